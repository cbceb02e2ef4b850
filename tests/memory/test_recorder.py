"""The recorder sees exactly what kernels access, and leaves the interpreter as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import interpreter

from fastproj.bench.traffic.recorder import Access, Launch, observed_accesses

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels hide their accesses")


@triton.jit
def add_one_kernel(source, target, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < length, other=0.0) + 1, mask=at < length)


def launch(source: torch.Tensor, target: torch.Tensor) -> None:
    add_one_kernel[lambda _: (3,)](source, target, len(source), BLOCK=4)


def test_active_lanes_of_each_program() -> None:
    """Six elements in blocks of four: the third program has no lane, and no access."""
    source, target = torch.zeros(6, dtype=torch.float64), torch.zeros(6)
    accesses: list[Access] = []
    launches: list[Launch] = []
    with observed_accesses(accesses.append, launches.append):
        launch(source, target)
        launch(source, target)
    assert [(access.launch, access.program[0], access.kind, access.itemsize) for access in accesses] == [
        (number, program, kind, size)
        for number in range(2)
        for program in range(2)
        for kind, size in (("load", 8), ("store", 4))
    ]
    assert {access.kernel for access in accesses} == {"add_one_kernel"}
    loads = np.concatenate([access.addresses for access in accesses if access.kind == "load"][:2])
    assert loads.dtype == np.uint64
    assert (loads - np.uint64(source.data_ptr())).tolist() == [0, 8, 16, 24, 32, 40]
    assert [one.grid for one in launches] == [(3, 1, 1)] * 2
    assert launches[0].arguments["length"] == 6
    assert launches[0].arguments["target"] is target
    assert target.tolist() == [1.0] * 6


def test_observations_nest_and_end() -> None:
    call = interpreter.GridExecutor.__call__
    outer: list[Access] = []
    inner: list[Access] = []
    with observed_accesses(outer.append):
        with observed_accesses(inner.append):
            launch(torch.zeros(4), torch.zeros(4))
        with pytest.raises(ZeroDivisionError), observed_accesses(inner.append):
            raise ZeroDivisionError
        launch(torch.zeros(4), torch.zeros(4))
    launch(torch.zeros(4), torch.zeros(4))
    assert (len(outer), len(inner)) == (4, 2)
    assert interpreter.GridExecutor.__call__ is call
    assert not [name for name in vars(interpreter.interpreter_builder) if name.startswith("create_")]


def test_compiled_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tl, "zeros", object())
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), observed_accesses(lambda access: None):
        pass
