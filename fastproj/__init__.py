"""fastproj: kernel-accelerated gradient projections for debiased fine-tuning.

Every name below is imported at its first use, so that importing the package costs nothing: no CUDA
context, no triton, no transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastproj.bindings.combine import combine
    from fastproj.bindings.cross_entropy import SampleLosses, cross_entropy
    from fastproj.bindings.edge import EdgeStats, edge, edge_
    from fastproj.bindings.gram import gram
    from fastproj.bindings.per_sample_grad import per_sample_grad
    from fastproj.bindings.per_sample_influence import (
        per_sample_dot,
        per_sample_influence,
        per_sample_sqnorm,
    )
    from fastproj.bindings.project_out import project_out, project_out_, project_out_stream
    from fastproj.bindings.sketch import sketch
    from fastproj.bindings.weighted_grad import weighted_grad
    from fastproj.influence.scorer import InfluenceScorer
    from fastproj.influence.select import select
    from fastproj.latent.describe import describe
    from fastproj.latent.factors import LatentFactors
    from fastproj.latent.identify import identify
    from fastproj.methods.edge import EDGE
    from fastproj.methods.grasp import GRASP
    from fastproj.reference.adam import AdamState
    from fastproj.reference.basis import Basis, orthonormalize

__version__ = "0.1.0"

_HOME = {
    "EDGE": "fastproj.methods.edge",
    "GRASP": "fastproj.methods.grasp",
    "AdamState": "fastproj.reference.adam",
    "Basis": "fastproj.reference.basis",
    "EdgeStats": "fastproj.bindings.edge",
    "InfluenceScorer": "fastproj.influence.scorer",
    "LatentFactors": "fastproj.latent.factors",
    "SampleLosses": "fastproj.bindings.cross_entropy",
    "combine": "fastproj.bindings.combine",
    "cross_entropy": "fastproj.bindings.cross_entropy",
    "describe": "fastproj.latent.describe",
    "edge": "fastproj.bindings.edge",
    "edge_": "fastproj.bindings.edge",
    "gram": "fastproj.bindings.gram",
    "identify": "fastproj.latent.identify",
    "orthonormalize": "fastproj.reference.basis",
    "per_sample_dot": "fastproj.bindings.per_sample_influence",
    "per_sample_grad": "fastproj.bindings.per_sample_grad",
    "per_sample_influence": "fastproj.bindings.per_sample_influence",
    "per_sample_sqnorm": "fastproj.bindings.per_sample_influence",
    "project_out": "fastproj.bindings.project_out",
    "project_out_": "fastproj.bindings.project_out",
    "project_out_stream": "fastproj.bindings.project_out",
    "select": "fastproj.influence.select",
    "sketch": "fastproj.bindings.sketch",
    "weighted_grad": "fastproj.bindings.weighted_grad",
}

__all__ = [
    "EDGE",
    "GRASP",
    "AdamState",
    "Basis",
    "EdgeStats",
    "InfluenceScorer",
    "LatentFactors",
    "SampleLosses",
    "combine",
    "cross_entropy",
    "describe",
    "edge",
    "edge_",
    "gram",
    "identify",
    "orthonormalize",
    "per_sample_dot",
    "per_sample_grad",
    "per_sample_influence",
    "per_sample_sqnorm",
    "project_out",
    "project_out_",
    "project_out_stream",
    "select",
    "sketch",
    "weighted_grad",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastproj' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
