"""Cross entropy of samples and tokens: reference, CPU path, Triton launcher and operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICE, GPU_MARKS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastproj.bindings.cross_entropy import backward_from_reference, from_reference
from fastproj.kernels.cpu import cross_entropy as cpu_module
from fastproj.reference.cross_entropy import token_losses as reference

pytest.importorskip("triton")

from fastproj.kernels import cross_entropy as kernel_module

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
IGNORED = -100
Forward = Callable[..., tuple[Tensor, ...]]
Path = tuple[Forward, Callable[..., Tensor]]
# What follows from NaN and Inf in numpy's words, in the interpreter.
QUIET = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def forward_on_device(*arguments: Tensor | float) -> tuple[Tensor, ...]:
    """The Triton launcher on whichever device runs it."""
    here = (a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments)
    return tuple(result.cpu() for result in kernel_module.cross_entropy(*here))


def backward_on_device(*arguments: Tensor | float) -> Tensor:
    here = (a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments)
    return kernel_module.cross_entropy_backward(*here).cpu()


PATHS = pytest.mark.parametrize(
    "path",
    [
        pytest.param((cpu_module.cross_entropy, cpu_module.cross_entropy_backward), id="cpu"),
        pytest.param((forward_on_device, backward_on_device), id="triton", marks=GPU_MARKS),
    ],
)
# A class or two, rows off 16-byte boundaries, no whole vector, one chunk of a program and two and a rest.
# Every width in fp32, the other dtypes over several chunks of the vocabulary.
WIDTHS = [(width, torch.float32) for width in (1, 2, 33, 2048, 5003)]
WIDTHS += [(5003, dtype) for dtype in DTYPES if dtype != torch.float32]


def batch(
    shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Logits of some magnitude, and labels of which about a quarter is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, shape[2], shape[:2], generator=generator)
    return logits, labels.masked_fill(torch.rand(shape[:2], generator=generator) < 0.25, IGNORED)


def assert_right(
    path: Path, logits: Tensor, labels: Tensor, smoothing: float, ignored: int = IGNORED
) -> None:
    """Losses, log-probabilities and gradient against fp64 autograd through the reference."""
    forward, backward = path
    losses, log_probabilities, maxima, log_sums = forward(logits, labels, ignored, smoothing)
    exact = logits.to(torch.float64, copy=True).requires_grad_()
    want, want_log = reference(exact, labels, ignored, smoothing)
    upstream = torch.linspace(-1, 2, labels.numel(), dtype=losses.dtype).reshape(labels.shape)
    eps = torch.finfo(losses.dtype).eps
    # Subtracting the maximum rounds the range of the logits, a sum of V exponentials its order of V, exp2's
    # approximation on a GPU two units: together some tens of units of range plus log V.
    allowed = (
        32 * eps * (1 + logits.double().abs().amax().item() + torch.tensor(logits.shape[2]).log().item())
    )
    assert losses.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(losses.double(), want.detach(), rtol=0, atol=allowed)
    torch.testing.assert_close(log_probabilities.double(), want_log.detach(), rtol=0, atol=allowed)
    (wanted,) = torch.autograd.grad(want, exact, upstream.double())
    got = backward(upstream, logits, labels, maxima, log_sums, ignored, smoothing)
    assert got.dtype == logits.dtype
    assert got.shape == logits.shape
    # Probabilities up to one times g up to two are as far off; then one rounding, in the interpreter's bf16 a
    # truncation, of each element, and the smallest numbers of a half.
    elements = (
        torch.finfo(got.dtype).eps * wanted.abs() + 2 * allowed + torch.finfo(got.dtype).smallest_normal
    )
    assert bool(((got.double() - wanted).abs() <= elements).all())
    assert not got[labels == ignored].any()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory reads NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_reference_is_torchs_in_fp64(smoothing: float) -> None:
    logits, labels = batch((3, 5, 9), torch.float64)
    losses, log_probabilities = reference(logits, labels, IGNORED, smoothing)
    want = F.cross_entropy(logits.mT, labels, reduction="none", label_smoothing=smoothing)
    # fp64 sums of nine numbers near ten.
    torch.testing.assert_close(losses, want, rtol=1e-13, atol=1e-13)
    plain = F.cross_entropy(logits.mT, labels, reduction="none")
    torch.testing.assert_close(log_probabilities, -plain, rtol=1e-13, atol=1e-13)


@PATHS
@settings(max_examples=10)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_paths_agree_with_the_reference(
    path: Path, shape: tuple[int, int, int], dtype: torch.dtype, smoothing: float, seed: int
) -> None:
    assert_right(path, *batch(shape, dtype, seed), smoothing)


@PATHS
@pytest.mark.parametrize(("width", "dtype"), WIDTHS)
def test_every_element_is_written(path: Path, width: int, dtype: torch.dtype, poisoned_memory: None) -> None:
    assert_right(path, *batch((2, 3, width), dtype), 0.1 if width % 2 else 0.0)


@PATHS
def test_any_layout_is_read_right(path: Path) -> None:
    logits, labels = batch((3, 4, 37), torch.float32)
    padded = torch.full((3, 6, 45), torch.nan)
    padded[:, 1:5, 3:40] = logits
    tokens_first = logits.transpose(0, 1).contiguous().transpose(0, 1)
    classes_first = logits.mT.contiguous().mT
    for layout in (padded[:, 1:5, 3:40], tokens_first, classes_first, logits[:1].expand(3, 4, 37)):
        assert_right(path, layout, labels, 0.1)


@PATHS
def test_rows_that_are_alike_to_the_gradient_or_not(path: Path) -> None:
    """Slices by token of an odd vocabulary begin elsewhere than the rows of a new tensor do."""
    logits, labels = batch((2, 5, 4099), torch.float32)
    assert_right(path, logits[:, :-1], labels[:, 1:], 0.0)
    out = torch.empty(2, 4, 4099)
    assert not kernel_module.rows_alike(logits[:, :-1], out)
    assert kernel_module.rows_alike(logits, logits.clone())
    assert kernel_module.rows_alike(logits[:1, :-1], out[:1])


@PATHS
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty_extents(path: Path, shape: tuple[int, int, int]) -> None:
    logits, labels = torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.int64)
    results = path[0](logits, labels, IGNORED, 0.0)
    assert [tuple(result.shape) for result in results] == [shape[:2]] * 4
    assert path[1](results[0], logits, labels, *results[2:], IGNORED, 0.0).shape == shape


@PATHS
@QUIET
@pytest.mark.parametrize(("smoothing", "value"), [(0.0, torch.inf), (0.1, torch.inf), (0.1, torch.nan)])
def test_what_is_not_finite_stays_in_its_row(path: Path, smoothing: float, value: float) -> None:
    logits, labels = batch((2, 3, 33), torch.float32)
    labels[1] = torch.tensor([4, 5, IGNORED])
    clean = path[0](logits, labels, IGNORED, smoothing)
    upstream = torch.ones(2, 3)
    clean_grad = path[1](upstream, logits, labels, *clean[2:], IGNORED, smoothing)
    logits[1, 1, 7] = logits[1, 2, 7] = value
    got = path[0](logits, labels, IGNORED, smoothing)
    grad = path[1](upstream, logits, labels, *got[2:], IGNORED, smoothing)
    want = F.cross_entropy(logits[1, 1:2], labels[1, 1:2], label_smoothing=smoothing)
    assert want.isnan()
    assert got[0][1, 1].isnan()
    assert grad[1, 1].isnan().all()
    # The ignored row beside it is not read, and gives zeros whatever it holds.
    others = torch.tensor([[True] * 3, [True, False, True]])
    for a, b in zip((*got, grad), (*clean, clean_grad), strict=True):
        assert torch.equal(a[others], b[others])


@PATHS
@QUIET
def test_classes_of_probability_zero_as_torch_has_them(path: Path) -> None:
    logits, _ = batch((1, 4, 2100), torch.float32)
    logits[0, 0, ::2] = -torch.inf  # labelled otherwise
    logits[0, 1, 5] = -torch.inf  # the label's own
    logits[0, 2] = -torch.inf
    logits[0, 3, :2090] = -torch.inf
    labels = torch.tensor([[1, 5, 3, 2095]])
    for smoothing in (0.0, 0.1):
        got = path[0](logits, labels, IGNORED, smoothing)
        grad = path[1](torch.ones(1, 4), logits, labels, *got[2:], IGNORED, smoothing)
        leaf = logits.clone().requires_grad_()
        want = F.cross_entropy(leaf.mT, labels, reduction="none", label_smoothing=smoothing)
        # fp32 rounding of exponentials and of a sum of 2,100.
        torch.testing.assert_close(got[0], want.detach(), rtol=1e-5, atol=1e-5, equal_nan=True)
        (wanted,) = torch.autograd.grad(want.sum(), leaf)
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


@PATHS
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_scales_at_the_ends_of_fp32(path: Path, scale: float) -> None:
    logits, labels = batch((2, 3, 40), torch.float32, scale=scale)
    losses, _, maxima, log_sums = path[0](logits, labels, IGNORED, 0.0)
    want, _ = reference(logits, labels, IGNORED, 0.0)
    # Relative to the largest logit, or to log 40 where all are alike.
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-6 * max(1.0, 10 * scale))
    assert path[1](losses, logits, labels, maxima, log_sums, IGNORED, 0.0).isfinite().all()


@PATHS
def test_a_sure_token_keeps_its_small_loss(path: Path) -> None:
    """−log p of a p next to 1, far from 0 in the logits: the maximum and the log-sum are kept apart."""
    logits = torch.tensor([[[1000.0, 990.0], [-1000.0, -1010.0]]])
    labels = torch.zeros(1, 2, dtype=torch.int64)
    losses, _, maxima, log_sums = path[0](logits, labels, IGNORED, 0.0)
    small = torch.tensor(-10.0, dtype=torch.float64).exp()
    # log1p of 4.5e-5 in fp32: half a unit of 1 beside it.
    torch.testing.assert_close(losses.double(), small.log1p().expand(1, 2), rtol=0, atol=1.2e-7)
    grad = path[1](torch.ones(1, 2), logits, labels, maxima, log_sums, IGNORED, 0.0)
    torch.testing.assert_close(grad[..., 1].double(), (small / (1 + small)).expand(1, 2), rtol=1e-5, atol=0)


@PATHS
def test_an_ignore_index_among_the_classes(path: Path) -> None:
    logits, labels = batch((2, 5, 6), torch.float32)
    assert_right(path, logits, labels.clamp_min(0), 0.1, ignored=0)


def test_triton_marks_labels_out_of_range_with_nan() -> None:
    logits, _ = batch((1, 3, 6), torch.float32)
    labels = torch.tensor([[6, 2, -1]])
    losses, log_probabilities, maxima, log_sums = forward_on_device(logits, labels, IGNORED, 0.0)
    assert losses.isnan().tolist() == log_probabilities.isnan().tolist() == [[True, False, True]]
    grad = backward_on_device(torch.ones(1, 3), logits, labels, maxima, log_sums, IGNORED, 0.0)
    assert grad.isnan().all(2).tolist() == grad.isnan().any(2).tolist() == [[True, False, True]]


def test_the_cpu_takes_packs_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = batch((3, 5, 9), torch.float32)
    path = (cpu_module.cross_entropy, cpu_module.cross_entropy_backward)
    for pack in (1, 20, 40):
        monkeypatch.setattr(cpu_module, "PACK", pack)
        assert_right(path, logits, labels, 0.1)
        assert_right(path, logits[:, :-1], labels[:, 1:], 0.0)


def test_adapters_give_the_reference_in_the_dtypes_of_the_operator() -> None:
    logits, labels = batch((2, 3, 9), torch.bfloat16)
    assert_right((from_reference, backward_from_reference), logits, labels, 0.1)
