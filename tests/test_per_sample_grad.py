"""Per-sample weight gradients: reference, CPU path, Triton launcher and operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from devices import DEVICE, GPU_MARKS, on_gpu
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastproj.bindings.per_sample_grad import from_reference, per_sample_grad
from fastproj.kernels.cpu.per_sample_grad import per_sample_grad as cpu_path
from fastproj.reference.per_sample_grad import per_sample_grad as reference

pytest.importorskip("triton")

from fastproj.kernels import per_sample_grad as kernel_module
from fastproj.kernels.per_sample_grad import per_sample_grad as triton_path

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Path = Callable[[Tensor, Tensor], Tensor]


def on_device(x: Tensor, delta: Tensor) -> Tensor:
    """The Triton launcher on whichever device runs it."""
    return triton_path(x.to(DEVICE), delta.to(DEVICE)).cpu()


PATHS = pytest.mark.parametrize(
    "path", [pytest.param(cpu_path, id="cpu"), pytest.param(on_device, id="triton", marks=GPU_MARKS)]
)


def layer(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    samples, tokens, d_out, d_in = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, tokens, d_in, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randn(samples, tokens, d_out, generator=generator, dtype=torch.float64).to(dtype)


def assert_within_rounding(got: Tensor, x: Tensor, delta: Tensor) -> None:
    """Each element within what rounding the result and summing T products can do to it."""
    exact = reference(x, delta)
    magnitude = reference(x.abs(), delta.abs())
    total_eps = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    # One rounding of the result (a truncation in the interpreter's bf16), one of each product and sum.
    allowed = magnitude * (torch.finfo(got.dtype).eps + 2 * (x.shape[1] + 1) * total_eps)
    allowed += torch.finfo(got.dtype).smallest_normal
    worst = ((got.double() - exact).abs() - allowed).max() if got.numel() else torch.tensor(0.0)
    assert got.shape == exact.shape
    assert worst <= 0, f"off by {worst} more than rounding explains"


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory reads NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_reference_is_what_autograd_gives_each_sample() -> None:
    x, delta = layer((3, 4, 5, 6), torch.float64)
    weight = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    for i, got in enumerate(reference(x, delta)):
        (want,) = torch.autograd.grad(torch.nn.functional.linear(x[i], weight), weight, delta[i])
        # fp64 sums of four products of numbers near 1.
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@PATHS
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_paths_agree_with_the_reference(
    path: Path, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int
) -> None:
    x, delta = layer(shape, dtype, seed)
    got = path(x, delta)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert_within_rounding(got, x, delta)


@PATHS
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 300), (2, 70, 300, 5), (1, 5, 130, 140)])
def test_every_element_is_written(
    path: Path, shape: tuple[int, int, int, int], poisoned_memory: None
) -> None:
    x, delta = layer(shape, torch.float32)
    assert_within_rounding(path(x, delta), x, delta)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_stays_within_that_of_an_eager_low_precision_run(path: Path, dtype: torch.dtype) -> None:
    x, delta = layer((3, 50, 8, 48), dtype)
    exact = reference(x, delta)
    eager = torch.stack([d.T @ a for a, d in zip(x, delta, strict=True)])
    # Errors as root mean squares: the interpreter truncates to bf16, which has twice that of rounding.
    budget = 2.2 * (eager.double() - exact).norm()
    assert (path(x, delta).double() - exact).norm() <= budget


@PATHS
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty_extents(path: Path, shape: tuple[int, int, int, int], poisoned_memory: None) -> None:
    got = path(*layer(shape, torch.float32))
    assert got.shape == (shape[0], shape[2], shape[3])
    # Zero tokens: a sum over nothing.
    assert not got.any()
    assert reference(*layer(shape, torch.float32)).shape == got.shape


@PATHS
def test_any_layout_is_read_right(path: Path) -> None:
    x, delta = layer((3, 5, 4, 24), torch.float32)
    tokens_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    x_columns_first, columns_first = (t.mT.contiguous().mT for t in (x, delta))
    assert_within_rounding(path(tokens_first, columns_first), x, delta)
    assert_within_rounding(path(x_columns_first, delta), x, delta)
    padded = torch.full((3, 5, 31), torch.nan)
    padded[:, :, 3:27] = x
    assert_within_rounding(path(padded[:, :, 3:27], delta), x, delta)


@PATHS
def test_expanded_inputs(path: Path) -> None:
    x, delta = layer((3, 5, 4, 6), torch.float32)
    expanded = x[:1].expand(3, 5, 6)
    assert_within_rounding(path(expanded, delta), expanded, delta)


@PATHS
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy in the interpreter
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(path: Path, tokens: int, value: float) -> None:
    x, delta = layer((3, tokens, 4, 6), torch.float32)
    clean = path(x, delta)
    x[1, 0, 2] = value
    got = path(x, delta)
    assert not got[1, :, 2].isfinite().any()
    got[1, :, 2] = clean[1, :, 2]
    assert torch.equal(got, clean)


@PATHS
@pytest.mark.parametrize(
    ("x_scale", "delta_scale"), [(1e30, 1e-30), (1e-30, 1e30), (1e-30, 1e-5), (1e30, 1e5)]
)
def test_scales_at_the_ends_of_fp32(path: Path, x_scale: float, delta_scale: float) -> None:
    x, delta = layer((2, 5, 3, 7), torch.float32)
    x, delta = x * x_scale, delta * delta_scale
    assert_within_rounding(path(x, delta), x, delta)


@PATHS
def test_mixed_dtypes_promote(path: Path) -> None:
    x, _ = layer((2, 5, 3, 7), torch.float32)
    _, delta = layer((2, 5, 3, 7), torch.bfloat16)
    got = path(x, delta)
    assert got.dtype == torch.float32
    assert_within_rounding(got, x, delta)


@on_gpu
def test_triton_addresses_in_64_bits_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    x, delta = layer((2, 5, 3, 7), torch.float32)
    want = on_device(x, delta)
    monkeypatch.setattr(kernel_module, "index_dtype", lambda *tensors: kernel_module.tl.int64)
    assert torch.equal(on_device(x, delta), want)


def test_operator_flattens_tokens() -> None:
    x, delta = layer((2, 6, 3, 4), torch.float64)
    want = reference(x, delta)
    # One GEMM either way; fp64 rounding of six products.
    torch.testing.assert_close(per_sample_grad(x, delta), want, rtol=1e-13, atol=1e-13)
    many_axes = per_sample_grad(x.reshape(2, 2, 3, 4), delta.reshape(2, 2, 3, 3))
    torch.testing.assert_close(many_axes, want, rtol=1e-13, atol=1e-13)
    no_tokens = per_sample_grad(x[:, 0], delta[:, 0])
    torch.testing.assert_close(no_tokens, delta[:, 0, :, None] * x[:, 0, None], rtol=1e-13, atol=1e-13)


def test_adapter_gives_the_reference_in_the_dtype_of_the_result() -> None:
    x, delta = layer((2, 5, 3, 7), torch.bfloat16)
    assert torch.equal(from_reference(x, delta), reference(x, delta).bfloat16())


@pytest.mark.parametrize("tokens", [1, 3])
def test_gradients(tokens: int) -> None:
    x, delta = (t.requires_grad_() for t in layer((2, tokens, 3, 4), torch.float64))
    assert torch.autograd.gradcheck(per_sample_grad, (x, delta))
    assert torch.autograd.gradgradcheck(per_sample_grad, (x, delta))


def test_gradients_keep_the_dtype_of_their_inputs() -> None:
    x, _ = layer((2, 5, 3, 4), torch.float32)
    _, delta = layer((2, 5, 3, 4), torch.bfloat16)
    per_sample_grad(x.requires_grad_(), delta.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert delta.grad is not None
    assert (x.grad.dtype, delta.grad.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x, delta = (t.requires_grad_() for t in layer((2, 5, 3, 4), dtype))
    torch.library.opcheck(torch.ops.fastproj.per_sample_grad.default, (x, delta))


def test_compiles_without_a_graph_break() -> None:
    def norms(x: Tensor, delta: Tensor) -> Tensor:
        return per_sample_grad(x, delta).square().sum((1, 2)).sqrt()

    x, delta = (t.requires_grad_() for t in layer((2, 5, 3, 4), torch.float32))
    want = torch.autograd.grad(norms(x, delta).sum(), (x, delta))
    got = torch.autograd.grad(
        torch.compile(norms, backend="aot_eager", fullgraph=True)(x, delta).sum(), (x, delta)
    )
    for a, b in zip(got, want, strict=True):
        # The same operations on the same numbers; fp32 rounding in another order at most.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "delta", "error", "message"),
    [
        ([1.0], torch.ones(1, 1), TypeError, "x must be a tensor, got list"),
        (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64), TypeError, "delta must be fp32.*torch.int64"),
        (torch.ones(2, 3).to_sparse(), torch.ones(2, 3), TypeError, "x must be dense, got torch.sparse_coo"),
        (torch.ones(3), torch.ones(3), ValueError, r"x must be \(samples.*got shape \(3,\)"),
        (torch.ones(2, 3), torch.ones(4, 3), ValueError, r"agree on samples.*\(2, 3\).*\(4, 3\)"),
        (torch.ones(2, 5, 3), torch.ones(2, 4, 3), ValueError, r"agree on samples.*\(2, 5, 3\)"),
        (torch.ones(2, 5, 3), torch.ones(2, 3), ValueError, "agree on samples"),
        (torch.ones(2, 3), torch.ones(2, 3, device="meta"), ValueError, "one device, got cpu and meta"),
    ],
)
def test_bad_inputs_are_named(x: Tensor, delta: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        per_sample_grad(x, delta)
