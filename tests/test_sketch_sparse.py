"""Sketches of kind "sjlt": the rooms against the reference, its laws, the statistics of its matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from devices import DEVICE, GPU_MARKS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastproj.kernels.cpu._sketch_sparse import project as cpu_path
from fastproj.reference._sketch_hadamard import BLOCK, permuted
from fastproj.reference._sketch_sparse import project as reference

pytest.importorskip("triton")

from fastproj.kernels import _sketch_sparse as kernel_module
from fastproj.kernels._blocks import launch_options

# By position, the outputs among 32 that are not zero, counted from 1, with their signs; the third position
# begins a run.
GOLDEN = [
    [1, 11, -23, -32],
    [6, -10, 23, -26],
    [-8, -11, 17, 32],
    [8, -12, -21, 32],
    [-4, 12, -17, -31],
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
    """An output sums about n/L elements, run by run or slot by slot, its order left to the path."""
    assert got.dtype == (torch.float64 if vectors.dtype == torch.float64 else torch.float32)
    # Rounding errors of sums with random signs grow with |v|: 32 of them leave room for the largest output.
    allowed = 32 * torch.finfo(got.dtype).eps * vectors.double().norm(dim=1, keepdim=True)
    assert got.shape == want.shape
    assert bool(((got.double() - want).abs() <= allowed).all()), (got.double() - want).abs().max()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory reads NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_golden_entries() -> None:
    """The matrix of version 1: sketches on disk are worth nothing should it change."""
    columns = 2 * reference(torch.eye(5, dtype=torch.float64), 32, 3, 4094)
    found = [[(o + 1) * int(column[o]) for o in column.nonzero().flatten().tolist()] for column in columns]
    assert found == GOLDEN


def test_columns_have_an_entry_in_each_part() -> None:
    columns = reference(torch.eye(50, dtype=torch.float64), 64, 3, 4080)
    assert set(columns.abs().unique().tolist()) == {0.0, 0.5}
    assert (columns.unflatten(1, (4, 16)) != 0).sum(2).eq(1).all()
    many = reference(torch.eye(2, dtype=torch.float64), 20480, 3, 0)
    assert (many.unflatten(1, (5, BLOCK)) != 0).sum(2).eq(1).all()


@PATHS
@pytest.mark.parametrize("dimension", [1, 3, 100, 5000, 12288, 16400, 24000])
def test_a_dimension_that_cuts_no_run_into_equal_parts(path, dimension: int) -> None:  # type: ignore[no-untyped-def]
    message = rf"power of two from 4 to 16384, or a greater multiple of 4096, got {dimension}$"
    for project in (path, reference):
        with pytest.raises(ValueError, match=message):
            project(normal(1, 5), dimension, 1, 0)


@PATHS
@pytest.mark.parametrize("dtype", DTYPES)
def test_paths_agree_with_the_reference(path, dtype: torch.dtype, poisoned_memory: None) -> None:  # type: ignore[no-untyped-def]
    vectors = normal(2, 5000, dtype)
    got = path(vectors, 128, 7, 2**40 + 4001)
    assert_close(got, reference(vectors.double(), 128, 7, 2**40 + 4001), vectors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_launched_is_compiled_ahead(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads and the width of elements are no constants of a kernel, so the audit's matrix misses them."""
    launched: list[tuple[int, int]] = []

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda vectors, *_, num_warps, **__: launched.append((8 * vectors.itemsize, num_warps))

    monkeypatch.setattr(kernel_module, "sparse_kernel", Watched())
    kernel_module.project(torch.ones(1, 8, dtype=dtype, device=DEVICE), 16, 0, 0)
    cases = [case for case in kernel_module.CASES if "vectors_ptr" in case.signature]
    compiled = {
        (int(case.signature["vectors_ptr"][-2:]), launch_options(case.threads)["num_warps"]) for case in cases
    }
    assert len(launched) == 1
    assert set(launched) <= compiled


@PATHS
@pytest.mark.parametrize("dimension", [4, 16384, 20480])
def test_few_and_many_outputs(  # type: ignore[no-untyped-def]
    path, dimension: int, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_module, "OUTPUTS", 1024)  # few programs, for the interpreter
    vectors = normal(1, 4100)
    assert_close(path(vectors, dimension, 7, 5), reference(vectors.double(), dimension, 7, 5), vectors)


@PATHS
@settings(max_examples=3)
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=2),
    dimension=st.sampled_from([32, 64, 512]),
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
def test_runs_share_a_program(path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Two spans for five runs, and pieces of one block."""
    monkeypatch.setattr("fastproj.kernels._sketch_hadamard.PROGRAMS", 8)
    monkeypatch.setattr("fastproj.kernels.cpu._sketch_sparse.RUNS_A_PIECE", 1)
    monkeypatch.setattr("fastproj.kernels.cpu._sketch_sparse.MOST_SAMPLES", 1)
    vectors = normal(2, 4 * BLOCK + 10)
    assert_close(path(vectors, 64, 7, 0), reference(vectors.double(), 64, 7, 0), vectors)


@PATHS
def test_any_layout_is_read_right(path) -> None:  # type: ignore[no-untyped-def]
    vectors = normal(3, 70)
    want = reference(vectors.double(), 32, 7, 8)
    padded = torch.full((3, 80), torch.nan)
    padded[:, 3:73] = vectors
    for layout in (padded[:, 3:73], vectors.T.contiguous().T):
        assert_close(path(layout, 32, 7, 8), want, vectors)
    assert_close(path(vectors[:1].expand(3, 70), 32, 7, 8), want[:1].expand(3, 32), vectors)


@PATHS
def test_any_scale(path) -> None:  # type: ignore[no-untyped-def]
    vectors = normal(3, 4200) * torch.tensor([[0.0], [1e-30], [1e30]])
    assert_close(path(vectors, 32, 7, 0), reference(vectors.double(), 32, 7, 0), vectors)


@PATHS
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(path, value: float) -> None:  # type: ignore[no-untyped-def]
    vectors = normal(3, 300)
    vectors[1, 7] = value
    got = path(vectors, 16, 7, 0)
    assert (~got[1].isfinite()).sum() == 4
    assert got[0].isfinite().all()
    assert got[2].isfinite().all()


@pytest.mark.parametrize("spread", ["dense", "two spikes a block", "same spike in each block"])
def test_norms_are_kept_as_well_as_theory_has_it(spread: str) -> None:
    """``E‖Pv‖² = ‖v‖²`` and ``Var ‖Pv‖² ≤ 2‖v‖⁴/k`` over seeds, as for dense signs."""
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


def test_permutations_take_pairs_everywhere() -> None:
    """Pairs of positions meet in an output as often as chance has it, near ones and far ones."""
    keys = torch.randint(0, 2**63 - 1, (1000, 1), generator=torch.Generator().manual_seed(0))
    source = torch.from_numpy(permuted(torch.arange(BLOCK).numpy(), keys.numpy().astype("uint64")))
    assert source.sort(dim=1).values.eq(torch.arange(BLOCK)).all()
    slot = torch.empty_like(source).scatter_(1, source, torch.arange(BLOCK).expand(source.shape))
    for slots in (64, 1024):
        chance = (slots - 1) / (BLOCK - 1)
        for a, b in ((0, 1), (0, 64), (5, 5 + 2048), (7, 7 + 512), (100, 4000)):
            together = (slot[:, a] // slots == slot[:, b] // slots).double().mean()
            # Five standard deviations of a frequency.
            assert abs(together - chance) < 5 * (chance / len(slot)) ** 0.5, (slots, a, b)
