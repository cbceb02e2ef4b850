"""Random bits and what is made of them: the same in every room, and the same for ever."""

from __future__ import annotations

import hashlib
from statistics import NormalDist

import numpy as np
import pytest
import torch
from devices import DEVICE, on_gpu
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fastproj.bindings.sketch import sketch
from fastproj.kernels._normal import GRID, levels, variance
from fastproj.kernels.cpu._philox import next_words, philox_from
from fastproj.kernels.cpu._philox import philox_words as cpu_words
from fastproj.reference._philox import philox_words as reference_words
from fastproj.reference._sketch_dense import upper_quantiles

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastproj.kernels._philox import philox_words as device_words
from fastproj.kernels.sketch import sketch as triton_path

numbers = st.integers(0, 2**63 - 1)


@triton.jit
def words_kernel(out_ptr, seed, stream, row, first, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, BLOCKS)
    # Triton takes a ``first`` below 2^31 for an int32, which the last blocks may pass.
    block = tl.zeros([BLOCKS], tl.int64) + first + index
    word0, word1, word2, word3 = device_words(seed, stream, row, block)
    tl.store(out_ptr + 4 * index, word0.to(tl.int64, bitcast=True))
    tl.store(out_ptr + 4 * index + 1, word1.to(tl.int64, bitcast=True))
    tl.store(out_ptr + 4 * index + 2, word2.to(tl.int64, bitcast=True))
    tl.store(out_ptr + 4 * index + 3, word3.to(tl.int64, bitcast=True))


def test_known_answers() -> None:
    """The authors' own test vector of Philox4x64-10 at a key and a counter of zeros (Random123)."""
    zero = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert reference_words(0, 0, 0, 0).tolist() == zero


@on_gpu
@given(seed=numbers, stream=st.integers(1, 2**31 - 1), row=numbers, first=st.integers(0, 2**62))
@example(seed=0, stream=1, row=0, first=2**31 - 15)
def test_bits_are_the_same_in_every_room(seed: int, stream: int, row: int, first: int) -> None:
    blocks = first + np.arange(16, dtype=np.uint64)
    want = reference_words(seed, stream, row, blocks)
    assert np.array_equal(cpu_words(seed, stream, row, first, 16), want)
    out = torch.empty(16, 4, dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](out, seed, stream, row, first, BLOCKS=16)
    assert np.array_equal(out.cpu().numpy().view(np.uint64), want)


def test_blocks_follow_each_other() -> None:
    bits = philox_from(3, 1, 2, 10)
    first, second = next_words(bits, 5), next_words(bits, 7)
    assert np.array_equal(np.concatenate([first, second]), cpu_words(3, 1, 2, 10, 12))


def test_quantiles_are_those_of_a_normal_distribution() -> None:
    values = np.array(levels()) / GRID
    assert np.array_equal(values, upper_quantiles())
    assert (values.min(), values.max(), len(values)) == (0.0, 138 / 32, 2**15)
    assert bool((np.diff(values) >= 0).all())
    assert variance() == np.square(values).mean()
    # A quantile is off by half a step of the grid at most, so the moments are near those of a normal number.
    assert variance() == pytest.approx(1.0, abs=2e-4)
    assert (values**4).mean() == pytest.approx(3.0, abs=0.01)


def test_no_quantile_lies_on_a_rounding_boundary() -> None:
    """The nearest is 3.5e-8 away, where errors of the inverse in fp64 are below 1e-13."""
    normal = NormalDist()
    exact = [32 * normal.inv_cdf((2**15 + i + 0.5) / 2**16) for i in range(2**15)]
    assert min(abs(value % 1 - 0.5) for value in exact) > 1e-8


def columns(kind: str, dimension: int, offset: int, count: int) -> Tensor:
    """Some columns of P in units of its entries: whole numbers."""
    sketched = sketch(torch.eye(count, dtype=torch.float64), dimension, seed=2026, kind=kind, offset=offset)
    steps = GRID * variance() ** 0.5 if kind == "gaussian" else 1.0
    whole = sketched.mT * dimension**0.5 * steps
    assert torch.allclose(whole, whole.round(), atol=1e-9)
    return whole.round().long()


# Stored sketches are worth as much as the matrix that made them: these numbers must never change.
FROZEN = {
    "rademacher": (
        [
            [1, -1, -1, -1, 1, -1, 1, 1],
            [1, 1, 1, -1, 1, 1, -1, 1],
            [-1, -1, 1, 1, 1, -1, 1, -1],
            [1, -1, 1, -1, -1, 1, -1, 1],
            [1, 1, 1, -1, -1, 1, -1, -1],
        ],
        "e1ac6ab2af7cd076",
    ),
    "gaussian": (
        [
            [2, -30, 39, -8, 55, 12, 0, -33],
            [33, 11, -3, -21, 11, 14, 40, -10],
            [-9, 49, 4, 23, 13, -41, 32, 1],
            [-14, 9, 35, 18, 40, -30, -46, -32],
            [-59, -65, -26, 12, 19, -15, -9, 33],
        ],
        "a16611390206fda3",
    ),
    "kronecker": (
        [
            [1, -1, 1, 1, 1, -1, 1, -1],
            [1, -1, -1, -1, 1, -1, -1, -1],
            [1, 1, -1, 1, -1, 1, 1, -1],
            [-1, -1, 1, 1, -1, -1, 1, 1],
            [1, -1, 1, 1, -1, 1, 1, 1],
        ],
        "4fce8fb8f1628956",
    ),
}


@pytest.mark.parametrize("kind", FROZEN)
def test_matrices_never_change(kind: str) -> None:
    corner, digest = FROZEN[kind]
    matrix = columns(kind, 300, 1000, 64)
    assert matrix[[0, 1, 255, 256, 299], :8].tolist() == corner
    assert hashlib.sha256(matrix.numpy().astype("<i2").tobytes()).hexdigest()[:16] == digest


@on_gpu
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("offset", [2**31 - 20, 2**32 - 20, 2**50])
def test_entries_are_the_same_bits_on_the_device(kind: str, offset: int) -> None:
    """Columns that no sum rounds, where positions leave 32 bits."""
    units = torch.eye(40, dtype=torch.float64)
    want = sketch(units, 300, seed=5, kind=kind, offset=offset)
    got = triton_path([units.to(DEVICE)], 300, 5, kind, offset)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_entries_are_independent_to_the_eye(kind: str) -> None:
    """Mean, variance and the correlation of neighbours in rows and in columns, over 768 × 2,000 entries."""
    matrix = sketch(torch.eye(2000), 768, seed=9, kind=kind).mT * 768**0.5
    count = matrix.numel()
    # Five standard errors of a mean of numbers, and of products of two, of variance 1.
    bound = 5 / count**0.5
    assert abs(matrix.mean().item()) < bound
    assert abs(matrix.square().mean().item() - 1) < 2 * bound
    assert abs((matrix[1:] * matrix[:-1]).mean().item()) < bound
    assert abs((matrix[:, 1:] * matrix[:, :-1]).mean().item()) < bound
    assert abs((matrix[256:] * matrix[:-256]).mean().item()) < 1.3 * bound
