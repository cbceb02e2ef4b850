"""The residual stream at the outputs of a model's blocks: what is done to it there, forward or backward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.architectures import blocks
from fastproj.bindings.project_out import project_out_stream
from fastproj.latent.factors import LatentFactors
from fastproj.reference.basis import Basis

Change = Callable[[Tensor], Tensor]


def stream_basis(factors: LatentFactors, model: nn.Module) -> Basis:
    """The directions in the model's residual stream.

    Raises ValueError for factors of modules, or of what these read, and for a stream of another width.
    """
    if factors.pool != "stream" or factors.side != "write":
        raise ValueError(
            "expected factors of the residual stream, identify(..., pool='stream', side='write'), got "
            f"pool={factors.pool!r}, side={factors.side!r}"
        )
    basis = factors.bases["stream"]
    width = getattr(getattr(model, "config", None), "hidden_size", basis.dimension)
    if width != basis.dimension:
        raise ValueError(
            f"expected directions of the residual stream's width, {width}, got length {basis.dimension}"
        )
    return basis


def on_blocks(
    model: nn.Module, change: Change, chosen: Collection[int] | None = None
) -> list[torch.utils.hooks.RemovableHandle]:
    """Put ``change`` on the output of every block, or of those at the positions in ``chosen``.

    Raises ValueError for a position that is not there.
    """
    found = list(blocks(model).values())
    wrong = [] if chosen is None else sorted(set(chosen) - set(range(len(found))))
    if wrong:
        raise ValueError(f"expected blocks from 0 to {len(found) - 1}, got {wrong}")

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return [
        block.register_forward_hook(hook)
        for position, block in enumerate(found)
        if chosen is None or position in chosen
    ]


class OnStream:
    """A change of the residual stream that lasts until it is detached."""

    def __init__(self, hooks: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
        self._hooks = list(hooks)

    def detach(self) -> None:
        """Leave the model as it was found."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> OnStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


class Projection:
    """``h ← h − (h V) Vᵀ``, forward and so backward; also the backward of :class:`BackwardProjection`."""

    def __init__(self, basis: Basis) -> None:
        self._basis = basis

    def __call__(self, stream: Tensor) -> Tensor:
        return project_out_stream(stream, self.basis_for(stream))

    def basis_for(self, stream: Tensor) -> Basis:
        """The basis where the stream is, and as precise."""
        dtype = torch.float64 if stream.dtype == torch.float64 else torch.float32
        if self._basis.matrix.device != stream.device or self._basis.matrix.dtype != dtype:
            self._basis = self._basis.to(stream.device, dtype)
        return self._basis


class BackwardProjection(Projection):
    """``h ← h`` forward, ``δ ← δ − (δ V) Vᵀ`` backward."""

    def __call__(self, stream: Tensor) -> Tensor:
        return changing_the_gradient(stream, partial(project_out_stream, basis=self.basis_for(stream)))


def changing_the_gradient(stream: Tensor, change: Change) -> Tensor:
    """``h ← h`` forward, ``δ ← change(δ)`` backward."""
    if not stream.requires_grad:
        return stream
    out: Tensor = _ChangeGradient.apply(stream, change)
    return out


class _ChangeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, change: Change) -> Tensor:
        ctx.change = change
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grads[0]), None
