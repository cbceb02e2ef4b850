"""Attaching to a model: captured layers, forward passes, and finding what one pass cannot see through."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.capture.functions import (
    CapturedEmbedding,
    CapturedLinear,
    CapturedScale,
    Consume,
    ForwardPass,
    Layer,
)
from fastproj.capture.graph import foreign_uses
from fastproj.capture.select import Obstacle, batch_norms, find_obstacles


class Capture:
    """Replaces the forward of every layer that owns a selected parameter, until :meth:`detach`.

    The model computes what it computed before. Each forward pass ends with :meth:`close`, which gives the
    sample weights; the backward pass then hands both gradient sums of every layer call to ``consume``.
    Layers with nothing selected are left alone, and all of them where ``attach`` is False.
    """

    def __init__(self, model: nn.Module, selected: dict[str, nn.Parameter], *, attach: bool = True) -> None:
        self.parameters = selected
        self.static_obstacles = find_obstacles(model, selected)
        self._batch_norms = batch_norms(model)
        self._layers: list[Layer] = []
        self._current = ForwardPass()
        self._calls: dict[str, int] = {}
        self._in_backward: list[tuple[int, ForwardPass]] = []
        self._graph_checked = False
        if attach and not self.static_obstacles:
            self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        chosen = {id(parameter) for parameter in self.parameters.values()}
        for name, module in model.named_modules():
            own = tuple(p for p in module.parameters(recurse=False) if id(p) in chosen)
            if not own:
                continue
            if "forward" in vars(module):
                raise ValueError(
                    f"{name!r} already has a replaced forward, of another engine or of hooks that move its "
                    "weights; detach those first"
                )
            layer = Layer(name, module, own)
            self._layers.append(layer)
            # Compiled graphs break here: the weights of a backward pass are not known when it is traced.
            module.forward = torch.compiler.disable(partial(_FORWARDS[type(module)], self, layer))

    def detach(self) -> None:
        """Give every layer its own forward back."""
        for layer in self._layers:
            del layer.module.forward
        self._layers.clear()

    def enter(self, layer: Layer, batch: int) -> ForwardPass:
        """The pass that a layer call belongs to: the running forward, or the backward that recomputes it."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            self._calls[layer.name] = batch if self._calls.get(layer.name, batch) == batch else -1
            return self._current
        # A checkpoint inside a checkpoint is recomputed in a nested backward that no loss began.
        known = {began for began, _ in self._in_backward}
        task = task if task in known else max(known, default=-1)
        passes = [forward_pass for began, forward_pass in self._in_backward if began == task]
        if len(passes) != 1:
            raise RuntimeError(
                f"{layer.name!r} is recomputed while {len(passes)} losses are in backward: under gradient "
                "checkpointing each loss needs its own backward()"
            )
        return passes[0]

    def obstacles(self, loss: Tensor, batch: int) -> list[Obstacle]:
        """Why the running forward pass cannot be taken apart into its ``batch`` samples; empty if it can."""
        found = list(self.static_obstacles)
        for name, module in self._batch_norms.items():
            if module.training:
                found.append(Obstacle(name, f"{type(module).__name__} in training mode mixes samples"))
        for name, first in self._calls.items():
            if first != batch:
                came = (
                    "calls of different batch sizes"
                    if first < 0
                    else f"its input has first dimension {first}"
                )
                reason = f"{came}, not the batch's {batch}"
                found.append(Obstacle(name, reason))
        if not found and not self._graph_checked:
            found += foreign_uses(loss, self.parameters)
            self._graph_checked = not found
        return found

    def close(self, loss: Tensor, weights: Tensor | None, consume: Consume | None) -> None:
        """End the running forward pass: its backward uses ``weights`` (B,), or is ordinary where None."""
        finished, self._current, self._calls = self._current, ForwardPass(), {}
        finished.closed, finished.consume = True, consume
        if weights is not None:
            finished.weights = torch.stack([torch.ones_like(weights), weights])
        if loss.requires_grad:
            loss.register_hook(partial(self._begin_backward, finished))

    def _begin_backward(self, finished: ForwardPass, _: Tensor) -> None:
        begun = (torch._C._current_graph_task_id(), finished)
        self._in_backward.append(begun)
        at_end_of_backward(partial(self._in_backward.remove, begun))


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run ``callback`` once the backward pass that is running has accumulated every gradient."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _cast_for_autocast(device_type: str, *tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast would do to a linear's operands, done where autograd sees it."""
    if not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors]


def _linear(capture: Capture, layer: Layer, input: Tensor) -> Tensor:
    module: Any = layer.module
    if not torch.is_grad_enabled():
        return F.linear(input, module.weight, module.bias)
    forward_pass = capture.enter(layer, input.shape[0])
    operands = _cast_for_autocast(input.device.type, input, module.weight, module.bias)
    return CapturedLinear.apply(*operands, layer, forward_pass)


def _embedding(capture: Capture, layer: Layer, input: Tensor) -> Tensor:
    module: Any = layer.module
    if not torch.is_grad_enabled():
        return F.embedding(input, module.weight)
    forward_pass = capture.enter(layer, input.shape[0])
    return CapturedEmbedding.apply(input, module.weight, layer, forward_pass)


def _layer_norm(capture: Capture, layer: Layer, input: Tensor) -> Tensor:
    module: Any = layer.module
    if not torch.is_grad_enabled():
        return F.layer_norm(input, module.normalized_shape, module.weight, module.bias, module.eps)
    forward_pass = capture.enter(layer, input.shape[0])
    normalised = F.layer_norm(input, module.normalized_shape, None, None, module.eps)
    return CapturedScale.apply(normalised, module.weight, module.bias, layer, forward_pass)


_FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
}
