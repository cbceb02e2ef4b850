"""``fastproj.balance_loss``: options, derivatives, the memory, compilation, words about wrong inputs."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastproj
from fastproj.bindings import balance_loss as module
from fastproj.bindings.balance_loss import BalanceLoss, RunningMeans, balance_loss
from fastproj.reference.balance_loss import balance_loss as reference

IGNORED = -100


def batch(
    dtype: torch.dtype = torch.float64, each: bool = False, samples: int = 7, number: int = 4
) -> tuple[Tensor, Tensor]:
    """Samples of which one is ignored, or an entry of one; of the last label there is no sample."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(samples, number, generator=generator, dtype=torch.float64).to(dtype)
    if each:
        labels = torch.randint(0, 2, (samples, number), generator=generator)
        labels[:, -1] = 0
    else:
        labels = torch.arange(samples).remainder(number - 1)
    labels[1] = IGNORED
    return logits, labels


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for value, expected in zip(got, want, strict=True):
        # fp64 sums of a few numbers of order one.
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)


@settings(max_examples=20)
@given(
    each=st.booleans(),
    present_only=st.booleans(),
    ignored=st.sampled_from([IGNORED, 0]),
    memory=st.booleans(),
)
def test_every_option_as_the_reference_defines_it(
    each: bool, present_only: bool, ignored: int, memory: bool
) -> None:
    logits, labels = batch(each=each)
    labels = labels.masked_fill(labels == IGNORED, ignored)
    running, known = None, None
    if memory:
        running = RunningMeans(4)
        running.means[:, 1:] = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -3.0]])
        known = running.means.clone()
    got = balance_loss(logits, labels, present_only=present_only, running=running, ignore_index=ignored)
    want = reference(logits, labels, present_only=present_only, known=known, ignore_index=ignored)
    assert isinstance(got, BalanceLoss)
    assert_equal(got, want)


def test_the_example_of_the_docstring() -> None:
    (example,) = (found for found in doctest.DocTestFinder().find(balance_loss, globs={}) if found.examples)
    outcome = doctest.DocTestRunner(verbose=False).run(example)
    assert (outcome.attempted, outcome.failed) == (5, 0)


def losses_of(labels: Tensor, **options: Any) -> Callable[[Tensor], BalanceLoss]:
    return lambda logits: balance_loss(logits, labels, **options)


@pytest.mark.parametrize("present_only", [True, False])
@pytest.mark.parametrize("each", [True, False])
def test_derivatives(each: bool, present_only: bool) -> None:
    logits, labels = batch(each=each)
    losses = losses_of(labels, present_only=present_only)
    assert torch.autograd.gradcheck(losses, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(losses, logits)


def test_derivatives_with_a_memory_that_is_a_constant() -> None:
    logits, labels = batch()
    running = RunningMeans(4).eval()
    running.means[:, 2:] = torch.tensor([[0.5, -1.0], [1.5, 0.25]])
    losses = losses_of(labels, running=running)
    assert torch.autograd.gradcheck(losses, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(losses, logits)
    # Label 3 is of no sample: its H^C is remembered, and the gradient of its logits is H^N's alone.
    known = running.means.clone()
    (grad,) = torch.autograd.grad(losses(logits).discrimination, logits)
    exact = logits.detach().requires_grad_()
    (want,) = torch.autograd.grad(reference(exact, labels, known=known)[1], exact)
    assert_equal((grad,), (want,))
    assert grad[:, 3].any()


def test_a_third_derivative() -> None:
    logits, labels = batch()

    def square_of_the_gradient(logits: Tensor) -> Tensor:
        loss = balance_loss(logits, labels)
        (grad,) = torch.autograd.grad(loss.propensity - 0.5 * loss.discrimination, logits, create_graph=True)
        (second,) = torch.autograd.grad(grad.pow(3).sum(), logits, create_graph=True)
        return second

    assert torch.autograd.gradcheck(square_of_the_gradient, logits.requires_grad_())


def test_at_the_kink_every_derivative_is_zero() -> None:
    logits = torch.full((5, 3), 0.5, dtype=torch.float64, requires_grad=True)
    loss = balance_loss(logits, torch.tensor([0, 1, 2, 1, 0]))
    (grad,) = torch.autograd.grad(loss.propensity + loss.discrimination, logits, create_graph=True)
    assert not grad.any()
    (second,) = torch.autograd.grad(grad.sum(), logits)
    assert not second.any()


def test_one_loss_alone_has_its_own_gradient() -> None:
    logits, labels = batch()
    logits.requires_grad_()
    loss = balance_loss(logits, labels)
    exact = logits.detach().requires_grad_()
    for one, want in zip(loss, reference(exact, labels), strict=True):
        grads = [torch.autograd.grad(*pair, retain_graph=True) for pair in ((one, logits), (want, exact))]
        assert_equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_losses_and_gradients(dtype: torch.dtype) -> None:
    logits, labels = batch(dtype)
    loss = balance_loss(logits.requires_grad_(), labels.to(torch.int32))
    total = torch.float64 if dtype == torch.float64 else torch.float32
    assert [(value.dtype, value.shape) for value in loss] == [(total, ())] * 2
    sum(loss).backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


def test_no_logits_are_kept_for_the_gradient() -> None:
    logits, labels = batch(torch.float32, samples=50)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        balance_loss(logits.requires_grad_(), labels)
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(2, 2, 4), (2, 4), (50,)]


def test_a_memory_counts_for_labels_that_the_batch_lacks() -> None:
    running = RunningMeans(2, momentum=0.75)
    # H^C = (4, –) and H^N = (–, 1): nothing is known of the others yet.
    loss = balance_loss(torch.tensor([[3.0, 2.0], [5.0, 0.0]]), torch.tensor([0, 0]), running=running)
    assert loss == (0.0, 0.0)
    assert torch.equal(running.means.nan_to_num(9), torch.tensor([[4.0, 9.0], [9.0, 1.0]]).double())
    # H^C = (4, 6) and H^N = (1, 1), of which 4 and 1 are remembered: norms √2, 0 and |(3, 5)|.
    logits = torch.tensor([[1.0, 6.0]], requires_grad=True)
    loss = balance_loss(logits, torch.tensor([1]), running=running)
    # fp32's rounding of the losses.
    torch.testing.assert_close(torch.stack(loss), torch.tensor([2.0**0.5, 34.0**0.5]), rtol=2e-7, atol=0)
    loss.propensity.backward()
    # By H^C_1 = 6 it is (6 − 5)/√2, by H^N_0 nothing, as that norm is 0.
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.5**0.5]]), rtol=2e-7, atol=0)
    # First means of what was not seen, and what was and is not in the batch as it was.
    assert running.means.tolist() == [[4.0, 6.0], [1.0, 1.0]]
    balance_loss(torch.tensor([[8.0, 5.0]]), torch.tensor([0]), running=running)
    assert running.means.tolist() == [[0.75 * 4 + 0.25 * 8, 6.0], [1.0, 0.75 * 1 + 0.25 * 5]]


def test_without_a_memory_nothing_is_remembered() -> None:
    logits, labels = batch()
    first = balance_loss(logits, labels)
    balance_loss(logits + 1, labels, running=RunningMeans(4))
    balance_loss(logits * 3, labels)
    assert_equal(balance_loss(logits, labels), first)


def test_a_memory_is_written_in_training_mode_alone_and_by_finite_means() -> None:
    running = RunningMeans(4)
    logits, labels = batch()
    balance_loss(logits, labels, running=running.eval())
    assert running.means.isnan().all()
    logits[0, 0] = torch.inf
    balance_loss(logits, labels, running=running.train())
    assert running.means.isnan().tolist() == [[True, False, False, True], [False] * 4]
    logits[0, 0] = 0.0
    before = running.means.clone()
    logits[2] = torch.nan
    balance_loss(logits, labels, running=running)
    assert running.means.isfinite().sum() == before.isfinite().sum() + 1


def test_a_memory_goes_round_by_its_state_dict() -> None:
    running = RunningMeans(4, momentum=0.5)
    balance_loss(*batch(), running=running)
    other = RunningMeans(4)
    other.load_state_dict(running.state_dict())
    assert list(running.state_dict()) == ["means"]
    assert torch.equal(other.means.nan_to_num(9), running.means.nan_to_num(9))
    with pytest.raises(RuntimeError, match="size mismatch for means"):
        RunningMeans(5).load_state_dict(running.state_dict())
    assert repr(running) == "RunningMeans(4, momentum=0.5)"
    copied = copy.deepcopy(running)
    balance_loss(batch()[0] + 1, batch()[1], running=copied)
    assert not torch.equal(copied.means.nan_to_num(9), running.means.nan_to_num(9))


def test_a_memory_that_was_cast_with_its_model_counts_in_fp64_again() -> None:
    running = RunningMeans(4).to(torch.bfloat16)
    logits, labels = batch()
    balance_loss(logits, labels, running=running)
    fresh = RunningMeans(4)
    balance_loss(logits, labels, running=fresh)
    assert torch.equal(running.means.nan_to_num(9), fresh.means.nan_to_num(9))


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(dtype: torch.dtype, each: bool) -> None:
    logits, labels = batch(dtype, each)
    # NaN is no equal of itself there: every label is of some sample and not of another.
    labels[2], labels[3] = (1, 0) if each else (3, 0)
    known = torch.zeros(2, 4, dtype=torch.float64)
    for remembered in (None, known):
        arguments = (logits.requires_grad_(), labels, remembered, True, IGNORED)
        torch.library.opcheck(torch.ops.fastproj.balance_loss.default, arguments)
    *_, slopes = torch.ops.fastproj.balance_loss(logits.detach(), labels, None, True, IGNORED)
    one = torch.ones((), requires_grad=True)
    for grads in ((one, one), (one, None), (None, one)):
        arguments = (*grads, slopes.requires_grad_(), labels, IGNORED, dtype)
        torch.library.opcheck(torch.ops.fastproj.balance_loss_backward.default, arguments)


@pytest.mark.parametrize("memory", [False, True])
def test_compiles_without_a_graph_break(memory: bool) -> None:
    logits, labels = batch(torch.float32)
    outcomes = []
    for compiled in (False, True):
        running = RunningMeans(4) if memory else None

        def total(logits: Tensor, running: RunningMeans | None = running) -> Tensor:
            loss = balance_loss(logits, labels, running=running)
            return loss.propensity - 0.5 * loss.discrimination

        call = torch.compile(total, backend="aot_eager", fullgraph=True) if compiled else total
        leaf = logits.clone().requires_grad_()
        for _ in range(2):
            (grad,) = torch.autograd.grad(call(leaf), leaf)
        outcomes.append([grad, *([running.means] if running is not None else [])])
    for got, want in zip(*outcomes, strict=True):
        # The same operations on the same numbers.
        assert torch.equal(got.nan_to_num(9), want.nan_to_num(9))


def test_it_is_exported() -> None:
    assert fastproj.balance_loss is module.balance_loss
    assert (fastproj.BalanceLoss, fastproj.RunningMeans) == (BalanceLoss, RunningMeans)


ONES = torch.ones(2, 3)
ZEROS = torch.zeros(2, dtype=torch.int64)
WRONG: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    ([1.0], ZEROS, {}, TypeError, "logits must be a tensor, got list"),
    (ONES.long(), ZEROS, {}, TypeError, "logits must be fp32"),
    (ONES.to_sparse(), ZEROS, {}, TypeError, "logits must be dense"),
    (ONES, [0, 1], {}, TypeError, "labels must be a tensor, got list"),
    (ONES, ZEROS.float(), {}, TypeError, r"labels must be integers \(B,\), or bool .*got torch.float32"),
    (ONES, ONES, {}, TypeError, r"labels must be integers .*got torch.float32"),
    (ONES, ZEROS.bool(), {}, TypeError, r"labels must be integers .*got torch.bool"),
    (ONES, torch.zeros(3).long(), {}, ValueError, r"got \(2, 3\) and \(3,\)"),
    (ONES, torch.zeros(3, 2).long(), {}, ValueError, r"got \(2, 3\) and \(3, 2\)"),
    (torch.ones(2), ZEROS, {}, ValueError, r"expected logits \(B, C\) .*got \(2,\) and \(2,\)"),
    (torch.ones(2, 3, 4), ZEROS, {}, ValueError, r"expected logits \(B, C\) .*got \(2, 3, 4\)"),
    (torch.ones(2, 0), ZEROS, {}, ValueError, r"at least one label.*\(2, 0\)"),
    (ONES, ZEROS.to("meta"), {}, ValueError, "one device, got cpu and meta"),
    (ONES, ZEROS, {"running": 0.9}, TypeError, "running must be RunningMeans or None, got float"),
    (ONES, ZEROS, {"running": RunningMeans(4)}, ValueError, "as many labels as the logits, 3, got 4"),
    (ONES, ZEROS + 3, {}, ValueError, "labels must be in 0 … 2 or -100, got 3"),
    (ONES, ONES.long() * 2, {}, ValueError, "labels must be in 0 … 1 or -100, got 2"),
    (ONES, ZEROS - 100, {"ignore_index": -1}, ValueError, "labels must be in 0 … 2 or -1, got -100"),
]


@pytest.mark.parametrize(("logits", "labels", "options", "error", "message"), WRONG)
def test_bad_inputs_are_named(
    logits: Any, labels: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        balance_loss(logits, labels, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_labels must be at least 1, got 0"),
        ((3, 1.0), r"momentum must be in \[0, 1\), got 1.0"),
        ((3, -0.1), r"momentum must be in \[0, 1\), got -0.1"),
        ((3, float("nan")), r"momentum must be in \[0, 1\), got nan"),
    ],
)
def test_a_memory_of_wrong_numbers_is_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunningMeans(*arguments)
