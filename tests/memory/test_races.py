"""Programs of a launch never meet in memory: nothing stored twice, nothing loaded that another one stores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from memory_case import Case, outcome
from memory_cases import CASES
from memory_checker import Guards, checked
from triton.runtime.errors import InterpreterError

from fastproj.bench.traffic.recorder import observed_accesses

# Accesses are seen in the interpreter alone. Products overflow first and are then taken again, scaled.
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels hide their accesses"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_race(case: Case) -> None:
    seen = outcome(case).seen
    assert any(access.kind == "store" for access in seen.accesses)
    assert seen.races() == []


@triton.jit
def overlapping_stores_kernel(source, target, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program stores one element more than its share: the next one's first."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, 2 * BLOCK)
    mask = tl.arange(0, 2 * BLOCK) <= BLOCK
    tl.store(target + at, tl.load(source + at, mask=mask, other=0.0), mask=mask)


@triton.jit
def reads_its_neighbour_kernel(source, target, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A shift in place: program 1 overwrites what program 0 may still have to load."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at + 1))


@triton.jit
def stores_twice_kernel(source, target, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two lanes of one program store to the same address."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at // 2, tl.load(source + at))


@triton.jit
def right_kernel(source, target, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at) + 1)
    tl.store(target + at, tl.load(target + at) * 2)


@triton.jit
def atomic_kernel(source, target, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.atomic_add(target, tl.load(source + tl.program_id(0)))


def faults(kernel: Any, source: Tensor, target: Tensor) -> list[str]:
    """What is found in a launch of two programs."""
    return checked(lambda: kernel[(2,)](source, target, BLOCK=8), [source, target], Guards())[1].races()


def test_two_programs_that_store_to_one_address() -> None:
    (found,) = faults(overlapping_stores_kernel, torch.ones(32), torch.zeros(32))
    assert "two programs store" in found


def test_a_program_that_loads_what_another_one_stores() -> None:
    tensor = torch.ones(17)
    (found,) = faults(reads_its_neighbour_kernel, tensor, tensor)
    assert "loads what another one stores" in found
    assert faults(reads_its_neighbour_kernel, torch.ones(17), torch.ones(17)) == []


def test_overlap_of_items_of_different_size() -> None:
    """fp32 stores over the bytes that another program loads as halves."""
    words = torch.ones(16)
    halves = words.view(torch.float16)
    (found,) = faults(right_kernel, halves, words)
    assert "loads what another one stores" in found


def test_two_lanes_that_store_to_one_address() -> None:
    found = faults(stores_twice_kernel, torch.ones(16), torch.zeros(16))
    assert "two lanes" in found[0]


def test_a_program_may_meet_itself() -> None:
    tensor = torch.ones(16)
    assert faults(right_kernel, tensor, tensor) == []


def test_launches_are_apart() -> None:
    """What one launch stores, the next one may load."""
    tensor, target = torch.ones(17), torch.zeros(17)

    def call() -> None:
        right_kernel[(2,)](tensor, target, BLOCK=8)
        reads_its_neighbour_kernel[(2,)](target, tensor, BLOCK=8)

    seen = checked(call, [tensor, target], Guards())[1]
    assert [launch.launch for launch in seen.launches] == [0, 1]
    assert seen.races() == []


def test_atomics_are_refused() -> None:
    with (
        pytest.raises(InterpreterError, match="atomic"),
        observed_accesses(lambda access: None),
    ):
        atomic_kernel[(2,)](torch.ones(2), torch.zeros(1), BLOCK=8)
