"""Concept erasure: fitted on activations or weights, applied to activations, gradients or weights."""

from fastproj.erasure.difference_of_means import DifferenceOfMeans
from fastproj.erasure.eraser import Eraser, ObliqueEraser, OrthogonalEraser
from fastproj.erasure.inlp import INLP, nullspace_projection
from fastproj.erasure.leace import LEACE
from fastproj.erasure.principal_directions import PrincipalDirections
from fastproj.erasure.safe_lora import AlignmentProjection, SafeLoRA
from fastproj.erasure.stream import StreamErasure

__all__ = [
    "INLP",
    "LEACE",
    "AlignmentProjection",
    "DifferenceOfMeans",
    "Eraser",
    "ObliqueEraser",
    "OrthogonalEraser",
    "PrincipalDirections",
    "SafeLoRA",
    "StreamErasure",
    "nullspace_projection",
]
