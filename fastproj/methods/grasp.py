"""GRASP as a training loop uses it: attach, hold the optimiser, train."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastproj.bindings.project_out import project_out_
from fastproj.latent.factors import LatentFactors
from fastproj.methods._constraint import SIDE_OF, Constraint, bases_like, constraints
from fastproj.methods._stream import BackwardProjection, on_blocks, stream_basis
from fastproj.reference.basis import Basis

if TYPE_CHECKING:
    from fastproj.integrations.trainer import GraspCallback

Mode = Literal["read", "write", "stream"]
MODES: tuple[str, ...] = get_args(Mode)


class GRASP:
    """``ΔW V = 0`` or ``Uᵀ ΔW = 0`` all through training: an adapter that takes no hold of a latent factor.

    With ``ΔW = s·B·A`` and the factor's directions V (of what modules read) or U (of what they write):

    - ``mode="read"``: ``ΔW V = 0``. A and its gradient are projected from the right, ``A ← A − (A V) Vᵀ``; A
      starts at random, so it is projected at once.
    - ``mode="write"``: ``Uᵀ ΔW = 0``. B and its gradient are projected from the left, ``B ← B − U (Uᵀ B)``.
    - ``mode="stream"``: the gradient of the residual stream is projected where it enters each block from
      above, ``δ ← δ − (δ U) Uᵀ``, while the forward pass stays as it is: no adapter learns from what the loss
      asks along the factor. Modules that write into the stream are held to ``Uᵀ ΔW = 0`` as well, since
      element-wise optimisers would give them what the gradient no longer asks for.

    The frozen weights are never touched, so that ``(W + ΔW) v = W v``: what the pretrained model does with
    the factor stays. Adam's element-wise step leaves the subspace, whatever the gradient, so that the
    parameters themselves are projected after every step::

        grasp = GRASP(model, fastproj.identify(naive, side="write", rank=2), mode="write")
        grasp.hold(optimizer)  # gradients before, parameters after each of its steps
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        grasp.detach()

    Args:
        model: a PEFT model; its active LoRA adapter is constrained.
        factors: directions found on the side that the mode constrains; for ``"stream"`` those of the residual
            stream, found by what modules write.
        mode: one of the three above.

    Loss scaling, clipping, accumulation, weight decay and :class:`fastproj.EDGE`, whose ``project_`` comes
    before the step, work as they do without it. An adapter that was trained before loses its part along the
    directions at once. Copies of the parameters that an optimiser keeps elsewhere (DeepSpeed's in fp32,
    FSDP's shards) are out of reach. A context manager; :meth:`detach` takes every hook away.

    Raises ValueError for an unknown mode, and factors of the other side, of another pool or of none of the
    adapted modules.

    Source: Gilligan-Lee et al. 2026 (arXiv:2605.27676) for the idea. Only its abstract was to be had: the
    equations and the three modes are ours.
    """

    def __init__(self, model: nn.Module, factors: LatentFactors, mode: Mode = "write") -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        self.mode = mode
        basis = stream_basis(factors, model) if mode == "stream" else None
        side = "read" if mode == "read" else "write"
        self._side = SIDE_OF[side]
        self._held: list[Constraint] = constraints(model, factors, side, may_be_none=mode == "stream")
        self._hooks: list[Any] = [] if basis is None else on_blocks(model, BackwardProjection(basis))
        self._bases: list[Basis] = []
        self._place: tuple[torch.device, torch.dtype] | None = None
        self.project_parameters_()

    @property
    def constrained(self) -> tuple[str, ...]:
        """The modules whose ΔW is held, by name."""
        return tuple(constraint.layer.name for constraint in self._held)

    def hold(self, *optimizers: torch.optim.Optimizer) -> None:
        """Project before and after every step of these optimisers, each its own parameters.

        Before a step :meth:`project_gradients_`, after it :meth:`project_parameters_`, whatever calls the
        step: a loop, a GradScaler (which may skip it), Accelerate. A closure's gradients are not projected,
        its parameters are.

        Raises ValueError for an optimiser that has none of the constrained parameters.
        """
        own = set(map(id, self._parameters))
        for number, optimizer in enumerate(optimizers):
            if own and not own & _parameters_of(optimizer):
                raise ValueError(f"optimizer {number} steps none of the {len(own)} constrained parameters")
        for optimizer in optimizers:
            inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
            self._hooks.append(inner.register_step_pre_hook(self._before_step))
            self._hooks.append(inner.register_step_post_hook(self._after_step))

    def project_(self) -> None:
        """Project gradients and parameters: for loops that call it before and after ``step`` themselves."""
        self.project_gradients_()
        self.project_parameters_()

    def project_gradients_(self) -> None:
        """Take the directions out of ``.grad``, so that an optimiser's moments do not see them.

        :meth:`hold` does it when the step begins, so after clipping; call it before that, too, where the norm
        should be without them.
        """
        self._project([parameter.grad for parameter in self._parameters])

    def project_parameters_(self) -> None:
        """Put the parameters back on the constraint."""
        self._project(self._parameters)

    def violation(self) -> float:
        """The largest ``‖ΔW V‖ / ‖ΔW‖`` (or ``‖Uᵀ ΔW‖ / ‖ΔW‖``) of the constrained modules, in fp64.

        Rounding alone where the constraint holds: about 1e-7 for parameters in fp32. Waits for the device.
        """
        return max((constraint.violation() for constraint in self._held), default=0.0)

    def callback(self) -> GraspCallback:
        """A ``TrainerCallback`` that holds the trainer's optimiser while it trains."""
        from fastproj.integrations.trainer import GraspCallback

        return GraspCallback(self)

    def detach(self) -> None:
        """Let go of the model and of every optimiser; the engine is of no further use."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> GRASP:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        own = _parameters_of(optimizer)
        self._project([p.grad if id(p) in own else None for p in self._parameters])

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        own = _parameters_of(optimizer)
        self._project([p if id(p) in own else None for p in self._parameters])

    @property
    def _parameters(self) -> list[Tensor]:
        return [constraint.parameter for constraint in self._held]

    @torch.no_grad()
    def _project(self, shards: Sequence[Tensor | None]) -> None:
        """Project what is there; the bases follow the parameters to another device or dtype."""
        parameters = self._parameters
        if parameters and (parameters[0].device, parameters[0].dtype) != self._place:
            self._place = parameters[0].device, parameters[0].dtype
            self._bases = bases_like(self._held, parameters)
        project_out_(shards, self._bases, side=self._side)


def _parameters_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
