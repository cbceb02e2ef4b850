"""EDGE as a training loop uses it: attach, loss, backward, project, step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastproj.bindings.edge import EdgeStats, closed_form, edge_
from fastproj.capture import Capture, Obstacle, select_parameters
from fastproj.capture.attach import at_end_of_backward
from fastproj.capture.second_set import SecondSet
from fastproj.methods._edge_options import EdgeOptions
from fastproj.methods.gce import CrossEntropy, cross_entropy
from fastproj.methods.lagged import LaggedRatio
from fastproj.methods.second_forward import SecondForward, logits_of
from fastproj.reference.segments import Segments, segmentation

if TYPE_CHECKING:
    from fastproj.integrations.trainer import EdgeCallback


class EDGE:
    """``G_EDGE = (1 + α|g| / (2|e|)) e − (α/2) g`` in ``.grad`` after one ordinary backward pass.

    e is the gradient of cross entropy, ``g = Σ_i p_i^q g_i`` that of generalised cross entropy (GCE), whose
    sample weights ``p_i^q`` are known once the loss is::

        edge = EDGE(model, alpha=0.5, q=0.7)
        loss = edge.loss(model(**inputs).logits, labels)
        loss.backward()
        edge.project_()            # before unscaling or clipping
        optimizer.step()

    Args:
        model: a PEFT model, or any module with trainable Linear, Embedding and LayerNorm layers and
            transformers' Conv1D.
        alpha: strength of the projection.
        q: exponent of the GCE loss, in (0, 1].
        segments, variant: as in :func:`fastproj.edge`. ``"released"`` also scales the GCE loss by q, as
            the authors' code does.
        params: ``"lora"`` projects the adapters' gradients, ``"trainable"`` every trainable parameter's.
        passes: ``"one"`` takes both gradients from one backward pass and raises, naming the module, where
            samples cannot be told apart; ``"two"`` runs a second backward pass over the same forward;
            ``"auto"`` takes one where it can and otherwise warns once and takes two.
        weight: for token labels, ``"sequence"`` weighs a sequence by the geometric mean of its tokens'
            probabilities, ``"token"`` every token by its own, which needs two passes: under attention
            tokens meet before the layers do.
        dropout: ``"shared"`` takes both gradients from one forward pass and so under the same masks;
            ``"independent"`` runs a second forward with fresh masks, as published: with dropout the
            cosine of e and g drops, and with it what the projection sees.
        ratio: ``"exact"``, or ``"lagged"``: |g|/|e| from the step before, with no second gradient set in
            memory (paper's form only; global, tensor or listed segments). The first step is exact.
        shift: hold logits at t against labels at t+1. By default decided by the model: causal language
            models shift.
        on_nonfinite: as in :func:`fastproj.edge`.

    Gradient accumulation, checkpointing, dropout, autocast and loss scaling work as they do without it:
    call :meth:`project_` once, after the last ``backward()`` and before ``unscale_`` and clipping. Choose
    what is trainable before attaching, and let no other loss reach the projected parameters: its gradient
    would be projected with them. The first step, and the first with another set of layers, holds one
    sample's gradient against autograd's own, for two more backward passes.
    A context manager; :meth:`detach` leaves the model as it was found.

    Raises ValueError for options that are unknown or do not go together, and for a model with nothing to
    project.

    Source: Li et al., CCL 2025, eq. 5-12; GCE: Zhang & Sabuncu 2018. One pass, lagged ratio: ours.
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 1.0,
        q: float = 0.7,
        *,
        segments: Segments = "global",
        variant: str = "paper",
        params: str = "lora",
        passes: str = "one",
        weight: str = "sequence",
        dropout: str = "shared",
        ratio: str = "exact",
        shift: bool | None = None,
        on_nonfinite: str = "propagate",
    ) -> None:
        self.options = EdgeOptions(
            alpha, q, segments, variant, params, passes, weight, dropout, ratio, shift, on_nonfinite
        ).resolved(model)
        self.stats: EdgeStats | None = None
        self.weights: Tensor | None = None
        self._parameters = select_parameters(model, params)
        if self.options.variant != "released":
            segmentation(list(self._parameters.values()), segments)  # a wrong id should not wait for a step
        self._lagged = self._make_lagged() if ratio == "lagged" else None
        self._capture = Capture(model, self._parameters, attach=self.options.passes != "two")
        if self._capture.static_obstacles and not self._may_take_two:
            raise _cannot_see(self._capture.static_obstacles)
        self._verified: set[frozenset[str]] = set()
        self._second_set = SecondSet(self._parameters.values())
        self._second_forward = SecondForward(model) if dropout == "independent" else None
        self._handed_over: list[Tensor] = []
        self._detached = False

    def loss(self, logits: Tensor, labels: Tensor, *, num_items: Tensor | int | None = None) -> Tensor:
        """Mean cross entropy over labels that are not −100 (or their sum over ``num_items``).

        logits (B, C) with labels (B,), or (B, T, V) with (B, T). Its ``backward()`` also forms the second
        gradient set. Under no_grad it is plain cross entropy. ``weights`` then holds ``p_y^q``.
        """
        if self._detached:
            raise RuntimeError("this engine is detached from its model; make a new one")
        terms = self._terms(logits, labels)
        loss = terms.total(num_items)
        if not loss.requires_grad:
            return loss
        self.weights = self._scale * terms.sample_weights(self.options.q)
        if self._goes_in_one_pass(loss, terms, num_items):
            self._close_for_one_pass(loss)
        else:
            self._close_for_two_passes(loss, terms, labels, num_items)
        return loss

    def compute_loss(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """For ``Trainer(compute_loss_func=...)``: :meth:`loss`, and the projection when its backward ends.

        Projects at the step at which accelerate synchronises gradients, so after the last micro-batch and
        before clipping.
        """
        loss = self.loss(logits_of(outputs), labels, num_items=num_items_in_batch)
        if loss.requires_grad:
            loss.register_hook(self._project_at_end)
        return loss

    @torch.no_grad()
    def project_(self) -> EdgeStats:
        """Replace the gradients in ``.grad`` by ``G_EDGE``; returns what was seen, still on the device.

        Raises RuntimeError where no gradient has been computed since the last projection, where ``.grad``
        was changed in between (unscaled, clipped), where a parameter got its gradient past the capture, and
        under torch.distributed with more than one process, over which the second set is not reduced.
        """
        self._second_set.check_untouched()
        _check_single_process()
        if self._lagged is not None and self._lagged.ready:
            self.stats = self._lagged.finish()
        else:
            self.stats = self._project_exact()
            if self._lagged is not None:
                self._lagged.learn(self.stats)
        self._second_set.projected()
        return self.stats

    @property
    def granularity(self) -> Segments:
        """The segments for a :class:`fastproj.optim.ProjectedAdamW` that is given none of its own."""
        if self.options.variant == "released":
            return "row"
        if not isinstance(self.options.segments, str):
            raise ValueError(
                "listed segments are in the order of this engine's parameters; give the optimiser's order to "
                "ProjectedAdamW(segments=...)"
            )
        return self.options.segments

    @torch.no_grad()
    def further_sets(self, parameters: Sequence[nn.Parameter]) -> list[list[Tensor | None]]:
        """g of each parameter, None for those not projected: ProjectedAdamW takes it in place of project_().

        Hands the second set over once. Raises RuntimeError as :meth:`project_` does, where the ratio is
        lagged, so that ``.grad`` is projected already, and where a parameter with a g is missing.
        """
        self._second_set.check_untouched()
        _check_single_process()
        if self._lagged is not None:
            raise RuntimeError(
                "ratio='lagged' projects inside the backward pass; call project_() and step one of torch's "
                "optimisers"
            )
        _, gce = self._both_sets()
        weighted = dict(zip(self._parameters.values(), gce, strict=True))
        further = [weighted.get(parameter) for parameter in parameters]
        if sum(g is not None for g in further) < sum(g is not None for g in gce):
            raise RuntimeError("the optimiser does not have all parameters that this engine projects")
        self._handed_over = [g for g in further if g is not None]
        self._second_set.projected()
        return [further]

    @torch.no_grad()
    def coefficients(
        self, gram: Tensor, *, precision: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """(c_e, c_g) of each segment from the Gram of (e, g), (S, 2, 2); also leaves them in ``stats``.

        For the sets that were handed over last. ``precision`` and ``generator`` change nothing here.
        """
        o = self.options
        found = closed_form(gram, self._handed_over, o.alpha, o.variant, o.on_nonfinite)
        self._handed_over = []
        self.stats = EdgeStats(gram, found)
        return found

    def callback(self) -> EdgeCallback:
        """A ``TrainerCallback`` that adds cosine and bias share to the trainer's logs."""
        from fastproj.integrations.trainer import EdgeCallback

        return EdgeCallback(self)

    def detach(self) -> None:
        """Leave the model as it was found; the engine is of no further use."""
        self._capture.detach()
        if self._second_forward is not None:
            self._second_forward.detach()
        self._second_set.detach()
        self._detached = True

    def __enter__(self) -> EDGE:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def _scale(self) -> float:
        """The released code's amplified loss is ``q p_y^q CE``."""
        return self.options.q if self.options.variant == "released" else 1.0

    def _terms(self, logits: Tensor, labels: Tensor) -> CrossEntropy:
        return cross_entropy(logits, labels, shift=logits.dim() == 3 and labels.dim() == 2 and self._shift())

    def _shift(self) -> bool:
        if self.options.shift is None:
            raise ValueError(
                "cannot tell from the model's class whether its logits at t predict the label at t+1: pass "
                "shift=True (decoder-only language models) or shift=False"
            )
        return self.options.shift

    def _make_lagged(self) -> LaggedRatio:
        plan = segmentation(list(self._parameters.values()), self.options.segments)
        segment_of = dict(zip(self._parameters.values(), plan.first, strict=True))
        return LaggedRatio(segment_of, plan.count, self.options.alpha)

    @property
    def _may_take_two(self) -> bool:
        """A lagged ratio lives inside one pass, so it has nothing to fall back to."""
        return self.options.passes != "one" and self.options.ratio != "lagged"

    def _goes_in_one_pass(self, loss: Tensor, terms: CrossEntropy, num_items: Tensor | int | None) -> bool:
        if self.options.passes == "two":
            return False
        obstacles = self._capture.obstacles(terms.batch) or self._verify_once(loss, terms, num_items)
        if not obstacles:
            return True
        if not self._may_take_two:
            self._capture.close(loss, None, None)
            raise _cannot_see(obstacles)
        warnings.warn(f"EDGE takes two backward passes: {_describe(obstacles)}", stacklevel=3)
        self.options = replace(self.options, passes="two")
        return False

    def _verify_once(
        self, loss: Tensor, terms: CrossEntropy, num_items: Tensor | int | None
    ) -> list[Obstacle]:
        """The first time that a set of layers runs, hold one sample's gradient against autograd's own."""
        signature = self._capture.signature
        if not signature or signature in self._verified:
            return []
        sample, sample_loss = terms.heaviest_sample(num_items)
        obstacles = self._capture.verify(loss, sample_loss, sample, terms.batch)
        if not obstacles:
            self._verified.add(signature)
        return obstacles

    def _close_for_one_pass(self, loss: Tensor) -> None:
        lagged = self._lagged
        consume = lagged.consume if lagged is not None and lagged.ready else self._keep_second
        self._capture.close(loss, self.weights, consume)
        loss.register_hook(self._begin_backward)

    def _begin_backward(self, _: Tensor) -> None:
        if self._second_set.begin() and self._lagged is not None:
            self._lagged.forget()

    def _keep_second(self, parameter: nn.Parameter, plain: Tensor, weighted: Tensor) -> Tensor:
        self._second_set.add(parameter, weighted)
        return plain

    def _close_for_two_passes(
        self, loss: Tensor, terms: CrossEntropy, labels: Tensor, num_items: Tensor | int | None
    ) -> None:
        self._capture.close(loss, None, None)
        if self._second_forward is not None:
            terms = self._terms(self._second_forward.logits(), labels)
        by_token = self.options.weight == "token" and terms.terms.dim() > 1
        weights = terms.token_weights(self.options.q) if by_token else terms.sample_weights(self.options.q)
        self.weights = self._scale * weights
        gce = terms.gce(self.weights, num_items)

        def second_backward(grad: Tensor) -> None:
            # Inside the first backward, so that loss scaling and accumulation reach both sets alike.
            self._second_set.begin()
            chosen = [p for p in self._parameters.values() if p.requires_grad]
            # A second forward has a graph of its own, which nothing else needs.
            keep = self._second_forward is None
            sums = torch.autograd.grad(gce, chosen, grad.to(gce.dtype), retain_graph=keep, allow_unused=True)
            for parameter, weighted in zip(chosen, sums, strict=True):
                if weighted is not None:
                    self._second_set.add(parameter, weighted)

        loss.register_hook(second_backward)

    def _both_sets(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """e and g of every parameter; each has both or neither, and one of them has."""
        erm: list[Tensor | None] = []
        gce: list[Tensor | None] = []
        for name, parameter in self._parameters.items():
            plain = parameter.grad if self._second_set.reached(parameter) else None
            weighted = self._second_set.get(parameter)
            if (plain is None) != (weighted is None):
                where = (
                    "outside the captured layers"
                    if weighted is None
                    else "that was dropped before project_()"
                )
                raise RuntimeError(f"{name!r} got a gradient {where}")
            erm.append(plain)
            gce.append(weighted)
        if all(plain is None for plain in erm):
            raise RuntimeError(
                "project_() found no gradient: call backward() on the loss of this engine first"
            )
        return erm, gce

    def _project_exact(self) -> EdgeStats:
        erm, gce = self._both_sets()
        o = self.options
        return edge_(
            erm, gce, alpha=o.alpha, segments=o.segments, variant=o.variant, on_nonfinite=o.on_nonfinite
        )

    def _project_at_end(self, _: Tensor) -> None:
        from accelerate.state import GradientState

        if GradientState().sync_gradients:
            at_end_of_backward(self._project_once)

    def _project_once(self) -> None:
        self.project_()


def _check_single_process() -> None:
    """Each process holds a second set of its own batch only: their projections would drift apart."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"EDGE projects the gradients of one process; torch.distributed runs "
            f"{distributed.get_world_size()}, and the second gradient set is not reduced over them yet"
        )


def _describe(obstacles: list[Obstacle]) -> str:
    shown = "; ".join(str(obstacle) for obstacle in obstacles[:3])
    return shown + (f"; and {len(obstacles) - 3} more" if len(obstacles) > 3 else "")


def _cannot_see(obstacles: list[Obstacle]) -> ValueError:
    return ValueError(
        f"one backward pass cannot tell samples apart at {_describe(obstacles)}; passes='two' or "
        "passes='auto' takes a second backward pass"
    )
