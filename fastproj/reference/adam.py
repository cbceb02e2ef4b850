"""Adam's update direction for one sample's gradient, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Variant = Literal["adam", "less"]
VARIANTS: tuple[str, ...] = get_args(Variant)


@dataclass(frozen=True)
class AdamState:
    """``m_t``, ``v_t`` and ``t`` of one parameter, and the constants β1, β2 and ε that it is trained with.

    ``exp_avg`` (m) and ``exp_avg_sq`` (v) have the parameter's shape, fp32, bf16, fp16 or fp64; ``step`` is
    how many steps have been taken, so that a sample's update is that of step ``t + 1``. ``variant`` is
    "adam", or "less" for ε inside the root and no bias correction.

    Raises:
        TypeError: a moment is no tensor, or ``step`` no int.
        ValueError: the moments' shapes differ, ``step`` or ``eps`` is negative, a β is outside [0, 1), or
            the variant is unknown.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    variant: Variant = "adam"

    def __post_init__(self) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(getattr(self, name)).__name__}")
        if self.exp_avg.shape != self.exp_avg_sq.shape:
            raise ValueError(
                "exp_avg and exp_avg_sq must have one shape, the parameter's: "
                f"got {tuple(self.exp_avg.shape)} and {tuple(self.exp_avg_sq.shape)}"
            )
        if isinstance(self.step, bool) or not isinstance(self.step, int):
            raise TypeError(f"step must be an int, the steps taken so far, got {self.step!r}")
        if self.step < 0:
            raise ValueError(f"step must be 0 or more, the steps taken so far, got {self.step}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.eps >= 0:
            raise ValueError(f"eps must be 0 or more, got {self.eps}")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}, got {self.variant!r}")


def adam_update(gradient: Tensor, adam: AdamState) -> Tensor:
    """``Γ = m̂ / (√v̂ + ε)``: what Adam would add to the parameter, but for the learning rate and its sign.

    ``m = β1 m_t + (1 − β1) g`` and ``v = β2 v_t + (1 − β2) g²``, each divided by ``1 − β^(t+1)`` to give m̂
    and v̂. ``variant="less"`` is ``m / √(v + ε)``, no division of either.

    ``gradient`` is (…, *shape) for a parameter of that shape: each of the leading axes' gradients takes the
    step for itself. The result has its shape and dtype, in which all is computed. Where g and v_t are 0 the
    update is m̂/ε, NaN if ε is 0 too. Raises ValueError where the gradient does not end in the parameter's
    shape. Source: Kingma & Ba, "Adam", ICLR 2015, algorithm 1; Xia et al., "LESS", ICML 2024, section 3.1,
    and for the variant the code published with it.
    """
    m_hat, v_hat, _, _ = _moments(gradient, adam)
    return m_hat / _divisor(v_hat, adam)


def adam_slope(gradient: Tensor, adam: AdamState) -> Tensor:
    """``∂Γ/∂g``, element by element as Γ is: what a backward pass multiplies by.

    ``m̂'/D − m̂ D'/D²`` with ``D = √v̂ + ε`` and ``D' = v̂'/(2√v̂)``; "less" has ``D = √(v + ε)`` and
    ``D' = v'/(2D)``. Where v̂ is 0, so is g, and D' is taken as 0. Arguments, dtype and errors are those of
    ``adam_update``.
    """
    m_hat, v_hat, m_slope, v_slope = _moments(gradient, adam)
    divisor = _divisor(v_hat, adam)
    root = divisor if adam.variant == "less" else torch.sqrt(v_hat)
    bend = torch.where(root > 0, v_slope / (2 * torch.where(root > 0, root, 1.0)), 0.0)
    return m_slope / divisor - m_hat * bend / divisor.square()


def _divisor(v_hat: Tensor, adam: AdamState) -> Tensor:
    return torch.sqrt(v_hat + adam.eps) if adam.variant == "less" else torch.sqrt(v_hat) + adam.eps


def _moments(gradient: Tensor, adam: AdamState) -> tuple[Tensor, Tensor, float, Tensor]:
    """m̂ and v̂, uncorrected for "less", and how both change with g."""
    shape = adam.exp_avg.shape
    if gradient.shape[max(0, gradient.dim() - len(shape)) :] != shape:
        raise ValueError(f"expected a gradient of shape (…, *{tuple(shape)}), got {tuple(gradient.shape)}")
    m = adam.beta1 * adam.exp_avg.to(gradient.dtype) + (1 - adam.beta1) * gradient
    v = adam.beta2 * adam.exp_avg_sq.to(gradient.dtype) + (1 - adam.beta2) * gradient.square()
    m_slope, v_slope = 1 - adam.beta1, 2 * (1 - adam.beta2) * gradient
    if adam.variant == "less":
        return m, v, m_slope, v_slope
    taken = adam.step + 1
    m_correction, v_correction = 1 - adam.beta1**taken, 1 - adam.beta2**taken
    return m / m_correction, v / v_correction, m_slope / m_correction, v_slope / v_correction
