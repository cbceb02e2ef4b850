"""Named workloads: what the operators are handed in one training step of a real model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastproj.bench.traffic.shapes import ALL_LINEARS, MODELS, Linear, Model, lora_shards, target_linears
from fastproj.bench.workloads import Shape


@dataclass(frozen=True)
class Contraction:
    """One linear map of every block: x (B, T, d_in) and delta (B, T, d_out), ``calls`` times in a step."""

    name: str
    samples: int
    tokens: int
    d_in: int
    d_out: int
    calls: int = 1


@dataclass(frozen=True)
class Workload:
    """A LoRA fine-tune: ``sets`` gradient sets of its shards, and the contractions of one batch.

    ``dtype`` names the dtype of the gradient sets, ``activation_dtype`` that of x and delta.
    """

    name: str
    model: Model
    rank: int
    targets: tuple[str, ...]
    samples: int = 8
    tokens: int = 2048
    sets: int = 2
    dtype: str = "fp32"
    activation_dtype: str = "bf16"

    @property
    def shards(self) -> list[Shape]:
        """The shapes of one gradient set."""
        return lora_shards(self.model, self.rank, self.targets)

    @property
    def elements(self) -> int:
        """N: the elements of one gradient set."""
        return sum(rows * columns for rows, columns in self.shards)

    @property
    def contractions(self) -> tuple[Contraction, ...]:
        """Two for each target: LoRA A reads the layer's input, LoRA B writes the layer's output."""
        linears = target_linears(self.model, self.targets)
        return tuple(side for linear in linears for side in self._sides(linear))

    def _sides(self, linear: Linear) -> tuple[Contraction, Contraction]:
        batch = (self.samples, self.tokens)
        return (
            Contraction(f"{linear.name} A", *batch, linear.d_in, self.rank, self.model.layers),
            Contraction(f"{linear.name} B", *batch, self.rank, linear.d_out, self.model.layers),
        )


def _lora(model: str, rank: int, targets: Sequence[str], words: str) -> Workload:
    return Workload(f"{model}, LoRA r={rank} on {words}", MODELS[model], rank, tuple(targets))


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        _lora("Qwen2.5-1.5B", 16, ("q_proj", "v_proj"), "q, v"),
        _lora("Llama-3.1-8B", 16, ALL_LINEARS, "all linear layers"),
        _lora("Llama-3.1-70B", 64, ALL_LINEARS, "all linear layers"),
    )
}
