"""What the methods of gradient surgery have in common: a Gram matrix in, coefficients out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastproj.surgery._unit_gram import UnitGram, unit_gram

MOST_SETS = 64
EXACT = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Method(ABC):
    """A projection inside the span of K gradients, ``out = Σ_k C[s,k] G_k``, solved on their Gram matrix.

    ``granularity`` is what :func:`fastproj.project` takes for segments where it is given none: those of the
    method's paper. A method keeps no state but where its own docstring says so.
    """

    granularity: ClassVar[str] = "global"
    sets_needed: ClassVar[tuple[int, int]] = (1, MOST_SETS)

    @torch.no_grad()
    def coefficients(
        self, gram: Tensor, *, precision: float = EXACT, generator: torch.Generator | None = None
    ) -> Tensor:
        """``C[s,k]`` of the result ``Σ_k C[s,k] G_k``.

        Args:
            gram: (S, K, K), ``⟨G_a, G_b⟩`` segment by segment, K ≤ 64, floating point.
            precision: to how much of ``|G_a||G_b|`` the inner products are good; what is linearly dependent
                to it counts as dependent. At least the rounding of gram's own dtype.
            generator: where the order of tasks is drawn from, by the methods that draw one; on the CPU.

        Returns:
            (S, K) in fp64 on gram's device; NaN for a segment whose Gram is not finite. The numbers of
            iterations are fixed and the host never waits for the device. Not differentiable.

        Raises:
            TypeError: gram is not a floating-point tensor.
            ValueError: its shape is another, or the method is of another number of gradients.
        """
        self._check(gram)
        unit = unit_gram(gram.to(torch.float64), max(precision, torch.finfo(gram.dtype).eps))
        return torch.where(unit.finite[:, None], self._solve(unit, generator), torch.nan)

    @abstractmethod
    def _solve(self, unit: UnitGram, generator: torch.Generator | None) -> Tensor:
        """The coefficients (S, K) for finite segments; whatever for the others."""

    def _check(self, gram: Tensor) -> None:
        if not isinstance(gram, Tensor) or not gram.dtype.is_floating_point:
            came = gram.dtype if isinstance(gram, Tensor) else type(gram).__name__
            raise TypeError(f"gram must be a floating-point tensor, got {came}")
        if gram.dim() != 3 or gram.shape[1] != gram.shape[2]:
            raise ValueError(f"gram must be (S, K, K), got {tuple(gram.shape)}")
        fewest, most = self.sets_needed
        if not fewest <= gram.shape[1] <= most:
            wanted = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            raise ValueError(f"{type(self).__name__} takes {wanted} gradient sets, got {gram.shape[1]}")


def check_number(name: str, value: float, least: float, most: float = float("inf")) -> None:
    """Raise TypeError where an option is no number, ValueError where it is outside ``[least, most]``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not least <= value <= most or value == float("inf"):
        bounds = f"at least {least:g} and finite" if most == float("inf") else f"from {least:g} to {most:g}"
        raise ValueError(f"{name} must be {bounds}, got {value}")


def preference_weights(preference: tuple[float, ...] | None, unit: UnitGram) -> Tensor:
    """One weight for each gradient, (K,): the given ones, or ``1/K``."""
    size = unit.norms.shape[-1]
    if preference is None:
        return torch.full((size,), 1 / size, dtype=unit.norms.dtype, device=unit.norms.device)
    if len(preference) != size:
        raise ValueError(
            f"preference must have one weight per gradient set: expected {size}, got {len(preference)}"
        )
    return torch.tensor(preference, dtype=unit.norms.dtype).to(unit.norms.device, non_blocking=True)


def check_preference(preference: tuple[float, ...] | None) -> None:
    """Weights are finite, not negative and not all zero."""
    if preference is None:
        return
    for weight in preference:
        check_number("a preference", weight, 0.0)
    if not any(preference):
        raise ValueError("preference must have a weight above 0, got zeros only")
