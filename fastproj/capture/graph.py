"""Reading the autograd graph: is a captured parameter also used where the capture cannot see it?"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastproj.capture.functions import CapturedEmbedding, CapturedLinear, CapturedScale
from fastproj.capture.select import Obstacle

CAPTURED_NODES = {f"{f.__name__}Backward" for f in (CapturedLinear, CapturedEmbedding, CapturedScale)}
# Casts of a weight (autocast) and the checkpoint's own node stand between a parameter and its layer.
TRANSPARENT_NODES = {"ToCopyBackward0"}


def foreign_uses(loss: Tensor, parameters: dict[str, nn.Parameter]) -> list[Obstacle]:
    """Parameters that a node other than a captured layer reads, such as ``F.linear(x, module.weight)``.

    Walks the graph of ``loss`` once; what reentrant checkpointing hides is not seen.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, Obstacle] = {}
    seen: set[Any] = set()
    stack: list[tuple[Any, str]] = [(loss.grad_fn, "")] if loss.grad_fn is not None else []
    while stack:
        node, reader = stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            name = names.get(id(variable))
            if name is not None and reader not in CAPTURED_NODES:
                found[name] = Obstacle(name, f"is read by {reader or 'the loss'} outside its layer")
            continue
        passes_through = node.name() in TRANSPARENT_NODES and reader in CAPTURED_NODES
        label = reader if passes_through else node.name()
        if (node, label) in seen:
            continue
        seen.add((node, label))
        stack += [(child, label) for child, _ in node.next_functions if child is not None]
    return list(found.values())
