"""``fastproj.cross_entropy``: samples, weights, gradients, compilation, memory, words about wrong inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastproj.bindings.cross_entropy import LEVELS, REDUCTIONS, cross_entropy
from fastproj.kernels.cpu.cross_entropy import cross_entropy as cpu_forward
from fastproj.kernels.cpu.cross_entropy import cross_entropy_backward as cpu_backward
from fastproj.reference.cross_entropy import cross_entropy as reference

IGNORED = -100


def batch(dtype: torch.dtype = torch.float64, classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three samples of five tokens; one label is ignored, and all of the last sample's."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 5, classes, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, classes, (3, 5), generator=generator)
    labels[0, 2], labels[2] = IGNORED, IGNORED
    return logits, labels


def assert_equal(got: Tensor | None, want: Tensor | None) -> None:
    assert (got is None) == (want is None)
    if got is not None and want is not None:
        # fp64 sums of a few numbers of order one.
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@given(
    q=st.sampled_from([None, 0.7, 1.0]),
    level=st.sampled_from(LEVELS),
    reduction=st.sampled_from(REDUCTIONS),
    smoothing=st.sampled_from([0.0, 0.2]),
    shift=st.booleans(),
    ignored=st.sampled_from([IGNORED, 3]),
)
def test_every_option_as_the_reference_defines_it(
    q: float | None, level: str, reduction: str, smoothing: float, shift: bool, ignored: int
) -> None:
    logits, labels = batch()
    labels = labels.masked_fill(labels == IGNORED, ignored)
    options: dict[str, Any] = {"q": q, "level": level, "reduction": reduction, "shift": shift}
    options |= {"label_smoothing": smoothing, "ignore_index": ignored}
    got = cross_entropy(logits, labels, **options)
    losses, weights, counted = reference(logits, labels, **options)
    assert_equal(got.losses, losses)
    assert_equal(got.weights, weights)
    assert torch.equal(got.counted, counted)


def test_samples_are_torchs_means_and_weights_powers_of_the_geometric_mean() -> None:
    logits, labels = batch()
    got = cross_entropy(logits, labels, q=0.7, label_smoothing=0.1)
    assert got.weights is not None
    for i, number in enumerate([4, 5]):
        want = F.cross_entropy(logits[i], labels[i], label_smoothing=0.1)
        own = labels[i] != IGNORED
        p = torch.softmax(logits[i][own], 1).gather(1, labels[i][own][:, None])
        assert_equal(got.losses[i], want)
        assert_equal(got.weights[i], p.prod().pow(0.7 / number))
    assert got.counted.tolist() == [4, 5, 0]
    # Nothing counts: a loss and a weight of zero, and not 0/0.
    assert (got.losses[2].item(), got.weights[2].item()) == (0.0, 0.0)


@pytest.mark.parametrize("level", LEVELS)
def test_classes_know_no_difference_between_levels(level: str) -> None:
    logits, labels = (tensor[:2, 0] for tensor in batch())
    got = cross_entropy(logits, labels.to(torch.int32), q=0.5, level=level)
    want = F.cross_entropy(logits, labels, reduction="none")
    assert_equal(got.losses, want)
    assert_equal(got.weights, torch.exp(-0.5 * want))
    assert got.counted.tolist() == [1, 1]


def test_shift_holds_logits_against_the_next_label() -> None:
    logits, labels = batch()
    got = cross_entropy(logits, labels, q=0.5, level="token", shift=True)
    want = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    assert_equal(got.losses, want)
    assert got.weights is not None
    assert got.weights.shape == (3, 4)
    assert cross_entropy(logits[:, :1], labels[:, :1], level="token", shift=True).losses.shape == (3, 0)
    assert cross_entropy(logits[:, :0], labels[:, :0], shift=True).losses.tolist() == [0.0] * 3


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients(smoothing: float, shift: bool) -> None:
    logits, labels = batch()

    def losses(logits: Tensor) -> Tensor:
        return cross_entropy(logits, labels, label_smoothing=smoothing, shift=shift).losses

    assert torch.autograd.gradcheck(losses, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(losses, logits)


def test_weights_are_detached_and_make_generalised_cross_entropy() -> None:
    logits, labels = batch()
    leaf = logits.requires_grad_()
    got = cross_entropy(leaf, labels, q=0.7, level="token")
    assert got.weights is not None
    assert not got.weights.requires_grad
    (grad,) = torch.autograd.grad((got.weights * got.losses).sum(), leaf)
    own = labels != IGNORED
    p = torch.softmax(leaf[own], 1).gather(1, labels[own][:, None])
    (want,) = torch.autograd.grad(((1 - p.pow(0.7)) / 0.7).sum(), leaf)
    assert_equal(grad, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_losses_and_gradients(dtype: torch.dtype) -> None:
    logits, labels = batch(dtype)
    got = cross_entropy(logits.requires_grad_(), labels, q=0.7)
    assert got.weights is not None
    assert (got.losses.dtype, got.weights.dtype) == (torch.float32, torch.float32)
    got.losses.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize(("dtype", "smoothing"), [(torch.bfloat16, 0.1), (torch.float32, 0.0)])
def test_opcheck(dtype: torch.dtype, smoothing: float) -> None:
    logits, labels = batch(dtype)
    torch.library.opcheck(
        torch.ops.fastproj.cross_entropy.default, (logits.requires_grad_(), labels, IGNORED, smoothing)
    )
    losses, _, *statistics = torch.ops.fastproj.cross_entropy(logits.detach(), labels, IGNORED, smoothing)
    arguments = (torch.ones_like(losses).requires_grad_(), logits, labels, *statistics, IGNORED, smoothing)
    torch.library.opcheck(torch.ops.fastproj.cross_entropy_backward.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    logits, labels = batch(torch.float32)
    logits.requires_grad_()

    def weighted(logits: Tensor) -> Tensor:
        out = cross_entropy(logits, labels, q=0.7, label_smoothing=0.1, shift=True)
        assert out.weights is not None
        return out.losses @ out.weights

    want = torch.autograd.grad(weighted(logits), logits)
    got = torch.autograd.grad(torch.compile(weighted, backend="aot_eager", fullgraph=True)(logits), logits)
    # The same operations on the same numbers; fp32 rounding in another order at most.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


class NewStorages(TorchDispatchMode):
    """Elements of each floating-point storage that an operation inside makes, the largest first."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                storage = leaf.untyped_storage()
                self.made += [storage.nbytes() // leaf.itemsize] * (storage.data_ptr() not in known)
        self.made.sort(reverse=True)
        return out


@pytest.mark.parametrize("layout", ["whole", "slice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_holds_packs_of_the_logits_and_their_gradient(dtype: torch.dtype, layout: str) -> None:
    logits = torch.zeros(4, 65, 2000, dtype=dtype)[:, : 65 if layout == "whole" else 64]
    labels = torch.arange(logits.shape[0] * logits.shape[1]).view(logits.shape[:2])
    labels[1, ::2] = IGNORED
    pack = 65_536 * torch.get_num_threads()
    with NewStorages() as forward:
        losses, _, *statistics = cpu_forward(logits, labels, IGNORED, 0.1)
    with NewStorages() as backward:
        cpu_backward(losses, logits, labels, *statistics, IGNORED, 0.1)
    assert pack / 2 < forward.made[0] <= pack
    assert backward.made[0] == logits.numel()
    assert pack / 2 < backward.made[1] <= pack


def test_shifting_copies_no_logits() -> None:
    """The operator is handed the logits themselves, and its gradient is theirs."""
    logits, labels = batch()
    leaf = logits.requires_grad_()
    losses = cross_entropy(leaf, labels, shift=True).losses
    with NewStorages() as backward:
        losses.sum().backward()
    assert backward.made.count(logits.numel()) == 1


WRONG: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    ([1.0], torch.zeros(1), {}, TypeError, "logits must be a tensor, got list"),
    (torch.ones(2, 3, dtype=torch.int64), torch.zeros(2), {}, TypeError, "logits must be fp32"),
    (torch.ones(2, 3).to_sparse(), torch.zeros(2), {}, TypeError, "logits must be dense"),
    (torch.ones(2, 3), [0, 1], {}, TypeError, "labels must be a tensor, got list"),
    (torch.ones(2, 3), torch.zeros(2), {}, TypeError, r"labels must be integers.*torch.float32"),
    (torch.ones(2, 3), torch.zeros(2).bool(), {}, TypeError, r"labels must be integers.*torch.bool"),
    (torch.ones(2, 3), torch.zeros(3).long(), {}, ValueError, r"got \(2, 3\) and \(3,\)"),
    (torch.ones(3), torch.zeros(()).long(), {}, ValueError, r"expected logits .*got \(3,\)"),
    (torch.ones(2, 0), torch.zeros(2).long(), {}, ValueError, r"at least one class.*\(2, 0\)"),
    (torch.ones(2, 3), torch.zeros(2, device="meta").long(), {}, ValueError, "one device, got cpu and meta"),
    (torch.ones(2, 3), torch.zeros(2).long(), {"shift": True}, ValueError, r"shift needs .*\(2, 3\)"),
    (torch.ones(2, 3), torch.zeros(2).long(), {"q": 0.0}, ValueError, r"q must be in \(0, 1\], got 0.0"),
    (torch.ones(2, 3), torch.zeros(2).long(), {"q": float("nan")}, ValueError, "q must be in .*got nan"),
    (torch.ones(2, 3), torch.zeros(2).long(), {"level": "word"}, ValueError, "level must be one of .*'word'"),
    (torch.ones(2, 3), torch.zeros(2).long(), {"reduction": "max"}, ValueError, "reduction must be .*'max'"),
    (torch.ones(2, 3), torch.zeros(2).long(), {"label_smoothing": 1.5}, ValueError, r"in \[0, 1\], got 1.5"),
    (torch.ones(2, 3), torch.tensor([0, 3]), {}, ValueError, r"labels must be in 0 … 2 or -100, got 3"),
    (torch.ones(2, 3), torch.tensor([0, -1]), {}, ValueError, r"labels must be in 0 … 2 or -100, got -1"),
]


@pytest.mark.parametrize(("logits", "labels", "options", "error", "message"), WRONG)
def test_bad_inputs_are_named(
    logits: Any, labels: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cross_entropy(logits, labels, **options)


def test_the_reference_names_labels_out_of_range_too() -> None:
    with pytest.raises(ValueError, match="labels must be in 0 … 2 or -100, got 3"):
        reference(torch.ones(2, 3), torch.tensor([0, 3]))
