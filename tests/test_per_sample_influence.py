"""Per-sample dot products and square norms: reference, CPU path and Triton launcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from devices import DEVICE, GPU_MARKS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastproj.bindings.per_sample_influence import from_reference
from fastproj.kernels.cpu import per_sample_influence as cpu_module
from fastproj.reference.adam import AdamState, adam_slope, adam_update
from fastproj.reference.per_sample_grad import per_sample_grad
from fastproj.reference.per_sample_influence import per_sample_influence as reference

pytest.importorskip("triton")

from fastproj.kernels.per_sample_influence import per_sample_influence as triton_path

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
KINDS = (None, "adam", "less")
Shape = tuple[int, int, int, int]
Layer = tuple[Tensor, Tensor, Tensor]
Path = Callable[[Tensor, Tensor, Tensor, "AdamState | None"], Tensor]


def constants(adam: AdamState | None) -> tuple[Any, ...]:
    """The state as the operator hands it to its kernels."""
    if adam is None:
        return ()
    return (adam.exp_avg, adam.exp_avg_sq, adam.step, adam.beta1, adam.beta2, adam.eps, adam.variant)


def on_cpu(x: Tensor, delta: Tensor, references: Tensor, adam: AdamState | None) -> Tensor:
    return cpu_module.per_sample_influence(x, delta, references, *constants(adam))


def on_device(x: Tensor, delta: Tensor, references: Tensor, adam: AdamState | None) -> Tensor:
    """The Triton launcher on whichever device runs it."""
    if adam is not None:
        adam = replace(adam, exp_avg=adam.exp_avg.to(DEVICE), exp_avg_sq=adam.exp_avg_sq.to(DEVICE))
    return triton_path(x.to(DEVICE), delta.to(DEVICE), references.to(DEVICE), *constants(adam)).cpu()


PATHS = pytest.mark.parametrize(
    "path", [pytest.param(on_cpu, id="cpu"), pytest.param(on_device, id="triton", marks=GPU_MARKS)]
)
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)


def layer(shape: Shape, dtype: torch.dtype, num_references: int = 2, seed: int = 0) -> Layer:
    samples, tokens, d_out, d_in = shape
    generator = torch.Generator().manual_seed(seed)
    shapes = ((samples, tokens, d_in), (samples, tokens, d_out), (num_references, d_out, d_in))
    x, delta, references = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return x.to(dtype), delta.to(dtype), references.float()


def state(kind: str | None, shape: Shape, **others: Any) -> AdamState | None:
    """Moments as after some steps, fp32; the second far enough from 0 for a tame slope."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(7)
    m, v = torch.randn(*shape[2:], generator=generator), torch.rand(*shape[2:], generator=generator)
    own = {"exp_avg": m / 10, "exp_avg_sq": v / 10 + 0.01, "step": 3, "variant": kind}
    return AdamState(**(own | others))


def wanted(x: Tensor, delta: Tensor, references: Tensor, adam: AdamState | None) -> Tensor:
    dots, sqnorms = reference(x, delta, references, adam)
    return torch.cat([dots, sqnorms[:, None]], 1)


def assert_within_rounding(got: Tensor, x: Tensor, delta: Tensor, references: Tensor, adam: Any) -> None:
    """Each number within what rounding of T products, of Adam's step and of the sums can do to it."""
    exact = wanted(x, delta, references, adam)
    eps = torch.finfo(got.dtype).eps
    assert got.dtype == (torch.float64 if torch.float64 in (x.dtype, delta.dtype) else torch.float32)
    assert got.shape == exact.shape
    gradients = per_sample_grad(x, delta)
    update, off = gradients, per_sample_grad(x.abs(), delta.abs()) * eps * (x.shape[1] + 1)
    if adam is not None:
        update = adam_update(gradients, adam)
        # The slope nearby is at most twice that here; a dozen operations round beside it.
        slopes = [adam_slope(gradients + shift, adam).abs() for shift in (-off, 0, off)]
        off = 2 * torch.stack(slopes).amax(0) * off
        off += 12 * eps * (update.abs() + adam_slope(gradients, adam).abs() * gradients.abs())
    # Sums over the weight: pairwise or in blocks, never worse than one after the other.
    off = off + (update[0].numel() + 2) * eps * update.abs()
    both = torch.cat([references.double().expand(len(x), *references.shape), 2 * update[:, None]], 1)
    allowed = (off[:, None] * both.abs()).sum((2, 3)) + torch.finfo(got.dtype).smallest_normal
    worst = ((got.double() - exact).abs() - allowed).max() if got.numel() else torch.tensor(0.0)
    assert worst <= 0, f"off by {worst} more than rounding explains"


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory reads NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@ALL_KINDS
def test_reference_is_products_of_autograds_gradients(kind: str | None) -> None:
    shape = (3, 4, 5, 6)
    x, delta, references = layer(shape, torch.float64)
    adam = state(kind, shape)
    weight = torch.zeros(5, 6, dtype=torch.float64, requires_grad=True)
    dots, sqnorms = reference(x, delta, references, adam)
    for i in range(3):
        (update,) = torch.autograd.grad(torch.nn.functional.linear(x[i], weight), weight, delta[i])
        update = update if adam is None else adam_update(update, adam)
        want = torch.einsum("oi,moi->m", update, references.double())
        # fp64 sums of 4 and of 30 products of numbers near 1.
        torch.testing.assert_close(dots[i], want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sqnorms[i], update.norm() ** 2, rtol=1e-12, atol=1e-12)


@PATHS
@settings(max_examples=12)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    num_references=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_paths_agree_with_the_reference(
    path: Path, shape: Shape, dtype: torch.dtype, kind: str | None, num_references: int, seed: int
) -> None:
    x, delta, references = layer(shape, dtype, num_references, seed)
    adam = state(kind, shape)
    assert_within_rounding(path(x, delta, references, adam), x, delta, references, adam)


@PATHS
@pytest.mark.parametrize("kind", [None, "adam"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 300), (2, 70, 300, 5), (1, 5, 130, 140)])
def test_every_tile_counts_once(path: Path, shape: Shape, kind: str | None, poisoned_memory: None) -> None:
    x, delta, references = layer(shape, torch.float32)
    adam = state(kind, shape)
    assert_within_rounding(path(x, delta, references, adam), x, delta, references, adam)


@PATHS
@ALL_KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_not_rounded_between(path: Path, kind: str | None, dtype: torch.dtype) -> None:
    """Products of halves are summed in fp32: an eager run in the dtype is off by hundreds of times more."""
    shape = (3, 50, 8, 48)
    x, delta, references = layer(shape, dtype)
    adam = state(kind, shape)
    exact = wanted(x, delta, references, adam)
    eager = torch.stack([d.T @ a for a, d in zip(x, delta, strict=True)])
    eager = eager if adam is None else adam_update(eager, adam)
    dots = torch.einsum("boi,moi->bm", eager.float(), references)
    got = path(x, delta, references, adam)[:, :-1]
    assert (got - exact[:, :-1]).norm() <= (dots - exact[:, :-1]).norm() / 50


@PATHS
@ALL_KINDS
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@pytest.mark.parametrize("num_references", [0, 2])
def test_empty_extents(
    path: Path, shape: Shape, kind: str | None, num_references: int, poisoned_memory: None
) -> None:
    x, delta, references = layer(shape, torch.float32, num_references)
    adam = state(kind, shape)
    got = path(x, delta, references, adam)
    assert got.shape == (shape[0], num_references + 1)
    if shape[1] == 0 and adam is not None:
        # Zero tokens are a gradient of 0, which the first moment turns into an update.
        assert got[:, -1].all()
        assert_within_rounding(got, x, delta, references, adam)
    else:
        assert not got.any()


@PATHS
@pytest.mark.parametrize("kind", [None, "adam"])
def test_any_layout_is_read_right(path: Path, kind: str | None) -> None:
    shape = (3, 5, 4, 24)
    x, delta, references = layer(shape, torch.float32)
    adam = state(kind, shape)
    if adam is not None:
        turned = (moment.T.contiguous().T for moment in (adam.exp_avg, adam.exp_avg_sq))
        adam = AdamState(*turned, adam.step, variant=adam.variant)
    tokens_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    columns_first = delta.mT.contiguous().mT
    padded = torch.full((3, 5, 31), torch.nan)
    padded[:, :, 3:27] = x
    shifted = torch.full((references.numel() + 1,), torch.nan)[1:].view(references.shape).copy_(references)
    for a, d, r in (
        (tokens_first, columns_first, references.mT.contiguous().mT),
        (padded[:, :, 3:27], delta, shifted),
        (x[:1].expand(x.shape), delta, references[:1].expand(3, 4, 24)),
    ):
        assert_within_rounding(path(a, d, r, adam), a, d, r, adam)


@PATHS
@ALL_KINDS
def test_dtypes_of_moments_and_references(path: Path, kind: str | None) -> None:
    """They are read in the dtype of the sum, and have no say in it."""
    shape = (2, 5, 3, 7)
    x, delta, references = layer(shape, torch.float32)
    adam = state(kind, shape)
    if adam is not None:
        adam = AdamState(adam.exp_avg.bfloat16(), adam.exp_avg_sq.double(), adam.step, variant=adam.variant)
    for other in (references.double(), references.bfloat16(), references.half()):
        assert_within_rounding(path(x, delta, other, adam), x, delta, other, adam)


@PATHS
def test_mixed_dtypes_promote(path: Path) -> None:
    x, _, references = layer((2, 5, 3, 7), torch.float32)
    for dtype in (torch.bfloat16, torch.float64):
        delta = layer((2, 5, 3, 7), dtype)[1]
        assert_within_rounding(path(x, delta, references, None), x, delta, references, None)


@PATHS
@pytest.mark.parametrize("kind", [None, "adam"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(path: Path, kind: str | None, value: float) -> None:
    shape = (3, 5, 4, 6)
    x, delta, references = layer(shape, torch.float32)
    clean = path(x, delta, references, state(kind, shape))
    x[1, 0, 2] = value
    got = path(x, delta, references, state(kind, shape))
    assert not got[1].isfinite().any()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@PATHS
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy in the interpreter
def test_infinite_gradients_meet_nothing_beyond_the_layer(path: Path) -> None:
    """A weight of 3 × 5 in tiles of 16 × 64 and in padded rows: Inf · 0 is outside of it."""
    x, delta = torch.ones(1, 1, 5), torch.full((1, 1, 3), torch.inf)
    assert path(x, delta, torch.ones(1, 3, 5), None).tolist() == [[torch.inf, torch.inf]]


@PATHS
@ALL_KINDS
def test_references_that_are_not_finite_stay_in_their_column(path: Path, kind: str | None) -> None:
    x, delta, references = layer((3, 5, 4, 6), torch.float32, 3)
    references[1, 2, 3] = torch.inf
    got = path(x, delta, references, state(kind, (3, 5, 4, 6)))
    assert not got[:, 1].isfinite().any()
    assert got[:, [0, 2, 3]].isfinite().all()


@PATHS
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy in the interpreter
def test_epsilon_may_be_zero(path: Path) -> None:
    """Where v is not 0, that is; what pads the tiles is 0/0 there."""
    shape = (2, 3, 3, 5)
    x, delta, references = layer(shape, torch.float32)
    for kind in ("adam", "less"):
        adam = state(kind, shape, eps=0.0)
        assert_within_rounding(path(x, delta, references, adam), x, delta, references, adam)


@PATHS
def test_an_optimiser_that_has_seen_nothing(path: Path) -> None:
    """``m̂ = g`` and ``v̂ = g²``: the update is g/(|g| + ε), and 0 for a gradient of 0."""
    zeros = torch.zeros(4, 24)
    x, delta, references = layer((3, 5, 4, 24), torch.float32)
    x[0] = 0
    got = path(x, delta, references, AdamState(zeros, zeros, 0))
    assert not got[0].any()
    # Signs: one for each element, but for g/(|g| + 1e-8) of the smallest among some hundred gradients.
    torch.testing.assert_close(got[1:, -1], torch.full((2,), 96.0), rtol=1e-5, atol=0)


@PATHS
@ALL_KINDS
@pytest.mark.parametrize(("x_scale", "delta_scale"), [(1e30, 1e-30), (1e-30, 1e30)])
def test_scales_that_cancel(path: Path, kind: str | None, x_scale: float, delta_scale: float) -> None:
    shape = (2, 5, 3, 7)
    x, delta, references = layer(shape, torch.float32)
    x, delta, adam = x * x_scale, delta * delta_scale, state(kind, shape)
    assert_within_rounding(path(x, delta, references, adam), x, delta, references, adam)


@PATHS
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy in the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales_at_the_ends_of_fp32(path: Path, scale: float, dtype: torch.dtype) -> None:
    """Dot products hold; a square norm is beyond fp32, as Inf or 0, and within fp64."""
    x, delta, references = layer((2, 5, 3, 7), dtype)
    x = x * scale
    references = (references.double() / scale).to(dtype)
    got, want = path(x, delta, references, None), wanted(x, delta, references, None)
    eps = torch.finfo(dtype).eps
    # Some hundred products, whose magnitudes add up to about ten times the result.
    torch.testing.assert_close(got[:, :-1].double(), want[:, :-1], rtol=1000 * eps, atol=1000 * eps)
    if dtype == torch.float64:
        torch.testing.assert_close(got[:, -1], want[:, -1], rtol=1000 * eps, atol=0)
    else:
        assert got[:, -1].tolist() == [torch.inf if scale > 1 else 0.0] * 2


@PATHS
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy in the interpreter
@pytest.mark.parametrize("kind", ["adam", "less"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_adam_at_the_ends_of_fp32(path: Path, scale: float, kind: str) -> None:
    """Where g² underflows ε rules; where it overflows fp32 the step is 0, as torch's fp32 step is."""
    shape = (2, 5, 3, 7)
    adam = state(kind, shape, exp_avg=torch.zeros(3, 7), exp_avg_sq=torch.zeros(3, 7))
    for dtype in (torch.float32, torch.float64):
        x, delta, references = layer(shape, dtype)
        x = x * scale
        got, want = path(x, delta, references, adam)[:, :-1], wanted(x, delta, references, adam)[:, :-1]
        if scale > 1 and dtype == torch.float32:
            assert not got.any()
        else:
            # Sums of 21 numbers, the largest among them about the size of the tolerance's base.
            base = want.abs().max().item()
            torch.testing.assert_close(got.double(), want, rtol=0, atol=100 * torch.finfo(dtype).eps * base)


@ALL_KINDS
def test_cpu_pieces_make_up_the_whole(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of few rows and few samples, the last ones smaller."""
    shape = (5, 3, 37, 11)
    x, delta, references = layer(shape, torch.float64)
    whole = on_cpu(x, delta, references, state(kind, shape))
    monkeypatch.setattr(cpu_module, "PIECE", 16 * 11 * 2)
    # fp64 sums of 407 products in another order.
    torch.testing.assert_close(
        on_cpu(x, delta, references, state(kind, shape)), whole, rtol=1e-12, atol=1e-12
    )


@ALL_KINDS
def test_adapter_gives_the_reference_in_the_dtype_of_the_result(kind: str | None) -> None:
    shape = (2, 5, 3, 7)
    x, delta, references = layer(shape, torch.bfloat16)
    adam = state(kind, shape)
    arguments = constants(adam) or (None, None)
    got = from_reference(x, delta, references, *arguments)
    assert torch.equal(got, wanted(x, delta, references, adam).float())
