"""What is made of sample gradients as they pass: scores against references, and sketches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastproj.bindings.per_sample_grad import per_sample_grad
from fastproj.bindings.per_sample_influence import per_sample_influence
from fastproj.bindings.sketch import sketch
from fastproj.reference.adam import AdamState, adam_update

MOST_ELEMENTS = 2**25  # of the sample gradients that are in memory together on their way to a sketch


class ScoreConsumer:
    """``⟨R_m, Γ_i⟩`` and ``‖Γ_i‖²`` summed over parameters: ``dots`` (B, M) and ``sqnorms`` (B,), in fp64."""

    def __init__(
        self,
        samples: int,
        references: Mapping[nn.Parameter, Tensor],
        adam: Mapping[nn.Parameter, AdamState] | None,
    ) -> None:
        first = next(iter(references.values()))
        self._references, self._adam = references, adam
        self.dots = torch.zeros(samples, first.shape[0], dtype=torch.float64, device=first.device)
        self.sqnorms = torch.zeros(samples, dtype=torch.float64, device=first.device)

    def contraction(self, parameter: nn.Parameter, x: Tensor, delta: Tensor) -> None:
        """See :class:`fastproj.capture.per_sample.Consumer`."""
        shape = (delta.shape[2], x.shape[2])
        dots, sqnorms = per_sample_influence(
            x,
            delta,
            self._references[parameter].reshape(-1, *shape),
            adam=None if self._adam is None else reshaped(self._adam[parameter], shape),
        )
        self.dots += dots
        self.sqnorms += sqnorms

    def gradient(self, parameter: nn.Parameter, sample: int, gradient: Tensor) -> None:
        """See :class:`fastproj.capture.per_sample.Consumer`."""
        update = gradient if self._adam is None else adam_update(gradient, self._adam[parameter])
        flat = update.flatten().double()
        self.dots[sample] += self._references[parameter].flatten(1).double() @ flat
        self.sqnorms[sample] += flat.square().sum()


class SketchConsumer:
    """``P Γ_i`` over all parameters, each at its place in the vector of them: ``sketches`` (B, k)."""

    def __init__(
        self,
        samples: int,
        dimension: int,
        places: Mapping[nn.Parameter, int],
        adam: Mapping[nn.Parameter, AdamState] | None,
        *,
        kind: str,
        seed: int,
    ) -> None:
        first = next(iter(places))
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self._places, self._adam, self._kind, self._seed = places, adam, kind, seed
        self.sketches = torch.zeros(samples, dimension, dtype=dtype, device=first.device)

    def contraction(self, parameter: nn.Parameter, x: Tensor, delta: Tensor) -> None:
        """See :class:`fastproj.capture.per_sample.Consumer`."""
        step = max(1, MOST_ELEMENTS // parameter.numel())
        for first in range(0, x.shape[0], step):
            rows = slice(first, first + step)
            # The result has the wider dtype: Adam's second moments are beyond what fp16 holds.
            gradients = per_sample_grad(x[rows], delta[rows].to(self.sketches.dtype))
            self._add(parameter, gradients.flatten(1), rows)

    def gradient(self, parameter: nn.Parameter, sample: int, gradient: Tensor) -> None:
        """See :class:`fastproj.capture.per_sample.Consumer`."""
        self._add(parameter, gradient.view(1, -1), slice(sample, sample + 1))

    def _add(self, parameter: nn.Parameter, gradients: Tensor, rows: slice) -> None:
        if self._adam is not None:
            gradients = adam_update(gradients, reshaped(self._adam[parameter], (parameter.numel(),)))
        self.sketches[rows] += sketch(
            gradients,
            self.sketches.shape[1],
            seed=self._seed,
            kind=self._kind,
            offset=self._places[parameter],
        )


def reshaped(adam: AdamState, shape: tuple[int, ...]) -> AdamState:
    """The moments in another shape of as many elements."""
    return replace(adam, exp_avg=adam.exp_avg.reshape(shape), exp_avg_sq=adam.exp_avg_sq.reshape(shape))
