"""The second gradient set, accumulated beside ``.grad``."""

from __future__ import annotations

from torch import Tensor, nn


class SecondSet:
    """``Σ w_i g_i`` for each parameter, over as many backward passes as ``.grad`` itself holds.

    Gradients that were zeroed without a projection (``.grad`` set to None) start the sums anew.
    """

    def __init__(self) -> None:
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._round: dict[nn.Parameter, int] = {}
        self._rounds = 0

    def begin(self) -> None:
        """A new loss: what follows belongs to one more backward pass."""
        self._rounds += 1

    def add(self, parameter: nn.Parameter, weighted: Tensor) -> None:
        """Add one call's weighted sum."""
        weighted = weighted.to(parameter.dtype).contiguous()
        stale = parameter.grad is None and self._round.get(parameter) != self._rounds
        self._round[parameter] = self._rounds
        if stale or parameter not in self._sums:
            self._sums[parameter] = weighted
        else:
            self._sums[parameter].add_(weighted)

    def get(self, parameter: nn.Parameter) -> Tensor | None:
        """The sum, or None where no backward pass reached the parameter."""
        return self._sums.get(parameter)

    def clear(self) -> None:
        """Drop all sums."""
        self._sums.clear()
        self._round.clear()
