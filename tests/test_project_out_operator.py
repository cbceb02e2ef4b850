"""project_out as an operator: autograd, torch.compile, in place, streams, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from devices import on_gpu
from projection_inputs import random_basis, random_problem
from span_inputs import device_of, moved
from torch import Tensor

import fastproj
from fastproj.bindings.project_out import SIDES
from fastproj.reference.basis import Basis

pytest.importorskip("triton")

SIZES, RANKS = ((3, 6), (2, 6), (4, 5)), (2, 1, 3)


@pytest.mark.parametrize("side", SIDES)
def test_gradcheck(side: str) -> None:
    problem = random_problem(SIZES, RANKS, side == "left", (torch.float64,))
    shards = [shard.requires_grad_() for shard in problem.shards]
    spans = [problem.spans[0], None, problem.spans[2]]

    def function(*shards: Tensor) -> tuple[Tensor, ...]:
        return tuple(fastproj.project_out(shards, spans, side=side))

    assert torch.autograd.gradcheck(function, shards)
    assert torch.autograd.gradgradcheck(function, shards)


@pytest.mark.parametrize("side", SIDES)
def test_a_gradient_is_projected(side: str) -> None:
    """The projection is its own transpose; a shard without one passes its gradient on as it is."""
    problem = random_problem(SIZES, RANKS, side == "left")
    spans = [*problem.spans[:2], None]
    shards = [shard.requires_grad_() for shard in problem.shards]
    grads = [torch.randn_like(shard) for shard in shards]
    out = fastproj.project_out(shards, spans, side=side)
    got = torch.autograd.grad(out, shards, grads)
    for value, want in zip(got, fastproj.project_out(grads, spans, side=side), strict=True):
        assert torch.equal(value, want)


def test_a_result_that_nobody_uses_has_a_gradient_of_zero() -> None:
    problem = random_problem(SIZES, RANKS, False)
    shards = [shard.requires_grad_() for shard in problem.shards]
    out = fastproj.project_out(shards, problem.spans, side="right")
    used, unused = torch.autograd.grad(out[0].sum(), [shards[0], shards[1]], allow_unused=True)
    assert torch.equal(used, fastproj.project_out([torch.ones(3, 6)], problem.spans[0], side="right")[0])
    assert unused is None or not unused.any()


@pytest.mark.parametrize("side", SIDES)
def test_autocast_changes_nothing(side: str) -> None:
    """Neither the result, of shards large and small, nor what is projected in place, nor the gradient."""
    problem = random_problem((*SIZES, (150, 80)), (*RANKS, 3), side == "left", (torch.float32,))
    shards = [shard.requires_grad_() for shard in problem.shards]
    copies = [shard.detach().clone() for shard in shards]
    want = fastproj.project_out(shards, problem.spans, side=side)
    wanted = torch.autograd.grad(want, shards, copies)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fastproj.project_out(shards, problem.spans, side=side)
        gradients = torch.autograd.grad(got, shards, copies)
        fastproj.project_out_(copies, problem.spans, side=side)
    for values in (got, gradients, copies):
        for value, right in zip(values, want if values is not gradients else wanted, strict=True):
            assert torch.equal(value, right)


@on_gpu
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(left: bool, grad: bool) -> None:
    problem = random_problem(SIZES, RANKS, left)
    shards = [shard.requires_grad_(grad) for shard in moved(problem.shards, "public")]
    bases = moved(problem.bases, "public")
    arguments = (shards, bases, [0, -1, 2], left)
    torch.library.opcheck(torch.ops.fastproj.project_out.default, arguments)
    if not grad:
        torch.library.opcheck(torch.ops.fastproj.project_out_.default, arguments)


@on_gpu
@pytest.mark.parametrize("side", SIDES)
def test_compiles_without_graph_break(side: str) -> None:
    problem = random_problem(SIZES, RANKS, side == "left")
    shards = moved(problem.shards, "public")
    spans = [span.to(device_of("public")) for span in problem.spans]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def projected(shards: list[Tensor]) -> list[Tensor]:
        return fastproj.project_out([shard * 2 for shard in shards], spans, side=side)

    want = fastproj.project_out([shard * 2 for shard in shards], spans, side=side)
    assert all(torch.equal(a, b) for a, b in zip(projected(shards), want, strict=True))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def in_place(shards: list[Tensor]) -> list[Tensor]:
        own = [shard * 2 for shard in shards]
        fastproj.project_out_(own, spans, side=side)
        return own

    assert all(torch.equal(a, b) for a, b in zip(in_place(shards), want, strict=True))


@on_gpu
def test_backward_compiles() -> None:
    (shard,) = moved(random_problem([(3, 6)], [2], False).shards, "public")
    span = random_basis(6, 2).to(device_of("public"))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(shard: Tensor) -> Tensor:
        return fastproj.project_out_stream(shard, span).square().sum()

    want = torch.autograd.grad(loss(shard.requires_grad_()), shard)[0]
    # d‖P g‖² = 2 P g: products with two unit vectors in fp32.
    twice = 2 * fastproj.project_out_stream(shard.detach(), span)
    torch.testing.assert_close(want, twice, rtol=1e-5, atol=1e-6)


def test_missing_shards_and_bases() -> None:
    shard, span = torch.ones(2, 3), random_basis(3, 1)
    out = fastproj.project_out([None, shard, shard], [span, None, span], side="right")
    assert out[0] is None
    assert torch.equal(out[1], shard)
    assert out[1] is not shard
    assert torch.equal(out[2], fastproj.project_out([shard], span, side="right")[0])
    assert fastproj.project_out([], span, side="right") == []
    assert fastproj.project_out([None], [None], side="left") == [None]
    fastproj.project_out_([None], span, side="left")


def test_a_plain_tensor_is_orthonormalised() -> None:
    shard, direction = torch.arange(6.0).view(2, 3), torch.tensor([0.0, 0.0, 5.0])
    (got,) = fastproj.project_out([shard], direction, side="right")
    assert got.tolist() == [[0, 1, 0], [3, 4, 0]]
    assert torch.equal(fastproj.project_out([shard], [direction[:, None]], side="right")[0], got)


def test_one_tensor_of_directions_in_many_places_is_one_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    direction, calls = torch.tensor([0.0, 0.0, 5.0]), []
    real = fastproj.bindings.project_out.orthonormalize

    def counted(vectors: Tensor) -> Basis:
        calls.append(vectors)
        return real(vectors)

    monkeypatch.setattr(fastproj.bindings.project_out, "orthonormalize", counted)
    fastproj.project_out([torch.ones(2, 3)] * 4, [direction] * 4, side="right")
    assert len(calls) == 1


@pytest.mark.parametrize("shape", [(2, 5, 6), (6,), (1, 6), (0, 5, 6), (2, 0, 6), (3, 1, 2, 6)])
def test_stream(shape: tuple[int, ...]) -> None:
    delta, span = torch.randn(shape), random_basis(6, 2)
    got = fastproj.project_out_stream(delta, span)
    matrix = span.matrix.double()
    want = delta.double() - (delta.double() @ matrix) @ matrix.mT
    assert got.shape == delta.shape
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)  # a few fp32 roundings of numbers to 5


def test_in_place_writes_strided_memory_and_nothing_beside_it() -> None:
    memory = torch.randn(4, 12)
    before, span = memory.clone(), random_basis(6, 2)
    view = memory[:, ::2]
    (want,) = fastproj.project_out([view], span, side="right")
    fastproj.project_out_([view], span, side="right")
    torch.testing.assert_close(view, want, rtol=0, atol=1e-6)  # layouts may order sums otherwise
    assert torch.equal(memory[:, 1::2], before[:, 1::2])


def test_in_place_changes_the_version_that_autograd_checks() -> None:
    shard = torch.ones(2, 3, requires_grad=True)
    product = shard.square().sum()
    with torch.no_grad():
        fastproj.project_out_([shard], random_basis(3, 1), side="right")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


ONE, SPAN = torch.ones(2, 3), random_basis(3, 1)


@pytest.mark.parametrize(
    ("shards", "basis", "side", "error", "match"),
    [
        ([ONE], SPAN, "up", ValueError, r"one of \('left', 'right'\), got 'up'"),
        ([ONE], SPAN, None, ValueError, "got None"),
        ([ONE], [SPAN, SPAN], "right", ValueError, "each of 1 shards, got 2"),
        ([ONE], [], "right", ValueError, "got 0"),
        ([ONE], SPAN, "left", ValueError, r"length 3, but the shard's columns have length 2: shape \(2, 3\)"),
        ([ONE.mT], SPAN, "right", ValueError, "the shard's rows have length 2"),
        ([torch.ones(2)], SPAN, "right", ValueError, "rows have length 2"),
        ([torch.ones(0, 2)], SPAN, "right", ValueError, "rows have length 2"),
        ([torch.ones(2, 0)], SPAN, "left", ValueError, "columns have length 2"),
        ([torch.tensor(1.0)], random_basis(1, 1), "right", ValueError, "shard 0 is a scalar"),
        ([ONE], SPAN.to("meta"), "right", ValueError, "is on meta, the shard on cpu"),
        ([ONE], "basis", "right", TypeError, "a tensor or a list of them, got str"),
        ([ONE], 3, "right", TypeError, "a tensor or a list of them, got int"),
        ([ONE], [3], "right", TypeError, "got int"),
        ([ONE], torch.ones(3, 2), "right", ValueError, "1 independent directions"),
        ([ONE], torch.ones(3, dtype=torch.int64), "right", TypeError, "int64"),
        ([ONE, ONE.int()], SPAN, "right", TypeError, "shard 1 of shards must be .* got torch.int32"),
        ([ONE.to_sparse()], SPAN, "right", TypeError, "must be dense"),
        ([3.0], SPAN, "right", TypeError, "must be a tensor or None, got float"),
        (ONE, SPAN, "right", TypeError, "shards must be a list"),
    ],
)
@pytest.mark.parametrize("function", [fastproj.project_out, fastproj.project_out_])
def test_bad_input(
    function: object, shards: object, basis: object, side: object, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        function(shards, basis, side=side)


def test_bad_streams() -> None:
    for delta, came in ((3.0, "float"), (torch.tensor(1.0), "a scalar")):
        with pytest.raises(TypeError, match=came):
            fastproj.project_out_stream(delta, SPAN)
    with pytest.raises(ValueError, match="length 3, but the shard's rows have length 4"):
        fastproj.project_out_stream(torch.ones(2, 4), SPAN)


def test_in_place_refuses_gradients_and_one_tensor_twice() -> None:
    shard = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"not differentiable; call it under torch.no_grad\(\)"):
        fastproj.project_out_([shard], SPAN, side="right")
    with pytest.raises(ValueError, match="the same tensor at two positions"):
        fastproj.project_out_([ONE, ONE], SPAN, side="right")
