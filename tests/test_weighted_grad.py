"""Weighted sums of per-sample gradients: reference, CPU path, Triton launcher and operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from devices import DEVICE, GPU_MARKS, on_gpu
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastproj.bindings.per_sample_grad import per_sample_grad
from fastproj.bindings.weighted_grad import from_reference, weighted_grad
from fastproj.kernels.cpu.weighted_grad import weighted_grad as cpu_path
from fastproj.reference.weighted_grad import weighted_grad as reference

pytest.importorskip("triton")

from fastproj.kernels import weighted_grad as kernel_module
from fastproj.kernels._contraction import fp32_precision
from fastproj.kernels.weighted_grad import weighted_grad as triton_path

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Path = Callable[[Tensor, Tensor, Tensor], Tensor]
Shape = tuple[int, int, int, int, int]  # K, B, T, d_out, d_in


def on_device(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """The Triton launcher on whichever device runs it."""
    return triton_path(x.to(DEVICE), delta.to(DEVICE), weights.to(DEVICE)).cpu()


PATHS = pytest.mark.parametrize(
    "path", [pytest.param(cpu_path, id="cpu"), pytest.param(on_device, id="triton", marks=GPU_MARKS)]
)


def layer(shape: Shape, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, delta and weights; half the weights lie in [0, 1] as GCE's do, half have either sign."""
    sums, samples, tokens, d_out, d_in = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x, delta, weights = random(samples, tokens, d_in), random(samples, tokens, d_out), random(sums, samples)
    weights[::2] = weights[::2].sigmoid()
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    return x.to(dtype), delta.to(dtype), weights.to(accumulation)


def assert_within_rounding(got: Tensor, x: Tensor, delta: Tensor, weights: Tensor) -> None:
    """Each element within what rounding the scaled side and the result and summing B·T products can do."""
    exact = reference(x, delta, weights)
    magnitude = reference(x.abs(), delta.abs(), weights.abs())
    total_eps = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    # Half an eps for the scaled side, half for the result (a whole one in the interpreter's bf16).
    positions = x.shape[0] * x.shape[1]
    allowed = magnitude * (1.5 * torch.finfo(got.dtype).eps + 2 * (positions + 2) * total_eps)
    allowed += positions * torch.finfo(got.dtype).smallest_normal
    worst = ((got.double() - exact).abs() - allowed).max() if got.numel() else torch.tensor(0.0)
    assert got.shape == exact.shape
    assert worst <= 0, f"off by {worst} more than rounding explains"


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory reads NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_reference_is_what_autograd_gives_the_weighted_losses() -> None:
    x, delta, weights = layer((3, 4, 5, 2, 6), torch.float64)
    weight = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    for w, got in zip(weights, reference(x, delta, weights), strict=True):
        want = torch.zeros_like(weight)
        for i in range(4):
            (gradient,) = torch.autograd.grad(torch.nn.functional.linear(x[i], weight), weight, delta[i])
            want += w[i] * gradient
        # fp64 sums of twenty products of numbers near 1.
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@PATHS
@given(
    shape=st.tuples(*[st.integers(1, most) for most in (5, 4, 40, 40, 40)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_paths_agree_with_the_reference(path: Path, shape: Shape, dtype: torch.dtype, seed: int) -> None:
    x, delta, weights = layer(shape, dtype, seed)
    got = path(x, delta, weights)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert_within_rounding(got, x, delta, weights)


# Both stackings, several tiles of rows and of columns, and several splits of the tokens.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 8, 300),
    (2, 3, 5, 300, 8),
    (3, 2, 7, 70, 140),
    (2, 3, 520, 4, 9),
    (2, 1100, 1, 9, 4),
]


def test_some_shapes_take_several_splits() -> None:
    """Else the sum of partial results would be in no test."""

    def splits(shape: Shape) -> int:
        _, samples, tokens, d_out, d_in = shape
        tiles = -(-max(d_out, d_in) // 64)
        return -(-samples * tokens // kernel_module.positions_per_split(samples * tokens, tiles, 16))

    assert [splits(shape) for shape in SHAPES[-2:]] == [3, 2]


@PATHS
@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_is_written(path: Path, shape: Shape, poisoned_memory: None) -> None:
    inputs = layer(shape, torch.float32)
    assert_within_rounding(path(*inputs), *inputs)


@PATHS
@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[4]])
def test_two_runs_agree_bit_for_bit(path: Path, shape: Shape) -> None:
    inputs = layer(shape, torch.float32)
    assert torch.equal(path(*inputs), path(*inputs))


@PATHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_stays_within_that_of_an_eager_low_precision_run(path: Path, dtype: torch.dtype) -> None:
    x, delta, weights = layer((2, 4, 40, 8, 48), dtype)
    exact = reference(x, delta, weights)
    scaled = (weights[:, :, None, None] * delta).to(dtype).flatten(1, 2)
    eager = scaled.mT @ x.flatten(0, 1)
    # Errors as root mean squares: the interpreter truncates to bf16, which has twice that of rounding.
    budget = 2.2 * (eager.double() - exact).norm()
    assert (path(x, delta, weights).double() - exact).norm() <= budget


@PATHS
@pytest.mark.parametrize(
    "shape", [(2, 0, 3, 4, 5), (2, 3, 0, 4, 5), (0, 2, 3, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0)]
)
def test_empty_extents(path: Path, shape: Shape, poisoned_memory: None) -> None:
    got = path(*layer(shape, torch.float32))
    assert got.shape == (shape[0], shape[3], shape[4])
    # Zero samples or tokens: a sum over nothing.
    assert not got.any()


@PATHS
def test_any_layout_is_read_right(path: Path) -> None:
    x, delta, weights = layer((2, 3, 5, 4, 24), torch.float32)
    tokens_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    x_columns_first, columns_first = (t.mT.contiguous().mT for t in (x, delta))
    samples_first = weights.T.contiguous().T
    assert_within_rounding(path(tokens_first, columns_first, samples_first), x, delta, weights)
    assert_within_rounding(path(x_columns_first, delta, weights), x, delta, weights)
    padded = torch.full((3, 5, 31), torch.nan)
    padded[:, :, 3:27] = x
    assert_within_rounding(path(padded[:, :, 3:27], delta, weights), x, delta, weights)


@PATHS
def test_expanded_inputs(path: Path) -> None:
    x, delta, weights = layer((2, 3, 5, 4, 6), torch.float32)
    expanded, ones = x[:1].expand(3, 5, 6), torch.ones(1, 1).expand(2, 3)
    assert torch.equal(path(expanded, delta, weights), path(expanded.contiguous(), delta, weights))
    assert torch.equal(path(x, delta, ones), path(x, delta, ones.contiguous()))


@pytest.mark.parametrize(("d_out", "d_in", "wide"), [(4, 9, 0), (9, 4, 1)])
def test_cpu_path_multiplies_once_and_reads_the_wide_side_where_it_lies(
    d_out: int, d_in: int, wide: int
) -> None:
    inputs = layer((3, 4, 5, d_out, d_in), torch.float32)

    class Products(TorchDispatchMode):
        operands: ClassVar[list[Tensor]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                self.operands.extend(args)
            return func(*args, **(kwargs or {}))

    with Products() as seen:
        cpu_path(*inputs)
    assert len(seen.operands) == 2
    assert seen.operands[1].data_ptr() == inputs[wide].data_ptr()


@PATHS
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy in the interpreter
def test_zero_weights_do_not_hide_what_is_not_finite(path: Path) -> None:
    x, delta, weights = layer((2, 3, 5, 4, 6), torch.float32)
    weights[0, 1] = 0
    clean = path(x, delta, weights)
    x[1, 0, 2] = torch.inf
    got = path(x, delta, weights)
    assert got[0, :, 2].isnan().all()
    got[:, :, 2] = clean[:, :, 2]
    assert torch.equal(got, clean)


@PATHS
def test_a_zero_weight_leaves_a_finite_sample_out(path: Path) -> None:
    x, delta, weights = layer((2, 3, 5, 4, 6), torch.float32)
    weights[:, 1] = 0
    got = path(x, delta, weights)
    x[1], delta[1] = 1e30, -1e5
    assert torch.equal(path(x, delta, weights), got)


@PATHS
@pytest.mark.parametrize(
    ("x_scale", "delta_scale"), [(1e30, 1e-30), (1e-30, 1e30), (1e-30, 1e-5), (1e30, 1e5)]
)
def test_scales_at_the_ends_of_fp32(path: Path, x_scale: float, delta_scale: float) -> None:
    x, delta, weights = layer((2, 3, 5, 3, 7), torch.float32)
    x, delta = x * x_scale, delta * delta_scale
    assert_within_rounding(path(x, delta, weights), x, delta, weights)


@PATHS
@pytest.mark.parametrize("weights_dtype", DTYPES)
def test_the_dtype_of_the_weights_has_no_say(path: Path, weights_dtype: torch.dtype) -> None:
    x, delta, weights = layer((2, 3, 5, 3, 7), torch.float32)
    weights = weights.to(weights_dtype)
    assert torch.equal(path(x, delta, weights), path(x, delta, weights.float()))


@PATHS
def test_mixed_dtypes_promote(path: Path) -> None:
    x, _, weights = layer((2, 3, 5, 3, 7), torch.float32)
    _, delta, _ = layer((2, 3, 5, 3, 7), torch.bfloat16)
    got = path(x, delta, weights)
    assert got.dtype == torch.float32
    assert_within_rounding(got, x, delta, weights)


@on_gpu
def test_triton_addresses_in_64_bits_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = layer((2, 3, 520, 3, 7), torch.float32)
    want = on_device(*inputs)
    monkeypatch.setattr(kernel_module, "index_dtype", lambda *tensors: kernel_module.tl.int64)
    assert torch.equal(on_device(*inputs), want)


def test_offsets_past_31_bits_are_seen() -> None:
    last = 2**31 - 1
    assert kernel_module.index_dtype(torch.empty(last + 1, device="meta")) == kernel_module.tl.int32
    assert kernel_module.index_dtype(torch.empty(last + 2, device="meta")) == kernel_module.tl.int64
    # One element repeated: many indices, no extent.
    assert kernel_module.index_dtype(torch.empty(1, device="meta").expand(2**33)) == kernel_module.tl.int32


@given(positions=st.integers(1, 10**7), tiles=st.integers(1, 2000), step=st.sampled_from([16, 32, 64]))
def test_splits_cover_all_positions_and_stay_few(positions: int, tiles: int, step: int) -> None:
    per_split = kernel_module.positions_per_split(positions, tiles, step)
    splits = -(-positions // per_split)
    assert per_split % step == 0
    assert splits == 1 or splits * tiles <= kernel_module.PROGRAMS
    assert splits == 1 or per_split >= kernel_module.TOKENS_PER_SPLIT


def test_fp32_products_are_exact_unless_tf32_is_allowed() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert fp32_precision() == "ieee"
        torch.set_float32_matmul_precision("high")
        assert fp32_precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_operator_is_the_weighted_sum_of_per_sample_gradients() -> None:
    x, delta, weights = layer((3, 4, 6, 3, 5), torch.float64)
    want = torch.einsum("kb,boi->koi", weights, per_sample_grad(x, delta))
    # fp64 sums of 24 products of numbers near 1, in another order.
    torch.testing.assert_close(weighted_grad(x, delta, weights), want, rtol=1e-12, atol=1e-12)


def test_operator_flattens_tokens_and_takes_a_vector_as_one_sum() -> None:
    x, delta, weights = layer((1, 4, 6, 3, 5), torch.float64)
    want = reference(x, delta, weights)
    # One GEMM each way; fp64 rounding of 24 products.
    many_axes = weighted_grad(x.reshape(4, 2, 3, 5), delta.reshape(4, 2, 3, 3), weights[0])
    torch.testing.assert_close(many_axes, want, rtol=1e-13, atol=1e-13)
    no_tokens = weighted_grad(x[:, 0], delta[:, 0], weights)
    torch.testing.assert_close(no_tokens, reference(x[:, :1], delta[:, :1], weights), rtol=1e-13, atol=1e-13)


def test_adapter_gives_the_reference_in_the_dtype_of_the_result() -> None:
    inputs = layer((2, 3, 5, 3, 7), torch.bfloat16)
    assert torch.equal(from_reference(*inputs), reference(*inputs).bfloat16())


@pytest.mark.parametrize("shape", [(2, 3, 2, 2, 4), (1, 2, 2, 4, 3)])
def test_gradients(shape: Shape) -> None:
    inputs = [t.requires_grad_() for t in layer(shape, torch.float64)]
    assert torch.autograd.gradcheck(weighted_grad, inputs)
    assert torch.autograd.gradgradcheck(weighted_grad, inputs)


@pytest.mark.parametrize("chosen", range(3))
def test_gradients_of_one_input_alone(chosen: int) -> None:
    inputs = list(layer((2, 3, 2, 2, 4), torch.float64))
    inputs[chosen].requires_grad_()
    assert torch.autograd.gradcheck(weighted_grad, inputs)


def test_gradients_keep_the_dtype_of_their_inputs() -> None:
    x, _, weights = layer((2, 3, 5, 3, 7), torch.float16)
    _, delta, _ = layer((2, 3, 5, 3, 7), torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, delta, weights)]
    weighted_grad(*leaves).sum().backward()
    assert [t.grad.dtype for t in leaves if t.grad is not None] == [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    inputs = tuple(t.requires_grad_() for t in layer((2, 3, 5, 4, 3), dtype))
    torch.library.opcheck(torch.ops.fastproj.weighted_grad.default, inputs)


def test_compiles_without_a_graph_break() -> None:
    def norm(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
        return weighted_grad(x, delta, weights).square().sum().sqrt()

    inputs = [t.requires_grad_() for t in layer((2, 3, 5, 4, 3), torch.float32)]
    want = torch.autograd.grad(norm(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(norm, backend="aot_eager", fullgraph=True)(*inputs), inputs)
    for a, b in zip(got, want, strict=True):
        # The same operations on the same numbers; fp32 rounding in another order at most.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (0.5, TypeError, "weights must be a tensor, got float"),
        (torch.ones(2, dtype=torch.bool), TypeError, "weights must be fp32.*torch.bool"),
        (torch.ones(3), ValueError, r"\(2,\) or \(K, 2\).*got shape \(3,\)"),
        (torch.ones(2, 4), ValueError, r"one for each sample of x, got shape \(2, 4\)"),
        (torch.ones(1, 1, 2), ValueError, r"got shape \(1, 1, 2\)"),
        (torch.tensor(1.0), ValueError, r"got shape \(\)"),
        (torch.ones(2, device="meta"), ValueError, "one device, got meta and cpu"),
    ],
)
def test_bad_weights_are_named(weights: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        weighted_grad(torch.ones(2, 3), torch.ones(2, 4), weights)


def test_bad_layers_are_named() -> None:
    with pytest.raises(ValueError, match="agree on samples"):
        weighted_grad(torch.ones(2, 3), torch.ones(3, 3), torch.ones(2))
