"""The quadratic programmes under the methods: optimality by their own conditions, on matrices of any rank."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from surgery_families import families, gram_of, normal
from torch import Tensor

from fastproj.surgery._nonnegative_qp import nonnegative_qp, residual
from fastproj.surgery._unit_gram import pseudo_solve, semidefinite_factor, unit_gram

EXACT = torch.finfo(torch.float64).eps
# Of a solution whose active entries are well told from the others: the ridge of 1e-12 times its norm.
RESIDUAL = 1e-10
# Where an entry and its slack are both 0 at the solution, each stops at the square root of their product.
DEGENERATE = 1e-8


def by_trying(matrix: Tensor, linear: Tensor) -> Tensor:
    """The solution for an invertible matrix, from every active set."""
    size, best, least = len(linear), torch.zeros_like(linear), 0.0
    for active in product((False, True), repeat=size):
        chosen = torch.tensor(active)
        x = torch.zeros_like(linear)
        x[chosen] = torch.linalg.solve(matrix[chosen][:, chosen], -linear[chosen])
        value = float(0.5 * x @ matrix @ x + linear @ x)
        if bool((x >= 0).all()) and value < least:
            best, least = x, value
    return best


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_is_the_best_of_all_active_sets(size: int) -> None:
    for seed in range(10):
        rows = normal(size, seed=seed)
        matrix, linear = unit_gram(gram_of(rows), EXACT).cosines[0], normal(1, size, seed)[0]
        got = nonnegative_qp(matrix, linear)
        torch.testing.assert_close(got, by_trying(matrix, linear), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 64])
def test_meets_its_optimality_conditions(size: int) -> None:
    for name, rows in families(size).items():
        matrix = unit_gram(gram_of(rows), EXACT).cosines
        x = nonnegative_qp(matrix, matrix[0])  # K right-hand sides in the range of the matrix
        assert (x >= 0).all(), name
        assert (residual(matrix, matrix[0], x) <= DEGENERATE).all(), name
        if name in ("normal", "conflicting", "agreeing"):
            assert (residual(matrix, matrix[0], x) <= RESIDUAL).all(), name


@given(size=st.integers(1, 8), rank=st.integers(1, 8), seed=st.integers(0, 999))
def test_any_rank(size: int, rank: int, seed: int) -> None:
    rows = normal(size, rank, seed)
    matrix = unit_gram(gram_of(rows), EXACT).cosines[0]
    linear = matrix @ normal(1, size, seed + 1)[0]
    x = nonnegative_qp(matrix, linear)
    assert (x >= 0).all()
    assert residual(matrix, linear, x) <= DEGENERATE * max(1.0, float(linear.abs().max()), float(x.max()))


def test_the_residual_is_zero_at_the_solution_alone() -> None:
    matrix = torch.eye(2, dtype=torch.float64)
    linear = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    solution = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert residual(matrix, linear, solution) == 0
    for other in ([0.0, 0.0], [1.0, 0.1], [0.9, 0.0], [1.0, -0.1]):
        assert residual(matrix, linear, torch.tensor(other, dtype=torch.float64)) >= 0.1 - 1e-15


@pytest.mark.parametrize("scale", [1e-200, 1e-15, 1e15, 1e200])
def test_the_solution_scales_with_the_linear_term(scale: float) -> None:
    matrix = unit_gram(gram_of(normal(4)), EXACT).cosines[0]
    linear = normal(1, 4, 7)[0]
    scaled = nonnegative_qp(matrix, scale * linear) / scale
    # The division by the largest entry rounds differently once, the solution follows by the condition number.
    torch.testing.assert_close(scaled, nonnegative_qp(matrix, linear), rtol=1e-12, atol=1e-14)


def test_no_linear_term_gives_zero_and_a_non_negative_one_too() -> None:
    matrix = unit_gram(gram_of(normal(3)), EXACT).cosines[0]
    for linear in ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]):
        got = nonnegative_qp(matrix, torch.tensor(linear, dtype=torch.float64))
        assert torch.equal(got, torch.zeros(3, dtype=torch.float64))


def test_of_several_solutions_it_is_the_shortest() -> None:
    """Two equal gradients share what either could do alone."""
    matrix = torch.ones(2, 2, dtype=torch.float64)
    got = nonnegative_qp(matrix, torch.tensor([-1.0, -1.0], dtype=torch.float64))
    torch.testing.assert_close(got, torch.full((2,), 0.5, dtype=torch.float64), rtol=1e-9, atol=0)


def test_programmes_of_a_batch_do_not_touch_each_other() -> None:
    matrices = torch.stack([unit_gram(gram_of(normal(3, seed=s)), EXACT).cosines[0] for s in range(4)])
    linear = torch.stack([normal(1, 3, s)[0] for s in range(4)])
    linear[1] = torch.nan
    together = nonnegative_qp(matrices, linear)
    for s in (0, 2, 3):
        alone = nonnegative_qp(matrices[s], linear[s])
        torch.testing.assert_close(
            together[s], alone, rtol=1e-12, atol=1e-14
        )  # batched products may round apart
    assert together[1].isnan().all()


@given(size=st.integers(1, 10), rank=st.integers(1, 10), seed=st.integers(0, 999))
def test_the_factor_is_the_matrix_and_has_its_rank(size: int, rank: int, seed: int) -> None:
    rows = normal(size, rank, seed)
    unit = unit_gram(gram_of(rows), EXACT)
    directions = rows / rows.norm(dim=1, keepdim=True)
    # K products of numbers below 1, and what the left-out pivots held.
    torch.testing.assert_close(unit.cosines[0], directions @ directions.mT, rtol=0, atol=1e-12)
    assert int((unit.factor[0] != 0).any(0).sum()) <= min(size, rank)


def test_rounding_makes_no_gradient_that_is_not_there() -> None:
    """A third gradient in the plane of two, in fp32: the rounding of its Gram is no third direction."""
    rows = (normal(2, 3).mT @ normal(2)).float()
    unit = unit_gram(gram_of(rows), torch.finfo(torch.float32).eps)
    assert int((unit.factor[0] != 0).any(0).sum()) == 2
    assert torch.linalg.eigvalsh(unit.cosines[0]).min() > -1e-15


def test_pseudo_solve_is_the_pseudo_inverse() -> None:
    for rank in (1, 2, 4):
        matrix = unit_gram(gram_of(normal(4, rank)), EXACT).cosines[0]
        right = normal(1, 4, 3)[0]
        got = pseudo_solve(semidefinite_factor(matrix, 1e-14), right)
        want = torch.linalg.pinv(matrix, rtol=1e-10) @ right
        # Matrices of order 1 whose smallest kept eigenvalue is some hundredths.
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
