"""Combine: reference, CPU fast path, Triton launcher, operator."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from devices import on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from span_inputs import (
    DTYPES,
    KERNELS,
    PATHS,
    Family,
    accumulation_eps,
    assert_as_good_as_eager,
    device_of,
    eager_combine,
    families,
    function_of,
    moved,
    poisoned,
    random_sets,
    strided,
)
from torch import Tensor

import fastproj
from fastproj.bindings.combine import result_dtype
from fastproj.reference.combine import combine as reference

pytest.importorskip("triton")

# fp16 overflows in a test on purpose; numpy, behind the interpreter, tells of it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

SEGMENTS = ("global", "tensor", "row", (0, 1, 0))
LORA = ((16, 96), (80, 16), (24,))


def run(path: str, family: Family, coefficients: Tensor, out: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The combination by one of PATHS, back on the CPU; ``out`` is moved there and back like the rest."""
    sets = [moved(shards, path) for shards in family.sets]
    coefficients = coefficients.to(device_of(path))
    if path == "public" and out is None:
        return [value.cpu() for value in fastproj.combine(sets, coefficients, segments=family.segments)]
    if out is None:
        out = poisoned(sets[0], [result_dtype(at) for at in zip(*sets, strict=True)])
    out = moved(out, path)
    if path == "public":
        fastproj.combine(sets, coefficients, segments=family.segments, out=out)
    else:
        flat = [shard for shards in sets for shard in shards]
        function_of(path, "combine")(flat, coefficients, family.plan.first, family.plan.rows, out)
    return [value.cpu() for value in out]


def random_coefficients(family: Family, seed: int = 0) -> Tensor:
    """(S, K), a quarter of them exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(family.plan.count, len(family.sets), generator=generator, dtype=torch.float64)
    return values * (torch.rand(values.shape, generator=generator) > 0.25)


def assert_within_budget(got: Sequence[Tensor], family: Family, coefficients: Tensor) -> None:
    absolute = [[shard.abs() for shard in shards] for shards in family.sets]
    magnitude = reference(absolute, coefficients.abs(), family.plan)
    exact = reference(family.sets, coefficients, family.plan)
    eager = eager_combine(family, coefficients, [value.dtype for value in got])
    assert_as_good_as_eager(got, eager, exact, magnitude, accumulation_eps(got))


def test_reference_by_hand() -> None:
    family = Family(
        [[torch.tensor([[1.0, 2.0], [3.0, 4.0]])], [torch.tensor([[1.0, 0.0], [0.0, 1.0]])]], "row"
    )
    (out,) = reference(family.sets, torch.tensor([[2.0, 1.0], [0.0, -1.0]]), family.plan)
    assert out.tolist() == [[3.0, 4.0], [0.0, -1.0]]


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25)
@given(family=families(), seed=st.integers(0, 9))
def test_matches_reference(path: str, family: Family, seed: int) -> None:
    coefficients = random_coefficients(family, seed)
    got = run(path, family, coefficients)
    assert [value.dtype for value in got] == [result_dtype(at) for at in zip(*family.sets, strict=True)]
    assert_within_budget(got, family, coefficients)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_zero_leaves_a_set_out_even_if_it_is_not_finite(path: str, segments: object) -> None:
    family = Family(random_sets(3, LORA), segments)
    for shard, bad in zip(family.sets[1], (torch.nan, torch.inf, -torch.inf), strict=True):
        shard.fill_(bad)
    coefficients = random_coefficients(family).index_fill(1, torch.tensor([1]), 0.0)
    got = run(path, family, coefficients)
    clean = Family([family.sets[0], random_sets(1, LORA)[0], family.sets[2]], segments)
    assert all(torch.equal(a, b) for a, b in zip(got, run(path, clean, coefficients), strict=True))
    assert all(value.isfinite().all() for value in got)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("segments", ["tensor", "row"])
def test_nan_coefficient_stays_in_its_segment(path: str, segments: str) -> None:
    family = Family(random_sets(2, LORA), segments)
    coefficients = torch.ones(family.plan.count, 2, dtype=torch.float64)
    clean = run(path, family, coefficients)
    coefficients[1, 0] = torch.nan
    got = run(path, family, coefficients)
    hit = (got[1] if segments == "tensor" else got[0][1]).isnan()
    assert hit.all()
    assert sum(int(value.isnan().sum()) for value in got) == hit.numel()
    for value, want in zip(got, clean, strict=True):
        assert torch.equal(value[~value.isnan()], want[~value.isnan()])


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("segments", ["global", "row"])
def test_out_may_be_one_of_the_sets(path: str, position: int, segments: str) -> None:
    family = Family(random_sets(3, LORA), segments)
    coefficients = random_coefficients(family) + 0.1
    want = run(path, family, coefficients)
    sets = [moved([shard.clone() for shard in shards], path) for shards in family.sets]
    flat, plan = [shard for shards in sets for shard in shards], family.plan
    coefficients = coefficients.to(device_of(path))
    function_of(path, "combine")(flat, coefficients, plan.first, plan.rows, sets[position])
    for value, expected in zip(sets[position], want, strict=True):
        torch.testing.assert_close(
            value.cpu(), expected, rtol=1e-6, atol=1e-6
        )  # aliasing may order sums otherwise


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_strided_sets_and_out(path: str, segments: object) -> None:
    sets = random_sets(2, LORA)
    dense, cut = Family(sets, segments), Family([strided(shards) for shards in sets], segments)
    coefficients = random_coefficients(dense)
    got = run(path, cut, coefficients, out=strided(poisoned(sets[0])))
    for value, want in zip(got, run(path, dense, coefficients), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-6)  # same products, order of sums free


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [2.0**-99, 2.0**99])
def test_range(path: str, dtype: torch.dtype, scale: float) -> None:
    """Powers of two commute with everything but the ends of the range."""
    family = Family(random_sets(2, LORA, (dtype,)), "tensor")
    scaled = Family([[shard * scale for shard in shards] for shards in family.sets], "tensor")
    coefficients = random_coefficients(family)
    for value, want in zip(run(path, scaled, coefficients), run(path, family, coefficients), strict=True):
        assert torch.equal(value, want * scale)


@on_gpu
@pytest.mark.parametrize("segments", ["global", "row"])
def test_coefficients_beyond_fp32(segments: str) -> None:
    """Triton takes them as a product of two fp32 numbers: c·x is in range even where c is not."""
    family = Family(random_sets(2, LORA), segments)
    family.sets[0] = [shard * 2.0**-99 for shard in family.sets[0]]
    coefficients = torch.tensor([[2.0**180, -(2.0**70)]], dtype=torch.float64).repeat(family.plan.count, 1)
    exact = reference(family.sets, coefficients, family.plan)
    for value, want in zip(run("triton", family, coefficients), exact, strict=True):
        assert (value - want).abs().max() <= 4 * torch.finfo(torch.float32).eps * want.abs().max()


@pytest.mark.parametrize("path", KERNELS)
def test_two_runs_agree_bit_for_bit(path: str) -> None:
    family = Family(random_sets(2, LORA, DTYPES), "row")
    copy = Family([[shard.clone() for shard in shards] for shards in family.sets], "row")
    coefficients = random_coefficients(family)
    again = run(path, copy, coefficients)
    assert all(torch.equal(a, b) for a, b in zip(run(path, family, coefficients), again, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [1, 1000])
def test_many_shards(path: str, count: int) -> None:
    """The interpreter takes 10 ms for each: a thousand of them are test_edge's."""
    count = min(count, 50) if device_of(path).type == "cpu" and path == "triton" else count
    family = Family(random_sets(2, [(3,)] * count), "tensor")
    coefficients = random_coefficients(family)
    assert_within_budget(run(path, family, coefficients), family, coefficients)


@pytest.mark.parametrize("path", KERNELS)
def test_eight_sets(path: str) -> None:
    family = Family(random_sets(8, LORA, (torch.float32, torch.float16)), "row")
    coefficients = random_coefficients(family)
    assert_within_budget(run(path, family, coefficients), family, coefficients)


@pytest.mark.parametrize("path", KERNELS)
def test_half_precision_overflows_to_infinity_as_eager_does(path: str) -> None:
    family = Family([[torch.full((40,), 60000.0, dtype=torch.float16)]], "global")
    assert run(path, family, torch.tensor([[2.0]], dtype=torch.float64))[0].isinf().all()


def test_missing_shards() -> None:
    one = torch.ones(2)
    out = fastproj.combine([[one, None], [one, None]], torch.tensor([[1.0, 2.0]]))
    assert out[1] is None
    assert out[0].tolist() == [3, 3]
    assert fastproj.combine([[], []], torch.ones(1, 2)) == []
    assert fastproj.combine([[None]], torch.ones(1, 1)) == [None]


@pytest.mark.parametrize("segments", ["global", "row"])
def test_gradcheck(segments: str) -> None:
    shards = [
        s.requires_grad_() for s in Family(random_sets(2, [(3, 2), (4,)], (torch.float64,)), segments).flat
    ]
    count = 1 if segments == "global" else 4
    coefficients = torch.randn(count, 2, dtype=torch.float64, requires_grad=True)

    def function(c: Tensor, *s: Tensor) -> tuple[Tensor, ...]:
        return tuple(fastproj.combine([s[:2], s[2:]], c, segments=segments))

    assert torch.autograd.gradcheck(function, [coefficients, *shards])


@on_gpu
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool) -> None:
    device = device_of("public")
    shards = [s.to(device).requires_grad_(grad) for s in Family(random_sets(2, [(3, 2), (4,)]), "row").flat]
    coefficients = torch.ones(4, 2, dtype=torch.float64, device=device, requires_grad=grad)
    torch.library.opcheck(torch.ops.fastproj.combine.default, (shards, coefficients, [0, 3], True))
    if not grad:
        out = [torch.empty_like(shard) for shard in shards[:2]]
        torch.library.opcheck(
            torch.ops.fastproj.combine_out.default, (shards, coefficients, [0, 3], True, out)
        )


@on_gpu
def test_compiles_without_graph_break() -> None:
    e, g = (moved(shards, "public") for shards in random_sets(2, LORA))
    coefficients = torch.tensor([[0.5, -2.0]], device=device_of("public"))
    compiled = torch.compile(fastproj.combine, fullgraph=True, backend="aot_eager")
    for value, want in zip(
        compiled([e, g], coefficients), fastproj.combine([e, g], coefficients), strict=True
    ):
        assert torch.equal(value, want)


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("coefficients", "out", "error", "match"),
    [
        (torch.ones(1, 3), None, ValueError, r"\(1, 2\), got \(1, 3\)"),
        (torch.ones(2), None, ValueError, r"got \(2,\)"),
        (torch.ones(1, 2, dtype=torch.int64), None, TypeError, "int64"),
        ([[1.0, 2.0]], None, TypeError, "list"),
        (torch.ones(1, 2, device="meta"), None, ValueError, "meta"),
        (torch.ones(1, 2), [torch.ones(3)], ValueError, r"\(3,\)"),
        (torch.ones(1, 2), [], ValueError, "out has 0"),
        (torch.ones(1, 2), [None], ValueError, "out only"),
        (torch.ones(1, 2), [torch.ones(2, dtype=torch.int32)], TypeError, "int32"),
        (torch.ones(1, 2, requires_grad=True), [torch.ones(2)], ValueError, "not differentiable"),
    ],
)
def test_bad_input(coefficients: object, out: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fastproj.combine([[ONE], [ONE]], coefficients, out=out)


def test_out_may_only_be_a_shard_at_its_own_position() -> None:
    a, b = torch.ones(2, 2), torch.full((2, 2), 2.0)
    sets, coefficients = [[a, b], [b.clone(), a.clone()]], torch.tensor([[2.0, 3.0]])
    for out, message in (
        ([b, a], "shares memory with shard"),
        ([a.t(), torch.empty(2, 2)], "in the same layout"),
        ([a, a], "at two positions"),
    ):
        with pytest.raises(ValueError, match=message):
            fastproj.combine(sets, coefficients, out=out)
    expected = fastproj.combine(sets, coefficients)
    mixed = fastproj.combine(sets, coefficients, out=[a, torch.full((2, 2), 7.0)])
    torch.testing.assert_close(mixed, expected)


def test_projecting_one_tensor_twice_in_place_is_an_error() -> None:
    e, g = torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match="at two positions"):
        fastproj.edge_([e, e], [g, g])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "pair", [(1e-3, 1e-3), (1e-6, 0.5), (0.0, 0.5), (-1e-4, 2.0), (0.5, -0.5), (900.0, -1.0)]
)
def test_small_coefficients_keep_their_digits(path: str, pair: tuple[float, float]) -> None:
    a, b = random_sets(2, [(40, 33), (7,)])
    # Scaled so that neither term hides the other's error.
    sets = [a, [shard * abs(pair[0] / pair[1]) for shard in b]] if pair[0] else [a, b]
    got = run(path, Family(sets, "global"), torch.tensor([pair], dtype=torch.float64))
    for value, x, y in zip(got, *sets, strict=True):
        exact = pair[0] * x.double() + pair[1] * y.double()
        size = (pair[0] * x.double()).abs() + (pair[1] * y.double()).abs()
        # Two products and a sum, each rounded once to fp32.
        assert ((value.double() - exact).abs() <= 4 * torch.finfo(torch.float32).eps * size).all()
