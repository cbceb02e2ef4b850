"""Which factor of which adapter a latent factor constrains, and how far it is from the constraint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastproj.architectures import stream_role
from fastproj.bindings.project_out import Side
from fastproj.latent.factors import LatentFactors
from fastproj.latent.lora import LoraLayer, lora_layers
from fastproj.reference.basis import Basis

# Where a basis stands beside the factor that it projects.
SIDE_OF: dict[str, Side] = {"read": "right", "write": "left"}


@dataclass(frozen=True, eq=False)
class Constraint:
    """``ΔW V = 0`` (side "read": through A, from the right), ``Uᵀ ΔW = 0`` ("write": B, from the left)."""

    layer: LoraLayer
    basis: Basis
    side: str

    @property
    def parameter(self) -> Tensor:
        """The factor that alone decides whether the constraint holds."""
        return self.layer.a if self.side == "read" else self.layer.b

    @torch.no_grad()
    def violation(self) -> float:
        """``‖ΔW V‖ / ‖ΔW‖`` or ``‖Uᵀ ΔW‖ / ‖ΔW‖``, Frobenius, in fp64; 0 where ΔW = 0."""
        a, b = self.layer.a.double(), self.layer.b.double()
        basis = self.basis.matrix.to(a.device, torch.float64)
        along_a, along_b = (a @ basis, b) if self.side == "read" else (a, basis.mT @ b)
        whole = _product_norm(a, b)
        return _product_norm(along_a, along_b) / whole if whole else 0.0


def _product_norm(a: Tensor, b: Tensor) -> float:
    """``‖B A‖`` from the triangles of their QR decompositions, without forming the product."""
    return float(torch.linalg.matrix_norm(torch.linalg.qr(b).R @ torch.linalg.qr(a.mT).R.mT))


def constraints(
    model: nn.Module, factors: LatentFactors, side: str, *, may_be_none: bool = False
) -> list[Constraint]:
    """The constraints on the active LoRA adapter of ``model``, module by module.

    Factors of single modules constrain these; those of the residual stream every module that reads it (side
    "read") or writes into it ("write").

    Raises ValueError where the factors were found on the other side, or constrain nothing here.
    """
    if factors.side != side:
        raise ValueError(
            f"expected factors of side {side!r}, identify(..., side={side!r}), got those of {factors.side!r}"
        )
    layers = lora_layers(model)
    found = []
    for layer in layers:
        if factors.pool == "stream" and stream_role(layer.name) != side:
            continue
        basis = factors.basis_of(layer.name, layer.a.shape[1] if side == "read" else layer.b.shape[0])
        if basis is not None and basis.rank:
            found.append(Constraint(layer, basis, side))
    if not found and not may_be_none:
        raise ValueError(
            f"the factors (of {', '.join(list(factors.bases)[:3]) or 'no module'}) constrain none of the "
            f"model's {len(layers)} adapted modules ({', '.join(layer.name for layer in layers[:3])}, …)"
        )
    return found


def bases_like(found: Sequence[Constraint], tensors: Sequence[Tensor]) -> list[Basis]:
    """The constraints' bases on the devices of ``tensors``, fp64 for those that are fp64, each basis once."""
    made: dict[tuple[int, torch.device, torch.dtype], Basis] = {}
    bases = []
    for constraint, tensor in zip(found, tensors, strict=True):
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        key = (id(constraint.basis), tensor.device, dtype)
        if key not in made:
            made[key] = constraint.basis.to(tensor.device, dtype)
        bases.append(made[key])
    return bases
