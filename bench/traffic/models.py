"""The traffic model of every operator on a named workload, in one place."""

from __future__ import annotations

from collections.abc import Callable

from fastproj.bench.traffic.balance_loss import balance_loss
from fastproj.bench.traffic.contraction import per_sample_grad, weighted_grad
from fastproj.bench.traffic.cross_entropy import cross_entropy
from fastproj.bench.traffic.influence import per_sample_influence
from fastproj.bench.traffic.moves import Floor, Traffic, roofline
from fastproj.bench.traffic.projected_adamw import projected_adamw
from fastproj.bench.traffic.sketch import sketch
from fastproj.bench.traffic.span import combine, edge, gram, gram_and_combine
from fastproj.bench.traffic.subspace import project_out
from fastproj.bench.traffic.workloads import Workload

OPERATORS: dict[str, Callable[[Workload], Traffic]] = {
    "gram": gram,
    "combine": combine,
    "gram + combine": gram_and_combine,
    "edge": edge,
    "project_out": project_out,
    "weighted_grad": weighted_grad,
    "per_sample_grad": per_sample_grad,
    "per_sample_influence": per_sample_influence,
    "sketch": sketch,
    "cross_entropy": cross_entropy,
    "projected_adamw": projected_adamw,
    "balance_loss": balance_loss,
}

__all__ = [
    "OPERATORS",
    "Floor",
    "Traffic",
    "balance_loss",
    "combine",
    "cross_entropy",
    "edge",
    "gram",
    "gram_and_combine",
    "per_sample_grad",
    "per_sample_influence",
    "project_out",
    "projected_adamw",
    "roofline",
    "sketch",
    "weighted_grad",
]
