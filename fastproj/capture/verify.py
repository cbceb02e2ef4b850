"""Is what the capture sees all there is? Read off the autograd graph, and measured on one sample."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.capture.functions import (
    CapturedConv1D,
    CapturedEmbedding,
    CapturedLayerNorm,
    CapturedLinear,
    ForwardPass,
)
from fastproj.capture.select import Obstacle

_FUNCTIONS = (CapturedLinear, CapturedConv1D, CapturedEmbedding, CapturedLayerNorm)
CAPTURED_NODES = {f"{function.__name__}Backward" for function in _FUNCTIONS}
# Casts of a weight, as autocast makes them, stand between a parameter and its layer.
TRANSPARENT_NODES = {"ToCopyBackward0"}
REENTRANT_CHECKPOINT = "CheckpointFunctionBackward"


def foreign_uses(loss: Tensor, parameters: dict[str, nn.Parameter]) -> list[Obstacle]:
    """Parameters that a node other than a captured layer reads, such as ``F.linear(x, module.weight)``.

    Walks the graph of ``loss`` once; what reentrant checkpointing hides is not seen.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, Obstacle] = {}
    for node, reader in _edges(loss):
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None and reader not in CAPTURED_NODES:
            found[name] = Obstacle(name, f"is read by {reader or 'the loss'} outside its layer")
    return list(found.values())


def is_hidden(loss: Tensor) -> bool:
    """Whether reentrant checkpoints keep part of the graph, and with it ``torch.autograd.grad``, away."""
    return any(node.name() == REENTRANT_CHECKPOINT for node, _ in _edges(loss))


def disagreement(
    loss: Tensor,
    sample_loss: Tensor,
    sample: int,
    batch: int,
    forward_pass: ForwardPass,
    parameters: dict[str, nn.Parameter],
) -> list[Obstacle]:
    """The parameters for which the capture's gradient of one sample is not the gradient of its loss.

    Two backward passes over the graph of ``loss``, which is kept; ``sample_loss`` is the sample's share.
    Samples that meet anywhere, or a first dimension that is a batch by coincidence, show as an error of order
    one; rounding stays within a few square roots of the coarsest dtype's epsilon.
    """
    captured: dict[int, Tensor] = {}

    def keep(parameter: nn.Parameter, plain: Tensor, weighted: Tensor) -> Tensor:
        before = captured.get(id(parameter))
        captured[id(parameter)] = weighted.clone() if before is None else before + weighted
        return plain

    chosen = {name: p for name, p in parameters.items() if p.requires_grad}
    one = torch.zeros(batch, dtype=loss.dtype, device=loss.device)
    one[sample] = 1
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    forward_pass.use(one, keep)
    torch.autograd.grad(loss, list(chosen.values()), **options)
    forward_pass.use(None, None)
    expected = torch.autograd.grad(sample_loss, list(chosen.values()), **options)
    tolerance = 4 * math.sqrt(max(forward_pass.epsilon, torch.finfo(torch.float32).eps))
    found = []
    scale = torch.stack([g.double().norm() for g in expected if g is not None]).norm()
    for (name, parameter), exact in zip(chosen.items(), expected, strict=True):
        mine = captured.get(id(parameter))
        if exact is None or mine is None:
            continue
        error = (mine.double() - exact.double()).norm() / scale
        if error > tolerance:  # False for NaN: gradients that are not finite say nothing
            found.append(
                Obstacle(name, f"one sample's captured gradient is off by {error:.1g}: samples meet")
            )
    return found


def _edges(loss: Tensor) -> Iterator[tuple[Any, str]]:
    """Every node of the graph once for each kind of node that reads it, casts passed through."""
    seen: set[Any] = set()
    stack: list[tuple[Any, str]] = [(loss.grad_fn, "")] if loss.grad_fn is not None else []
    while stack:
        node, reader = stack.pop()
        if (node, reader) in seen:
            continue
        seen.add((node, reader))
        yield node, reader
        passes_through = node.name() in TRANSPARENT_NODES and reader in CAPTURED_NODES
        label = reader if passes_through else node.name()
        stack += [(child, label) for child, _ in node.next_functions if child is not None]
