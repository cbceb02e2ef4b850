"""AdamW that projects as it steps: Gram, coefficients, one sweep over gradients, moments and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastproj.bindings._sets import GradientSets, gradient_sets, split_sets
from fastproj.bindings.combine import check_coefficients
from fastproj.bindings.projected_adamw import learning_rate
from fastproj.reference.segments import Segments

Sets = Sequence[Sequence[Tensor | None]]


class Projection(Protocol):
    """What a step is projected by: a method of ``fastproj.surgery``, or a :class:`fastproj.EDGE`.

    One that has ``further_sets(parameters)`` brings its gradient sets with it, each with a gradient or None
    for every parameter; for others they are given to :meth:`ProjectedAdamW.step`.
    """

    @property
    def granularity(self) -> Segments:
        """The segments where none are asked for."""
        ...

    def coefficients(
        self, gram: Tensor, *, precision: float = ..., generator: torch.Generator | None = ...
    ) -> Tensor:
        """``C[s,k]``, (S, K), from the Gram of ``.grad`` and the further sets, (S, K, K)."""
        ...


class ProjectedAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` along ``G = Σ_k C[s,k] G_k`` instead of ``.grad``, with G never in memory.

    ``G_0`` is ``.grad``; the further sets and the coefficients come from ``project``. Gradients, moments and
    parameters are read once, moments and parameters written once (:func:`fastproj.projected_adamw_`), where a
    projection and then AdamW write G and read it again::

        optimizer = ProjectedAdamW(model.parameters(), lr=1e-3, project=UPGrad())
        loss.backward()
        optimizer.step(sets=[second_gradients])      # or, with project=EDGE(model): optimizer.step()

    ``.grad`` keeps what it holds: ``G_0``. A parameter that no further set has a gradient for takes AdamW's
    step along ``.grad``, one without ``.grad`` takes none.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``, group by group.
        project: a method of ``fastproj.surgery``, a :class:`fastproj.EDGE` (which takes the place of its
            ``project_()``), or an object with their ``coefficients`` and ``granularity``.
        segments: as in :func:`fastproj.gram` over all parameters, in the order of the groups; ``project``'s
            own granularity where left out.
        generator: for the methods that draw an order of tasks.

    State and options are those of ``torch.optim.AdamW(fused=True)``: a ``state_dict`` of either one, fused or
    not, goes into the other. ``torch.amp.GradScaler`` is heard without waiting for the device: hand over all
    sets scaled alike and let none be unscaled. Then a step is skipped where it found NaN or Inf in ``.grad``,
    or where a coefficient is not finite. All parameters lie on one device.

    Raises TypeError where ``project`` has no coefficients or a β is no number, ValueError for an option
    outside its range and for ``amsgrad``, which is not supported.

    Equal to :func:`fastproj.combine` and AdamW one after the other, but for rounding. Source: Loshchilov &
    Hutter, ICLR 2019; the sweep: ours.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        project: Projection,
        segments: Segments | None = None,
        generator: torch.Generator | None = None,
        maximize: bool = False,
    ) -> None:
        if not callable(getattr(project, "coefficients", None)):
            raise TypeError(
                f"project must have coefficients(gram), as EDGE and the methods of fastproj.surgery have, "
                f"got {type(project).__name__}"
            )
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, fused=True)
        self.project = project
        self.segments = segments
        self.generator = generator

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer`` has it; refuses what this step does not do."""
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state and the options of this optimiser or of a ``torch.optim.AdamW``."""
        for group in state_dict["param_groups"]:
            _check_group(group)
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # Whatever AdamW the state is of, its steps are counted on the parameters' device from here on.
            group.update(fused=True, foreach=None)
            for parameter in group["params"]:
                own = self.state.get(parameter)
                if own:
                    own["step"] = own["step"].to(parameter.device, torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, sets: Sets | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the loss and the gradients again; returned is what it returns.
            sets: K − 1 further gradient sets, each one gradient or None for every parameter in the order of
                the groups. Left out where ``project`` brings its own.

        Raises TypeError and ValueError as :func:`fastproj.combine` does; ValueError where a parameter has no
        ``.grad`` but a gradient in a further set, or in some of them only, and where a moment does not fit.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        further = self._further_sets(parameters, sets)
        grads = [parameter.grad for parameter in parameters]
        reached = [any(g is not None for g in at) for at in zip(*further, strict=True)]
        own = [grad if there else None for grad, there in zip(grads, reached, strict=True)]
        rest = [None if there else grad for grad, there in zip(grads, reached, strict=True)]
        names = [".grad", *(f"set {k}" for k in range(1, len(further) + 1))]
        segments = self.project.granularity if self.segments is None else self.segments
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        todo: list[tuple[GradientSets, Tensor]] = []
        projected = gradient_sets([own, *further], segments, names)
        if projected.shards:
            coefficients = self._coefficients(projected, scale)
            todo.append((projected, coefficients))
            if found_inf is not None:
                found_inf = found_inf + (~torch.isfinite(coefficients).all()).to(found_inf)
        if any(grad is not None for grad in rest):
            plain = gradient_sets([rest], "global", [".grad"])
            todo.append((plain, plain.shards[0].new_ones(1, 1, dtype=torch.float64)))
        self._count_step([parameters[i] for checked, _ in todo for i in checked.present], found_inf)
        for checked, factors in todo:
            self._sweep(checked, factors, parameters, scale, found_inf)
        return loss

    def _further_sets(self, parameters: list[nn.Parameter], sets: Sets | None) -> list[list[Tensor | None]]:
        source = getattr(self.project, "further_sets", None)
        if source is not None:
            if sets is not None:
                raise ValueError(
                    f"{type(self.project).__name__} brings its own gradient sets; leave sets out"
                )
            return [list(own) for own in source(parameters)]
        if sets is None:
            raise TypeError(
                f"expected step(sets=...), the gradient sets beside .grad that {type(self.project).__name__} "
                "projects with, got none"
            )
        for k, own in enumerate(sets, start=1):
            if isinstance(own, Tensor) or not isinstance(own, Sequence):
                raise TypeError(f"set {k} must be a list of tensors, got {type(own).__name__}")
            if len(own) != len(parameters):
                raise ValueError(
                    f"set {k} must have a gradient or None for each of {len(parameters)} parameters, got "
                    f"{len(own)}"
                )
        return [list(own) for own in sets]

    def _coefficients(self, checked: GradientSets, scale: Tensor | None) -> Tensor:
        """The method's answer to the Gram of the unscaled sets."""
        gram = torch.ops.fastproj.gram(
            checked.shards, checked.num_sets, checked.first, checked.rows, checked.count
        )
        if scale is not None:
            gram = gram / scale.to(gram).square()
        exact = all(shard.dtype == torch.float64 for shard in checked.shards)
        precision = torch.finfo(torch.float64 if exact else torch.float32).eps
        coefficients = self.project.coefficients(gram, precision=precision, generator=self.generator)
        check_coefficients(coefficients, checked)
        return coefficients

    def _count_step(self, parameters: Sequence[nn.Parameter], found_inf: Tensor | None) -> None:
        """Make the state where there is none, and count the step unless it is to be skipped."""
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        steps = [self.state[parameter]["step"] for parameter in parameters]
        if steps and found_inf is None:
            torch._foreach_add_(steps, 1)
        elif steps and found_inf is not None:
            torch._foreach_add_(steps, found_inf.eq(0).to(torch.float32).reshape(()))

    def _sweep(
        self,
        checked: GradientSets,
        coefficients: Tensor,
        parameters: Sequence[nn.Parameter],
        scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """One call of the operator for each group that has a part in it."""
        sets = split_sets(checked.shards, checked.num_sets)
        for group, chosen in self._members(checked.present):
            own = [parameters[checked.present[j]] for j in chosen]
            state = [self._state_of(parameter) for parameter in own]
            exp_avgs, exp_avg_sqs, steps = (list(tensors) for tensors in zip(*state, strict=True))
            beta1, beta2 = group["betas"]
            torch.ops.fastproj.projected_adamw_(
                [shards[j] for shards in sets for j in chosen],
                coefficients,
                [checked.first[j] for j in chosen],
                checked.rows,
                [parameter.detach() for parameter in own],
                exp_avgs,
                exp_avg_sqs,
                steps,
                learning_rate(group["lr"]),
                beta1,
                beta2,
                group["eps"],
                group["weight_decay"],
                group["maximize"],
                scale,
                found_inf,
            )

    def _members(self, present: Sequence[int]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Of each group, which of the parameters at these positions are its own."""
        end = 0
        for group in self.param_groups:
            begin, end = end, end + len(group["params"])
            chosen = [j for j, position in enumerate(present) if begin <= position < end]
            if chosen:
                yield group, chosen

    def _state_of(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
        """m, v and t, which lie where the parameter does and are as large: the sweep goes by addresses."""
        state = self.state[parameter]
        m, v, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
        shape, device = parameter.shape, parameter.device
        if not (m.shape == shape and v.shape == shape and step.numel() == 1 and step.dtype == torch.float32):
            raise ValueError(
                f"exp_avg and exp_avg_sq must be {tuple(shape)} as their parameter is, step one fp32 number; "
                f"got {tuple(m.shape)}, {tuple(v.shape)} and {tuple(step.shape)} of {step.dtype}"
            )
        if not (m.device == device and v.device == device and step.device == device):
            raise ValueError(
                f"exp_avg, exp_avg_sq and step must be on {device} as their parameter is, got {m.device}, "
                f"{v.device} and {step.device}"
            )
        return m, v, step


def _check_group(group: Mapping[str, Any]) -> None:
    if group.get("amsgrad"):
        raise ValueError("amsgrad is not supported by ProjectedAdamW, got amsgrad=True")
    for beta in group.get("betas", ()):
        if isinstance(beta, bool) or not isinstance(beta, (int, float)):
            raise TypeError(f"betas must be numbers, got {type(beta).__name__}")
