"""Linear combination of gradient sets, in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastproj.reference.segments import Segmentation, per_element


def combine(
    sets: Sequence[Sequence[Tensor]], coefficients: Tensor, segmentation: Segmentation
) -> list[Tensor]:
    """``out = Σ_k C[s,k] G_k``, where s is the segment of the element.

    ``sets`` holds K lists of n tensors, ``coefficients`` is (S, K). A coefficient of exactly zero leaves
    its set out, non-finite values included. The result is n fp64 tensors.
    """
    coefficients = coefficients.to(torch.float64)
    out = []
    for shards, first in zip(zip(*sets, strict=True), segmentation.first, strict=True):
        total = torch.zeros_like(shards[0], dtype=torch.float64)
        for k, shard in enumerate(shards):
            c = per_element(coefficients[:, k], shard, first, segmentation.rows)
            total = total + torch.where(c == 0, 0.0, c * shard.to(torch.float64))
        out.append(total)
    return out
