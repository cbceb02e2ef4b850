"""EDGE: reference, CPU fast path, Triton launcher, operator, statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    eager_gram,
    families,
    function_of,
    moved,
    packed,
    poisoned,
    random_sets,
    strided,
)
from torch import Tensor

import fastproj
from fastproj.bindings.edge import row_owners
from fastproj.reference.combine import combine as reference_combine
from fastproj.reference.edge import VARIANTS, edge_coefficients
from fastproj.reference.edge import edge as reference
from fastproj.reference.gram import gram as reference_gram

pytest.importorskip("triton")

# Products overflow first and are then taken again, scaled; numpy tells of the first time.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

SEGMENTS = ("global", "tensor", "row", (0, 1, 0))
LORA = ((16, 96), (80, 16), (24,))


@dataclass(frozen=True)
class Projected:
    """What a call gives, on the CPU."""

    out: list[Tensor]
    gram: Tensor
    coefficients: Tensor


def run(
    path: str, family: Family, alpha: float = 1.0, variant: str = "paper", on_nonfinite: str = "propagate"
) -> Projected:
    """The projection by one of PATHS; the kernels write into poisoned buffers."""
    e, g = (moved(shards, path) for shards in family.sets)
    if path == "public":
        options = {"alpha": alpha, "variant": variant, "on_nonfinite": on_nonfinite}
        options["segments"] = "global" if variant == "released" else family.segments
        out = fastproj.edge(e, g, **options)
        stats = fastproj.edge_([shard.clone() for shard in e], g, **options)
        gram, coefficients = stats.gram, stats.coefficients
    else:
        plan, out, skip = family.plan, poisoned(e), on_nonfinite == "skip"
        function = function_of(path, "edge")
        gram, coefficients = function(e, g, out, plan.first, plan.rows, plan.count, alpha, variant, skip)
    return Projected([value.cpu() for value in out], gram.cpu(), coefficients.cpu())


def of_variant(family: Family, variant: str) -> Family:
    """ "released" fixes its own segments."""
    return replace(family, segments="row") if variant == "released" else family


def coefficients_of(family: Family, gram: Tensor, alpha: float, variant: str) -> Tensor:
    """The closed form of the reference."""
    owners = row_owners(family.sets[0], gram.device) if variant == "released" else None
    n = len(family.sets[0])
    return edge_coefficients(gram, alpha=alpha, variant=variant, tensor_of_segment=owners, tensors=n)


def assert_within_budget(got: Projected, family: Family, alpha: float, variant: str) -> None:
    exact = reference(*family.sets, family.plan, alpha=alpha, variant=variant)
    eager = eager_combine(
        family,
        coefficients_of(family, eager_gram(family).float(), alpha, variant),
        [shard.dtype for shard in family.sets[0]],
    )
    absolute = [[shard.abs() for shard in shards] for shards in family.sets]
    gram = reference_gram(family.sets, family.plan)
    own = coefficients_of(family, gram, alpha, variant).abs()
    # An inner product is exact to an eps of the norms, not of itself: α|g|, once for e and once for g.
    floor = alpha * torch.ones_like(own)
    floor[:, 0] *= torch.where(gram[:, 0, 0] > 0, (gram[:, 1, 1] / gram[:, 0, 0]).sqrt(), 0.0)
    magnitude = reference_combine(absolute, torch.maximum(own, floor), family.plan)
    assert [value.dtype for value in got.out] == [shard.dtype for shard in family.sets[0]]
    assert_as_good_as_eager(got.out, eager, exact, magnitude, accumulation_eps(family.flat))


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    """Bit for bit, NaN included."""
    for value, expected in zip(got, want, strict=True):
        assert torch.equal(value.isnan(), expected.isnan())
        assert torch.equal(value.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("variant", VARIANTS)
@given(family=families(num_sets=2), alpha=st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_closed_form_is_the_paper_step_by_step(variant: str, family: Family, alpha: float) -> None:
    family = of_variant(family, variant)
    coefficients = coefficients_of(family, reference_gram(family.sets, family.plan), alpha, variant)
    closed = reference_combine(family.sets, coefficients, family.plan)
    for value, want in zip(
        closed, reference(*family.sets, family.plan, alpha=alpha, variant=variant), strict=True
    ):
        # ⟨g,b⟩/⟨b,b⟩ loses 1/|b|² ≤ 1e4 of fp64's 1e-16 on one-element shards that nearly cancel.
        torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-10)


def test_bias_is_orthogonal_to_the_bisector() -> None:
    (e,), (g,) = random_sets(2, [(30, 7)], (torch.float64,))
    (out,) = fastproj.edge([e], [g], alpha=1.0)
    bisector = e / e.norm() + g / g.norm()
    assert abs(((e - out) * bisector).sum().item()) < 1e-12  # 210 products of order 1 in fp64


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=20)
@given(family=families(num_sets=2), alpha=st.sampled_from([0.3, 1.0]))
def test_matches_reference(path: str, variant: str, family: Family, alpha: float) -> None:
    family = of_variant(family, variant)
    got = run(path, family, alpha, variant)
    assert_within_budget(got, family, alpha, variant)
    exact = reference_gram(family.sets, family.plan)
    # The inner products' own test is test_gram; here they must be those of the right segments.
    scale = exact.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    assert ((got.gram - exact).abs() <= 1e-5 * scale).all()
    torch.testing.assert_close(
        got.coefficients, coefficients_of(family, got.gram, alpha, variant), rtol=1e-12, atol=1e-300
    )  # both fp64 from one Gram


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", PATHS)
def test_in_place_is_the_same(path: str, variant: str) -> None:
    family = of_variant(Family(random_sets(2, LORA, DTYPES), "tensor"), variant)
    e, g = (moved([shard.clone() for shard in shards], path) for shards in family.sets)
    if path == "public":
        segments = "global" if variant == "released" else "tensor"
        fastproj.edge_(e, g, alpha=0.7, segments=segments, variant=variant)
    else:
        plan = family.plan
        function_of(path, "edge")(e, g, e, plan.first, plan.rows, plan.count, 0.7, variant, False)
    assert_same([value.cpu() for value in e], run(path, family, 0.7, variant).out)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_strided_in_and_out(path: str, segments: object) -> None:
    sets = random_sets(2, LORA)
    e, g = (moved(strided(shards), path) for shards in sets)
    if device_of(path).type == "cpu":
        assert not e[0].is_contiguous()
    fastproj.edge_(e, g, segments=segments) if path == "public" else _in_place(
        path, e, g, Family(sets, segments)
    )
    for value, want in zip(e, run(path, Family(sets, segments)).out, strict=True):
        torch.testing.assert_close(
            value.cpu(), want, rtol=1e-5, atol=1e-6
        )  # the CPU's sums follow the strides


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_views_into_a_bucket(path: str, segments: object) -> None:
    sets = random_sets(2, LORA)
    got = run(path, Family([packed(shards) for shards in sets], segments))
    for value, want in zip(got.out, run(path, Family(sets, segments)).out, strict=True):
        torch.testing.assert_close(
            value, want, rtol=1e-5, atol=1e-6
        )  # alignment may change the order of sums


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_shard(path: str, dtype: torch.dtype) -> None:
    """Many blocks, the last of them short."""
    family = Family(random_sets(2, [(100_003,)], (dtype,)), "global")
    assert_within_budget(run(path, family), family, 1.0, "paper")


def _in_place(path: str, e: list[Tensor], g: list[Tensor], family: Family) -> None:
    plan = family.plan
    function_of(path, "edge")(e, g, e, plan.first, plan.rows, plan.count, 1.0, "paper", False)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ratio", [-2.0, -0.25])
def test_antiparallel(path: str, ratio: float) -> None:
    """ĝ = −ê: the bisector is 0/0, all of g is bias."""
    e = random_sets(1, LORA)[0]
    family = Family([e, [shard * ratio for shard in e]], "tensor")
    for value, shard in zip(run(path, family, 1.0).out, e, strict=True):
        torch.testing.assert_close(value, shard * (1 - ratio), rtol=1e-6, atol=0)  # a few fp32 roundings


@pytest.mark.parametrize("path", PATHS)
def test_parallel_has_no_bias(path: str) -> None:
    e = random_sets(1, LORA)[0]
    for value, shard in zip(run(path, Family([e, [s * 4.0 for s in e]], "tensor")).out, e, strict=True):
        torch.testing.assert_close(value, shard, rtol=1e-5, atol=1e-6)  # 3 e − ½ 4 e: two eps of 3|e|


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("zero", [0, 1])
def test_zero_gradient_changes_nothing(path: str, segments: object, zero: int) -> None:
    sets = random_sets(2, LORA)
    sets[zero] = [torch.zeros_like(shard) for shard in sets[zero]]
    got = run(path, Family(sets, segments))
    assert_same(got.out, sets[0])
    assert got.coefficients.tolist() == [[1, 0]] * len(got.gram)


@pytest.mark.parametrize("path", PATHS)
def test_alpha_zero_changes_nothing(path: str) -> None:
    family = Family(random_sets(2, LORA, DTYPES), "tensor")
    for variant in ("paper", "naive", "subtract"):
        assert_same(run(path, family, 0.0, variant).out, family.sets[0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("segments", ["tensor", "row"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_nonfinite_stays_in_its_segment(path: str, segments: str, bad: float, which: int) -> None:
    family = Family(random_sets(2, LORA), segments)
    clean = run(path, family)
    family.sets[which][1][3, 2] = bad
    propagated, skipped = run(path, family), run(path, family, on_nonfinite="skip")
    hit = 1 if segments == "tensor" else 16 + 3
    touched = [torch.zeros_like(shard, dtype=torch.bool) for shard in family.sets[0]]
    touched[1][slice(None) if segments == "tensor" else 3] = True
    for i, mask in enumerate(touched):
        assert propagated.out[i][mask].isnan().all()
        assert_same([skipped.out[i][mask]], [family.sets[0][i][mask]])
        for got in (propagated, skipped):
            # The CPU's path may take a whole shard again in fp64: other rounding, same values.
            torch.testing.assert_close(got.out[i][~mask], clean.out[i][~mask], rtol=1e-5, atol=1e-5)
    finite = propagated.gram.isfinite().all(-1).all(-1)
    assert finite.nonzero().flatten().tolist() == [s for s in range(len(finite)) if s != hit]
    assert propagated.coefficients[hit].isnan().all()
    assert skipped.coefficients[hit].tolist() == [1, 0]


@pytest.mark.parametrize("path", PATHS)
def test_released_shares_a_norm_so_a_bad_row_takes_its_tensor(path: str) -> None:
    family = Family(random_sets(2, [*LORA, (3, 600)]), "row")
    clean = run(path, family, variant="released")
    for shard in (0, 3):
        family.sets[1][shard][2, 5] = torch.nan
    propagated, skipped = (
        run(path, family, variant="released", on_nonfinite=rule) for rule in ("propagate", "skip")
    )
    for shard in (0, 3):
        assert propagated.out[shard].isnan().all()
        assert_same([skipped.out[shard]], [family.sets[0][shard]])
    for shard in (1, 2):
        assert_same([propagated.out[shard], skipped.out[shard]], [clean.out[shard]] * 2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [2.0**-99, 2.0**99])
def test_range(path: str, variant: str, dtype: torch.dtype, scale: float) -> None:
    """Around 1e-30 and 1e30 the squares are no fp32 numbers; the projection scales with its inputs."""
    plain = of_variant(Family(random_sets(2, LORA, (dtype,)), "tensor"), variant)
    scaled = replace(plain, sets=[[shard * scale for shard in shards] for shards in plain.sets])
    got, want = run(path, scaled, 0.5, variant), run(path, plain, 0.5, variant)
    assert got.gram.isfinite().all()
    eps = torch.finfo(dtype).eps
    for value, expected in zip(got.out, want.out, strict=True):
        # Sums of squares are added in another order: another last bit in the coefficients.
        assert ((value / scale - expected).abs() <= 2 * eps * expected.abs().max()).all()


@on_gpu
@pytest.mark.parametrize("powers", [(-99, 99), (99, -99)])
@pytest.mark.parametrize("variant", ["paper", "naive"])
def test_gradients_sixty_decades_apart(powers: tuple[int, int], variant: str) -> None:
    """Triton: neither |g|/|e| nor ⟨e,g⟩/⟨g,g⟩ is an fp32 number, their products with e and g are."""
    sets = [[s * 2.0**p for s in shards] for shards, p in zip(random_sets(2, LORA), powers, strict=True)]
    family = Family(sets, "tensor")
    exact = reference(*sets, family.plan, alpha=1.0, variant=variant)
    eps = torch.finfo(torch.float32).eps
    for value, want in zip(run("triton", family, 1.0, variant).out, exact, strict=True):
        assert ((value - want).abs() <= 16 * eps * want.abs().max()).all()


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_runs_agree_bit_for_bit(path: str, variant: str) -> None:
    family = of_variant(Family(random_sets(2, LORA, DTYPES), "global"), variant)
    copy = replace(family, sets=[[shard.clone() for shard in shards] for shards in family.sets])
    one, two = run(path, family, 0.3, variant), run(path, copy, 0.3, variant)
    assert_same([*one.out, one.gram, one.coefficients], [*two.out, two.gram, two.coefficients])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [1, 1000])
def test_many_shards(path: str, count: int) -> None:
    family = Family(random_sets(2, [(3,)] * count), "global")
    assert_within_budget(run(path, family), family, 1.0, "paper")


@pytest.mark.parametrize("path", KERNELS)
def test_sums_over_more_slots_than_one_tile(path: str) -> None:
    """Released rows: the norms of a shard are sums over all its rows."""
    family = Family(random_sets(2, [(1200, 4)]), "row")
    assert_within_budget(run(path, family, variant="released"), family, 1.0, "released")
