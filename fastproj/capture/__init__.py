"""Weighted sums of per-sample gradients out of one ordinary backward pass."""

from fastproj.capture.attach import Capture
from fastproj.capture.select import Obstacle, select_parameters

__all__ = ["Capture", "Obstacle", "select_parameters"]
