"""``fastproj.project``: segments, missing and empty shards, dtypes, memory, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from span_inputs import Family, families, packed, random_sets, strided
from surgery_families import combined, methods, normal, round_robin
from surgery_families import families as gradient_families
from torch import Tensor

import fastproj
from fastproj.reference.segments import segment_views
from fastproj.surgery import AGEM, GEM, MGDA, OGD, CAGrad, GradVac, Method, NashMTL, OGDBasis, PCGrad, UPGrad

LORA = ((16, 96), (80, 16), (24,))


def rows_of_segment(family: Family, segment: int) -> Tensor:
    """The gradients of one segment as rows, fp64."""
    plan = family.plan
    rows = []
    for shards in family.sets:
        pieces = [
            piece.double()
            for shard, first in zip(shards, plan.first, strict=True)
            for at, piece in segment_views(shard, first, plan.rows)
            if at == segment
        ]
        rows.append(torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.float64))
    return torch.stack(rows)


@settings(max_examples=15)
@given(family=families(num_sets=3))
def test_every_segment_is_solved_alone(family: Family) -> None:
    """On shards of any shape, dtype and segments, against the method on that segment's vectors."""
    method = UPGrad()
    out = fastproj.project(family.sets, method, segments=family.segments)
    result = Family([out, *family.sets], family.segments)  # type: ignore[list-item]
    for segment in range(family.plan.count):
        gradients, got = rows_of_segment(family, segment), rows_of_segment(result, segment)[0]
        want = combined(method, gradients)
        # Half precision rounds the result once; the Gram of the rest is fp32's, and small conflicts are
        # known to its square root.
        scale = float(gradients.norm(dim=1).max()) if gradients.numel() else 0.0
        assert (got - want).norm() <= 2e-2 * scale


@pytest.mark.parametrize("segments", ["global", "tensor", "row", (0, 1, 0)])
@pytest.mark.parametrize("name", methods(3))
def test_in_fp64_as_on_vectors(name: str, segments: str | tuple[int, ...]) -> None:
    family = Family(random_sets(3, LORA, (torch.float64,)), segments)
    method = methods(3)[name][0]
    out = fastproj.project(family.sets, method, segments=segments)
    if isinstance(method, GradVac):
        assert method.targets.values is not None
        assert len(method.targets.values) == family.plan.count
        method = methods(3)[name][0]
    result = Family([out, *family.sets], segments)  # type: ignore[list-item]
    for segment in range(family.plan.count):
        if isinstance(method, GradVac):
            method.targets.reset()
        gradients = rows_of_segment(family, segment)
        want = combined(method, gradients)
        slack = 1e-6 if isinstance(method, (CAGrad, NashMTL)) else 1e-9
        assert (rows_of_segment(result, segment)[0] - want).norm() <= slack * (1 + want.norm())


def test_the_methods_granularity_is_the_default() -> None:
    sets = random_sets(2, LORA, seed=3)

    class ByTensor(PCGrad):
        granularity = "tensor"

    assert PCGrad.granularity == "global"
    for method, segments in ((PCGrad(), "global"), (ByTensor(), "tensor")):
        default, explicit = (fastproj.project(sets, method, **s) for s in ({}, {"segments": segments}))
        assert all(torch.equal(a, b) for a, b in zip(default, explicit, strict=True))


def test_missing_and_empty_shards_keep_their_places() -> None:
    sets = random_sets(2, [(4, 5), (0, 3), (6,)], (torch.float64,))
    holed: list[list[Tensor | None]] = [[own[0], None, own[1], own[2], None] for own in sets]
    out = fastproj.project(holed, UPGrad())
    whole = fastproj.project(sets, UPGrad())
    assert [value is None for value in out] == [False, True, False, False, True]
    for value, want in zip([out[0], out[2], out[3]], whole, strict=True):
        assert torch.equal(value, want)
    assert fastproj.project([[None], [None]], PCGrad()) == [None]
    assert fastproj.project([[], []], PCGrad()) == []


def test_layout_does_not_matter() -> None:
    sets = random_sets(3, LORA)
    want = fastproj.project(sets, MGDA())
    for lay in (strided, packed):
        for value, expected in zip(fastproj.project([lay(own) for own in sets], MGDA()), want, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)  # fp32, summed in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_results_have_the_dtype_of_their_shards(dtype: torch.dtype) -> None:
    sets = random_sets(2, LORA, (dtype,))
    assert {value.dtype for value in fastproj.project(sets, PCGrad())} == {dtype}


def test_writes_into_what_it_is_given() -> None:
    sets = random_sets(2, LORA)
    want = fastproj.project(sets, AGEM())
    places = [shard.data_ptr() for shard in sets[0]]
    out = fastproj.project(sets, AGEM(), out=sets[0])
    assert [value.data_ptr() for value in out] == places
    for value, expected in zip(out, want, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)  # one rounding of fp32 in either


def test_orders_come_from_the_generator() -> None:
    sets = [[row] for row in gradient_families(5)["conflicting"]]
    for make in (PCGrad, GradVac):
        results = [
            fastproj.project(sets, make(), generator=torch.Generator().manual_seed(seed))[0]
            for seed in (1, 1, 2)
        ]
        torch.manual_seed(7)
        results.append(fastproj.project(sets, make())[0])
        torch.manual_seed(7)
        results.append(fastproj.project(sets, make())[0])
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])
        assert torch.equal(results[3], results[4])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_segment(bad: float) -> None:
    for name, (method, _) in methods(3).items():
        sets = random_sets(3, LORA, (torch.float64,))
        clean = fastproj.project(sets, methods(3)[name][0], segments="tensor")
        sets[1][1][0, 0] = bad
        out = fastproj.project(sets, method, segments="tensor")
        assert out[1].isnan().all(), name
        for position in (0, 2):
            torch.testing.assert_close(out[position], clean[position], rtol=1e-9, atol=1e-9)


def test_gradvac_learns_nothing_from_what_is_not_finite() -> None:
    method = GradVac(order=round_robin(2))
    fastproj.project([[normal(1)], [normal(1) * torch.nan]], method)
    assert torch.equal(method.targets.values, torch.zeros(1, 2, 2, dtype=torch.float64))


def test_runs_without_a_graph() -> None:
    sets = [[shard.requires_grad_() for shard in own] for own in random_sets(2, LORA)]
    assert not any(value.requires_grad for value in fastproj.project(sets, UPGrad()))


def test_bad_input_is_refused_with_what_came() -> None:
    sets = random_sets(2, LORA)
    with pytest.raises(TypeError, match="such as PCGrad"):
        fastproj.project(sets, PCGrad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="AGEM takes 2 to 64 gradient sets, got 1"):
        fastproj.project(sets[:1], AGEM())
    with pytest.raises(ValueError, match="2 tasks, the 1 others once"):
        fastproj.project(sets, PCGrad(order=[[0], [1]]))
    with pytest.raises(ValueError, match="expected 2, got 3"):
        fastproj.project(sets, UPGrad(preference=(1.0, 1.0, 1.0)))
    with pytest.raises(ValueError, match="zeros only"):
        UPGrad(preference=(0.0, 0.0))
    with pytest.raises(ValueError, match="c must be at least 0"):
        CAGrad(-1.0)
    with pytest.raises(TypeError, match="margin must be a number, got str"):
        GEM(margin="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gram must be \(S, K, K\)"):
        PCGrad().coefficients(torch.eye(2))
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        PCGrad().coefficients(torch.ones(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="1 to 64 gradient sets, got 65"):
        PCGrad().coefficients(torch.zeros(1, 65, 65))
    method = GradVac()
    fastproj.project(sets, method)
    with pytest.raises(ValueError, match=r"call reset\(\)"):
        fastproj.project(sets, method, segments="tensor")


def every_method(size: int) -> list[Method]:
    return [method for method, _ in methods(size).values()]


@pytest.mark.parametrize("size", [2, 3])
def test_no_method_looks_at_a_value_on_the_host(size: int) -> None:
    """On tensors without data, where asking for one raises."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():
        gram = torch.empty(5, size, size, dtype=torch.float64)
        for method in every_method(size):
            assert method.coefficients(gram).shape == (5, size), method
        with pytest.raises(DataDependentOutputException):
            gram.sum().item()


def test_segments_of_a_batch_are_what_they_are_alone() -> None:
    grams = torch.stack([normal(3, seed=s) @ normal(3, seed=s).mT for s in range(4)])
    for name in methods(3):
        together = methods(3)[name][0].coefficients(grams)
        for s in range(4):
            alone = methods(3)[name][0].coefficients(grams[s : s + 1])
            torch.testing.assert_close(
                together[s], alone[0], rtol=1e-7, atol=1e-9
            )  # batched products round apart


def test_no_segments_give_no_coefficients() -> None:
    for method in every_method(3):
        assert method.coefficients(torch.zeros(0, 3, 3)).shape == (0, 3), method


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("segments", ["global", "tensor"])
def test_the_growing_basis_stays_orthonormal(segments: str, dtype: torch.dtype) -> None:
    basis = OGDBasis(segments=segments)
    sets = random_sets(6, LORA, (dtype,))
    for own in sets:
        basis.add(own)
    basis.add([2 * a - 3 * b for a, b in zip(sets[0], sets[4], strict=True)])  # in the span already
    assert len(basis) == 7
    gram = fastproj.gram(basis.sets, segments=segments)
    want = torch.diag(torch.tensor([1.0] * 6 + [0.0], dtype=torch.float64)).expand_as(gram)
    # Two projections leave one rounding; unit vectors are rounded to their dtype.
    torch.testing.assert_close(gram, want, rtol=0, atol=64 * torch.finfo(dtype).eps)
    (new,) = random_sets(1, LORA, (dtype,), seed=9)
    out = basis.project_out(new)
    inner = fastproj.gram([out, *basis.sets], segments=segments)[:, 0, 1:]
    norm = fastproj.gram([new], segments=segments)[:, 0, 0].sqrt()
    assert (inner.abs() <= 64 * torch.finfo(dtype).eps * norm[:, None]).all()


def test_a_basis_holds_what_a_gram_matrix_can() -> None:
    basis = OGDBasis()
    for k in range(63):
        basis.add([torch.eye(64)[k]])
    with pytest.raises(ValueError, match="at most 63 directions"):
        basis.add([torch.ones(64)])
    torch.testing.assert_close(basis.project_out([torch.ones(64)])[0], torch.eye(64)[63], rtol=0, atol=1e-5)


def test_zero_is_no_direction() -> None:
    basis = OGDBasis()
    basis.add([torch.zeros(4)])
    assert torch.equal(basis.project_out([torch.ones(4)])[0], torch.ones(4))


def test_ogd_is_exact_on_directions_that_are_not_orthogonal() -> None:
    gradients = normal(4)
    (out,) = fastproj.project([[row] for row in gradients], OGD())
    q = torch.linalg.qr(gradients[1:].mT).Q
    torch.testing.assert_close(out, gradients[0] - q @ (q.mT @ gradients[0]), rtol=1e-12, atol=1e-12)
