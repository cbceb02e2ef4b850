"""Projection onto the complement of a subspace: reference, CPU fast path, Triton launcher, public call."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from projection_inputs import (
    Problem,
    assert_within_budget,
    exact,
    problems,
    random_basis,
    random_problem,
    run,
    run_in_place,
)
from span_inputs import DTYPES, KERNELS, PATHS, TRITON, device_of, packed, poisoned, strided
from torch import Tensor

from fastproj.reference.basis import Basis, orthonormalize
from fastproj.reference.project_out import project_out as reference

pytest.importorskip("triton")

from fastproj.bench.traffic.recorder import Launch, observed_accesses
from fastproj.kernels import _project_out_plan
from fastproj.kernels._project_out_plan import length_on_chip, prepare

# Inf − Inf, and halves that overflow, happen on purpose; numpy, behind the interpreter, tells of it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

# Whole vectors on chip, of two classes, and chunks, which many directions take.
MIXED_SIZES = ((16, 40), (5, 300), (17, 136))
MIXED_RANKS = (3, 40, 4)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_reference_by_hand() -> None:
    g = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    diagonal = torch.full((2, 1), 0.5**0.5, dtype=torch.float64)
    (right,) = reference([g], [diagonal], [0], False)
    (left,) = reference([g], [diagonal], [0], True)
    torch.testing.assert_close(right, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double())
    torch.testing.assert_close(left, torch.tensor([[1.5, -0.5], [-1.5, 0.5]]).double())


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=20)
@given(problem=problems())
def test_matches_reference(path: str, problem: Problem) -> None:
    assert_within_budget(run(path, problem), problem)


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_of_every_dtype(path: str, left: bool, dtype: torch.dtype) -> None:
    """On chip and in chunks, aligned to 128-bit loads and not."""
    for shift in (0, -3):
        sizes = [(vectors + shift, length + shift) for vectors, length in ((24, 72), (8, 304))]
        problem = random_problem(sizes, (3, 60), left, (dtype,))
        assert_within_budget(run(path, problem), problem)


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize(
    ("size", "left", "dtype"), [((2, 4104), False, torch.bfloat16), ((8, 1032), True, torch.float32)]
)
def test_vectors_too_long_for_the_chip(
    path: str, size: tuple[int, int], left: bool, dtype: torch.dtype
) -> None:
    problem = random_problem([size], [2], left, (dtype,))
    assert length_on_chip(size[1], 2, left, dtype) == 0
    assert length_on_chip(size[1] - 8, 2, left, dtype) == size[1] - 8
    assert_within_budget(run(path, problem), problem)


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("shape", [(9,), (0,), (2, 3, 4), (6, 2, 1), (1,)])
@pytest.mark.parametrize("left", [False, True])
def test_shards_of_other_dimensions(path: str, left: bool, shape: tuple[int, ...]) -> None:
    """A shard is its first dimension against the rest; a vector is one row, or one column."""
    shard = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    length = shape[0] if left or len(shape) < 2 else shard[0].numel()
    problem = Problem([shard], [random_basis(length, 1)], left)
    assert_within_budget(run(path, problem), problem)


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("left", [False, True])
def test_one_basis_for_many_shards(path: str, left: bool) -> None:
    made = random_problem([(5, 48), (16, 48), (3, 48)], (4, 4, 4), left, (torch.float32, torch.float64))
    problem = Problem(made.shards, [made.spans[0]] * 3, left)
    assert problem.owner == [0, 0, 0]
    assert_within_budget(run(path, problem), problem)


@pytest.mark.parametrize("path", PATHS)
def test_a_thousand_shards(path: str) -> None:
    """The interpreter takes 3 ms for each: a tenth of them there."""
    count = 100 if device_of(path).type == "cpu" and path != "cpu" else 1000
    problem = random_problem([(2, 5)] * count, [i % 3 for i in range(count)], False)
    assert_within_budget(run(path, problem), problem)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("left", [False, True])
def test_in_place_is_the_same_bit_for_bit(path: str, left: bool) -> None:
    made = random_problem(MIXED_SIZES, MIXED_RANKS, left, (torch.float32, torch.bfloat16))
    problem = Problem([*made.shards, torch.ones(3)], [*made.spans, None], left)
    for value, want in zip(run_in_place(path, problem), run(path, problem), strict=True):
        assert same_bits(value, want)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("left", [False, True])
def test_strided_shards_and_results(path: str, left: bool) -> None:
    dense = random_problem(MIXED_SIZES, MIXED_RANKS, left)
    turned = [shard.mT.contiguous().mT for shard in dense.shards]
    want = exact(dense)
    for shards in (strided(dense.shards), turned, packed(dense.shards)):
        problem = dense.of(shards)
        assert_within_budget(run(path, problem), dense)
        assert_within_budget(run_in_place(path, problem), dense)
    if path != "public":
        assert_within_budget(run(path, dense, strided(poisoned(dense.shards))), dense)
    assert all(shard.shape == value.shape for shard, value in zip(dense.shards, want, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("left", [False, True])
def test_nothing_to_project_changes_no_bit(path: str, left: bool) -> None:
    """No basis, a basis of rank 0, an empty shard; −0 and what is denormal keep their bits as well."""
    odd = torch.tensor([[2.0, -0.0, torch.inf], [1e-42, -torch.inf, 3.0]])
    shards = [odd, odd.half(), odd.double(), torch.empty(0, 3), torch.empty(3, 0)]
    length = [shard.shape[0 if left else 1] for shard in shards]
    spans = [None, random_basis(length[1], 0), None, *(random_basis(n, min(n, 1)) for n in length[3:])]
    problem = Problem(shards, spans, left)
    for values in (run(path, problem), run_in_place(path, problem)):
        assert all(same_bits(value, shard) for value, shard in zip(values, shards, strict=True))


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("left", [False, True])
def test_zeros_stay_zeros(path: str, left: bool) -> None:
    made = random_problem(MIXED_SIZES, MIXED_RANKS, left)
    for value in run(path, made.of([torch.zeros_like(shard) for shard in made.shards])):
        assert not value.any()


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_left_inside_the_subspace(path: str, left: bool, dtype: torch.dtype) -> None:
    """``P V = 0`` and ``P P = P``, to the rounding of the result and of what was taken out of it."""
    problem = random_problem(MIXED_SIZES, MIXED_RANKS, left, (dtype,))
    once = run(path, problem)
    twice = run(path, problem.of(once))
    for value, again, shard, span in zip(once, twice, problem.shards, problem.spans, strict=True):
        vectors = value.double().mT if left else value.double()
        whole = shard.double().mT if left else shard.double()
        # A coefficient is a sum of roundings weighted by a unit vector: of the result's elements, and of
        # the k products subtracted from them in fp32 or fp64; the basis is orthonormal to its own rounding.
        eps = torch.finfo(dtype).eps + 4 * span.rank**0.5 * torch.finfo(span.matrix.dtype).eps
        largest = torch.linalg.vector_norm(whole, dim=1)
        inside = torch.linalg.vector_norm(vectors @ span.matrix.double(), dim=1)
        assert (inside <= eps * largest).all()
        moved_on = torch.linalg.vector_norm((again - value).double(), dim=0 if left else 1)
        assert (moved_on <= 2 * eps * largest).all()


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("left", [False, True])
def test_a_subspace_has_no_preferred_basis(path: str, left: bool) -> None:
    problem = random_problem(MIXED_SIZES, MIXED_RANKS, left)
    rotated = []
    for i, span in enumerate(problem.spans):
        rotation = random_basis(span.rank, span.rank, seed=77 + i, dtype=torch.float64).matrix
        rotated.append(orthonormalize(span.matrix.double() @ rotation).to(dtype=torch.float32))
    for value, want, shard in zip(
        run(path, Problem(problem.shards, rotated, left)), run(path, problem), problem.shards, strict=True
    ):
        # Both span the same to the rounding of 40 unit vectors to fp32.
        assert (value - want).abs().max() <= 64 * torch.finfo(torch.float32).eps * shard.abs().max()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_vector(path: str, left: bool, bad: float) -> None:
    problem = random_problem(MIXED_SIZES, MIXED_RANKS, left)
    clean = run(path, problem)
    for shard in problem.shards:
        (shard.mT if left else shard)[2, 7] = bad
    for value, want in zip(run(path, problem), clean, strict=True):
        vectors, expected = (value.mT, want.mT) if left else (value, want)
        assert not vectors[2].isfinite().any()
        others = torch.arange(len(vectors)) != 2
        assert torch.equal(vectors[others], expected[others])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("scale", [2.0**-99, 2.0**99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_range(path: str, left: bool, scale: float, dtype: torch.dtype) -> None:
    """About 1e-30 and 1e30: powers of two commute with everything but the ends of the range."""
    problem = random_problem(MIXED_SIZES, MIXED_RANKS, left, (dtype,))
    scaled = problem.of([shard * scale for shard in problem.shards])
    for value, want in zip(run(path, scaled), run(path, problem), strict=True):
        assert torch.equal(value, want * scale)


@pytest.mark.parametrize("path", KERNELS)
def test_two_runs_agree_bit_for_bit(path: str) -> None:
    problem = random_problem(MIXED_SIZES, MIXED_RANKS, True, DTYPES)
    again = problem.of([shard.clone() for shard in problem.shards])
    assert all(same_bits(a, b) for a, b in zip(run(path, problem), run(path, again), strict=True))


@pytest.mark.parametrize("path", [TRITON])
@pytest.mark.parametrize("left", [False, True])
def test_a_shard_alone_and_among_others(path: str, left: bool) -> None:
    """Neighbours change launches, not numbers, but for the padding of what is taken in chunks."""
    problem = random_problem(MIXED_SIZES, MIXED_RANKS, left)
    together = run(path, problem)
    for i, value in enumerate(together):
        (alone,) = run(path, Problem([problem.shards[i]], [problem.spans[i]], left))
        assert torch.equal(alone, value)


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_basis_in_the_other_precision(path: str, dtype: torch.dtype) -> None:
    """Converted to that of the projection: fp32, or fp64 for an fp64 shard."""
    made = random_problem(MIXED_SIZES, MIXED_RANKS, False, (torch.float32, torch.float64))
    spans: list[Basis | None] = [span.to(dtype=dtype) for span in made.spans]
    problem = Problem(made.shards, spans, False)
    assert_within_budget(run(path, problem), problem)


@pytest.mark.parametrize("path", KERNELS)
def test_a_base_of_all_there_is_leaves_nothing(path: str) -> None:
    problem = random_problem([(5, 33), (9, 64)], (33, 64), False)
    for value, shard in zip(run(path, problem), problem.shards, strict=True):
        norm = torch.linalg.vector_norm(shard, dim=1).max()
        assert value.abs().max() <= 64 * torch.finfo(torch.float32).eps * norm  # 64 differences, one each


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled launches are not seen")
@pytest.mark.parametrize("left", [False, True])
def test_launches_do_not_grow_with_the_shards(left: bool) -> None:
    """One over all classes of length on chip, one over all that is taken in chunks."""
    launches: list[Launch] = []
    few = random_problem([(16, 40), (8, 256), (8, 600), (8, 304)], (1, 2, 3, 60), left)
    with observed_accesses(lambda access: None, launches.append):
        run("triton", Problem(few.shards * 5, few.spans * 5, left))
    on_chip, chunks = sorted(launches, key=lambda launch: "chunks" in launch.kernel)
    assert (on_chip.kernel, chunks.kernel) == ("_project_on_chip_kernel", "_project_chunks_kernel")
    assert on_chip.arguments["LENGTHS"] == (64, 256, 1024)
    assert chunks.arguments["RANK"] == 64


def test_every_vector_is_in_one_block() -> None:
    sizes, ranks = [(16, 40), (2000, 33), (7, 300), (1, 5000), (33, 300)], (3, 1, 60, 2, 33)
    for left in (False, True):
        made = random_problem(sizes, ranks, left, (torch.float32, torch.float64))
        bases = [span.matrix.mT for span in made.spans]
        work = prepare(made.shards, bases, made.shards, left)
        seen = [torch.zeros(vectors, dtype=torch.int64) for vectors, _ in sizes]
        for group in work.groups:
            for shard, kind, number, vectors, length, rank in group.blocks.tolist():
                assert ((vectors, length), rank) == (sizes[shard], ranks[shard])
                assert group.dtype == made.shards[shard].dtype
                side = _project_out_plan.CHUNK_VECTORS
                if group.lengths:
                    assert length <= group.lengths[kind]
                    side = _project_out_plan.tile_elements(group.dtype) // group.lengths[kind]
                else:
                    assert rank <= group.rank
                assert number * side < vectors
                seen[shard][number * side : (number + 1) * side] += 1
        assert all((count == 1).all() for count in seen)


def test_tables_are_functions_of_what_they_are_kept_under() -> None:
    """The same shapes elsewhere find the same blocks and other addresses."""
    one, other = (random_problem([(16, 40)], [3], False, seed=seed) for seed in (0, 1))
    works = [prepare(p.shards, [s.matrix.mT for s in p.spans], p.shards, False) for p in (one, other)]
    assert works[0].groups is works[1].groups
    addresses = [[p.shards[0].data_ptr(), p.spans[0].matrix.data_ptr()] * 2 for p in (one, other)]
    assert [work.addresses[:, 0].tolist() for work in works] == [own[:3] for own in addresses]


def test_more_than_int32_counts_is_refused() -> None:
    shard = torch.empty(1, device="meta").expand(2, _project_out_plan.MOST_VECTORS + 1)
    with pytest.raises(ValueError, match="at most 1073741824 rows and columns in a shard, got 1073741825"):
        prepare([shard], [shard[:1]], [shard], False)
