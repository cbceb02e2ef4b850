"""Attaching to a model: captured layers, and the forward pass that each of their calls belongs to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.capture.functions import (
    CapturedConv1D,
    CapturedEmbedding,
    CapturedLayerNorm,
    CapturedLinear,
    Consume,
    ForwardPass,
    Layer,
    Sink,
    conv1d,
)
from fastproj.capture.select import (
    CONV1D,
    Obstacle,
    batch_norms,
    captured_kind,
    find_obstacles,
    flattening_modules,
)
from fastproj.capture.verify import disagreement, foreign_uses, is_hidden


class Capture:
    """Replaces the forward of every layer that owns a selected parameter, until :meth:`detach`.

    The model computes what it computed before. Each forward pass ends with :meth:`close`, which gives the
    sample weights; the backward pass then hands both gradient sums of every layer call to ``consume``.
    Layers with nothing selected are left alone, and all of them where ``attach`` is False.
    """

    def __init__(self, model: nn.Module, selected: dict[str, nn.Parameter], *, attach: bool = True) -> None:
        self.parameters = selected
        self.static_obstacles = find_obstacles(model, selected)
        self.attached = attach and not self.static_obstacles
        self._batch_norms = batch_norms(model)
        self._current = ForwardPass()
        self._in_backward: list[tuple[int, ForwardPass]] = []
        self._layers = self._find_layers(model) if self.attached else []
        for layer in self._layers:
            layer.module.forward = CapturedForward(self, layer)
        self._handle = model.register_forward_pre_hook(self._begin_forward) if self.attached else None

    def _find_layers(self, model: nn.Module) -> list[Layer]:
        chosen = {id(parameter) for parameter in self.parameters.values()}
        flattening = tuple(f"{name}." for name in flattening_modules(model))
        layers = []
        for name, module in model.named_modules():
            if not any(id(p) in chosen for p in module.parameters(recurse=False)):
                continue
            if "forward" in vars(module):
                raise ValueError(
                    f"{name!r} already has a replaced forward, of another engine or of hooks that move its "
                    "weights; detach those first"
                )
            layers.append(Layer(name, module, may_be_flat=name.startswith(flattening)))
        return layers

    def detach(self) -> None:
        """Give every layer its own forward back."""
        for layer in self._layers:
            del layer.module.forward
        self._layers = []
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def enter(self, layer: Layer, input: Tensor) -> ForwardPass:
        """The pass that a layer call belongs to: the running forward, or the backward that recomputes it."""
        task = current_backward()
        if task is None:
            batch, calls = input.shape[0], self._current.calls
            if layer.is_flat(input):
                self._current.flat.add(layer.name)
            calls[layer.name] = batch if calls.get(layer.name, batch) == batch else -1
            self._current.reads.update(layer.module.parameters(recurse=False))
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

    def seen_without_grad(self) -> None:
        """A captured layer ran under no_grad, as reentrant checkpointing runs it."""
        self._current.reached = True

    def obstacles(self, batch: int) -> list[Obstacle]:
        """Why the running forward pass cannot be taken apart into its samples, as far as shapes tell."""
        found = list(self.static_obstacles)
        for name, module in self._batch_norms.items():
            if module.training:
                found.append(Obstacle(name, f"{type(module).__name__} in training mode mixes samples"))
        for name, first in self._current.calls.items():
            rows_of_samples = name in self._current.flat and first >= 0 and first % max(batch, 1) == 0
            if first != batch and not rows_of_samples:
                came = (
                    "calls of different batch sizes"
                    if first < 0
                    else f"its input has first dimension {first}"
                )
                found.append(Obstacle(name, f"{came}, not the batch's {batch}"))
        return found

    def verify(self, loss: Tensor, sample_loss: Tensor, sample: int, batch: int) -> list[Obstacle]:
        """What is wrong with taking the running forward pass apart, by graph and by measurement.

        Costs two backward passes over a graph that is kept, so it is done once for each set of called layers.
        Under reentrant checkpointing neither can look inside, and nothing is found.
        """
        found = foreign_uses(loss, self.parameters)
        if found or is_hidden(loss):
            return found
        running = self._current
        handles = [
            tensor.register_hook(partial(self._begin_backward, running)) for tensor in (loss, sample_loss)
        ]
        try:
            return disagreement(loss, sample_loss, sample, batch, running, self.parameters)
        finally:
            running.closed = False
            for handle in handles:
                handle.remove()

    @property
    def signature(self) -> frozenset[str]:
        """The layers that the running forward pass called: what is known of one pass holds for its like."""
        return frozenset(self._current.calls)

    def close(self, loss: Tensor, weights: Tensor | None, consume: Consume | None) -> ForwardPass:
        """End the running forward pass: its backward uses ``weights`` (B,), or is ordinary where None.

        Raises RuntimeError where no captured layer has run since the last loss.
        """
        finished = self._finish(loss)
        finished.use(weights, consume)
        return finished

    def observe(self, loss: Tensor, samples: int, sink_for: Callable[[ForwardPass], Sink]) -> Sink:
        """End the running forward pass: its backward hands single samples' gradients to a sink.

        ``loss`` is the sum of the ``samples`` losses; nothing is accumulated in captured parameters. Returns
        the sink, to be told when backward is over. Raises RuntimeError where no captured layer has run since
        the last loss.
        """
        finished = self._finish(loss)
        sink = sink_for(finished)
        finished.observe(sink, samples)
        return sink

    def _finish(self, loss: Tensor) -> ForwardPass:
        finished = self._current
        if self.attached and not finished.reached and not finished.calls:
            raise RuntimeError(
                "no forward pass since the last loss(): each forward pass takes one loss, before the next "
                "forward pass"
            )
        self._start_anew()
        if loss.requires_grad:
            loss.register_hook(partial(self._begin_backward, finished))
        return finished

    def _begin_forward(self, *_: Any) -> None:
        """A pass that never got its loss is given up; a backward through it would say so."""
        if torch.is_grad_enabled() and current_backward() is None:
            self._start_anew()

    def _start_anew(self) -> None:
        self._current = ForwardPass()
        if current_backward() is None:
            self._in_backward.clear()  # left behind where a backward pass raised

    def _begin_backward(self, finished: ForwardPass, _: Tensor) -> None:
        begun = (torch._C._current_graph_task_id(), finished)
        self._in_backward.append(begun)
        at_end_of_backward(partial(self._end_backward, begun))

    def _end_backward(self, begun: tuple[int, ForwardPass]) -> None:
        if begun in self._in_backward:
            self._in_backward.remove(begun)


def current_backward() -> int | None:
    """What tells the running backward pass from others; None outside of one."""
    task: int = torch._C._current_graph_task_id()
    return None if task == -1 else task


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run ``callback`` once the backward pass that is running has accumulated every gradient."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


class CapturedForward:
    """What stands in for a layer's forward. A deep copy of the model gets the layer's own forward back."""

    def __init__(self, capture: Capture, layer: Layer) -> None:
        self._layer = layer
        # Compiled graphs break here: the weights of a backward pass are not known when it is traced.
        self._run = torch.compiler.disable(partial(_FORWARDS[captured_kind(layer.module)], capture, layer))

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        copied = memo[id(self._layer.module)]
        return MethodType(type(copied).forward, copied)

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self._layer.name!r} is captured by an engine: detach() it before pickling the model"
        )


def _cast_for_autocast(device_type: str, *tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast would do to a linear's operands, done where autograd sees it."""
    if not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors]


def _linear(capture: Capture, layer: Layer, input: Tensor) -> Tensor:
    module: Any = layer.module
    if not torch.is_grad_enabled():
        capture.seen_without_grad()
        return F.linear(input, module.weight, module.bias)
    return CapturedLinear.apply(*_enter_product(capture, layer, input))


def _conv1d(capture: Capture, layer: Layer, x: Tensor) -> Tensor:
    module: Any = layer.module
    if not torch.is_grad_enabled():
        capture.seen_without_grad()
        return conv1d(x, module.weight, module.bias)
    return CapturedConv1D.apply(*_enter_product(capture, layer, x))


def _enter_product(capture: Capture, layer: Layer, input: Tensor) -> tuple[Any, ...]:
    """What a function of a layer's input, weight and bias is applied to."""
    module: Any = layer.module
    forward_pass = capture.enter(layer, input)
    operands = _cast_for_autocast(input.device.type, input, module.weight, module.bias)
    epsilon = torch.finfo(operands[0].dtype).eps if operands[0] is not None else 0.0
    forward_pass.epsilon = max(forward_pass.epsilon, epsilon)
    return (*operands, layer, forward_pass)


def _embedding(capture: Capture, layer: Layer, input: Tensor) -> Tensor:
    module: Any = layer.module
    if not torch.is_grad_enabled():
        capture.seen_without_grad()
        return F.embedding(input, module.weight)
    forward_pass = capture.enter(layer, input)
    return CapturedEmbedding.apply(input, module.weight, layer, forward_pass)


def _layer_norm(capture: Capture, layer: Layer, input: Tensor) -> Tensor:
    module: Any = layer.module
    if not torch.is_grad_enabled():
        capture.seen_without_grad()
        return F.layer_norm(input, module.normalized_shape, module.weight, module.bias, module.eps)
    forward_pass = capture.enter(layer, input)
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        input = input.float()  # as autocast runs a layer norm there
    return CapturedLayerNorm.apply(input, module.weight, module.bias, layer, forward_pass)


_FORWARDS: dict[str | None, Callable[..., Tensor]] = {
    "Linear": _linear,
    "Embedding": _embedding,
    "LayerNorm": _layer_norm,
    CONV1D: _conv1d,
}
