"""A second forward pass on the batch of the first, under fresh dropout masks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


class SecondForward:
    """Remembers what a model was called with, under which autocast, and can call it again."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._autocast: dict[str, torch.dtype] = {}
        self._handle = model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def logits(self) -> Tensor:
        """The logits of one more forward pass on the batch of the last loss.

        Raises RuntimeError where the model was not called exactly once, under grad, since the last loss.
        """
        calls, self._calls = self._calls, []
        if len(calls) != 1:
            raise RuntimeError(
                "dropout='independent' runs the model again on the batch of the loss, so there must be one "
                f"forward pass for each loss; there were {len(calls)} since the last"
            )
        args, kwargs = calls[0]
        with ExitStack() as stack:
            for device_type, dtype in self._autocast.items():
                stack.enter_context(torch.autocast(device_type, dtype))
            outputs = self._model(*args, **kwargs)
        self._calls.clear()
        return logits_of(outputs)

    def detach(self) -> None:
        """Stop listening."""
        self._handle.remove()
        self._calls.clear()

    def _remember(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        self._calls.append((args, kwargs))
        types = ("cpu", "cuda")
        self._autocast = {t: torch.get_autocast_dtype(t) for t in types if torch.is_autocast_enabled(t)}


def logits_of(outputs: Any) -> Tensor:
    """The logits of a transformers model, returned as an object, a dict, a tuple or bare."""
    if isinstance(outputs, Tensor):
        return outputs
    logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return logits
