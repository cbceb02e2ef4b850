"""Orthonormal bases: the span, its order, the signs, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastproj
from fastproj.reference.basis import MOST_RANK, Basis, orthonormalize

# Of products of unit vectors. Each element is rounded once to fp32: two vectors change by half an eps each.
# In fp64 it is the error of a QR of at most 64 columns.
ROUNDING = {torch.float32: 2 * 2.0**-23, torch.float64: 1e-14}


def random_vectors(length: int, count: int, seed: int = 0) -> Tensor:
    return torch.randn(length, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_orthonormal(basis: Basis) -> None:
    matrix = basis.matrix.double()
    off = matrix.mT @ matrix - torch.eye(basis.rank, dtype=torch.float64)
    assert off.abs().max() <= ROUNDING[basis.matrix.dtype]


@given(length=st.integers(1, 90), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_spans_what_the_vectors_span(length: int, share: float, seed: int) -> None:
    count = max(1, round(share * min(length, MOST_RANK)))
    vectors = random_vectors(length, count, seed)
    basis = orthonormalize(vectors)
    assert (basis.dimension, basis.rank, basis.matrix.dtype) == (length, count, torch.float64)
    assert_orthonormal(basis)
    matrix = basis.matrix
    # QR of at most 64 columns in fp64 gives them back to a few times 64 roundings of their norms.
    torch.testing.assert_close(matrix @ (matrix.mT @ vectors), vectors, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    """Computed in fp64 whatever comes, and given in fp32 but for fp64."""
    vectors = random_vectors(50, 7).to(dtype)
    basis = orthonormalize(vectors)
    assert basis.matrix.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_orthonormal(basis)
    exact = orthonormalize(vectors.double()).matrix
    assert (basis.matrix.double() - exact).abs().max() <= torch.finfo(torch.float32).eps / 2


@given(seed=st.integers(0, 99))
def test_signs_and_order_are_those_of_the_vectors(seed: int) -> None:
    vectors = random_vectors(20, 6, seed)
    matrix = orthonormalize(vectors).matrix
    coefficients = matrix.mT @ vectors
    assert (coefficients.diagonal() > 0).all()
    assert coefficients.tril(-1).abs().max() <= 1e-13  # fp64's rounding of norms of about 5
    for rank in range(1, 6):
        nested = orthonormalize(vectors[:, :rank]).matrix
        torch.testing.assert_close(matrix[:, :rank], nested, rtol=0, atol=1e-13)


def test_one_direction_is_the_unit_vector() -> None:
    basis = orthonormalize(torch.tensor([3.0, 0.0, -4.0]))
    torch.testing.assert_close(basis.matrix, torch.tensor([[0.6], [0.0], [-0.8]]))
    assert orthonormalize(torch.tensor([[-2.0]])).matrix.tolist() == [[-1.0]]


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_lengths_of_the_vectors_do_not_matter(scale: float) -> None:
    vectors = random_vectors(30, 4)
    scaled = vectors * torch.tensor([1.0, scale, 1.0, scale], dtype=torch.float64)
    torch.testing.assert_close(orthonormalize(scaled).matrix, orthonormalize(vectors).matrix)


def test_denormal_vectors_have_a_direction() -> None:
    torch.testing.assert_close(
        orthonormalize(torch.tensor([3e-320, 4e-320], dtype=torch.float64)).matrix,
        torch.tensor([[0.6], [0.8]], dtype=torch.float64),
        rtol=0,
        atol=1e-3,  # 3e-320 is 6,000 times the smallest number there is
    )


def test_a_basis_of_nothing() -> None:
    for shape in ((5, 0), (0, 0)):
        basis = orthonormalize(torch.empty(shape))
        assert (basis.dimension, basis.rank) == shape


def test_columns_lie_together() -> None:
    """As the kernels read them, whatever the layout that came."""
    for matrix in (torch.eye(5)[:, :3].contiguous(), torch.eye(5)[:3].mT, torch.eye(10)[::2, ::2][:, :3]):
        assert Basis(matrix).matrix.mT.is_contiguous()
        assert torch.equal(Basis(matrix).matrix, matrix)
    assert orthonormalize(random_vectors(9, 3)).matrix.mT.is_contiguous()
    assert orthonormalize(random_vectors(9, 3)).to(dtype=torch.float32).matrix.mT.is_contiguous()


def test_first_and_to() -> None:
    basis = orthonormalize(random_vectors(9, 3))
    assert torch.equal(basis.first(2).matrix, basis.matrix[:, :2])
    assert basis.first(0).rank == 0
    assert basis.to(dtype=torch.float32).matrix.dtype == torch.float32
    assert basis.to("meta").matrix.device.type == "meta"
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"a rank from 0 to 3, got {rank}"):
            basis.first(rank)


def dependent(dtype: torch.dtype, noise: float = 0.0) -> Tensor:
    """Four vectors in a space of three dimensions, the last off it by about ``noise``."""
    vectors = random_vectors(40, 4)
    vectors[:, 3] = vectors[:, :3].sum(1) + noise * vectors[:, 3]
    return vectors.to(dtype)


@pytest.mark.parametrize(
    ("vectors", "found"),
    [
        (dependent(torch.float64), 3),
        (dependent(torch.float32), 3),
        (dependent(torch.bfloat16), 3),
        (dependent(torch.float16, noise=1e-4), 3),
        (torch.zeros(5, 2), 0),
        (torch.zeros(5), 0),
        (torch.eye(5)[:, [0, 1, 0]], 2),
        (torch.cat([torch.eye(5)[:, :2], torch.zeros(5, 1)], 1), 2),
        (torch.tensor([[1e30, 1e-30], [0.0, 0.0]]), 1),
    ],
)
def test_dependent_vectors_are_refused(vectors: Tensor, found: int) -> None:
    columns = vectors[:, None] if vectors.dim() == 1 else vectors
    message = f"expected {columns.shape[1]} linearly independent vectors, got {found} independent"
    with pytest.raises(ValueError, match=message):
        orthonormalize(vectors)


@pytest.mark.parametrize(("dtype", "noise"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_nearly_dependent_vectors_have_a_basis(dtype: torch.dtype, noise: float) -> None:
    """Far enough apart for their dtype, and orthonormal however close."""
    assert_orthonormal(orthonormalize(dependent(dtype, noise)))


@pytest.mark.parametrize(
    ("vectors", "error", "match"),
    [
        ([[1.0]], TypeError, "list"),
        (torch.ones(3, dtype=torch.int64), TypeError, "int64"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "complex64"),
        (torch.tensor(1.0), ValueError, r"\(d, k\), got \(\)"),
        (torch.ones(2, 2, 2), ValueError, r"got \(2, 2, 2\)"),
        (torch.ones(2, 3), ValueError, "at most 2 columns, got 3"),
        (torch.ones(100, MOST_RANK + 1), ValueError, "at most 64 columns, got 65"),
        (torch.tensor([1.0, torch.nan]), ValueError, "NaN or Inf"),
        (torch.tensor([1.0, -torch.inf]), ValueError, "NaN or Inf"),
    ],
)
def test_bad_vectors(vectors: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        orthonormalize(vectors)


@pytest.mark.parametrize(
    ("matrix", "error", "match"),
    [
        ([[1.0]], TypeError, "list"),
        (torch.ones(3, 1, dtype=torch.bfloat16), TypeError, "bfloat16"),
        (torch.ones(3), ValueError, r"\(d, k\), got \(3,\)"),
        (torch.ones(2, 3), ValueError, "at most 2 columns, got 3"),
        (torch.ones(3, 1, requires_grad=True), ValueError, "a constant"),
    ],
)
def test_bad_matrices(matrix: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Basis(matrix)


def test_vectors_that_require_a_gradient_give_a_constant() -> None:
    assert not orthonormalize(torch.ones(3, requires_grad=True)).matrix.requires_grad


def test_public_names() -> None:
    assert fastproj.Basis is Basis
    assert fastproj.orthonormalize is orthonormalize
