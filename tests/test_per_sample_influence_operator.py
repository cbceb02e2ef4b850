"""Per-sample dot products and square norms as an operator: public calls, gradients, compilation, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastproj
from fastproj.bindings.per_sample_influence import per_sample_influence
from fastproj.kernels.cpu import per_sample_influence as cpu_module
from fastproj.reference.adam import AdamState
from fastproj.reference.per_sample_influence import per_sample_influence as reference

KINDS = (None, "adam", "less")
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
SHAPE = (2, 5, 3, 4)


def layer(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    samples, tokens, d_out, d_in = SHAPE
    generator = torch.Generator().manual_seed(0)
    shapes = ((samples, tokens, d_in), (samples, tokens, d_out), (2, d_out, d_in))
    x, delta, references = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return x.to(dtype), delta.to(dtype), references.to(dtype)


def state(kind: Any, **others: Any) -> AdamState | None:
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(7)
    m, v = (torch.rand(*SHAPE[2:], generator=generator, dtype=torch.float64) for _ in range(2))
    return AdamState(**({"exp_avg": m - 0.5, "exp_avg_sq": v / 10, "step": 3, "variant": kind} | others))


@ALL_KINDS
def test_calls_are_the_references(kind: str | None) -> None:
    x, delta, references = layer()
    adam = state(kind)
    dots, sqnorms = fastproj.per_sample_influence(x, delta, references, adam=adam)
    want = reference(x, delta, references, adam)
    # fp64 sums of five and of twelve products.
    torch.testing.assert_close((dots, sqnorms), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(fastproj.per_sample_dot(x, delta, references, adam=adam), dots)
    # One GEMM less has no say in the square norm.
    assert torch.equal(fastproj.per_sample_sqnorm(x, delta, adam=adam), sqnorms)


@ALL_KINDS
def test_tokens_are_flattened(kind: str | None) -> None:
    x, delta, references = layer()
    want = per_sample_influence(x[:, :4], delta[:, :4], references, adam=state(kind))
    axes = per_sample_influence(
        x[:, :4].reshape(2, 2, 2, 4), delta[:, :4].reshape(2, 2, 2, 3), references, adam=state(kind)
    )
    assert all(torch.equal(a, b) for a, b in zip(axes, want, strict=True))
    one = per_sample_influence(x[:, 0], delta[:, 0], references, adam=state(kind))
    want = reference(x[:, 0], delta[:, 0], references, state(kind))
    torch.testing.assert_close(one, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtypes", "result"),
    [
        ((torch.float32, torch.float32, torch.float64), torch.float32),
        ((torch.bfloat16, torch.bfloat16, torch.float32), torch.float32),
        ((torch.float16, torch.float64, torch.float32), torch.float64),
    ],
)
def test_dtype_is_that_of_the_sum(dtypes: tuple[torch.dtype, ...], result: torch.dtype) -> None:
    x, delta, references = (t.to(dtype) for t, dtype in zip(layer(), dtypes, strict=True))
    for out in per_sample_influence(x, delta, references, adam=state("adam")):
        assert out.dtype == result


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        born = [
            leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(result) if isinstance(leaf, Tensor)
        ]
        self.numel = max(self.numel, *born, 0)
        return result


@ALL_KINDS
def test_no_gradients_of_all_samples_are_kept(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_module, "PIECE", 1024)
    x, delta, references = torch.ones(64, 4, 32), torch.ones(64, 4, 16), torch.ones(1, 16, 32)
    moments = torch.ones(16, 32)
    adam = () if kind is None else (moments, moments, 1, 0.9, 0.999, 1e-8, kind)
    with Largest() as largest:
        cpu_module.per_sample_influence(x, delta, references, *adam)
    # Views of x are seen too; all gradients have four times its elements.
    assert largest.numel == x.numel() == 64 * 16 * 32 // 4


@ALL_KINDS
def test_gradients(kind: str | None) -> None:
    inputs = tuple(t.requires_grad_() for t in layer())

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return per_sample_influence(*tensors, adam=state(kind))

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_gradients_of_one_result_alone() -> None:
    x, delta, references = (t.requires_grad_() for t in layer())
    assert torch.autograd.gradcheck(fastproj.per_sample_dot, (x, delta, references))
    assert torch.autograd.gradcheck(fastproj.per_sample_sqnorm, (x, delta))
    per_sample_influence(x, delta, references.detach())[0].sum().backward()
    assert references.grad is None


def test_gradients_keep_the_dtype_of_their_inputs() -> None:
    x, delta, references = layer()
    inputs = [t.to(d).requires_grad_() for t, d in zip(
        (x, delta, references), (torch.float32, torch.bfloat16, torch.float16), strict=True
    )]  # fmt: skip
    dots, sqnorms = per_sample_influence(*inputs)
    (dots.sum() + sqnorms.sum()).backward()
    for t in inputs:
        assert t.grad is not None
        assert t.grad.dtype == t.dtype


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, None), (torch.bfloat16, "less")])
def test_opcheck(dtype: torch.dtype, kind: str | None) -> None:
    inputs = [t.requires_grad_() for t in layer(dtype)]
    adam = state(kind)
    moments = (None, None) if adam is None else (adam.exp_avg, adam.exp_avg_sq)
    torch.library.opcheck(
        torch.ops.fastproj.per_sample_influence.default, (*inputs, *moments, 3, 0.9, 0.999, 1e-8, "less")
    )


@pytest.mark.parametrize("kind", [None, "adam"])
def test_compiles_without_a_graph_break(kind: str | None) -> None:
    adam = state(kind)

    def scores(x: Tensor, delta: Tensor, references: Tensor) -> Tensor:
        dots, sqnorms = per_sample_influence(x, delta, references, adam=adam)
        return dots / sqnorms.sqrt()[:, None]

    inputs = [t.requires_grad_() for t in layer()]
    want = torch.autograd.grad(scores(*inputs).sum(), inputs)
    compiled = torch.compile(scores, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    # The same operations on the same numbers; fp64 rounding in another order at most.
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


ONES = (torch.ones(2, 5, 4), torch.ones(2, 5, 3), torch.ones(1, 3, 4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 5, 4).int()}, TypeError, "x must be fp32.*torch.int32"),
        ({"delta": torch.ones(2, 4, 3)}, ValueError, "agree on samples"),
        ({"references": [1.0]}, TypeError, "references must be a tensor, got list"),
        ({"references": torch.ones(3, 4)}, ValueError, r"references must be \(M, 3, 4\).*\(3, 4\)"),
        ({"references": torch.ones(2, 4, 3)}, ValueError, r"references must be \(M, 3, 4\).*\(2, 4, 3\)"),
        ({"references": torch.ones(1, 3, 4).bool()}, TypeError, "references must be fp32.*torch.bool"),
        ({"references": torch.ones(1, 3, 4, device="meta")}, ValueError, "one device, got meta and cpu"),
        ({"adam": {"step": 1}}, TypeError, "adam must be an AdamState or None, got dict"),
    ],
)
def test_bad_inputs_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = dict(zip(("x", "delta", "references"), ONES, strict=True))
    with pytest.raises(error, match=message):
        per_sample_influence(**(good | change))


@pytest.mark.parametrize(
    ("moment", "error", "message"),
    [
        (torch.ones(4, 3), ValueError, r"adam.exp_avg must be \(3, 4\).*got \(4, 3\)"),
        (torch.ones(3, 4).int(), TypeError, "adam.exp_avg must be fp32.*torch.int32"),
        (torch.ones(3, 4, device="meta"), ValueError, "adam.exp_avg and x.*got meta and cpu"),
    ],
)
def test_moments_of_another_layer_are_named(moment: Tensor, error: type[Exception], message: str) -> None:
    adam = AdamState(moment, moment, 1)
    for call in (
        lambda: per_sample_influence(*ONES, adam=adam),
        lambda: fastproj.per_sample_dot(*ONES, adam=adam),
        lambda: fastproj.per_sample_sqnorm(*ONES[:2], adam=adam),
    ):
        with pytest.raises(error, match=message):
            call()
    second = replace(adam, exp_avg=torch.ones(moment.shape))
    if moment.shape == (3, 4):
        with pytest.raises(error, match=message.replace("exp_avg", "exp_avg_sq")):
            per_sample_influence(*ONES, adam=second)
