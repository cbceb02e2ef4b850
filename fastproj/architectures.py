"""Where transformers keep the residual stream: their blocks, and which linear layers read and write it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Role = Literal["read", "write"]


@dataclass(frozen=True)
class Architecture:
    """The parts of a model that touch the residual stream.

    ``blocks`` is the path of the list of blocks in a model with a head; a bare base model has it without the
    first part. ``readers`` and ``writers`` are linear layers of a block, the attention's writer first.
    Readers read the stream behind the block's norm; in Gemma 2 and 3 a norm also stands between what a
    writer gives and the stream. ``final`` are the paths of what a causal model puts between its last block
    and its unembedding, in order; encoders put layers of their heads there.
    """

    name: str
    blocks: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    final: tuple[str, ...] = ()

    @property
    def causal(self) -> bool:
        """Whether its models read from left to right; the others are encoders."""
        return bool(self.final)


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_BERT_READERS = ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense")
_BERT_WRITERS = ("attention.output.dense", "output.dense")

_LLAMA = Architecture(
    name="llama",
    blocks="model.layers",
    readers=(*_ATTENTION, "mlp.gate_proj", "mlp.up_proj"),
    writers=("self_attn.o_proj", "mlp.down_proj"),
    final=("model.norm",),
)
_GPT2 = Architecture(
    name="gpt2",
    blocks="transformer.h",
    readers=("attn.c_attn", "mlp.c_fc"),
    writers=("attn.c_proj", "mlp.c_proj"),
    final=("transformer.ln_f",),
)
_OPT = Architecture(
    name="opt",
    blocks="model.decoder.layers",
    readers=(*_ATTENTION, "fc1"),
    writers=("self_attn.out_proj", "fc2"),
    final=("model.decoder.final_layer_norm", "model.decoder.project_out"),
)
_BERT = Architecture("bert", "bert.encoder.layer", _BERT_READERS, _BERT_WRITERS)
_ROBERTA = Architecture("roberta", "roberta.encoder.layer", _BERT_READERS, _BERT_WRITERS)

# By config.model_type.
ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": _OPT,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _ROBERTA,
}


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture of a transformers model, an adapter around it looked through.

    Raises ValueError, with the known ones, for a ``config.model_type`` that is not in the table.
    """
    base = _base_model(model)
    kind = getattr(getattr(base, "config", None), "model_type", None)
    if kind not in ARCHITECTURES:
        came = repr(kind) if kind else f"a {type(base).__name__} without a model_type"
        raise ValueError(f"expected a model of type {', '.join(ARCHITECTURES)}, got {came}")
    return ARCHITECTURES[kind]


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The model's blocks in order, by their names in it without any adapter: ``{"model.layers.0": …}``.

    A bare base model's begin a level lower, as ``"layers.0"``. Raises ValueError as
    :func:`architecture_of`, and where the model has no blocks at the path of its architecture.
    """
    path = architecture_of(model).blocks
    base = _base_model(model)
    for name in (path, path.partition(".")[2]):
        try:
            found = base.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList) and len(found):
            return {f"{name}.{number}": block for number, block in enumerate(found)}
    raise ValueError(f"expected blocks at {path!r} in {type(base).__name__}, there are none")


def final_layers(model: nn.Module) -> list[nn.Module]:
    """What a causal model's last block gives goes through in front of the unembedding, in order.

    A norm, which some OPT models lack, and in OPT models with narrower embeddings a linear layer behind it.
    Raises ValueError as :func:`blocks`, and where a path of the architecture leads nowhere.
    """
    architecture = architecture_of(model)
    bare = not next(iter(blocks(model))).startswith(f"{architecture.blocks}.")
    base = _base_model(model)
    found = []
    for path in architecture.final:
        parent, _, name = (path.partition(".")[2] if bare else path).rpartition(".")
        owner = base.get_submodule(parent)
        if not hasattr(owner, name):
            raise ValueError(f"expected {path!r} in {type(base).__name__}, there is none")
        layer = getattr(owner, name)
        if layer is not None:
            found.append(layer)
    return found


def stream_role(name: str) -> Role | None:
    """What a module does to the residual stream, by the end of its name, over all architectures.

    ``"model.layers.0.mlp.down_proj"`` writes, ``"model.layers.0.mlp.up_proj"`` reads; None for any other.
    """
    for architecture in ARCHITECTURES.values():
        if _ends_with_one_of(name, architecture.readers):
            return "read"
        if _ends_with_one_of(name, architecture.writers):
            return "write"
    return None


def _ends_with_one_of(name: str, layers: tuple[str, ...]) -> bool:
    return any(name == layer or name.endswith(f".{layer}") for layer in layers)


def _base_model(model: nn.Module) -> nn.Module:
    wrapper: Any = model
    return wrapper.get_base_model() if hasattr(model, "get_base_model") else model
