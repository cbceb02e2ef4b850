"""Sketches of kind "srht": the rooms against the reference, its laws, the statistics of its matrix."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from devices import DEVICE, GPU_MARKS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastproj.kernels.cpu._sketch_hadamard import project as cpu_path
from fastproj.kernels.cpu._sketch_hadamard import sampled_rows
from fastproj.reference._sketch_hadamard import BLOCK
from fastproj.reference._sketch_hadamard import project as reference

pytest.importorskip("triton")

from fastproj.kernels import _sketch_hadamard as kernel_module

# By position, eight outputs each; the third position begins a block.
GOLDEN = [
    [1, 1, 1, 1, -1, 1, 1, -1],
    [-1, -1, 1, -1, -1, 1, -1, 1],
    [1, -1, 1, 1, -1, -1, 1, -1],
    [1, -1, -1, 1, 1, 1, 1, -1],
    [-1, -1, 1, -1, -1, -1, -1, -1],
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def on_cpu(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """The CPU's path, whose dispatcher has halves in fp32."""
    return cpu_path(vectors if vectors.dtype == torch.float64 else vectors.float(), dimension, seed, offset)


def on_device(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """The Triton launcher on whichever device runs it."""
    return kernel_module.project(vectors.to(DEVICE), dimension, seed, offset).cpu()


PATHS = pytest.mark.parametrize(
    "path", [pytest.param(on_cpu, id="cpu"), pytest.param(on_device, id="triton", marks=GPU_MARKS)]
)


def normal(samples: int, positions: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, positions, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(got: Tensor, want: Tensor, vectors: Tensor) -> None:
    """Entries are ±1/√k, summed in twelve rounds, or two of 64, and block by block."""
    assert got.dtype == (torch.float64 if vectors.dtype == torch.float64 else torch.float32)
    # Rounding errors of sums with random signs grow with |v|: 32 of them leave room for the largest output.
    allowed = (
        32 * torch.finfo(got.dtype).eps * vectors.double().norm(dim=1, keepdim=True) / want.shape[1] ** 0.5
    )
    assert got.shape == want.shape
    assert bool(((got.double() - want).abs() <= allowed).all()), (got.double() - want).abs().max()


def in_extended_precision(vectors: Tensor, by_reference: Tensor, seed: int, offset: int) -> Tensor:
    """The reference's matrix times the vectors, in 80 bits: its own fp64 sums, thousands of terms in a row,
    are on some processors ten times as far off as what is held against them."""
    dimension = by_reference.shape[1]
    units = torch.eye(vectors.shape[1], dtype=torch.float64)
    signs = reference(units, dimension, seed, offset).sign().numpy().astype(np.longdouble)
    product = vectors.numpy().astype(np.longdouble) @ signs / np.sqrt(np.longdouble(dimension))
    exact = torch.from_numpy(product.astype(np.float64))
    # The same product but for what the reference rounds.
    torch.testing.assert_close(by_reference, exact, rtol=0, atol=1e-12)
    return exact


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory reads NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_golden_entries() -> None:
    """The matrix of version 1: sketches on disk are worth nothing should it change."""
    units = torch.eye(5, dtype=torch.float64)
    signs = reference(units, 8, 3, 4094) * 8**0.5
    assert signs.round().int().tolist() == GOLDEN
    torch.testing.assert_close(signs, signs.round(), rtol=0, atol=1e-12)  # a root and a product in fp64


@PATHS
@pytest.mark.parametrize("dtype", DTYPES)
def test_paths_agree_with_the_reference(path, dtype: torch.dtype, poisoned_memory: None) -> None:  # type: ignore[no-untyped-def]
    vectors = normal(2, 5000, dtype)
    got = path(vectors, 100, 7, 2**40 + 4001)
    want = reference(vectors.double(), 100, 7, 2**40 + 4001)
    if dtype == torch.float64:
        want = in_extended_precision(vectors, want, 7, 2**40 + 4001)
    assert_close(got, want, vectors)


@PATHS
def test_outputs_fill_groups(path, poisoned_memory: None) -> None:  # type: ignore[no-untyped-def]
    vectors = normal(1, 4100)
    assert_close(path(vectors, 4200, 7, 5), reference(vectors.double(), 4200, 7, 5), vectors)


@PATHS
@settings(max_examples=3)
@given(
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=3),
    dimension=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    offset=st.integers(0, 2**50),
)
def test_pieces_add_up_to_the_whole(  # type: ignore[no-untyped-def]
    path, lengths: list[int], dimension: int, seed: int, offset: int
) -> None:
    whole = normal(2, sum(lengths))
    want = reference(whole.double(), dimension, seed, offset)
    total = torch.zeros_like(want)
    for piece in whole.split(lengths, dim=1):
        total += path(piece, dimension, seed, offset)
        offset += piece.shape[1]
    assert_close(total.float(), want, whole)


@PATHS
def test_blocks_share_a_program(path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Two programs for five blocks, and pieces of one block."""
    monkeypatch.setattr(kernel_module, "PROGRAMS", 2)
    monkeypatch.setattr("fastproj.kernels.cpu._sketch_hadamard.BLOCKS_A_PIECE", 1)
    monkeypatch.setattr("fastproj.kernels.cpu._sketch_hadamard.MOST_SAMPLES", 1)
    vectors = normal(2, 4 * BLOCK + 10)
    assert_close(path(vectors, 50, 7, 0), reference(vectors.double(), 50, 7, 0), vectors)


@PATHS
def test_any_layout_is_read_right(path) -> None:  # type: ignore[no-untyped-def]
    vectors = normal(3, 70)
    want = reference(vectors.double(), 20, 7, 8)
    padded = torch.full((3, 80), torch.nan)
    padded[:, 3:73] = vectors
    for layout in (padded[:, 3:73], vectors.T.contiguous().T):
        assert_close(path(layout, 20, 7, 8), want, vectors)
    assert_close(path(vectors[:1].expand(3, 70), 20, 7, 8), want[:1].expand(3, 20), vectors)


@PATHS
def test_any_scale(path) -> None:  # type: ignore[no-untyped-def]
    vectors = normal(3, 4200) * torch.tensor([[0.0], [1e-30], [1e30]])
    assert_close(path(vectors, 30, 7, 0), reference(vectors.double(), 30, 7, 0), vectors)


@PATHS
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(path, value: float) -> None:  # type: ignore[no-untyped-def]
    vectors = normal(3, 300)
    vectors[1, 7] = value
    got = path(vectors, 16, 7, 0)
    assert not got[1].isfinite().any()
    assert got[0].isfinite().all()
    assert got[2].isfinite().all()


def test_a_block_is_only_turned() -> None:
    """With all rows taken, ``PᵀP = I`` within a block."""
    vectors = normal(3, BLOCK, torch.float64)
    got = cpu_path(vectors, BLOCK, 1, 3 * BLOCK)
    # Sums of 4,096 products in fp64.
    torch.testing.assert_close(got @ got.T, vectors @ vectors.T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("spread", ["dense", "two spikes a block", "same spike in each block"])
def test_norms_are_kept_as_well_as_theory_has_it(spread: str) -> None:
    """``E‖Pv‖² = ‖v‖²`` and ``Var ‖Pv‖² ≤ 2‖v‖⁴/k`` over seeds."""
    dimension, seeds = 64, 300
    vector = torch.zeros(1, 3 * BLOCK)
    places = {
        "dense": slice(None),
        "two spikes a block": [5, 9, 4101, 4107],
        "same spike in each block": [5, 4101, 8197],
    }
    vector[:, places[spread]] = 1.0
    vector /= vector.norm()
    norms = torch.stack([cpu_path(vector, dimension, seed, 0).square().sum() for seed in range(seeds)])
    bound = 2 / dimension
    # Five standard deviations of a mean and of a variance (heavier tails than normal: kurtosis up to 9).
    assert abs(norms.mean() - 1) < 5 * (bound / seeds) ** 0.5
    assert norms.var() < bound * (1 + 5 * (8 / seeds) ** 0.5)


def test_rows_are_sampled_without_replacement() -> None:
    for seed in range(20):
        sample = sampled_rows(BLOCK + 500, seed)
        assert len(set(sample.tolist())) == BLOCK + 500
        assert sorted(sample[:BLOCK].tolist()) == list(range(BLOCK))
