"""The methods that the demo and the study compare, as data, and the step that each one takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.reference.recipes import published_step, shared_forward_step

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """One way to turn a batch into a gradient.

    Attributes:
        kind: ``"erm"`` plain fine-tuning; ``"edge"`` the engine; ``"published"`` the authors' recipe and
            ``"two_backward"`` the paper's formula by two backward passes, both in plain PyTorch.
        alpha, q, segments, variant, ratio, params: as in ``fastproj.EDGE``. All trainable parameters are
            projected by default: the token reaches the prediction through the head as well as through
            LoRA, and a method that leaves the head alone leaves it a way around.
    """

    kind: Literal["erm", "edge", "published", "two_backward"] = "edge"
    alpha: float = 1.0
    q: float = 0.7
    segments: str = "global"
    variant: str = "paper"
    ratio: str = "exact"
    params: str = "trainable"


METHODS = {
    "erm": Method(kind="erm"),
    "edge": Method(),
    "tensor": Method(segments="tensor"),
    "lora": Method(params="lora"),
    "lagged": Method(ratio="lagged"),
    "released": Method(variant="released"),
    "naive": Method(variant="naive"),
    "subtract": Method(variant="subtract", alpha=0.8),
    "published": Method(kind="published"),
    "two_backward": Method(kind="two_backward"),
}


@dataclass(frozen=True)
class Outcome:
    """What one step tells. The loss is a scalar; the others are None where the method does not know them.

    Attributes:
        weights: ``p_y^q`` (B,) of the samples.
        cosine: cos(e, g), (S,).
        bias_share: |bias| / |e|, (S,).
    """

    loss: Tensor
    weights: Tensor | None = None
    cosine: Tensor | None = None
    bias_share: Tensor | None = None


Step = Callable[[Batch, Tensor], Outcome]


def parse_method(text: str) -> Method:
    """Read ``"edge:alpha=2,q=0.5"``: a name of ``METHODS``, then what to change in it.

    Raises:
        ValueError: unknown name or setting, or a value that is no number where one is needed.
    """
    name, _, changes = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    known = {field.name: field.type for field in fields(Method) if field.name != "kind"}
    settings: dict[str, Any] = {}
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        if key not in known:
            raise ValueError(f"method {text!r}: expected a setting of {', '.join(known)}, got {key!r}")
        settings[key] = float(value) if known[key] == "float" else value
    return replace(METHODS[name], **settings)


def describe(text: str) -> str:
    """The method as a reader would name it: ``"edge:alpha=2,q=0.5"`` is "EDGE α = 2, q = 0.5"."""
    method = parse_method(text)
    if method.kind == "erm":
        return "ERM"
    name = {"edge": "EDGE", "published": "published recipe", "two_backward": "EDGE by two backward passes"}
    changed = [
        f"{field.name} = {getattr(method, field.name)}"
        for field in fields(Method)
        if field.name not in ("kind", "alpha") and getattr(method, field.name) != field.default
    ]
    return ", ".join([f"{name[method.kind]} α = {method.alpha:g}", *changed])


@contextmanager
def attach(model: nn.Module, method: Method) -> Iterator[Step]:
    """The step of ``method`` on ``model``: takes a batch and its labels, leaves the gradient in ``.grad``."""
    if method.kind == "edge":
        import fastproj

        engine = fastproj.EDGE(
            model,
            alpha=method.alpha,
            q=method.q,
            segments=method.segments,
            variant=method.variant,
            ratio=method.ratio,
            params=method.params,
        )
        with engine:
            yield lambda batch, labels: _edge_step(model, engine, batch, labels)
    elif method.kind == "erm":
        yield lambda batch, labels: _erm_step(model, method.q, batch, labels)
    else:
        recipe = published_step if method.kind == "published" else shared_forward_step
        settings: dict[str, Any] = {"alpha": method.alpha, "q": method.q, "params": method.params}
        yield lambda batch, labels: Outcome(recipe(model, batch, labels, **settings))


def _erm_step(model: nn.Module, q: float, batch: Batch, labels: Tensor) -> Outcome:
    losses = F.cross_entropy(model(**batch).logits, labels, reduction="none")
    loss = losses.mean()
    loss.backward()
    return Outcome(loss.detach(), weights=(-q * losses.detach()).exp())


def _edge_step(model: nn.Module, engine: Any, batch: Batch, labels: Tensor) -> Outcome:
    loss = engine.loss(model(**batch).logits, labels)
    loss.backward()
    stats = engine.project_()
    return Outcome(loss.detach(), engine.weights, stats.cosine, stats.bias_share)
