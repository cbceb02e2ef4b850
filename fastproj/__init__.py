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
    from fastproj.bindings.sketch import sketch
    from fastproj.bindings.weighted_grad import weighted_grad
    from fastproj.influence.scorer import InfluenceScorer
    from fastproj.influence.select import select
    from fastproj.methods.edge import EDGE
    from fastproj.reference.adam import AdamState

__version__ = "0.1.0"

_HOME = {
    "EDGE": "fastproj.methods.edge",
    "AdamState": "fastproj.reference.adam",
    "EdgeStats": "fastproj.bindings.edge",
    "InfluenceScorer": "fastproj.influence.scorer",
    "SampleLosses": "fastproj.bindings.cross_entropy",
    "combine": "fastproj.bindings.combine",
    "cross_entropy": "fastproj.bindings.cross_entropy",
    "edge": "fastproj.bindings.edge",
    "edge_": "fastproj.bindings.edge",
    "gram": "fastproj.bindings.gram",
    "per_sample_dot": "fastproj.bindings.per_sample_influence",
    "per_sample_grad": "fastproj.bindings.per_sample_grad",
    "per_sample_influence": "fastproj.bindings.per_sample_influence",
    "per_sample_sqnorm": "fastproj.bindings.per_sample_influence",
    "select": "fastproj.influence.select",
    "sketch": "fastproj.bindings.sketch",
    "weighted_grad": "fastproj.bindings.weighted_grad",
}

__all__ = [
    "EDGE",
    "AdamState",
    "EdgeStats",
    "InfluenceScorer",
    "SampleLosses",
    "combine",
    "cross_entropy",
    "edge",
    "edge_",
    "gram",
    "per_sample_dot",
    "per_sample_grad",
    "per_sample_influence",
    "per_sample_sqnorm",
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
