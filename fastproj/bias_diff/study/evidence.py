"""Everything that rankings are made of, out of one backward pass over the training samples.

Inner products are kept apart by parameter and by probe, so that rankings by other probes, by some layers and
by other norms follow from them by addition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastproj.bindings.per_sample_influence import per_sample_influence
from fastproj.influence.batches import TokenBatches
from fastproj.influence.consumers import SketchConsumer
from fastproj.influence.references import References
from fastproj.influence.scorer import InfluenceScorer
from fastproj.reference.adam import AdamState

UPDATES = ("adam", "adam, summed loss", "plain")
SKETCHES = (512, 1024, 2048, 4096, 8192)
SKETCH_SEED = 1
CONTRASTS = ("counterparts", "factual sentences")


@dataclass(frozen=True)
class Evidence:
    """Of N samples, M references and P parameters, in fp64. The references are the probes, one by one, then
    the means over their counterparts and over factual sentences (:data:`CONTRASTS`).

    Attributes:
        parameters: the names of the P parameters.
        dots: ``⟨R_m, Γ_i⟩`` by parameter, (P, N, M), for each of :data:`UPDATES`.
        sqnorms: ``‖Γ_i‖²`` by parameter, (P, N).
        gram: ``⟨R_m, R_n⟩`` by parameter, (P, M, M).
        sketched: cosines with the probes' mean gradient (N,) from sketches of Adam's update, by dimension.
        losses: mean loss of a sample's tokens (N,).
        lengths: number of tokens that are predicted (N,).
    """

    parameters: tuple[str, ...]
    dots: dict[str, Tensor]
    sqnorms: dict[str, Tensor]
    gram: Tensor
    sketched: dict[int, Tensor]
    losses: Tensor
    lengths: Tensor


@dataclass
class Layerwise:
    """A consumer of sample gradients that keeps every parameter's inner products."""

    references: Mapping[nn.Parameter, Tensor]
    adam: Mapping[nn.Parameter, AdamState]
    lengths: Tensor
    sketches: Sequence[SketchConsumer]
    dots: dict[str, dict[nn.Parameter, Tensor]] = field(default_factory=lambda: {u: {} for u in UPDATES})
    sqnorms: dict[str, dict[nn.Parameter, Tensor]] = field(default_factory=lambda: {u: {} for u in UPDATES})

    def contraction(self, parameter: nn.Parameter, x: Tensor, delta: Tensor) -> None:
        """See :class:`fastproj.capture.per_sample.Consumer`."""
        adam = self.adam[parameter]
        summed = delta * self.lengths[:, None, None]
        for update, own, state in (
            ("adam", delta, adam),
            ("adam, summed loss", summed, adam),
            ("plain", delta, None),
        ):
            dots, sqnorms = per_sample_influence(x, own, self.references[parameter], adam=state)
            self.dots[update][parameter], self.sqnorms[update][parameter] = dots.double(), sqnorms.double()
        for sketch in self.sketches:
            sketch.contraction(parameter, x, delta)

    def gradient(self, parameter: nn.Parameter, sample: int, gradient: Tensor) -> None:
        """LoRA has no embeddings."""
        raise NotImplementedError


def gather(
    scorer: InfluenceScorer, references: References, loader: TokenBatches, names: Sequence[str]
) -> Evidence:
    """One pass over ``loader``; rows are put into the order of ``names``, the samples' ids."""
    parameters = scorer.parameters
    adam = scorer.adam(0)
    if adam is None:
        raise ValueError(
            "the study compares Adam's update with plain gradients: the scorer needs an optimizer"
        )
    own = {parameter: references.gradients[0][name] for name, parameter in parameters.items()}
    queries = {k: _mean_query(scorer, references, k) for k in SKETCHES}
    places, end = {}, 0
    for parameter in parameters.values():
        places[parameter], end = end, end + parameter.numel()
    pieces: list[tuple[list[str], Layerwise, Tensor]] = []
    for batch in loader:
        lengths = batch["attention_mask"].sum(1) - 1

        def consumer_for(samples: int, lengths: Tensor = lengths) -> Layerwise:
            sketches = [
                SketchConsumer(samples, k, places, adam, kind="srht", seed=SKETCH_SEED) for k in SKETCHES
            ]
            return Layerwise(own, adam, lengths, sketches)

        for _, ids, consumer in scorer.passes([batch], consumer_for):
            pieces.append((ids, consumer, lengths))
    order = _order([name for ids, _, _ in pieces for name in ids], names)

    def stacked(which: str, update: str) -> Tensor:
        rows = [[getattr(c, which)[update][p] for p in parameters.values()] for _, c, _ in pieces]
        return torch.cat([torch.stack(row) for row in rows], 1)[:, order]

    flat = [own[parameter].double().flatten(1) for parameter in parameters.values()]
    return Evidence(
        parameters=tuple(parameters),
        dots={update: stacked("dots", update) for update in UPDATES},
        sqnorms={update: stacked("sqnorms", update) for update in UPDATES},
        gram=torch.stack([g @ g.T for g in flat]),
        sketched={
            k: torch.cat([_cosines(c.sketches[j].sketches, queries[k]) for _, c, _ in pieces])[order]
            for j, k in enumerate(SKETCHES)
        },
        losses=_losses(scorer, loader)[order],
        lengths=torch.cat([lengths for _, _, lengths in pieces])[order],
    )


def _mean_query(scorer: InfluenceScorer, references: References, dimension: int) -> Tensor:
    sketches = scorer.sketch_references(references, dimension, kind="srht", seed=SKETCH_SEED)
    return sketches[: -len(CONTRASTS)].double().mean(0)


def _cosines(sketches: Tensor, query: Tensor) -> Tensor:
    return torch.cosine_similarity(sketches.double(), query[None], dim=1)


def _losses(scorer: InfluenceScorer, loader: TokenBatches) -> Tensor:
    was = scorer.model.training
    scorer.model.eval()
    with torch.no_grad():
        losses = torch.cat([scorer.losses(batch) for batch in loader]).double()
    scorer.model.train(was)
    return losses


def _order(found: Sequence[str], wanted: Sequence[str]) -> Tensor:
    places = {name: place for place, name in enumerate(found)}
    return torch.tensor([places[name] for name in wanted])
