"""Tiny causal language models of every architecture, their weights far enough from zero to matter."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny_architectures import MODELS
from torch import Tensor, nn

from fastproj.balance.labels import LabelWords

# In fp64 the norms of these models, and what eager attention does, still round to fp32.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
_SLIDING = {"sliding_window": 4}
# By name: config.model_type, and what its configuration has beside the usual sizes. Windows of 4 tokens are
# shorter than the prompts of the tests.
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {**_SLIDING, "final_logit_softcapping": 3.0}),
    "gemma3_text": ("gemma3_text", _SLIDING),
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {}),
    "mistral": ("mistral", _SLIDING),
    "opt": ("opt", {}),
    "opt of narrow embeddings": ("opt", {"word_embed_proj_dim": 8}),
    "qwen2": ("qwen2", {**_SLIDING, "use_sliding_window": True, "max_window_layers": 0}),
    "qwen3": ("qwen3", {}),
}
# One and several tokens; "c" and "d" begin alike, "f" is a part of "c".
LABELS = LabelWords(
    ("a", "b", "c", "d", "e", "f"), tuple("abcdef"), ((3,), (4, 5), (6, 7, 8, 9), (6, 9), (10,), (6, 7, 8))
)


def causal(name: str, **more: Any) -> nn.Module:
    """In evaluation mode and fp64; Gemma 2 in fp32, where its softmax takes rows of padding alone."""
    kind, sizes = CAUSAL[name]
    prefix, head, usual = MODELS[kind]
    spread = {"initializer_range": 0.5, "init_std": 0.5}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{prefix}Config")(**{**usual, **spread, **ends, **sizes, **more})
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{prefix.removesuffix('Text')}{head}")(config)
    return (model if kind == "gemma2" else model.double()).eval()


def prompts(side: str = "right") -> tuple[Tensor, Tensor]:
    """Four prompts of 9, 2, 6 and 1 tokens, padded at that side: ids and mask."""
    lengths, width = (9, 2, 6, 1), 9
    ids = torch.randint(3, 30, (4, width), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(width - length, None)] = 1
    return ids, mask


def alone(ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Each prompt without its padding, (1, T)."""
    return [row[kept.bool()][None] for row, kept in zip(ids, mask, strict=True)]
