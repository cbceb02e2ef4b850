"""The upper blocks of a causal model as a model of its own, what lies below them computed once a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LowerBlocks(nn.Module):
    """The embedding and the first blocks, ``ids (B, T) → stream (B, T, d)``, in place of an embedding.

    They hold no adapter, so that every arm of the study gives them the same to do: each row of ids, its
    padding apart, is run through them once and remembered. Padding is at the right; what stands there is 0.
    """

    def __init__(self, inner: Any, first: int, pad: int) -> None:
        super().__init__()
        # In a tuple, these are no submodules: an adapter on the model passes them by.
        self._parts = (inner.embed_tokens, inner.rotary_emb, list(inner.layers[:first]))
        self._pad = pad
        self._known: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """(B, T, d), without a gradient."""
        rows = [self._stripped(row) for row in ids.tolist()]
        missing = sorted({row for row in rows if row not in self._known}, key=len)
        for start in range(0, len(missing), 16):
            self._remember(missing[start : start + 16])
        out = self._known[rows[0]].new_zeros(*ids.shape, self._known[rows[0]].shape[-1])
        for place, row in enumerate(rows):
            out[place, : len(row)] = self._known[row]
        return out

    def _stripped(self, row: list[int]) -> tuple[int, ...]:
        end = len(row)
        while end > 1 and row[end - 1] == self._pad:
            end -= 1
        return tuple(row[:end])

    def _remember(self, rows: list[tuple[int, ...]]) -> None:
        embed, rotary, lower = self._parts
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[self._pad] * (width - len(row))] for row in rows])
        stream = embed(ids)
        positions = torch.arange(width)[None]
        rotation = rotary(stream, positions)
        for block in lower:
            stream = block(stream, attention_mask=None, position_ids=positions, position_embeddings=rotation)
        for row, states in zip(rows, stream, strict=True):
            self._known[row] = states[: len(row)].clone()


def keep_upper(model: Any, first: int, pad: int) -> Any:
    """``model``, in place, with its first blocks folded into the embedding; its answers stay the same.

    Blocks are then counted from ``first``. For models that transformers lays out like Llama,
    ``model.layers``, with an attention that is causal without a mask (``sdpa``).

    Raises ValueError for another attention, or where no block is left on either side.
    """
    inner = model.model
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"expected attention sdpa, got {model.config._attn_implementation!r}")
    if not 0 < first < len(inner.layers):
        raise ValueError(f"expected a block from 1 to {len(inner.layers) - 1} to begin at, got {first}")
    lower = LowerBlocks(inner, first, pad)
    inner.layers = nn.ModuleList(inner.layers[first:])
    inner.embed_tokens = lower
    model.config.num_hidden_layers = len(inner.layers)
    model.config.use_cache = False  # a cache would be filled by the blocks' old numbers
    return model
