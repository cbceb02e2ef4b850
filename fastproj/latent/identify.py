"""Candidate latent factors from the weights of a naive LoRA fine-tune."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastproj.architectures import Role, stream_role
from fastproj.latent.factors import STREAM, LatentFactors, Pool, Side
from fastproj.latent.lora import LoraLayer, LoraSource, lora_layers, spectrum, unit_scaled
from fastproj.latent.null import module_null, p_values, quantiles, stream_null
from fastproj.reference.basis import MOST_RANK, Basis, orthonormalize

Weighting = Literal["energy", "relative", "uniform"]
# Singular values within so many roundings of the largest are of rounding alone.
_ROUNDINGS = 8


@dataclass(frozen=True, eq=False)
class _Module:
    """A module that learnt something, seen from one side: singular vectors (d, k), values (k,), its rank."""

    layer: LoraLayer
    vectors: Tensor
    singular: Tensor
    rank: int

    @property
    def width(self) -> int:
        return self.vectors.shape[0]

    @property
    def relative(self) -> Tensor:
        """Rows ``σᵢuᵢᵀ/‖ΔW‖_F``, (k, d)."""
        unit = self.singular / self.singular[0]
        return (self.vectors * (unit / torch.linalg.vector_norm(unit))).mT


def identify(
    source: LoraSource,
    *,
    side: Side = "write",
    rank: int = 1,
    pool: Pool = "stream",
    weighting: Weighting = "energy",
    adapter: str | None = None,
    draws: int = 100,
    seed: int = 0,
) -> LatentFactors:
    """The directions that a naive fine-tune relies on most, and whether they stand out from chance.

    Of each module's ``ΔW = U diag(σ) Vᵀ``, from its factors alone, the vectors of one side: U, what is
    written, or V, what is read. pool="module" takes each module's own leading ones. pool="stream" takes the
    leading eigenvectors of ``Σ_l w_l U_l diag(σ_l²) U_lᵀ`` over the modules that write the residual stream
    (or V_l, over those that read it), by their names and the width that most of them share. Modules that
    learnt nothing are left out, and named by ``LatentFactors.unchanged``.

    Signs are chosen: the largest entry is positive. All in fp64 on the CPU; no d × d matrix of ΔW is formed.

    Args:
        source: a PEFT model, or the folder of an adapter; see :func:`fastproj.latent.lora.lora_layers`.
        side: ``"write"`` or ``"read"``. Readers read the stream behind their block's norm, so the directions
            of the read side lie in the coordinates of their input, gain included; those of Gemma 2 and 3 on
            the write side in the writers' output, before the norm that follows them there.
        rank: how many directions, at most 64 and what the weights hold beyond rounding.
        pool: ``"stream"`` or ``"module"``.
        weighting: of pool="stream". ``"energy"``: w = 1; ``"relative"``: ``w = 1/‖ΔW_l‖²_F``, so that no
            module dominates; ``"uniform"``: σ = 1 too, what counts is the span of each.
        adapter: which of several.
        draws: of the permutation test, see :mod:`fastproj.latent.null`; 0 makes none.
        seed: of the test. The global generator is left alone.

    Raises:
        ValueError: an option out of range; a rank that the weights do not have; nothing learnt, as in a fresh
            adapter, where B = 0; no module on the stream; whatever ``lora_layers`` refuses.

    Source: the idea, Gilligan-Lee et al. 2026 (arXiv:2605.27676, abstract); weightings and tests are ours.
    """
    _check_options(side, rank, pool, weighting, draws)
    layers = lora_layers(source, adapter)
    spectra: dict[str, Tensor] = {}
    modules = []
    for layer in layers:
        u, singular, v = spectrum(layer)
        spectra[layer.name] = singular
        if bool(singular.any()):
            vectors = u if side == "write" else v
            modules.append(_Module(layer, vectors, singular, _numerical_rank(layer, singular)))
    if not modules:
        raise ValueError(f"nothing was learnt: ΔW = B A is zero in all {len(layers)} modules")
    generator = torch.Generator().manual_seed(seed)
    if pool == "stream":
        return _pooled(modules, spectra, side, rank, weighting, draws, generator)
    return _apart(modules, spectra, side, rank, draws, generator)


def _check_options(side: str, rank: int, pool: str, weighting: str, draws: int) -> None:
    for option, value, kind in (
        ("side", side, Side),
        ("pool", pool, Pool),
        ("weighting", weighting, Weighting),
    ):
        if value not in get_args(kind):
            raise ValueError(f"{option}: expected one of {', '.join(get_args(kind))}, got {value!r}")
    if pool == "module" and weighting != "energy":
        raise ValueError(f"weighting is of pool='stream' alone, got {weighting!r}")
    if not 1 <= rank <= MOST_RANK:
        raise ValueError(f"rank: expected 1 to {MOST_RANK}, got {rank}")
    if draws < 0:
        raise ValueError(f"draws: expected 0 or more, got {draws}")


def _numerical_rank(layer: LoraLayer, singular: Tensor) -> int:
    """Directions beyond the rounding of fp32, or of fp64 factors. Those of 16 bits are taken as exact."""
    wide = layer.a.dtype == layer.b.dtype == torch.float64
    precision = torch.finfo(torch.float64 if wide else torch.float32).eps
    tolerance = _ROUNDINGS * precision * len(singular) ** 0.5
    return int((singular > tolerance * singular[0]).sum())


def _pooled(
    modules: Sequence[_Module],
    spectra: Mapping[str, Tensor],
    side: Side,
    rank: int,
    weighting: Weighting,
    draws: int,
    generator: torch.Generator,
) -> LatentFactors:
    on_stream = _on_stream(modules, side)
    stack = _stack(on_stream, weighting)
    basis, shares = _leading(stack.flatten(0, 1), rank)
    null = stream_null(stack, rank, draws, generator)
    agreement = _energy_along(_stack(on_stream, "relative"), basis.matrix)
    return LatentFactors(
        side=side,
        pool="stream",
        bases={STREAM: basis},
        spectra=spectra,
        shares={STREAM: shares},
        agreement={STREAM: agreement},
        p_values={STREAM: p_values(shares, null)},
        null_shares={STREAM: quantiles(null)},
        modules=tuple(module.layer.name for module in on_stream),
    )


def _apart(
    modules: Sequence[_Module],
    spectra: Mapping[str, Tensor],
    side: Side,
    rank: int,
    draws: int,
    generator: torch.Generator,
) -> LatentFactors:
    for module in modules:
        if rank > module.rank:
            raise ValueError(
                f"rank: expected at most {module.rank}, the directions of {module.layer.name!r} beyond "
                f"rounding, got {rank}"
            )
    names = [module.layer.name for module in modules]
    bases = {module.layer.name: orthonormalize(_signed(module.vectors[:, :rank])) for module in modules}
    shares = {module.layer.name: module.relative.square().sum(1)[:rank] for module in modules}
    factors = [(unit_scaled(m.layer.b)[0], unit_scaled(m.layer.a)[0]) for m in modules]
    null = dict(zip(names, module_null(factors, rank, draws, generator), strict=True))
    return LatentFactors(
        side=side,
        pool="module",
        bases=bases,
        spectra=spectra,
        shares=shares,
        agreement=_agreement(modules, bases),
        p_values={name: p_values(shares[name], null[name]) for name in names},
        null_shares={name: quantiles(null[name]) for name in names},
        modules=tuple(names),
    )


def _on_stream(modules: Sequence[_Module], side: Side) -> list[_Module]:
    """Modules that do to the stream what the side says, of the width that most of them share."""
    candidates = [module for module in modules if stream_role(module.layer.name) == side]
    if not candidates:
        raise ValueError(
            f"expected modules that {side} the residual stream by their names, there are none of "
            f"{len(modules)}, the first of them {modules[0].layer.name!r}; pool='module' needs none"
        )
    widths = Counter(module.width for module in candidates).most_common()
    if len(widths) > 1 and widths[0][1] == widths[1][1]:
        raise ValueError(
            f"expected one width of the residual stream, got {widths[0][1]} modules each of "
            f"{widths[0][0]} and {widths[1][0]}"
        )
    return [module for module in candidates if module.width == widths[0][0]]


def _stack(modules: Sequence[_Module], weighting: Weighting) -> Tensor:
    """Weighted singular vectors as rows, (modules, r, d), zero rows where a module has fewer than others."""
    largest = max(float(module.singular[0]) for module in modules)
    stack = modules[0].vectors.new_zeros(
        len(modules), max(len(module.singular) for module in modules), modules[0].width
    )
    for rows, module in zip(stack, modules, strict=True):
        if weighting == "energy":
            own = (module.vectors * (module.singular / largest)).mT
        elif weighting == "relative":
            own = module.relative
        else:
            own = module.vectors[:, : module.rank].mT
        rows[: own.shape[0]] = own
    return stack


def _leading(rows: Tensor, rank: int) -> tuple[Basis, Tensor]:
    """The leading right singular vectors of ``rows`` and their shares, by the smaller Gram matrix."""
    few = rows.shape[0] < rows.shape[1]
    energies, vectors = torch.linalg.eigh(rows @ rows.mT if few else rows.mT @ rows)
    energies, vectors = energies.flip(0), vectors.flip(1)[:, :rank]
    tolerance = _ROUNDINGS * torch.finfo(rows.dtype).eps * max(rows.shape)
    most = int((energies > tolerance * energies[0]).sum())
    if rank > most:
        raise ValueError(
            f"rank: expected at most {most}, the directions of all pooled modules beyond rounding, got {rank}"
        )
    directions = rows.mT @ (vectors / energies[:rank].sqrt()) if few else vectors
    return orthonormalize(_signed(directions)), energies[:rank] / rows.square().sum()


def _signed(directions: Tensor) -> Tensor:
    """Columns with their largest entry positive."""
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return directions * torch.where(largest < 0, -1.0, 1.0)


def _energy_along(relative: Tensor, directions: Tensor) -> Tensor:
    """Shares of energy along (d, rank), (rank, modules), of rows ``σᵢuᵢᵀ/‖ΔW‖_F``, (modules, r, d)."""
    return (relative @ directions).square().sum(1).mT.clamp_max(1).contiguous()


def _agreement(modules: Sequence[_Module], bases: Mapping[str, Basis]) -> dict[str, Tensor]:
    """Of each module's directions, the energy of every module of the same role and width along them."""
    kinds: dict[tuple[Role | None, int], list[int]] = {}
    for number, module in enumerate(modules):
        kinds.setdefault((stream_role(module.layer.name), module.width), []).append(number)
    agreement = {}
    for members in kinds.values():
        stack = _stack([modules[number] for number in members], "relative")
        for number in members:
            name = modules[number].layer.name
            table = stack.new_full((bases[name].rank, len(modules)), torch.nan)
            table[:, members] = _energy_along(stack, bases[name].matrix)
            agreement[name] = table
    return {name: agreement[name] for name in bases}
