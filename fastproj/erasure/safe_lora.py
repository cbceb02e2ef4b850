"""Safe LoRA: a fine-tune's update put back into what alignment had changed, module by module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastproj.latent.lora import LoraLayer, LoraSource, lora_layers
from fastproj.tensor_file import check_header, read_tensors, write_tensors

VERSION = 1
_HEADER = "fastproj.erasure.alignment"
_WHAT = "alignment factors"


class SafeLoRA:
    """``C = F Fᵀ`` of each module, of ``V = W_aligned − W_base``: what its alignment wrote.

    - ``rank=None``: ``F = V / √‖V‖_F``, so ``C = V Vᵀ / ‖V‖_F``, as the paper has it and its code. It is no
      projection: its scale is that of V, and an update that it is applied to shrinks or grows with it;
    - ``rank=k``: F is the first k left singular vectors of V, C the orthogonal projection onto their span.
      The paper's exact form, ``V (VᵀV)⁻¹ Vᵀ``, is that of all of them, for square V of full rank the
      identity; the rank is ours.

    ::

        fit = SafeLoRA()
        for name in ("model.layers.0.self_attn.q_proj", ...):
            fit.update(name, base.get_submodule(name).weight, aligned.get_submodule(name).weight)
        fit.eraser.project_(tuned, threshold=0.35)

    Modules are known by name. Published codes pair them by position among the names that the adapter's
    targets are part of, which a bias, or a layer that is not adapted, shifts; they divide by 0 where
    alignment changed nothing; and of a number of modules to project they take all whose cosine equals the
    last one's.

    Source: Hsu et al. 2024 (arXiv:2405.16833), section 3.2.
    """

    def __init__(self, rank: int | None = None) -> None:
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
            raise TypeError(f"rank must be a whole number or None, got {type(rank).__name__}")
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be 1 or more, got {rank}")
        self.rank = rank
        self._factors: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, name: str, base: Tensor, aligned: Tensor) -> None:
        """Take in a module's weights (d_out, d_in) before and after alignment, in any floating-point dtype.

        Factors are fp32, or fp64 where a weight is. Raises TypeError for other tensors; ValueError for other
        shapes, a name that was there before, NaN or Inf, weights that are equal, and fewer singular values
        than the rank that are not rounding.
        """
        for weight in (base, aligned):
            if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
                came = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
                raise TypeError(f"weights must be floating-point tensors, got {came}")
        if name in self._factors:
            raise ValueError(f"expected each module once, got {name!r} again")
        if base.dim() != 2 or base.shape != aligned.shape:
            raise ValueError(
                f"expected two weights (d_out, d_in) of {name!r}, got {tuple(base.shape)} and "
                f"{tuple(aligned.shape)}"
            )
        v = aligned.double() - base.double().to(aligned.device)
        size = torch.linalg.matrix_norm(v)
        if not bool(torch.isfinite(size)):
            raise ValueError(f"the weights of {name!r} hold NaN or Inf")
        if not bool(size > 0):
            raise ValueError(f"alignment changed nothing in {name!r}: its weights are equal")
        out = torch.float64 if torch.float64 in (base.dtype, aligned.dtype) else torch.float32
        self._factors[name] = (v / size.sqrt() if self.rank is None else _span(v, self.rank, name)).to(out)

    @property
    def eraser(self) -> AlignmentProjection:
        """What the modules so far give. ValueError where there are none."""
        return AlignmentProjection(dict(self._factors))


@dataclass(frozen=True, eq=False)
class AlignmentProjection:
    """``B ← F Fᵀ B`` for the adapted modules whose update strays from what alignment wrote.

    Attributes:
        factors: by a module's name in the base model, F (d_out, m), fp32 or fp64.

    Raises ValueError for none, and for factors that are not two-dimensional, fp32 or fp64.
    """

    factors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError("expected the factors of one module or more, got none")
        for name, factor in self.factors.items():
            if factor.dim() != 2 or factor.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"expected fp32 or fp64 factors (d_out, m) of {name!r}, got {factor.dtype} of "
                    f"{tuple(factor.shape)}"
                )

    @torch.no_grad()
    def cosines(self, source: LoraSource) -> dict[str, float]:
        """``cos(C ΔW, ΔW)`` of each adapted module, in fp64, from the factors of ``ΔW = s·B·A`` alone.

        0 where ΔW or C ΔW is 0. Raises what :func:`fastproj.latent.lora.lora_layers` raises, and ValueError
        for an adapted module that has no factor here, or one of another width.
        """
        return {layer.name: self._cosine(layer) for layer in self._layers(source)}

    @torch.no_grad()
    def project_(
        self, model: torch.nn.Module, *, threshold: float | None = None, count: int | None = None
    ) -> tuple[str, ...]:
        """``B ← C B`` in place, for a model's active adapter; the names of the modules projected.

        Args:
            threshold: project where the cosine is this or less.
            count: or project so many, of the lowest cosines; of equal ones those that come first.

        Raises ValueError where not one of the two is given, and as :meth:`cosines`; then nothing is changed.
        """
        if (threshold is None) == (count is None):
            raise ValueError(f"expected a threshold or a count, got {threshold} and {count}")
        layers = self._layers(model)
        cosines = [self._cosine(layer) for layer in layers]
        if threshold is not None:
            chosen = [layer for layer, cosine in zip(layers, cosines, strict=True) if cosine <= threshold]
        else:
            if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= len(layers):
                raise ValueError(f"count must be from 0 to {len(layers)}, got {count!r}")
            order = sorted(range(len(layers)), key=cosines.__getitem__)
            chosen = [layers[number] for number in sorted(order[:count])]
        for layer in chosen:
            factor = self._factor(layer, torch.promote_types(layer.b.dtype, torch.float32))
            layer.b.copy_(factor @ (factor.mT @ layer.b.to(factor.dtype)))
        return tuple(layer.name for layer in chosen)

    def save(self, path: str | Path) -> None:
        """Write the factors to one safetensors file, whole or not at all. Raises OSError where that fails."""
        write_tensors(Path(path), _HEADER, {"version": VERSION}, self.factors)

    @classmethod
    def load(cls, path: str | Path) -> AlignmentProjection:
        """Read what :meth:`save` wrote, onto the CPU; nothing is unpickled.

        Raises FileNotFoundError where there is no file, ValueError, with the path, for one that is damaged,
        is of another version, or whose factors are not finite.
        """
        path = Path(path)
        header, tensors = read_tensors(path, _HEADER, _WHAT)
        try:
            check_header(header, _HEADER, VERSION, _WHAT)
            for name, factor in tensors.items():
                if not bool(torch.isfinite(factor).all()):
                    raise ValueError(f"the factors of {name!r} hold NaN or Inf")
            return cls(tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _layers(self, source: LoraSource) -> list[LoraLayer]:
        layers = lora_layers(source)
        for layer in layers:
            factor = self.factors.get(layer.name)
            if factor is None:
                raise ValueError(f"expected factors of each adapted module, there are none of {layer.name!r}")
            if len(factor) != len(layer.b):
                raise ValueError(
                    f"the factors of {layer.name!r} have length {len(factor)}, its output {len(layer.b)}"
                )
        return layers

    def _factor(self, layer: LoraLayer, dtype: torch.dtype) -> Tensor:
        return self.factors[layer.name].to(layer.b.device, dtype)

    def _cosine(self, layer: LoraLayer) -> float:
        """``⟨C B R, B R⟩ / ‖C B R‖‖B R‖`` with ``Aᵀ = Q Rᵀ``, which changes no product of the two."""
        factor = self._factor(layer, torch.float64)
        a, b = layer.a.double(), layer.b.double()
        update = (b / _largest(b)) @ torch.linalg.qr((a / _largest(a)).mT).R.mT
        within = factor.mT @ update
        moved = factor @ within
        sizes = torch.linalg.matrix_norm(update) * torch.linalg.matrix_norm(moved)
        return float(within.square().sum() / sizes) if bool(sizes > 0) else 0.0


def _span(v: Tensor, rank: int, name: str) -> Tensor:
    """The first left singular vectors (d_out, rank)."""
    u, sizes, _ = torch.linalg.svd(v, full_matrices=False)
    found = int((sizes > sizes[0] * max(v.shape) * torch.finfo(v.dtype).eps).sum())
    if found < rank:
        raise ValueError(f"alignment changed {name!r} along {found} directions, fewer than the rank, {rank}")
    return u[:, :rank].contiguous()


def _largest(factor: Tensor) -> Tensor:
    """The largest magnitude, 1 where all are 0: squares stay in range."""
    largest = factor.abs().max()
    return torch.where(largest > 0, largest, 1.0)
