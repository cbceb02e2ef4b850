"""Gradients of single samples out of one backward pass, each parameter's whole and only in passing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fastproj.capture.sums import with_token_axis


class Consumer(Protocol):
    """What is made of the sample gradients of one batch."""

    def contraction(self, parameter: nn.Parameter, x: Tensor, delta: Tensor) -> None:
        """The gradient of sample i is ``Σ_t δ_it x_itᵀ``, from x (B, T, d_in) and delta (B, T, d_out).

        A parameter that is a vector of d elements, or is one to its layer, comes as d_out = d, d_in = 1.
        """

    def gradient(self, parameter: nn.Parameter, sample: int, gradient: Tensor) -> None:
        """The gradient of one sample, in the parameter's shape, fp32 or fp64."""


class PerSample:
    """A :class:`fastproj.capture.functions.Sink` that hands each parameter over once, whole.

    A parameter that several calls read has a gradient that is the sum of theirs; what is not linear in the
    gradient needs that sum, so its calls wait for the last of them.
    """

    def __init__(
        self, consumer: Consumer, reads: Mapping[nn.Parameter, int], names: Mapping[nn.Parameter, str]
    ) -> None:
        self._consumer = consumer
        self._reads = reads
        self._names = names
        self._waiting: dict[nn.Parameter, list[tuple[Tensor, Tensor]]] = {}
        self._came: Counter[nn.Parameter] = Counter()

    def contract(self, parameter: nn.Parameter, x: Tensor | None, delta: Tensor) -> None:
        """See :class:`fastproj.capture.functions.Sink`."""
        delta = with_token_axis(delta)
        x = delta.new_ones(1, 1, 1).expand(*delta.shape[:2], 1) if x is None else with_token_axis(x)
        self._waiting.setdefault(parameter, []).append((x, delta))
        if not self._is_last(parameter):
            return
        self._hand_over(parameter)

    def finish(self) -> None:
        """See :class:`fastproj.capture.functions.Sink`."""
        for parameter in list(self._waiting):
            self._hand_over(parameter)

    def _hand_over(self, parameter: nn.Parameter) -> None:
        calls = self._waiting.pop(parameter)
        x, delta = calls[0] if len(calls) == 1 else (torch.cat(each, 1) for each in zip(*calls, strict=True))
        with torch.autocast(delta.device.type, enabled=False):
            self._consumer.contraction(parameter, x, delta)

    def scatter(self, parameter: nn.Parameter, indices: Tensor, delta: Tensor) -> None:
        """See :class:`fastproj.capture.functions.Sink`; one sample's table at a time."""
        if self._reads.get(parameter, 1) > 1:
            raise RuntimeError(
                f"{self._names[parameter]!r} is an embedding that several calls of a forward pass read: "
                "tied and shared tables have no sample gradients here; freeze it or choose params='lora'"
            )
        self._is_last(parameter)
        wide = torch.float64 if delta.dtype == torch.float64 else torch.float32
        for sample in range(indices.shape[0]):
            gradient = delta.new_zeros(parameter.shape, dtype=wide)
            rows = delta[sample].reshape(-1, delta.shape[-1]).to(wide)
            gradient.index_add_(0, indices[sample].reshape(-1), rows)
            self._consumer.gradient(parameter, sample, gradient)

    def _is_last(self, parameter: nn.Parameter) -> bool:
        # Under reentrant checkpointing the forward pass runs without grad, and no call is counted.
        expected = max(self._reads.get(parameter, 0), 1)
        self._came[parameter] += 1
        if self._came[parameter] > expected:
            raise RuntimeError(
                f"{self._names[parameter]!r} is read more often than the forward pass showed: use gradient "
                "checkpointing with use_reentrant=False where a layer is called more than once"
            )
        return self._came[parameter] == expected
