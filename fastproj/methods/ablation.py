"""Other ways with a direction, to compare with GRASP: ablated, steered against, taken out afterwards."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from fastproj.bindings.project_out import project_out_
from fastproj.latent.factors import LatentFactors
from fastproj.methods._constraint import SIDE_OF, bases_like, constraints
from fastproj.methods._stream import OnStream, Projection, on_blocks, stream_basis


class Ablation(OnStream):
    """``h ← h − (h U) Uᵀ`` at the outputs of blocks: the model runs without the directions while it lasts.

    Around a fine-tune it is concept ablation fine-tuning, which trains without the directions and answers
    with them; around inference, directional ablation.

    Args:
        model: any model that :func:`fastproj.architectures.blocks` knows.
        factors: directions of the residual stream, found by what modules write.
        chosen: positions of the blocks, by default all.

    Raises ValueError for other factors, architectures and positions.
    Source: Casademunt et al. 2025 (arXiv:2507.16795), concept ablation fine-tuning.
    """

    def __init__(
        self, model: nn.Module, factors: LatentFactors, chosen: Collection[int] | None = None
    ) -> None:
        super().__init__(on_blocks(model, Projection(stream_basis(factors, model)), chosen))


class Steering(OnStream):
    """``h ← h + strength · ‖h‖ · u`` at the outputs of blocks: a push along the first direction, or against.

    ``strength`` is a share of each token's own norm, which grows from block to block. Its sign matters, and
    that of a direction read from weights is arbitrary: try both on held-out texts. Other arguments and errors
    are those of :class:`Ablation`. Source: Turner et al. 2023 (arXiv:2308.10248); the scale is ours.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: LatentFactors,
        strength: float,
        chosen: Collection[int] | None = None,
    ) -> None:
        direction = stream_basis(factors, model).first(1).matrix[:, 0]

        def push(stream: Tensor) -> Tensor:
            nonlocal direction
            direction = direction.to(stream)  # moves once
            norms = torch.linalg.vector_norm(stream, dim=-1, keepdim=True)
            return stream + strength * norms * direction

        super().__init__(on_blocks(model, push, chosen))


@torch.no_grad()
def remove(model: nn.Module, factors: LatentFactors) -> None:
    """``ΔW ← ΔW − ΔW V Vᵀ`` (side "read") or ``ΔW − U Uᵀ ΔW`` ("write") of the active adapter, in place.

    What a naive fine-tune left, without its part along the directions, and without training again. Raises
    ValueError where the factors constrain none of the adapted modules.
    """
    found = constraints(model, factors, factors.side)
    parameters = [constraint.parameter for constraint in found]
    project_out_(parameters, bases_like(found, parameters), side=SIDE_OF[factors.side])
