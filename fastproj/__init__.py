"""fastproj: kernel-accelerated gradient projections for debiased fine-tuning.

Every name below is imported at its first use, so that importing the package costs nothing: no CUDA
context, no triton, no transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastproj.balance.adapter import add_balance_adapter, load_balance_adapter
    from fastproj.balance.early_exit import EarlyExit, early_exit
    from fastproj.balance.interchange import (
        InterchangePair,
        LayerScores,
        interchange_ablation,
        interchange_pairs,
    )
    from fastproj.balance.label_logits import label_logits
    from fastproj.balance.labels import LabelWords, label_words
    from fastproj.balance.objective import BalanceObjective
    from fastproj.bindings.balance_loss import BalanceLoss, RunningMeans, balance_loss
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
    from fastproj.bindings.projected_adamw import projected_adamw_
    from fastproj.bindings.sketch import sketch
    from fastproj.bindings.weighted_grad import weighted_grad
    from fastproj.erasure.difference_of_means import DifferenceOfMeans
    from fastproj.erasure.eraser import Eraser
    from fastproj.erasure.inlp import INLP, nullspace_projection
    from fastproj.erasure.leace import LEACE
    from fastproj.erasure.principal_directions import PrincipalDirections
    from fastproj.erasure.safe_lora import SafeLoRA
    from fastproj.erasure.stream import StreamErasure
    from fastproj.influence.scorer import InfluenceScorer
    from fastproj.influence.select import select
    from fastproj.latent.describe import describe
    from fastproj.latent.factors import LatentFactors
    from fastproj.latent.identify import identify
    from fastproj.methods.edge import EDGE
    from fastproj.methods.grasp import GRASP
    from fastproj.optim.projected import ProjectedOptimizer
    from fastproj.optim.projected_adamw import ProjectedAdamW
    from fastproj.reference.adam import AdamState
    from fastproj.reference.basis import Basis, orthonormalize
    from fastproj.surgery.project import project

__version__ = "0.1.0"

_HOME = {
    "EDGE": "fastproj.methods.edge",
    "GRASP": "fastproj.methods.grasp",
    "INLP": "fastproj.erasure.inlp",
    "LEACE": "fastproj.erasure.leace",
    "AdamState": "fastproj.reference.adam",
    "BalanceLoss": "fastproj.bindings.balance_loss",
    "BalanceObjective": "fastproj.balance.objective",
    "Basis": "fastproj.reference.basis",
    "DifferenceOfMeans": "fastproj.erasure.difference_of_means",
    "EarlyExit": "fastproj.balance.early_exit",
    "EdgeStats": "fastproj.bindings.edge",
    "Eraser": "fastproj.erasure.eraser",
    "InfluenceScorer": "fastproj.influence.scorer",
    "InterchangePair": "fastproj.balance.interchange",
    "LabelWords": "fastproj.balance.labels",
    "LatentFactors": "fastproj.latent.factors",
    "LayerScores": "fastproj.balance.interchange",
    "PrincipalDirections": "fastproj.erasure.principal_directions",
    "ProjectedAdamW": "fastproj.optim.projected_adamw",
    "ProjectedOptimizer": "fastproj.optim.projected",
    "RunningMeans": "fastproj.bindings.balance_loss",
    "SafeLoRA": "fastproj.erasure.safe_lora",
    "SampleLosses": "fastproj.bindings.cross_entropy",
    "StreamErasure": "fastproj.erasure.stream",
    "add_balance_adapter": "fastproj.balance.adapter",
    "balance_loss": "fastproj.bindings.balance_loss",
    "combine": "fastproj.bindings.combine",
    "cross_entropy": "fastproj.bindings.cross_entropy",
    "describe": "fastproj.latent.describe",
    "early_exit": "fastproj.balance.early_exit",
    "edge": "fastproj.bindings.edge",
    "edge_": "fastproj.bindings.edge",
    "gram": "fastproj.bindings.gram",
    "identify": "fastproj.latent.identify",
    "interchange_ablation": "fastproj.balance.interchange",
    "interchange_pairs": "fastproj.balance.interchange",
    "label_logits": "fastproj.balance.label_logits",
    "label_words": "fastproj.balance.labels",
    "load_balance_adapter": "fastproj.balance.adapter",
    "nullspace_projection": "fastproj.erasure.inlp",
    "orthonormalize": "fastproj.reference.basis",
    "per_sample_dot": "fastproj.bindings.per_sample_influence",
    "per_sample_grad": "fastproj.bindings.per_sample_grad",
    "per_sample_influence": "fastproj.bindings.per_sample_influence",
    "per_sample_sqnorm": "fastproj.bindings.per_sample_influence",
    "project": "fastproj.surgery.project",
    "project_out": "fastproj.bindings.project_out",
    "project_out_": "fastproj.bindings.project_out",
    "project_out_stream": "fastproj.bindings.project_out",
    "projected_adamw_": "fastproj.bindings.projected_adamw",
    "select": "fastproj.influence.select",
    "sketch": "fastproj.bindings.sketch",
    "weighted_grad": "fastproj.bindings.weighted_grad",
}

__all__ = [
    "EDGE",
    "GRASP",
    "INLP",
    "LEACE",
    "AdamState",
    "BalanceLoss",
    "BalanceObjective",
    "Basis",
    "DifferenceOfMeans",
    "EarlyExit",
    "EdgeStats",
    "Eraser",
    "InfluenceScorer",
    "InterchangePair",
    "LabelWords",
    "LatentFactors",
    "LayerScores",
    "PrincipalDirections",
    "ProjectedAdamW",
    "ProjectedOptimizer",
    "RunningMeans",
    "SafeLoRA",
    "SampleLosses",
    "StreamErasure",
    "add_balance_adapter",
    "balance_loss",
    "combine",
    "cross_entropy",
    "describe",
    "early_exit",
    "edge",
    "edge_",
    "gram",
    "identify",
    "interchange_ablation",
    "interchange_pairs",
    "label_logits",
    "label_words",
    "load_balance_adapter",
    "nullspace_projection",
    "orthonormalize",
    "per_sample_dot",
    "per_sample_grad",
    "per_sample_influence",
    "per_sample_sqnorm",
    "project",
    "project_out",
    "project_out_",
    "project_out_stream",
    "projected_adamw_",
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
