"""What a naive fine-tune's weights give away, and how near that comes to what was planted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.grasp.study.settings import Contrast
from fastproj.grasp.study.supervised import Supervised, supervised
from fastproj.grasp.study.tasks import Task, base_of
from fastproj.latent.evidence import activation_difference, match, rank_directions, recurrence
from fastproj.latent.factors import STREAM, LatentFactors
from fastproj.latent.identify import identify

CANDIDATES = 8
TOPS = (1, 3, 8)
LEVEL = 0.95
Record = dict[str, Any]
Others = Mapping[str, Mapping[str, list[LatentFactors]]]


@dataclass(frozen=True, eq=False)
class Identified:
    """Of one naive fine-tune.

    Attributes:
        write, read: candidates of the residual stream, by share of energy.
        by_probes: the write side's, by recurrence times the difference on probe sentences.
        planted, task: the supervised directions.
        record: the numbers.
    """

    write: LatentFactors
    read: LatentFactors
    by_probes: LatentFactors
    planted: Supervised
    task: Supervised
    record: Record


def identified(tuned: nn.Module, task: Task, others: Others, seed: int) -> Identified:
    """Candidates on both sides, their scores, and their cosines with the supervised directions.

    ``others``: by kind ("seeds", "other selection") and side, candidates of other naive fine-tunes.
    """
    found = {name: supervised(tuned, task, task.contrasts[name], seed) for name in ("planted", "task")}
    record: Record = {
        name: {"shares": own.shares, "spread": _agreement(own.by_block)} for name, own in found.items()
    }
    first, second = (own.basis.matrix[:, 0] for own in found.values())
    record["planted and task"] = float((first @ second).abs())
    sides: dict[str, LatentFactors] = {}
    by_probes: LatentFactors | None = None
    for side in ("write", "read"):
        factors = identify(tuned, side=side, rank=CANDIDATES, draws=100, seed=seed)
        scores = _scores(tuned, task, factors, {kind: own[side] for kind, own in others.items()})
        references = {
            name: own.basis.matrix[:, 0] if side == "write" else _read_direction(own, factors)
            for name, own in found.items()
        }
        record[side] = {
            "shares": factors.shares[STREAM].tolist(),
            "p_values": factors.p_values[STREAM].tolist(),
            "null": factors.null_shares[STREAM][:, -1].tolist(),
            "scores": {name: table[STREAM].tolist() for name, table in scores.items()},
            "orders": _orders(factors, scores),
            "cosines": {
                name: list(match(factors, direction)[STREAM].cosines)
                for name, direction in references.items()
            },
        }
        sides[side] = factors
        if side == "write":
            by_probes = rank_directions(
                factors, recurrence=_mean(scores), difference=scores["difference on probes"]
            )
            record[side]["thresholds"] = _thresholds(factors, found["planted"].permuted)
            record[side]["by block"] = _by_block(factors, found["planted"].by_block)
    record["modules"] = _modules(tuned, found["planted"])
    if by_probes is None:
        raise ValueError("expected candidates on the write side")
    return Identified(sides["write"], sides["read"], by_probes, found["planted"], found["task"], record)


@torch.no_grad()
def written_words(tuned: nn.Module, task: Task, factors: LatentFactors) -> Record:
    """How far each direction of the stream, through the last norm's gain, writes the task's words.

    In standard deviations over the vocabulary, of either sign: "both", the mean of both kinds' means, and
    "either", half their difference.
    """
    base = base_of(tuned)
    directions = factors.bases[STREAM].matrix.to(base.lm_head.weight)
    logits = base.lm_head.weight @ (base.model.norm.weight[:, None] * directions)
    scores = (logits - logits.mean(0)) / logits.std(0)
    first, second = (scores[words].mean(0) for words in task.words)
    return {"both": ((first + second) / 2).abs().tolist(), "either": ((first - second) / 2).abs().tolist()}


def _scores(
    tuned: nn.Module, task: Task, factors: LatentFactors, others: Mapping[str, list[LatentFactors]]
) -> dict[str, Mapping[str, Tensor]]:
    scores: dict[str, Mapping[str, Tensor]] = {
        f"recurrence over {kind}": recurrence(factors, own) for kind, own in others.items() if own
    }
    first, second = _pooled(task.contrasts["planted"])
    scores["difference on probes"] = activation_difference(tuned, task.tokenizer, factors, first, second)
    return scores


def _mean(scores: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    tables = [table[STREAM] for name, table in scores.items() if name.startswith("recurrence")]
    return {STREAM: torch.stack(tables).mean(0)}


def _pooled(contrast: Contrast) -> tuple[list[str], list[str]]:
    return (
        [text for cell in contrast.cells for text in cell[0]],
        [text for cell in contrast.cells for text in cell[1]],
    )


def _orders(factors: LatentFactors, scores: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[int]]:
    """Columns of the candidates by each score, the most suspect first."""
    tables = {"share": factors.shares[STREAM]} | {name: table[STREAM].abs() for name, table in scores.items()}
    tables["p-value"] = -factors.p_values[STREAM]
    tables["recurrence times difference"] = (
        _mean(scores)[STREAM] * scores["difference on probes"][STREAM].abs()
    )
    return {name: table.argsort(descending=True, stable=True).tolist() for name, table in tables.items()}


def _thresholds(factors: LatentFactors, permuted: Tensor) -> dict[str, Record]:
    """95 % quantiles of the best ``|cos|`` of the first k candidates with what is no direction of the factor.

    "permuted": differences of means between probes whose labels are dealt out at random, which lie where
    activations vary most. "random": directions drawn at random.
    """
    directions = factors.bases[STREAM].matrix.double()
    drawn = torch.randn(
        1000, len(directions), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    drawn = drawn / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
    quantiles = {}
    for name, chance in (("permuted", permuted), ("random", drawn)):
        cosines = (chance @ directions).abs()
        quantiles[name] = {str(k): float(cosines[:, :k].amax(1).quantile(LEVEL)) for k in TOPS}
    return quantiles


def _by_block(factors: LatentFactors, by_block: Tensor) -> Record:
    """Of each block's planted direction, the best candidate's ``|cos|`` and the span's."""
    cosines = (by_block @ factors.bases[STREAM].matrix.double()).abs()
    return {"best": cosines.amax(1).tolist(), "span": cosines.square().sum(1).sqrt().tolist()}


def _agreement(by_block: Tensor) -> float:
    """Mean ``|cos|`` between the directions of different blocks."""
    cosines = (by_block @ by_block.mT).abs()
    return float((cosines.sum() - cosines.diagonal().sum()) / max(1, cosines.numel() - len(cosines)))


def _read_direction(own: Supervised, factors: LatentFactors) -> Tensor:
    """The leading direction of what the stream's readers see of a contrast."""
    rows = torch.stack([own.by_module[name].matrix[:, 0].double() for name in factors.modules])
    return torch.linalg.svd(rows, full_matrices=False).Vh[0]


def _modules(tuned: nn.Module, planted: Supervised) -> Record:
    """Each module's own directions: the ``|cos|`` of its first, and of its span, with the planted one there.

    On the write side with the planted direction of its own block's output, on the read side of its input.
    """
    written = identify(tuned, side="write", rank=CANDIDATES, pool="module", draws=0)
    read = identify(tuned, side="read", rank=CANDIDATES, pool="module", draws=0)
    found: Record = {}
    for name in written.modules:
        kind = name.rsplit(".", 1)[-1]
        first, span = _closeness(read, name, planted.by_module[name].matrix[:, 0].double())
        found.setdefault(kind, {}).setdefault("read", []).append([first, span])
        if written.bases[name].dimension == planted.by_block.shape[1] and kind not in ("q_proj", "v_proj"):
            block = next(int(part) for part in name.split(".") if part.isdigit())
            first, span = _closeness(written, name, planted.by_block[block])
            found[kind].setdefault("write", []).append([first, span])
    return {kind: {side: _means(rows) for side, rows in own.items()} for kind, own in found.items()}


def _closeness(factors: LatentFactors, name: str, direction: Tensor) -> tuple[float, float]:
    cosines = (factors.bases[name].matrix.double().mT @ direction).abs()
    return float(cosines[0]), float(torch.linalg.vector_norm(cosines))


def _means(rows: Sequence[Sequence[float]]) -> Record:
    first, span = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    return {"first": first, "span": span}
