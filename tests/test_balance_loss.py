"""Propensity and discrimination of label logits: reference, CPU path and Triton launcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from devices import DEVICE, GPU_MARKS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastproj.bindings.balance_loss import INTEGERS, backward_from_reference, from_reference
from fastproj.kernels.cpu import balance_loss as cpu_module
from fastproj.reference.balance_loss import balance_loss as reference
from fastproj.reference.balance_loss import label_means, remembered

pytest.importorskip("triton")

from fastproj.kernels import balance_loss as kernel_module

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
IGNORED = -100
Path = tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]
# What follows from NaN and Inf in numpy's words, in the interpreter.
QUIET = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def here(argument: object) -> object:
    return argument.to(DEVICE) if isinstance(argument, Tensor) else argument


def forward_on_device(*arguments: object) -> tuple[Tensor, ...]:
    """The Triton launcher on whichever device runs it."""
    return tuple(result.cpu() for result in kernel_module.balance_loss(*map(here, arguments)))


def backward_on_device(*arguments: object) -> Tensor:
    return kernel_module.balance_loss_backward(*map(here, arguments)).cpu()


CPU: Path = (cpu_module.balance_loss, cpu_module.balance_loss_backward)
TRITON: Path = (forward_on_device, backward_on_device)
PATHS = pytest.mark.parametrize(
    "path", [pytest.param(CPU, id="cpu"), pytest.param(TRITON, id="triton", marks=GPU_MARKS)]
)


def batch(
    samples: int, number: int, dtype: torch.dtype, each: bool, seed: int = 0, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Logits of some magnitude; a label a sample, or each for some, of which about a sixth is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(samples, number, generator=generator, dtype=torch.float64)).to(dtype)
    shape = (samples, number) if each else (samples,)
    labels = torch.randint(0, 2 if each else number, shape, generator=generator)
    return logits, labels.masked_fill(torch.rand(shape, generator=generator) < 1 / 6, IGNORED)


def known_means(number: int) -> Tensor:
    """Means of earlier batches, of which every third is not known."""
    known = torch.randn(2, number, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    known.view(-1)[::3] = torch.nan
    return known


def assert_right(
    path: Path,
    logits: Tensor,
    labels: Tensor,
    known: Tensor | None = None,
    present_only: bool = True,
    ignored: int = IGNORED,
) -> None:
    """Losses, means and each gradient against fp64 autograd through the reference."""
    forward, backward = path
    *losses, means, slopes = forward(logits, labels, known, present_only, ignored)
    exact = logits.to(torch.float64, copy=True).requires_grad_()
    wants = reference(exact, labels, present_only=present_only, known=known, ignore_index=ignored)
    want_means, _ = remembered(*label_means(exact.detach(), labels, ignored), known)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    size = max(1.0, logits.double().abs().max().item() if logits.numel() else 0.0)
    # fp64 sums of some hundred logits; the losses are then rounded once.
    rounding = 1e-13 * size
    torch.testing.assert_close(means, want_means, rtol=0, atol=rounding, equal_nan=True)
    grads = torch.tensor([0.75, -1.5], dtype=dtype).unbind()
    for index, (loss, want) in enumerate(zip(losses, wants, strict=True)):
        assert (loss.dtype, loss.shape) == (dtype, ())
        allowed = torch.finfo(dtype).eps * want.detach().abs() + logits.shape[1] * rounding
        assert bool((loss.double() - want.detach()).abs() <= allowed)
        (wanted,) = torch.autograd.grad(want, exact, grads[index].double(), retain_graph=True)
        one = [grad if index == other else None for other, grad in enumerate(grads)]
        assert_gradient(backward(*one, slopes, labels, ignored, logits.dtype), wanted, logits)
    (wanted,) = torch.autograd.grad(wants, exact, [grad.double() for grad in grads])
    assert_gradient(backward(*grads, slopes, labels, ignored, logits.dtype), wanted, logits)


def assert_gradient(got: Tensor, want: Tensor, logits: Tensor) -> None:
    assert (got.dtype, got.shape) == (logits.dtype, logits.shape)
    kind = torch.finfo(got.dtype)
    # One rounding of each element, in the interpreter's bf16 a truncation, and the smallest numbers of a
    # half; before it fp64's, which a difference of means that is small beside them magnifies.
    allowed = kind.eps * want.abs() + kind.smallest_normal + 1e-9
    assert bool(((got.double() - want).abs() <= allowed).all())


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory reads NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@PATHS
@settings(max_examples=20)
@given(
    size=st.tuples(st.integers(0, 9), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    each=st.booleans(),
    known=st.booleans(),
    present_only=st.booleans(),
    ignored=st.sampled_from([IGNORED, 0, 1]),
    seed=st.integers(0, 1000),
)
def test_paths_agree_with_the_reference(
    path: Path,
    size: tuple[int, int],
    dtype: torch.dtype,
    each: bool,
    known: bool,
    present_only: bool,
    ignored: int,
    seed: int,
) -> None:
    logits, labels = batch(*size, dtype, each, seed)
    if ignored != IGNORED:
        labels = labels.clamp_min(0)
    assert_right(path, logits, labels, known_means(size[1]) if known else None, present_only, ignored)


@PATHS
@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("size", [(16, 28), (17, 32), (3, 33), (9, 257), (5, 1024), (5, 1025), (2, 2600)])
def test_every_element_is_written(
    path: Path, size: tuple[int, int], each: bool, poisoned_memory: None
) -> None:
    """Tiles of labels that are full and not, more labels than one takes, samples in several turns."""
    assert_right(path, *batch(*size, torch.float32, each), known_means(size[1]))


@PATHS
@pytest.mark.parametrize("samples", [129, 300])
def test_many_samples(path: Path, samples: int) -> None:
    """More than a program's turns of the gradient."""
    assert_right(path, *batch(samples, 5, torch.bfloat16, False))


@PATHS
@pytest.mark.parametrize("present_only", [True, False])
def test_labels_that_are_rare(path: Path, present_only: bool) -> None:
    """Of no sample, of one, of all; a sample alone; a label alone; samples none of which counts."""
    logits, _ = batch(4, 3, torch.float32, False)
    for labels in ([0, 0, 0, 0], [0, 1, 1, 1], [IGNORED] * 4, [2, IGNORED, IGNORED, IGNORED]):
        assert_right(path, logits, torch.tensor(labels), None, present_only)
    every = torch.tensor([[1, 0, IGNORED]] * 4)
    assert_right(path, logits, every, None, present_only)
    assert_right(path, logits[:1], torch.tensor([1]), None, present_only)
    assert_right(path, logits[:, :1], torch.zeros(4, dtype=torch.int64), None, present_only)
    propensity, discrimination, means, _ = path[0](logits, torch.zeros(4).long(), None, present_only, IGNORED)
    # One label has an H^C, and none beside it an H^N where only present ones count.
    assert (propensity == 0) == present_only
    assert discrimination == 0
    assert means.isnan().tolist() == [[False, True, True], [True, False, False]]


@PATHS
def test_an_empty_batch(path: Path) -> None:
    for labels in (torch.zeros(0).long(), torch.zeros(0, 3).bool()):
        propensity, discrimination, means, slopes = path[0](torch.zeros(0, 3), labels, None, True, IGNORED)
        assert (propensity.item(), discrimination.item()) == (0.0, 0.0)
        assert means.isnan().all()
        one = torch.ones(())
        assert path[1](one, one, slopes, labels, IGNORED, torch.float32).shape == (0, 3)
        assert_right(path, torch.zeros(0, 3), labels, known_means(3))


@PATHS
@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool])
def test_labels_of_every_integer_dtype(path: Path, dtype: torch.dtype) -> None:
    logits, members = batch(6, 5, torch.float32, True)
    # A byte has no −100 and is not to be taken for one.
    members = members.clamp_min(0) if dtype in (torch.bool, torch.uint8) else members
    assert_right(path, logits, members.to(dtype))
    if dtype != torch.bool:
        wide = torch.zeros(3, 157)
        wide[:, 156] = torch.tensor([1.0, 2.0, 5.0])
        labels = torch.tensor([0, 127 if dtype == torch.int8 else 156, 3], dtype=dtype)
        assert_right(path, wide, labels)


@PATHS
def test_any_layout_is_read_right(path: Path) -> None:
    logits, members = batch(6, 37, torch.float32, True)
    _, labels = batch(6, 37, torch.float32, False)
    padded = torch.full((9, 45), torch.nan)
    padded[1:7, 3:40] = logits
    for layout in (padded[1:7, 3:40], logits.mT.contiguous().mT, logits[:1].expand(6, 37)):
        assert_right(path, layout, labels)
        assert_right(path, layout, members.mT.contiguous().mT)
        assert_right(path, layout, members.repeat_interleave(2, 0)[::2])
        assert_right(path, layout, labels.repeat_interleave(3)[::3])
        assert_right(path, layout, members[:, :1].expand(6, 37))
    known = torch.stack([known_means(37)] * 2, 2)[..., 0]
    assert_right(path, logits, labels, known)


@PATHS
@QUIET
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_in_no_mean_that_counts_does_no_harm(path: Path, value: float) -> None:
    """In a sample that is ignored, in an entry that is, and in a label that no sample has."""
    one = torch.ones(())
    for each in (False, True):
        logits, labels = batch(6, 4, torch.float32, each)
        if each:
            labels[:, 3] = 0
            labels[0, 1] = IGNORED
        else:
            labels = torch.tensor([IGNORED, 0, 1, 1, 2, 0])
        dirty = logits.clone()
        dirty[0, 1] = dirty[2, 3] = value
        outcomes = []
        for values in (logits, dirty):
            *losses, means, slopes = path[0](values, labels, None, True, IGNORED)
            outcomes.append([*losses, path[1](one, one, slopes, labels, IGNORED, torch.float32)])
        for got, want in zip(*outcomes[::-1], strict=True):
            assert bool(want.isfinite().all())
            assert torch.equal(got, want)
        # The mean itself says what it is of, and counts where labels need not be present.
        assert not means[1, 3].isfinite()
        propensity, discrimination, _, slopes = path[0](dirty, labels, None, False, IGNORED)
        assert propensity.isnan()
        assert torch.equal(discrimination, outcomes[0][1])
        # The discrimination alone has a gradient that knows nothing of it.
        grad = path[1](None, one, slopes, labels, IGNORED, torch.float32)
        assert bool(grad.isfinite().all())


@PATHS
@QUIET
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_in_a_label_that_counts_shows(path: Path, value: float) -> None:
    logits, _ = batch(5, 4, torch.float32, False)
    labels = torch.tensor([0, 1, 1, 2, 0])
    logits[2, 1] = value
    propensity, discrimination, means, slopes = path[0](logits, labels, None, True, IGNORED)
    # About a mean of Inf, Inf is NaN; a distance from it is Inf.
    assert propensity.isnan()
    assert str(discrimination.item()) == str(abs(value))
    assert means.isfinite().sum() == 6
    grad = path[1](torch.ones(()), None, slopes, labels, IGNORED, torch.float32)
    exact = logits.double().requires_grad_()
    (want,) = torch.autograd.grad(reference(exact, labels)[0], exact)
    assert torch.equal(grad.isnan(), want.isnan())
    # The label that no sample has is in no loss.
    assert not grad[:, 3].any()


@PATHS
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales_at_the_ends_of_fp32(path: Path, scale: float) -> None:
    logits, labels = batch(7, 5, torch.float32, False, scale=scale)
    *losses, _, slopes = path[0](logits, labels, None, True, IGNORED)
    exact = logits.double().requires_grad_()
    wants = reference(exact, labels)
    for loss, want in zip(losses, wants, strict=True):
        # One rounding to fp32 of what is summed in fp64: squares of 1e±60 are far from its ends.
        assert abs(loss.item() - want.item()) <= 1.2e-7 * want.item()
    one = torch.ones(())
    (wanted,) = torch.autograd.grad(wants, exact, [one.double()] * 2)
    # The gradient has no scale: directions over numbers of samples.
    assert_gradient(path[1](one, one, slopes, labels, IGNORED, torch.float32), wanted, logits)


@PATHS
@pytest.mark.parametrize("value", [0.0, 0.1, 1e30])
def test_the_gradient_is_zero_where_a_norm_is(path: Path, value: float) -> None:
    """Logits all alike: a multiple of fp32 is exact in fp64, and so are its means and their mean."""
    logits = torch.full((6, 4), value)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    propensity, discrimination, _, slopes = path[0](logits, labels, None, True, IGNORED)
    assert (propensity.item(), discrimination.item()) == (0.0, 0.0)
    one = torch.ones(())
    assert not path[1](one, one, slopes, labels, IGNORED, torch.float32).any()
    # One norm of the propensity alone: H^C alike, H^N apart.
    logits[0, 1] += 1 + value
    assert_right(path, logits, labels)


@pytest.mark.parametrize("number", [3, 1030])
@QUIET
def test_triton_marks_labels_out_of_range_with_nan(number: int) -> None:
    logits, _ = batch(4, number, torch.float32, False)
    one = torch.ones(())
    for wrong in (number, -1, 2**40):
        labels = torch.tensor([0, wrong, 2, IGNORED])
        propensity, discrimination, means, slopes = forward_on_device(logits, labels, None, True, IGNORED)
        assert propensity.isnan()
        assert discrimination.isnan()
        # No memory takes in any of it.
        assert means.isnan().all()
        grad = backward_on_device(one, one, slopes, labels, IGNORED, torch.float32)
        assert grad[:3].isnan().all()
        assert not grad[3].any()
    members = torch.zeros(4, number, dtype=torch.int8)
    members[0, 1], members[1, 0] = 1, 2
    propensity, discrimination, means, _ = forward_on_device(logits, members, None, True, IGNORED)
    assert propensity.isnan()
    assert discrimination.isnan()
    assert means[:, 0].isnan().all()
    assert bool(means[:, 1].isfinite().all())


def test_triton_launches_once_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for more labels than a tile takes, whose norms are a launch of their own."""
    launched: list[tuple[str, tuple[int, ...]]] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(kernel_module, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
            launched.append((self.name, grid))
            return self.kernel[grid]

    kernels = ("balance_loss_kernel", "norms_kernel", "balance_loss_backward_kernel")
    for name in kernels:
        monkeypatch.setattr(kernel_module, name, Counted(name))
    for size, want in (((16, 28), [(1,), (1,)]), ((9, 1500), [(2,), (1,), (2,)])):
        launched.clear()
        logits, labels = batch(*size, torch.float32, False)
        *losses, _, slopes = forward_on_device(logits, labels, None, True, IGNORED)
        backward_on_device(*losses, slopes, labels, IGNORED, torch.float32)
        assert [grid for _, grid in launched] == want


def test_the_cpu_takes_packs_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for pack in (1, 20, 40):
        monkeypatch.setattr(cpu_module, "PACK", pack)
        for each in (True, False):
            assert_right(CPU, *batch(11, 9, torch.float32, each))


@pytest.mark.parametrize("each", [True, False])
def test_adapters_give_the_reference_in_the_dtypes_of_the_operator(each: bool) -> None:
    path = (from_reference, backward_from_reference)
    assert_right(path, *batch(6, 5, torch.bfloat16, each), known_means(5), False)
