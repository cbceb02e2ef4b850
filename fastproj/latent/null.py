"""Does a direction stand out? Shares of energy with what aligns the vectors destroyed by permutation.

Pooled over the stream, the coordinates of each module's singular vectors are permuted, one permutation for a
module: its singular values and the angles within it stay, only what modules have in common goes. Within a
module, entries are permuted in each column of B and in each row of A by itself: their marginals stay, only
what columns have in common goes. That null is of B and A as they were trained and, unlike the stream's,
changes under ``B → B M⁻¹, A → M A``.

The j-th share is held against the j-th null share, as in parallel analysis (Horn 1965; by permutation, Buja
and Eyuboglu 1992): ``p = (1 + #{null ≥ observed})/(draws + 1)``. Shares sum to one, so a strong first
direction takes from the others, whose p-values are then too large rather than too small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

QUANTILES = (0.05, 0.5, 0.95)
# Null shares this close below the observed one count as ties, which Ritz values may miss by less.
_TIE = 1e-4
# Up to this many rows or columns, or so many a direction, all eigenvalues cost less than iterations.
_DENSE, _DENSE_A_DIRECTION = 256, 16
# Ritz values that move less than this in a step, relatively, twice in a row have converged to some times it.
_CONVERGED = 1e-5
# Draws whose permuted factors are in memory together.
_DRAWS_AT_ONCE = 20


def p_values(observed: Tensor, null: Tensor) -> Tensor:
    """``(1 + #{null ≥ observed})/(draws + 1)``, (rank,), of (rank,) and (draws, rank); NaN of no draws."""
    draws = null.shape[0]
    if not draws:
        return torch.full_like(observed, torch.nan)
    return (1 + (null >= observed * (1 - _TIE)).sum(0)).double() / (draws + 1)


def quantiles(null: Tensor) -> Tensor:
    """5 %, 50 % and 95 % quantiles, (rank, 3), of (draws, rank); NaN of no draws."""
    if not null.shape[0]:
        return null.new_full((null.shape[1], len(QUANTILES)), torch.nan)
    return null.quantile(null.new_tensor(QUANTILES), dim=0).mT.contiguous()


def stream_null(stack: Tensor, rank: int, draws: int, generator: torch.Generator) -> Tensor:
    """The leading ``rank`` shares of ``Σ_l W_lᵀW_l``, the columns of each W_l permuted, (draws, rank).

    stack (modules, r, d): W_l has a module's weighted singular vectors as rows, zero where it has fewer.
    """
    modules, _, width = stack.shape
    total = stack.square().sum()
    shares = stack.new_empty(draws, rank)
    for draw in range(draws):
        order = torch.stack([torch.randperm(width, generator=generator) for _ in range(modules)])
        permuted = stack.gather(2, order[:, None].expand_as(stack)).flatten(0, 1)
        shares[draw] = leading_energies(permuted, rank, generator) / total
    return shares


def module_null(
    factors: Sequence[tuple[Tensor, Tensor]], rank: int, draws: int, generator: torch.Generator
) -> list[Tensor]:
    """The leading ``rank`` shares of each ``B A``, entries permuted within B's columns and A's rows.

    factors: (B, A) of each module, fp64, (d_out, r) and (r, d_in); returns (draws, rank) of each. Modules of
    one width see the same permutations, so that their p-values lean on each other a little.
    """
    widths = {width for b, a in factors for width in (b.shape[0], a.shape[1])}
    most = max(a.shape[0] for _, a in factors)
    parts: list[list[Tensor]] = [[] for _ in factors]
    for start in range(0, draws, _DRAWS_AT_ONCE):
        count = min(_DRAWS_AT_ONCE, draws - start)
        orders = {
            width: torch.rand(count, most, width, generator=generator).argsort(2) for width in sorted(widths)
        }
        for shares, (b, a) in zip(parts, factors, strict=True):
            grams = _permuted_gram(b.mT, orders), _permuted_gram(a, orders)
            shares.append(_product_shares(*grams)[:, :rank])
    none = torch.empty(0, rank, dtype=torch.float64)
    return [torch.cat([none, *shares]) for shares in parts]


def leading_energies(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The ``count`` largest squared singular values of ``rows``, descending.

    Eigenvalues of the smaller Gram matrix where that is small; else Ritz values of a block Krylov space from
    a random start, in fp32, which approach them from below to a few times 1e-5.
    """
    most = max(_DENSE, _DENSE_A_DIRECTION * count)
    if min(rows.shape) > most:
        return _ritz_values(rows.float(), count, most, generator).double()
    gram = rows @ rows.mT if rows.shape[0] <= rows.shape[1] else rows.mT @ rows
    return torch.linalg.eigvalsh(gram).flip(0)[:count].clamp_min(0)


def _permuted_gram(rows: Tensor, orders: dict[int, Tensor]) -> Tensor:
    """``R Rᵀ`` of rows permuted by themselves, for each draw: (draws, r, r) of (r, d)."""
    order = orders[rows.shape[1]][:, : rows.shape[0]]
    permuted = rows.expand(order.shape).gather(2, order)
    return permuted @ permuted.mT


def _product_shares(left: Tensor, right: Tensor) -> Tensor:
    """Shares of the squared singular values of ``B A``, which are the eigenvalues of ``(BᵀB)(AAᵀ)``."""
    values, vectors = torch.linalg.eigh(left)
    root = values.clamp_min(0).sqrt()[:, :, None] * vectors.mT
    energies = torch.linalg.eigvalsh(root @ right @ root.mT).flip(1).clamp_min(0)
    return energies / energies.sum(1, keepdim=True)


def _ritz_values(rows: Tensor, count: int, most: int, generator: torch.Generator) -> Tensor:
    """Largest Ritz values of ``rowsᵀ rows`` over its powers on a random block, ``most`` vectors at most."""
    columns = rows.mT.contiguous()  # both products then run along memory, which a few vectors need
    start = torch.randn(rows.shape[1], count, generator=generator, dtype=rows.dtype)
    block = torch.linalg.qr(start).Q.mT.contiguous()
    basis = images = rows.new_empty(0, rows.shape[1])
    before, quiet = rows.new_zeros(count), 0
    while True:
        image = (block @ rows.mT) @ columns.mT
        basis, images = torch.cat([basis, block]), torch.cat([images, image])
        values = torch.linalg.eigvalsh(basis @ images.mT).flip(0)[:count]
        quiet = quiet + 1 if bool(((values - before).abs() <= _CONVERGED * values).all()) else 0
        block = _new_directions(basis, image, _CONVERGED * float(values[0]))
        if quiet == 2 or len(basis) + count > most or not bool(block.any()):
            return values
        before = values


def _new_directions(basis: Tensor, image: Tensor, least: float) -> Tensor:
    """Orthonormal rows of ``image`` beyond ``basis``, zeros in place of those up to ``least`` long."""
    for _ in range(2):  # once leaves what rounding brought back
        image = image - (image @ basis.mT) @ basis
    q, r = torch.linalg.qr(image.mT)
    q = q.mT - (q.mT @ basis.mT) @ basis
    return torch.linalg.qr(q.mT).Q.mT.contiguous() * (r.diagonal().abs() > least)[:, None]
