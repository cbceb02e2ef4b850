"""The share of a model that one block's adapter trains: ``python -m fastproj.balance.shares`` counts it.

On configurations of real models, with their own classes, on the meta device: no weight is made or read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastproj.balance.adapter import add_balance_adapter, remove_balance_adapter

RANK = 16
_LLAMA_LIKE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size",
)  # fmt: skip
_GPT2 = ("n_embd", "n_layer", "n_head", "vocab_size", "n_positions")
_OPT = (
    "hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings", "word_embed_proj_dim",
)  # fmt: skip
_TIED = {"tie_word_embeddings": True}


def _sized(kind: str, names: tuple[str, ...], *sizes: int, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **dict(zip(names, sizes, strict=True)), **more}


# What the models' own config.json says of their sizes.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "Llama 2 7B": _sized("llama", _LLAMA_LIKE, 4096, 11008, 32, 32, 32, 32000),
    "Llama 3.1 8B": _sized("llama", _LLAMA_LIKE, 4096, 14336, 32, 32, 8, 128256),
    "Llama 3.2 1B": _sized("llama", _LLAMA_LIKE, 2048, 8192, 16, 32, 8, 128256, **_TIED),
    "SmolLM2 135M": _sized("llama", _LLAMA_LIKE, 576, 1536, 30, 9, 3, 49152, **_TIED),
    "Mistral 7B": _sized("mistral", _LLAMA_LIKE, 4096, 14336, 32, 32, 8, 32000),
    "Gemma 2 2B": _sized("gemma2", _LLAMA_LIKE, 2304, 9216, 26, 8, 4, 256000, head_dim=256),
    "Gemma 2 9B": _sized("gemma2", _LLAMA_LIKE, 3584, 14336, 42, 16, 8, 256000, head_dim=256),
    "Gemma 3 1B": _sized("gemma3_text", _LLAMA_LIKE, 1152, 6912, 26, 4, 1, 262144, head_dim=256),
    "Qwen2.5 1.5B": _sized("qwen2", _LLAMA_LIKE, 1536, 8960, 28, 12, 2, 151936, **_TIED),
    "Qwen2.5 7B": _sized("qwen2", _LLAMA_LIKE, 3584, 18944, 28, 28, 4, 152064),
    "Qwen3 0.6B": _sized("qwen3", _LLAMA_LIKE, 1024, 3072, 28, 16, 8, 151936, head_dim=128, **_TIED),
    "Qwen3 8B": _sized("qwen3", _LLAMA_LIKE, 4096, 12288, 36, 32, 8, 151936, head_dim=128),
    "GPT-2": _sized("gpt2", _GPT2, 768, 12, 12, 50257, 1024),
    "GPT-2 medium": _sized("gpt2", _GPT2, 1024, 24, 16, 50257, 1024),
    "GPT-2 large": _sized("gpt2", _GPT2, 1280, 36, 20, 50257, 1024),
    "GPT-2 XL": _sized("gpt2", _GPT2, 1600, 48, 25, 50257, 1024),
    "OPT 125M": _sized("opt", _OPT, 768, 3072, 12, 12, 50272, 2048, 768),
    "OPT 1.3B": _sized("opt", _OPT, 2048, 8192, 24, 32, 50272, 2048, 2048),
    "OPT 6.7B": _sized("opt", _OPT, 4096, 16384, 32, 32, 50272, 2048, 4096),
}


@dataclass(frozen=True)
class Share:
    """Parameters of a model, tied ones once, and those that an adapter of one block trains.

    Attributes:
        model: its name.
        parameters: without an adapter.
        in_full: trained where the writers train themselves.
        low_rank: trained in their place by LoRA of rank 16. Both count the vector.
    """

    model: str
    parameters: int
    in_full: int
    low_rank: int


def shares() -> Iterator[Share]:
    """One by one, for every configuration. Blocks of a model are alike: the first is counted."""
    for name in CONFIGURATIONS:
        yield share(name)


def share(name: str) -> Share:
    """That of one configuration, by its name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(CONFIGURATIONS[name])
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = []
    for rank in (None, RANK):
        adapted = add_balance_adapter(model, 0, rank=rank)
        trained.append(sum(p.numel() for p in adapted.parameters() if p.requires_grad))
        model = remove_balance_adapter(adapted)
    return Share(name, parameters, *trained)


def main() -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Trained by the adapter of one block, as a share of the model")
    table.add_column("model")
    for heading in ("parameters", "in full", "%", f"rank {RANK}", "%"):
        table.add_column(heading, justify="right")
    for counted in shares():
        cells = [f"{counted.parameters:,}"]
        for trained in (counted.in_full, counted.low_rank):
            cells += [f"{trained:,}", f"{100 * trained / counted.parameters:.3f}"]
        table.add_row(counted.model, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
