"""No kernel reads or writes an element beside its tensors; a kernel that does is caught."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from importlib import import_module

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from memory_case import Case, outcome
from memory_cases import CASES
from memory_checker import GUARD_BYTES, Guards, checked, regions
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction

import fastproj.kernels

# Accesses are seen in the interpreter alone. Products overflow first and are then taken again, scaled.
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels hide their accesses"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


def same_bits(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    return len(got) == len(want) and all(
        torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
        for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stays_inside(case: Case) -> None:
    """Each access in bounds (checked on the way), no guard in a result, no guard written."""
    run = outcome(case)
    assert run.seen.launches
    assert run.seen.accesses
    assert all(tensor.isfinite().all() for tensor in run.guarded)
    assert same_bits(run.guarded, run.plain)
    assert run.seen.guards.touched() == []


def test_every_kernel_is_watched() -> None:
    """A kernel is an interpreted function named so; a new one must appear among the cases."""
    modules = [
        import_module(f"fastproj.kernels.{info.name}")
        for info in pkgutil.iter_modules(fastproj.kernels.__path__)
    ]
    kernels = {
        value.__name__
        for module in modules
        for value in vars(module).values()
        if isinstance(value, InterpretedFunction) and value.__name__.endswith("_kernel")
    }
    assert len(kernels) >= 7
    assert {name for case in CASES for name in outcome(case).seen.kernels} == kernels


@triton.jit
def reads_one_past_kernel(source, target, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(source + at, mask=at <= length, other=0.0), axis=0)
    tl.store(target + tl.program_id(0), total)


@triton.jit
def writes_one_before_kernel(source, target, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at - 1, tl.load(source + at, mask=at < length, other=0.0), mask=at < length)


@triton.jit
def forgets_the_mask_kernel(source, target, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at))


BROKEN = {
    "reads one past": (reads_one_past_kernel, 3),
    "writes one before": (writes_one_before_kernel, 33),
    "forgets the mask": (forgets_the_mask_kernel, 33),
}
LENGTH, BLOCK = 33, 16


def broken(name: str, guards: Guards, offset: int) -> tuple[list[Tensor], list[Tensor]]:
    """(source, target) in guards, and plain results of the same kernel were it right."""
    kernel_target = BROKEN[name][1]
    source = guards.place(torch.ones(LENGTH), offset=offset)
    target = guards.place(torch.zeros(kernel_target), offset=offset)
    right = [torch.tensor([16.0, 16.0, 1.0]) if kernel_target == 3 else torch.ones(LENGTH)]
    return [source, target], right


def launch(name: str, tensors: list[Tensor]) -> None:
    BROKEN[name][0][(triton.cdiv(LENGTH, BLOCK),)](*tensors, LENGTH, BLOCK=BLOCK)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", BROKEN)
def test_checker_stops_a_broken_kernel(name: str, offset: int) -> None:
    """Before the access happens: no guard is touched."""
    guards = Guards()
    tensors, _ = broken(name, guards, offset)
    with pytest.raises(InterpreterError, match="outside of every tensor of the launch"):
        checked(lambda: launch(name, tensors), tensors, guards)
    assert guards.touched() == []


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", BROKEN)
def test_guards_show_a_broken_kernel(name: str, offset: int) -> None:
    """Each check that can see the fault sees it: wrong results, NaN in results, a guard written."""
    guards = Guards()
    (source, target), right = broken(name, guards, offset)
    launch(name, [source, target])
    finite, equal = bool(target.isfinite().all()), same_bits([target], right)
    seen = {"finite": finite, "equal": equal, "untouched": guards.touched() == []}
    assert (
        seen
        == {
            "reads one past": {"finite": False, "equal": False, "untouched": True},
            "writes one before": {"finite": True, "equal": False, "untouched": False},
            # It stores beside the target what it read beside the source, which is another NaN.
            "forgets the mask": {"finite": True, "equal": True, "untouched": False},
        }[name]
    )


def test_an_item_half_inside_is_outside() -> None:
    tensor = torch.zeros(4)
    inside = regions([tensor]).holds(
        regions([tensor]).starts + torch.tensor([0, 12, 14, 16]).numpy().astype("uint64"), 4
    )
    assert inside.tolist() == [True, True, False, False]


def test_gaps_between_rows_are_outside() -> None:
    guards = Guards()
    view = guards.place(torch.ones(2, 3, 4), gap=5)
    live = regions([view])
    assert view.stride() == (42, 9, 1)
    assert (live.ends - live.starts).tolist() == [16] * 6
    view.as_strided((1,), (1,), view.storage_offset() + 4).fill_(0.0)
    assert len(guards.touched()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("offset", [0, 1])
def test_guards_keep_and_break_alignment(dtype: torch.dtype, offset: int) -> None:
    guards = Guards()
    view = guards.place(torch.ones(7, dtype=dtype), offset=offset)
    assert view.data_ptr() % 16 == offset * dtype.itemsize
    storage = view.untyped_storage()
    assert view.data_ptr() - storage.data_ptr() >= GUARD_BYTES
    assert storage.data_ptr() + storage.nbytes() - view.data_ptr() - view.nbytes >= GUARD_BYTES
