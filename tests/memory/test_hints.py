"""What a kernel promises the compiler is true: a GPU faults at a wide access that is not aligned."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from memory_case import Case, outcome
from memory_cases import CASES
from memory_checker import Guards, checked

from fastproj.kernels._contraction import row_alignment

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels hide their values"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_promised_divisibility_holds(case: Case) -> None:
    assert outcome(case).seen.broken_hints == []


def test_hints_are_seen() -> None:
    assert sum(outcome(case).seen.hints for case in CASES) > 1000


@triton.jit
def promises_too_much_kernel(source, target, start, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.multiple_of(start + 0, 8) + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at))


@pytest.mark.parametrize(("start", "broken"), [(0, 0), (8, 0), (4, 1), (9, 1)])
def test_a_broken_promise_is_found(start: int, broken: int) -> None:
    guards = Guards()
    tensors = [guards.place(torch.ones(32)), guards.place(torch.zeros(32))]
    _, seen = checked(lambda: promises_too_much_kernel[(1,)](*tensors, start, BLOCK=16), tensors, guards)
    assert (seen.hints, len(seen.broken_hints)) == (1, broken)


def test_rows_are_wide_only_where_all_of_them_are() -> None:
    """128 bits are eight numbers of bf16: strides, columns and addresses of both sides, and one dtype."""
    narrow, wide = torch.zeros(2, 3, 8, dtype=torch.bfloat16), torch.zeros(2, 3, 40, dtype=torch.bfloat16)
    assert row_alignment(narrow, wide) == 8
    assert row_alignment(narrow.float(), wide.float()) == 4
    assert row_alignment(narrow, wide.float()) == 1
    assert row_alignment(narrow[..., :7], wide) == row_alignment(narrow, wide[..., :39]) == 1
    padded = torch.zeros(2, 3, 44, dtype=torch.bfloat16)[..., :40]
    assert row_alignment(narrow, padded) == 1
    shifted = torch.zeros(2 * 3 * 40 + 4, dtype=torch.bfloat16)[4:].view(2, 3, 40)
    assert row_alignment(narrow, shifted) == 1
    assert row_alignment(shifted[..., :8], wide) == 1
