"""Real models by their published configurations: the linear layers of a block and their LoRA shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastproj.bench.workloads import Shape, lora_shapes


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block, reading ``d_in`` features and writing ``d_out``."""

    name: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Model:
    """A decoder: the numbers of its configuration that its linear layers follow from."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one block: attention with grouped heads, then the gated MLP."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            Linear("q_proj", self.hidden, queries),
            Linear("k_proj", self.hidden, keys),
            Linear("v_proj", self.hidden, keys),
            Linear("o_proj", queries, self.hidden),
            Linear("gate_proj", self.hidden, self.intermediate),
            Linear("up_proj", self.hidden, self.intermediate),
            Linear("down_proj", self.intermediate, self.hidden),
        )


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("Qwen2.5-1.5B", 1536, 8960, layers=28, heads=12, kv_heads=2, head_dim=128),
        Model("Llama-3.1-8B", 4096, 14336, layers=32, heads=32, kv_heads=8, head_dim=128),
        Model("Llama-3.1-70B", 8192, 28672, layers=80, heads=64, kv_heads=8, head_dim=128),
    )
}
ALL_LINEARS = tuple(linear.name for linear in MODELS["Llama-3.1-8B"].linears)


def target_linears(model: Model, targets: Sequence[str]) -> tuple[Linear, ...]:
    """The linear layers of a block that ``targets`` names, in the block's order.

    Raises ValueError for a name that the block has not.
    """
    known = {linear.name for linear in model.linears}
    unknown = sorted(set(targets) - known)
    if unknown:
        raise ValueError(
            f"expected linear layers of {model.name} ({', '.join(sorted(known))}), got {unknown}"
        )
    return tuple(linear for linear in model.linears if linear.name in targets)


def lora_shards(model: Model, rank: int, targets: Sequence[str] = ALL_LINEARS) -> list[Shape]:
    """The shapes of A (r × d_in) and B (d_out × r) of each target of each block.

    Raises ValueError for a rank below 1 or a name that the block has not.
    """
    if rank < 1:
        raise ValueError(f"expected a rank of at least 1, got {rank}")
    linears = [(linear.d_in, linear.d_out) for linear in target_linears(model, targets)]
    return lora_shapes(model.layers, rank, linears)
