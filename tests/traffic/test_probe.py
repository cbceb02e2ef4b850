"""The traffic model equals what interpreted kernels access, byte for byte; a broken kernel is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from span_inputs import SHAPES

from fastproj.bench.traffic.moves import DTYPES
from fastproj.bench.traffic.probe import (
    contraction_probes,
    judge,
    probe_all,
    span_probes,
    step_probes,
    subspace_probes,
)
from fastproj.kernels import combine, edge, weighted_grad
from fastproj.kernels.sketch import HOMES

if torch.cuda.is_available():
    pytest.skip("accesses are seen in the interpreter alone", allow_module_level=True)

names = st.sampled_from(sorted(DTYPES))
segmentations = st.sampled_from(["global", "tensor", "row"])


def test_every_probe_agrees_with_the_model():
    results = probe_all()
    assert [result.problem for result in results if result.problem] == []
    assert {result.operator for result in results} == {
        *("gram + combine", "edge", "project_out", "weighted_grad", "per_sample_grad"),
        *("per_sample_influence", "sketch", "cross_entropy", "balance_loss", "projected_adamw"),
    }
    assert all(result.counted == result.modelled for result in results)
    assert {result.probe.split(", ")[1] for result in results if result.operator == "sketch"} == {*HOMES}


@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    dtypes=st.lists(names, min_size=1, max_size=2),
    segments=segmentations,
    sets=st.integers(1, 3),
)
def test_span_projections_access_what_the_model_says(
    shapes: list[tuple[int, ...]], dtypes: list[str], segments: str, sets: int
):
    for probe in (
        *span_probes(shapes, dtypes, segments, sets),
        *step_probes(shapes, dtypes, segments, sets),
    ):
        assert judge(probe).problem is None


@settings(max_examples=10)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 40), st.integers(64, 200), st.sampled_from([1, 3, 40])),
        min_size=1,
        max_size=3,
    ),
    dtype=names,
)
def test_subspace_projections_access_what_the_model_says(sizes: list[tuple[int, int, int]], dtype: str):
    for probe in subspace_probes(sizes, dtype):
        assert judge(probe).problem is None


@given(
    batch=st.tuples(st.integers(1, 3), st.integers(1, 200), st.integers(1, 140), st.integers(1, 40)),
    dtype=names,
    sums=st.integers(1, 3),
)
def test_contractions_access_what_the_model_says(batch: tuple[int, int, int, int], dtype: str, sums: int):
    for probe in contraction_probes(batch, dtype, sums):
        assert judge(probe).problem is None


def _problem(operator: str) -> str:
    """What is said of one probe of ``operator``."""
    probes = [
        *span_probes([(16, 300), (5000,)], ["fp32"], "tensor"),
        *contraction_probes((2, 520, 40, 4), "fp32"),
    ]
    (problem,) = (judge(probe).problem for probe in probes if probe.operator == operator)
    return problem or ""


def test_a_launch_too_many_is_named(monkeypatch: pytest.MonkeyPatch):
    launch = edge.launch_partials
    monkeypatch.setattr(edge, "launch_partials", lambda *args: (launch(*args), launch(*args))[1])
    problem = _problem("edge")
    assert problem.startswith(
        "edge on fp32, 2 sets, segments tensor, paper: _partial_kernel runs 2 times and not 1"
    )
    assert "7.0 N accesses where 5 N + O(blocks) are allowed" in problem
    assert "_apply_kernel" not in problem


class _Twice:
    """A kernel that every launch runs two times."""

    def __init__(self, kernel: object) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: object):
        launch = self.kernel[grid]
        return lambda *args, **kwargs: (launch(*args, **kwargs), launch(*args, **kwargs))


def test_a_second_combination_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(combine, "_combine_kernel", _Twice(combine._combine_kernel))
    assert "_combine_kernel runs 2 times and not 1, reads" in _problem("gram + combine")
    assert "8.0 N accesses where 5 N" in _problem("gram + combine")


@triton.jit
def sum_splits_kernel(partial_ptr, out_ptr, numel, splits, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """The kernel of this name with a pass over the partial results too many."""
    offset = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    exists = offset < numel
    total = tl.zeros((BLOCK,), dtype=partial_ptr.dtype.element_ty)
    for _ in range(2):
        total = tl.zeros((BLOCK,), dtype=partial_ptr.dtype.element_ty)
        for split in range(splits):
            total += tl.load(partial_ptr + split * numel + offset, mask=exists, other=0.0)
    tl.store(out_ptr + offset, total.to(out_ptr.dtype.element_ty), mask=exists)


def test_a_pass_too_many_inside_a_kernel_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weighted_grad, "sum_splits_kernel", sum_splits_kernel)
    problem = _problem("weighted_grad")
    # Two splits, two sums of 4 × 40 in fp32.
    assert f"sum_splits_kernel reads {2 * 2 * 4 * 40 * 4:,} bytes more than the model:" in problem
    assert "weighted_sum_kernel" not in problem
    assert "× the bytes that are allowed" in problem


def test_a_kernel_that_does_less_is_named_too(monkeypatch: pytest.MonkeyPatch):
    """A model that counts what no longer happens is as wrong."""
    monkeypatch.setattr(weighted_grad, "launch_weighted_sum", lambda *args, **_: args[3].zero_())
    problem = _problem("weighted_grad")
    assert "weighted_sum_kernel runs 0 times and not 1, reads" in problem
    assert "bytes less than the model" in problem


def test_the_command_prints_what_it_found():
    run = subprocess.run(
        [sys.executable, "-m", "fastproj.bench.traffic.probe"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    results = json.loads(run.stdout)
    assert {*results[0]} == {"operator", "probe", "counted", "modelled", "problem"}
    assert all(result["problem"] is None for result in results)
    assert results[0]["counted"]["_partial_kernel"]["launches"] == 1
