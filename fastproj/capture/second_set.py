"""The second gradient set, accumulated beside ``.grad``, and whether ``.grad`` is what backward left."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fastproj.capture.attach import current_backward

State = tuple[int, int]


class SecondSet:
    """``Σ w_i g_i`` for each parameter, over as many backward passes as ``.grad`` itself holds.

    Gradients that were dropped without a projection (``.grad`` set to None) drop their sums with them.
    Anything else that happens to ``.grad`` between two backward passes, or between a backward pass and the
    projection, is an error: the two sets would no longer belong together.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._left: dict[nn.Parameter, State] = {}
        self._projected: dict[nn.Parameter, State] = {}
        self._task: int | None = None
        self._hooks = [p.register_post_accumulate_grad_hook(self._remember) for p in self._parameters]

    def begin(self) -> bool:
        """A backward pass begins, with one loss or several; returns whether it starts from nothing."""
        task = current_backward()
        if task is not None and task == self._task:
            return False
        self._task = task
        self.check_untouched()
        for parameter in self._parameters:
            grad = parameter.grad
            if grad is None:
                self._sums.pop(parameter, None)
                self._left.pop(parameter, None)
            elif self._projected.get(parameter) == _state(grad):
                raise RuntimeError(
                    "backward() would add to gradients that are projected already: call project_() once, "
                    "after the last backward(), and zero the gradients before the next"
                )
        self._projected.clear()
        return not self._left

    def add(self, parameter: nn.Parameter, weighted: Tensor) -> None:
        """Add one call's weighted sum."""
        weighted = weighted.to(parameter.dtype).contiguous()
        if parameter in self._sums:
            self._sums[parameter].add_(weighted)
        elif parameter.grad is None:
            # Shares its buffer with the plain sum, which becomes .grad.
            self._sums[parameter] = weighted
        else:
            self._sums[parameter] = weighted.clone()

    def get(self, parameter: nn.Parameter) -> Tensor | None:
        """The sum, or None where no backward pass reached the parameter."""
        return self._sums.get(parameter)

    def reached(self, parameter: nn.Parameter) -> bool:
        """Whether a backward pass has added to the parameter's gradient since the last projection."""
        return parameter in self._left

    def check_untouched(self) -> None:
        """Raise RuntimeError where a gradient is not what the last backward pass left."""
        for parameter, state in self._left.items():
            if parameter.grad is not None and _state(parameter.grad) != state:
                raise RuntimeError(
                    "gradients were changed after backward(): project first, then unscale, clip and step; "
                    "and drop gradients that are not to be projected with zero_grad(set_to_none=True)"
                )

    def projected(self) -> None:
        """The sums are used up; remembers the gradients so that nothing is added to them."""
        self._projected = {p: _state(p.grad) for p in self._left if p.grad is not None}
        self.clear()

    def clear(self) -> None:
        """Drop all sums."""
        self._sums.clear()
        self._left.clear()

    def detach(self) -> None:
        """Stop watching the parameters."""
        for hook in self._hooks:
            hook.remove()
        self.clear()

    def _remember(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self._left[parameter] = _state(parameter.grad)


def _state(grad: Tensor) -> State:
    return id(grad), grad._version
