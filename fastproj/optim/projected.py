"""Any torch optimiser with a projection before its step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastproj.reference.segments import Segments
from fastproj.surgery._method import Method
from fastproj.surgery.project import project as project_sets

Gradients = list[Tensor | None]
Projection = Callable[[Gradients], "Sequence[Tensor | None] | None"]


class ProjectedOptimizer:
    """Project ``.grad`` before each ``step()`` of an optimiser, of whatever class it is.

    With a method of ``fastproj.surgery``, :meth:`keep` sets gradients aside and the step combines them::

        optimizer = ProjectedOptimizer(torch.optim.AdamW(model.parameters()), project=AGEM())
        memory_loss.backward()
        optimizer.keep()            # the gradient of the memory
        loss.backward()             # the one that is projected stays in .grad: set 0
        optimizer.step()

    A function gets the gradients of all parameters in the order of ``param_groups``, None for those that have
    none, and returns what replaces them; None where it has changed them in place.

    The projection is a step hook of the wrapped optimiser: schedulers, gradient scalers and trainers may hold
    that one, ``wrapped.optimizer``, and its ``state_dict`` is what it was. A closure's gradients are
    projected each time that it is called. Clipping between ``backward()`` and ``step()`` comes before the
    projection.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        project: a method, or a function as above.
        segments, generator: as in :func:`fastproj.project`, for a method.

    Raises:
        TypeError: optimizer or project is something else.
        RuntimeError, at the step: gradients were kept and none has come since; a method and nothing kept,
            where it needs more than one set; a function returned another number of gradients.

    A parameter that one set has no gradient of counts with zeros there.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        project: Method | Projection,
        *,
        segments: Segments | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(project, type) or not (isinstance(project, Method) or callable(project)):
            raise TypeError(f"project must be a method of fastproj.surgery or a function, got {project!r}")
        if not isinstance(project, Method) and not (segments is None and generator is None):
            raise TypeError("segments and generator belong to a method; a function has its own")
        self.optimizer = optimizer
        self.project = project
        self.segments = segments
        self.generator = generator
        self._kept: list[dict[Tensor, Tensor]] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the wrapped optimiser."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """That of the wrapped optimiser."""
        return self.optimizer.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Project, then step."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad``; what was kept stays until the next step or :meth:`forget`."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """That of the wrapped optimiser: interchangeable with one that was never wrapped."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the wrapped optimiser."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, group: dict[str, Any]) -> None:
        """To the wrapped optimiser."""
        self.optimizer.add_param_group(group)

    def keep(self) -> None:
        """Move ``.grad`` into a gradient set of its own, for the next step, and leave None there.

        Raises RuntimeError where no parameter has a gradient, and where ``project`` is a function.
        """
        if not isinstance(self.project, Method):
            raise RuntimeError("keep() is for the methods of fastproj.surgery; a function gets .grad alone")
        kept = {p: p.grad for p in self._parameters() if p.grad is not None}
        if not kept:
            raise RuntimeError("keep() found no gradient: call backward() first")
        self._kept.append(kept)
        for parameter in kept:
            parameter.grad = None

    def forget(self) -> None:
        """Drop what was kept."""
        self._kept.clear()

    def remove(self) -> None:
        """Leave the optimiser as it was found."""
        for handle in self._handles:
            handle.remove()
        self.forget()

    def _parameters(self) -> Iterable[Tensor]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._project()
            return None

        def projected_closure() -> Any:
            loss = closure()
            self._project()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": projected_closure}
        return (args[0], projected_closure, *args[2:]), kwargs

    def _after_step(self, *_: Any) -> None:
        self.forget()

    @torch.no_grad()
    def _project(self) -> None:
        parameters = list(self._parameters())
        current: Gradients = [parameter.grad for parameter in parameters]
        if isinstance(self.project, Method):
            projected: Sequence[Tensor | None] | None = self._combined(self.project, parameters, current)
        else:
            projected = self.project(current)
        if projected is None:
            return
        if len(projected) != len(parameters):
            raise RuntimeError(
                f"project must return one gradient per parameter: expected {len(parameters)}, got "
                f"{len(projected)}"
            )
        for parameter, gradient in zip(parameters, projected, strict=True):
            if gradient is not parameter.grad:
                parameter.grad = gradient

    def _combined(self, method: Method, parameters: list[Tensor], current: Gradients) -> Gradients:
        """The method's result, written over the gradients where there are some."""
        if all(gradient is None for gradient in current):
            raise RuntimeError(
                "no gradient to project: the last backward() before step() must not be followed by keep()"
            )
        sets = [current, *([kept.get(p) for p in parameters] for kept in self._kept)]
        reached = [any(own[i] is not None for own in sets) for i in range(len(parameters))]
        filled = [
            [
                torch.zeros_like(p) if gradient is None and there else gradient
                for p, gradient, there in zip(parameters, own, reached, strict=True)
            ]
            for own in sets
        ]
        return project_sets(filled, method, segments=self.segments, generator=self.generator, out=filled[0])
