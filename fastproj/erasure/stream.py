"""Erasers on a model's residual stream while it runs or trains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastproj.architectures import blocks
from fastproj.erasure.eraser import Eraser
from fastproj.methods._stream import OnStream, changing_the_gradient, on_blocks


class StreamErasure(OnStream):
    """``h ← r(h)`` at the outputs of blocks; with ``backward``, ``δ ← δ − R Lᵀ δ`` there and h as it is.

    Around a fine-tune, with directions of a concept, it is concept ablation fine-tuning (CAFT): the model
    learns without the concept, and answers with the eraser taken off. With ``backward`` alone nothing is
    learnt from what the loss asks along the directions, while the model runs as it would (backward-CAFT).
    Around inference, with :class:`LEACE` fitted on the stream, it is concept scrubbing, block by block.

    Args:
        model: any model that :func:`fastproj.architectures.blocks` knows.
        erasers: one for the output of every block, or by the position of the block, from 0.
        backward: change the gradient alone.

    A context manager; ``detach()`` takes it off. Raises TypeError for what is no eraser, ValueError for no
    eraser, other architectures, widths and positions.

    Differs from the authors' published code, whose projection is in bf16, by the rounding of that, and which
    passes over positions that are not there.

    Source: Casademunt et al. 2025 (arXiv:2507.16795); the backward form is ours, after GRASP's "stream".
    """

    def __init__(
        self, model: nn.Module, erasers: Eraser | Mapping[int, Eraser], *, backward: bool = False
    ) -> None:
        found = blocks(model)
        chosen = erasers if isinstance(erasers, Mapping) else dict.fromkeys(range(len(found)), erasers)
        if not chosen:
            raise ValueError("expected an eraser for one block or more, got none")
        for position, eraser in chosen.items():
            _check(eraser, position, len(found), model)
        hooks = []
        for position, eraser in chosen.items():
            hooks += on_blocks(model, _Erasure(eraser, backward), [position])
        super().__init__(hooks)


class _Erasure:
    """An eraser that follows the stream to its device and precision."""

    def __init__(self, eraser: Eraser, backward: bool) -> None:
        self._eraser, self._backward = eraser, backward

    def __call__(self, stream: Tensor) -> Tensor:
        dtype = torch.promote_types(stream.dtype, torch.float32)
        if (self._eraser.left.device, self._eraser.left.dtype) != (stream.device, dtype):
            self._eraser = self._eraser.to(stream.device, dtype)
        if self._backward:
            return changing_the_gradient(stream, self._eraser.gradient)
        return self._eraser(stream)


def _check(eraser: Eraser, position: int, count: int, model: nn.Module) -> None:
    if not isinstance(eraser, Eraser):
        raise TypeError(f"expected an eraser, or erasers by position, got {type(eraser).__name__}")
    if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < count:
        raise ValueError(f"expected blocks from 0 to {count - 1}, got {position!r}")
    width = getattr(getattr(model, "config", None), "hidden_size", eraser.dimension)
    if width != eraser.dimension:
        raise ValueError(
            f"expected an eraser of the residual stream's width, {width}, got length {eraser.dimension}"
        )
