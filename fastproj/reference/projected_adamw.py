"""A projection inside the span of gradient sets and AdamW's step along it, one after the other, in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastproj.reference.combine import combine
from fastproj.reference.segments import Segmentation

Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


def projected_adamw(
    sets: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    segmentation: Segmentation,
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[float],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Lists:
    """``G = Σ_k C[s,k] G_k``, then for each parameter p with its moments m and v, at step t, from 1 on::

        p ← p − lr·λ·p
        m ← β1 m + (1 − β1) G            v ← β2 v + (1 − β2) G²
        m̂ = m / (1 − β1ᵗ)               v̂ = v / (1 − β2ᵗ)
        p ← p − lr·m̂ / (√v̂ + ε)

    ``sets`` holds K lists of n tensors, ``coefficients`` is (S, K); a coefficient of exactly zero leaves its
    set out. ``params``, ``exp_avgs`` (m), ``exp_avg_sqs`` (v) and ``steps`` (t) are n each; λ is the weight
    decay. Returns p, m and v as lists of fp64 tensors; nothing is written. Where v̂ and ε are 0, p is NaN.
    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2, as
    ``torch.optim.AdamW`` has it: its λ is scaled by the learning rate.
    """
    gradients = combine(sets, coefficients, segmentation)
    out: Lists = ([], [], [])
    for g, p, m, v, step in zip(gradients, params, exp_avgs, exp_avg_sqs, steps, strict=True):
        exact = p.to(torch.float64)
        decayed = exact - lr * weight_decay * exact
        moment = beta1 * m.to(torch.float64) + (1 - beta1) * g
        square = beta2 * v.to(torch.float64) + (1 - beta2) * g.square()
        m_hat, v_hat = moment / (1 - beta1**step), square / (1 - beta2**step)
        out[0].append(decayed - lr * m_hat / (torch.sqrt(v_hat) + eps))
        out[1].append(moment)
        out[2].append(square)
    return out
