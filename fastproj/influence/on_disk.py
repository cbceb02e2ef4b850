"""Scoring and sketching to disk, so that a run killed at any moment goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastproj.influence.fingerprint import model_fingerprint, rows_fingerprint, tensors_fingerprint
from fastproj.influence.loaders import SameBatches
from fastproj.influence.manifest import Manifest
from fastproj.influence.references import References
from fastproj.influence.scores import Scores
from fastproj.influence.store import SketchStore, SketchWriter
from fastproj.influence.writer import ScoreWriter

if TYPE_CHECKING:
    from fastproj.influence.scorer import InfluenceScorer, Loader, Rows

Progress = Callable[[int], None]


def score_to_disk(
    path: Path,
    scorer: InfluenceScorer,
    loader: Loader,
    references: References,
    *,
    normalize: bool,
    progress: Progress | None = None,
) -> Scores:
    """``scorer.score`` with every part on disk once it is computed; see there.

    Of several checkpoints each has its own file, ``<path>.checkpoint-<t>``, which stays; ``path`` is their
    weighted sum.
    """
    batches = SameBatches(loader)
    data = batches.fingerprint()
    single = not scorer.checkpoints
    found: list[Scores] = []
    weights: list[float] = []
    for t, weight in enumerate(scorer.states()):
        own = path if single else path.with_name(f"{path.name}.checkpoint-{t}")
        options = {"normalize": str(normalize), "references": tensors_fingerprint(references.gradients[t])}
        manifest = _manifest(scorer, data, t, options)
        with ScoreWriter(own, manifest, references.names) as writer:
            rows = scorer.score_batches(batches, references, t, normalize=normalize, held=writer.holds)
            _append(writer, rows, progress)
            writer.finish()
        found.append(Scores.load(own))
        weights.append(weight)
    if single:
        return found[0]
    total = sum((w * s.values.double() for w, s in zip(weights, found, strict=True)), torch.zeros(()))
    scores = Scores(found[0].ids, references.names, total.float())
    scores.save(path)
    return scores


def sketch_to_disk(
    path: Path,
    scorer: InfluenceScorer,
    loader: Loader,
    dimension: int,
    *,
    kind: str,
    seed: int,
    progress: Progress | None = None,
) -> SketchStore:
    """``scorer.sketch``; see there."""
    if scorer.checkpoints:
        raise ValueError(
            f"sketches are of one state of the model, got {len(scorer.checkpoints)} checkpoints: load one, "
            "and sketch each into a folder of its own"
        )
    batches = SameBatches(loader)
    origin = _manifest(scorer, batches.fingerprint(), 0, {})
    manifest = replace(origin, content="sketches", kind=kind, seed=seed, dimension=dimension)
    with SketchWriter(path, manifest) as writer:
        rows = scorer.sketch_batches(batches, dimension, kind=kind, seed=seed, held=writer.holds)
        _append(writer, rows, progress)
        return writer.finish()


def _append(writer: ScoreWriter | SketchWriter, batches: Iterable[Rows], progress: Progress | None) -> None:
    for rows in batches:
        writer.append(rows.ids, rows.values, start=rows.start)
        if progress is not None:
            progress(rows.start + len(rows.ids))


def _manifest(scorer: InfluenceScorer, data: str, checkpoint: int, options: Mapping[str, str]) -> Manifest:
    """Where rows come from: weights, data, and whatever else changes them."""
    adam = scorer.adam(checkpoint)
    names = {parameter: name for name, parameter in scorer.parameters.items()}
    moments: dict[str, Tensor] = {}
    constants: set[str] = set()
    for parameter, state in (adam or {}).items():
        own = {field.name: getattr(state, field.name) for field in fields(state)}
        for moment in ("exp_avg", "exp_avg_sq"):
            moments[f"{names[parameter]}.{moment}"] = own.pop(moment)
        constants.add(repr(own))
    return Manifest(
        content="scores",
        model=model_fingerprint(scorer.model, without=scorer.parameters),
        adapter=tensors_fingerprint(scorer.parameters),
        data=data,
        options={
            **options,
            "loss": scorer.loss_name,
            "optimizer": tensors_fingerprint(moments) if moments else "none",
            "adam": "; ".join(sorted(constants)) or "none",
            "autocast": _autocast(next(iter(scorer.parameters.values())).device.type),
            "scaling": rows_fingerprint([_scaling(scorer.model)]),
        },
    )


def _autocast(kind: str) -> str:
    return str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "none"


def _scaling(model: nn.Module) -> dict[str, dict[str, float]]:
    """What LoRA multiplies each adapter of each layer by, which no weight tells."""
    scalings = {name: getattr(module, "scaling", None) for name, module in model.named_modules()}
    return {name: own for name, own in scalings.items() if isinstance(own, dict)}
