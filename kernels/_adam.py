"""Adam's update as the kernels compute it: constants taken out of the element-wise arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Update:
    """``u = scale (moment m_t + g) / (√(square v_t + inside + g²) + outside)``: all variants of Adam.

    Taking ``(1 − β1) g`` and ``(1 − β2) g²`` without their factors leaves one multiplication less for each.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    moment: float
    square: float
    inside: float
    outside: float
    scale: float


def update_of(
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    step: int = 0,
    beta1: float = 0.0,
    beta2: float = 0.0,
    eps: float = 0.0,
    variant: str = "adam",
) -> Update | None:
    """The update of step ``step + 1`` as ``fastproj.reference.adam`` has it; None without moments."""
    if exp_avg is None or exp_avg_sq is None:
        return None
    less = variant == "less"
    first, second = 1 - beta1, 1 - beta2
    m_correction = 1.0 if less else 1 - beta1 ** (step + 1)
    v_correction = 1.0 if less else 1 - beta2 ** (step + 1)
    root = (second / v_correction) ** 0.5
    return Update(
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        moment=beta1 / first,
        square=beta2 / second,
        inside=eps / second if less else 0.0,
        outside=0.0 if less else eps / root,
        scale=first / (m_correction * root),
    )
