"""Influence of training samples on probe gradients, one backward pass a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastproj.bindings.sketch import sketch
from fastproj.capture.attach import Capture
from fastproj.capture.per_sample import Consumer, PerSample
from fastproj.capture.select import select_parameters
from fastproj.influence.checkpoints import Checkpoint, require_alike, weights_restored
from fastproj.influence.consumers import ScoreConsumer, SketchConsumer
from fastproj.influence.loaders import ID, Batch, SameBatches, batch_ids, batch_size, first_and_last
from fastproj.influence.losses import SampleLoss, check_losses, loss_name, sample_loss
from fastproj.influence.optimizer_state import OptimizerSource, adam_states
from fastproj.influence.quiet import measured
from fastproj.influence.references import References
from fastproj.influence.scores import Aggregate, Scores
from fastproj.reference.adam import AdamState

if TYPE_CHECKING:
    from fastproj.influence.store import SketchStore

Loader = Iterable[Batch]
Held = Callable[[int, int], bool]


class Rows(NamedTuple):
    """Rows ``start`` and following of the data: their ids, and what they score or their sketches, (B, …)."""

    start: int
    ids: list[str]
    values: Tensor


def nothing(start: int, stop: int) -> bool:
    """No rows are held: all are to be computed."""
    return False


class InfluenceScorer:
    """``Inf(z, m) = Σ_t η̄_t cos(R_m(θ_t), Γ(z; θ_t))`` for every sample z and probe m, exactly.

    R_m is the mean gradient of probe m; Γ is Adam's update direction for z alone where an optimiser's state
    is given (see :func:`fastproj.reference.adam.adam_update`), else z's gradient. With one model, T = 1 and
    η̄ = 1; with ``checkpoints`` the sum goes over them, each with its own optimiser state. Scores come out of
    one forward and one backward pass a batch; the gradient of a sample exists a tile at a time.

    Args:
        model: any module; a batch's items go to it as keyword arguments, but for ``id`` and ``labels``.
        optimizer: a live Adam or AdamW, or a path to ``optimizer.pt``, read without unpickling; None for
            plain gradients. Its state is read anew at each call of :meth:`score`.
        loss: "causal-lm", "masked-lm", "classification", or a callable ``(outputs, batch) → (B,)``.
        params: "lora" for the adapters' parameters, "trainable" for all that are trainable.
        adam_variant: "adam", or "less" for LESS's form.
        reduction: "mean" or "sum" over a sample's tokens.
        checkpoints: folders or :class:`Checkpoint`, instead of the model as it is; weights are given back.

    Dropout is off and BatchNorm takes its running statistics while influence is measured. Forward passes run
    under the caller's autocast. The model may be wrapped by PEFT and use gradient checkpointing.

    Raises ValueError where parameters lie in layers that cannot be captured, or where samples meet in the
    forward pass, so that there is no gradient of a single one; reentrant checkpointing hides the latter.
    Source: Xia et al., "LESS", ICML 2024, section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerSource | None = None,
        *,
        loss: str | SampleLoss = "causal-lm",
        params: str = "lora",
        adam_variant: Literal["adam", "less"] = "adam",
        reduction: Literal["mean", "sum"] = "mean",
        checkpoints: Sequence[Checkpoint | str | Path] = (),
    ) -> None:
        if optimizer is not None and checkpoints:
            raise ValueError(
                "give an optimizer for the model as it is, or checkpoints with their own, not both"
            )
        self.model = model
        self.parameters = select_parameters(model, params)
        self.checkpoints = tuple(c if isinstance(c, Checkpoint) else Checkpoint.read(c) for c in checkpoints)
        require_alike(self.checkpoints)
        self.loss_name = loss_name(loss, reduction)
        self._loss = sample_loss(loss, reduction)
        self._optimizer, self._variant = optimizer, adam_variant
        self._verified: dict[frozenset[str], int] = {}

    def reference(self, probes: Loader | Mapping[str, Loader]) -> References:
        """The mean gradient of a probe, named "probe", or of each of several under its name.

        A loader yields batches of tensors. Raises ValueError where a loader yields nothing.
        """
        named = probes if isinstance(probes, Mapping) else {"probe": probes}
        if not named:
            raise ValueError("expected at least one probe, got none")
        gradients = []
        for _ in self.states():
            with measured(self.model, self.parameters):
                means = [self._mean_gradient(name, loader) for name, loader in named.items()]
            gradients.append({key: torch.stack([own[key] for own in means]) for key in self.parameters})
        return References(tuple(named), tuple(gradients))

    def score(
        self,
        loader: Loader,
        references: References,
        *,
        normalize: bool = True,
        aggregate: Aggregate | None = None,
        progress: Callable[[int], None] | None = None,
        out: str | Path | None = None,
    ) -> Scores:
        """The influence of every sample of ``loader`` on every reference, in the loader's order.

        ``normalize`` takes cosines, else dot products; a score is 0 where ``|R_m|`` or ``|Γ(z)|`` is (with
        Adam's moments Γ of a sample without gradient is not). Ids are the batches' ``id``, else row numbers.
        ``aggregate`` makes one column of all references, of what is returned and not of ``out``.
        ``progress`` is called with the number of rows done after each batch. With ``out`` the scores are a
        Parquet file that grows part by part: killed, the same call goes on where it was, and refuses what was
        made from another model, data or option (see :class:`fastproj.influence.writer.ScoreWriter`); a loss
        that is a callable counts by its name there. With ``out`` or several checkpoints the loader is gone
        through more than once: raises TypeError for an iterator, ValueError where it gives other batches.
        Raises ValueError where it gives none.
        """
        if out is None:
            scores = self._score(loader, references, normalize, progress)
        else:
            from fastproj.influence.on_disk import score_to_disk

            scores = score_to_disk(
                Path(out), self, loader, references, normalize=normalize, progress=progress
            )
        if aggregate is None:
            return scores
        return Scores(scores.ids, (aggregate,), scores.aggregate(aggregate).unsqueeze(1))

    def _score(
        self,
        loader: Loader,
        references: References,
        normalize: bool,
        progress: Callable[[int], None] | None,
    ) -> Scores:
        ids: list[str] = []
        total = torch.zeros((), dtype=torch.float64)
        if len(self.checkpoints) > 1:
            loader = SameBatches(loader)
        for t, weight in enumerate(self.states()):
            names: list[str] = []
            values = [torch.zeros(0, len(references.names), dtype=torch.float64)]
            for rows in self.score_batches(loader, references, t, normalize=normalize):
                names += rows.ids
                values.append(weight * rows.values)
                if progress is not None:
                    progress(len(names))
            ids, total = names, total + torch.cat(values)
        return Scores(tuple(ids), references.names, total.float())

    def sketch(
        self,
        loader: Loader,
        dimension: int,
        *,
        out: str | Path,
        kind: str = "srht",
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> SketchStore:
        """Sketches ``P Γ(z)`` of every sample, on disk in the folder ``out``, to be asked again and again.

        Resumes as :meth:`score` does. The store's ``scores`` takes the queries of
        :meth:`sketch_references`. Raises ValueError where there are several checkpoints.
        """
        from fastproj.influence.on_disk import sketch_to_disk

        return sketch_to_disk(Path(out), self, loader, dimension, kind=kind, seed=seed, progress=progress)

    def score_batches(
        self,
        loader: Loader,
        references: References,
        checkpoint: int = 0,
        *,
        normalize: bool = True,
        held: Held = nothing,
    ) -> Iterator[Rows]:
        """Values (B, M), fp64 on the CPU, batch by batch, with the weights that the model has now.

        Batches whose rows are all ``held`` are passed over.
        """
        references.check(self.parameters, max(len(self.checkpoints), 1))
        targets = {
            parameter: _beside(references.gradients[checkpoint][name], parameter)
            for name, parameter in self.parameters.items()
        }
        adam = self.adam(checkpoint)
        norms = references.norms[checkpoint]

        def consumer_for(samples: int) -> ScoreConsumer:
            return ScoreConsumer(samples, targets, adam)

        for start, ids, consumer in self.passes(loader, consumer_for, held):
            dots = consumer.dots.cpu()
            if normalize:
                scale = consumer.sqnorms.cpu().sqrt().unsqueeze(1) * norms
                dots = torch.where(scale == 0, 0.0, dots / scale)
            yield Rows(start, ids, dots)

    def sketch_batches(
        self, loader: Loader, dimension: int, *, kind: str = "srht", seed: int = 0, held: Held = nothing
    ) -> Iterator[Rows]:
        """Sketches ``P Γ(z)`` (B, dimension), batch by batch, of the model as it is.

        The vector of all parameters takes them in the model's order. See :func:`fastproj.sketch`.
        """
        places, end = {}, 0
        for parameter in self.parameters.values():
            places[parameter] = end
            end += parameter.numel()
        adam = self.adam(0)

        def consumer_for(samples: int) -> SketchConsumer:
            return SketchConsumer(samples, dimension, places, adam, kind=kind, seed=seed)

        for start, ids, consumer in self.passes(loader, consumer_for, held):
            yield Rows(start, ids, consumer.sketches.cpu())

    def sketch_references(
        self, references: References, dimension: int, *, kind: str = "srht", seed: int = 0
    ) -> Tensor:
        """``P R_m`` for the references of the model as it is, (M, dimension), to ask sketches with."""
        references.check(self.parameters, 1)
        own = references.gradients[0]
        shards = [own[name].cpu() for name in self.parameters]
        return sketch(shards, dimension, seed=seed, kind=kind)

    def states(self) -> Iterator[float]:
        """Put the model into the state of each checkpoint; yields their weights η̄."""
        if not self.checkpoints:
            yield 1.0
            return
        with weights_restored(self.model, whole=any(not own.is_adapter for own in self.checkpoints)):
            for checkpoint in self.checkpoints:
                checkpoint.load(self.model)
                yield checkpoint.learning_rate

    def adam(self, checkpoint: int) -> dict[nn.Parameter, AdamState] | None:
        """The optimiser's moments at a checkpoint, None where gradients are plain."""
        source = self.checkpoints[checkpoint].optimizer if self.checkpoints else self._optimizer
        if source is None:
            return None
        states = adam_states(source, self.model, self.parameters, self._variant)
        return {self.parameters[name]: state for name, state in states.items()}

    def _mean_gradient(self, name: str, loader: Loader) -> dict[str, Tensor]:
        samples = 0
        sums = {key: torch.zeros_like(p, dtype=_wide(p)) for key, p in self.parameters.items()}
        for batch in loader:
            losses = self.losses(batch)
            _backward(self._reached(losses.sum()))
            samples += losses.shape[0]
            for key, parameter in self.parameters.items():
                if parameter.grad is not None:  # in bf16 a long sum would come to a halt
                    sums[key] += parameter.grad
                parameter.grad = None
        if not samples:
            raise ValueError(f"the loader of probe {name!r} yielded no batch")
        return {key: total.div_(samples) for key, total in sums.items()}

    def passes(
        self, loader: Loader, consumer_for: Callable[[int], Any], held: Held = nothing
    ) -> Iterator[tuple[int, list[str], Any]]:
        """A forward and a backward pass for each batch: its first row, ids, and what its consumer became.

        ``consumer_for(B)`` makes a :class:`fastproj.capture.per_sample.Consumer` for a batch of B samples,
        which is handed the sample gradients of the model as it is.
        """
        names = {parameter: name for name, parameter in self.parameters.items()}
        stop = 0
        for batch in loader:
            start, stop = stop, stop + batch_size(batch)
            if held(start, stop):
                continue
            ids = batch_ids(batch, start, stop)
            with measured(self.model, self.parameters):
                capture = Capture(self.model, self.parameters)
                try:
                    consumer: Consumer = self._one_pass(capture, batch, consumer_for, names)
                finally:
                    capture.detach()
            yield start, ids, consumer
        if not stop:
            raise ValueError("the loader yielded no batch")

    def _one_pass(
        self,
        capture: Capture,
        batch: Batch,
        consumer_for: Callable[[int], Any],
        names: Mapping[nn.Parameter, str],
    ) -> Any:
        if max(self._verified.values(), default=0) < min(batch_size(batch), 2):
            # On two samples and before the batch's own graph is there, for the sake of memory.
            self._verify(capture, self.losses(first_and_last(batch)))
        losses = self.losses(batch)
        samples, total = losses.shape[0], losses.sum()
        self._verify(capture, losses)
        consumer = consumer_for(samples)
        sink = capture.observe(total, samples, lambda forward: PerSample(consumer, forward.reads, names))
        _backward(self._reached(total))
        sink.finish()
        return consumer

    def _verify(self, capture: Capture, losses: Tensor) -> None:
        """Raise ValueError where the running forward pass cannot be taken apart into its samples.

        Shapes are looked at each time; gradients are measured once for each set of layers that is called.
        """
        samples = losses.shape[0]
        obstacles = capture.obstacles(samples)
        # A batch of one tells nothing of samples that meet, nor does a loss without a gradient.
        if not obstacles and min(samples, 2) > self._verified.get(capture.signature, 0):
            worst = int(losses.detach().argmax())
            obstacles = capture.verify(self._reached(losses.sum()), losses[worst], worst, samples)
            value = losses[worst].item()
            if value and math.isfinite(value):
                self._verified[capture.signature] = min(samples, 2)
        if obstacles:
            raise ValueError(f"no gradients of single samples here: {'; '.join(map(str, obstacles))}")

    def _reached(self, loss: Tensor) -> Tensor:
        if loss.requires_grad:
            return loss
        raise ValueError(
            f"the loss depends on none of the {len(self.parameters)} parameters, such as "
            f"{next(iter(self.parameters))!r}: expected their adapter to be active"
        )

    def losses(self, batch: Batch) -> Tensor:
        samples = batch_size(batch)
        device = next(iter(self.parameters.values())).device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        outputs = self.model(**{k: v for k, v in moved.items() if k not in (ID, "labels")})
        return check_losses(self._loss(outputs, moved), samples)


def _backward(loss: Tensor) -> None:
    """Back-propagate outside of autocast, as it is meant to be."""
    kind = loss.device.type
    outside = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    with outside:
        loss.backward()


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _beside(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A reference where its parameter is, in the dtype of the sums."""
    return gradient.to(device=parameter.device, dtype=_wide(parameter))
