"""Gram matrix of gradient sets, in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastproj.reference.segments import Segmentation, segment_views


def gram(sets: Sequence[Sequence[Tensor]], segmentation: Segmentation) -> Tensor:
    """``M[s,a,b] = Σ_{shards in s} ⟨G_a, G_b⟩``.

    ``sets`` holds K lists of n tensors; the result is (S, K, K), fp64.
    """
    k = len(sets)
    device = sets[0][0].device if k and sets[0] else torch.device("cpu")
    out = torch.zeros(segmentation.count, k, k, dtype=torch.float64, device=device)
    for shards, first in zip(zip(*sets, strict=True), segmentation.first, strict=True):
        pieces = [list(segment_views(shard.to(torch.float64), first, segmentation.rows)) for shard in shards]
        for a in range(k):
            for b in range(k):
                for (segment, left), (_, right) in zip(pieces[a], pieces[b], strict=True):
                    out[segment, a, b] += torch.sum(left * right)
    return out
