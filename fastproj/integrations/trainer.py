"""EDGE and GRASP as callbacks of Hugging Face's Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

if TYPE_CHECKING:
    from fastproj.methods.edge import EDGE
    from fastproj.methods.grasp import GRASP


class EdgeCallback(TrainerCallback):
    """Adds ``edge_cosine`` and ``edge_bias_share``, means since the last entry, to the trainer's logs.

    The projection itself runs in ``EDGE.compute_loss``, because no callback event lies between the
    backward pass and gradient clipping. Reporters that the trainer put before its callbacks have already
    written an entry when this one adds to it; the log history and the console have both.
    """

    def __init__(self, engine: EDGE) -> None:
        self._engine = engine
        self._seen: list[Tensor] = []
        self._last: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the step's statistics on the device."""
        stats = self._engine.stats
        if stats is None or stats is self._last:
            raise RuntimeError(
                "EDGE did not project before this step: pass compute_loss_func=engine.compute_loss to the "
                "Trainer, with a dataset that has labels"
            )
        self._last = stats
        self._seen.append(torch.stack([stats.cosine.mean(), stats.bias_share.mean()]))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Means over the steps since the last training entry."""
        if logs is None or "loss" not in logs or not self._seen:
            return
        cosine, share = torch.stack(self._seen).mean(0).tolist()
        self._seen.clear()
        added = {"edge_cosine": cosine, "edge_bias_share": share}
        logs.update(added)
        if state.log_history:
            state.log_history[-1].update(added)


class GraspCallback(TrainerCallback):
    """Holds the trainer's optimiser: gradients are projected before its steps, parameters after them.

    Adds ``grasp_violation``, see :meth:`GRASP.violation`, to the trainer's last entry of its logs.
    """

    def __init__(self, engine: GRASP) -> None:
        self._engine = engine

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimiser is there from here on."""
        self._engine.hold(kwargs["optimizer"])

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Once, when training is over: the violation waits for the device."""
        if logs is None or "train_runtime" not in logs:
            return
        added = {"grasp_violation": self._engine.violation()}
        logs.update(added)
        if state.log_history:
            state.log_history[-1].update(added)
