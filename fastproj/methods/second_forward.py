"""A second forward pass on the batch of the first, under fresh dropout masks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


class SecondForward:
    """Remembers what a model was last called with, under which autocast, and can call it again."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._autocast: dict[str, torch.dtype] = {}
        self._handle = model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def logits(self) -> Tensor:
        """The logits of one more forward pass. Raises RuntimeError before the first."""
        if self._call is None:
            raise RuntimeError("dropout='independent' runs the model again, but it has not been called yet")
        args, kwargs = self._call
        with ExitStack() as stack:
            for device_type, dtype in self._autocast.items():
                stack.enter_context(torch.autocast(device_type, dtype))
            outputs = self._model(*args, **kwargs)
        logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs
        return logits

    def detach(self) -> None:
        """Stop listening."""
        self._handle.remove()
        self._call = None

    def _remember(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = (args, kwargs)
        types = ("cpu", "cuda")
        self._autocast = {t: torch.get_autocast_dtype(t) for t in types if torch.is_autocast_enabled(t)}
