"""What is timed: names, sizes, and checks that tell a wrong result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastproj
from fastproj.bench.harness import suites
from fastproj.bench.harness.case import WrongResultError
from fastproj.bench.harness.suites import SUITES, cases, select_workloads
from fastproj.bench.traffic.workloads import WORKLOADS
from fastproj.bindings import OPERATORS

SMALLEST = min(WORKLOADS.values(), key=lambda workload: workload.elements)


def test_every_operator_is_timed() -> None:
    assert set(SUITES) == set(OPERATORS)


def test_workloads_by_default() -> None:
    """All on a GPU; on the CPU, and where it must be quick, the smallest."""
    assert [workload.name for workload in select_workloads([], "cuda", False)] == sorted(
        WORKLOADS, key=lambda name: WORKLOADS[name].elements
    )
    assert [workload.name for workload in select_workloads([], "cpu", False)] == [SMALLEST.name]
    (quick,) = select_workloads([], "cuda", True)
    assert (quick.name, quick.samples, quick.tokens) == (SMALLEST.name, 2, 128)
    assert quick.activation_dtype == "bf16"
    assert select_workloads([], "cpu", True)[0].activation_dtype == "fp32"


def test_workloads_by_a_part_of_their_names() -> None:
    assert [workload.name for workload in select_workloads(["llama-3.1-70b"], "cpu", False)] == [
        "Llama-3.1-70B, LoRA r=64 on all linear layers"
    ]
    assert len(select_workloads(["Llama", "70B"], "cuda", False)) == 2
    with pytest.raises(ValueError, match=r"Qwen2.5-1.5B.*got 'GPT'"):
        select_workloads(["Llama", "GPT"], "cuda", False)


def test_a_suite_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="got sums"):
        list(cases(["gram", "sums"], [SMALLEST], "cpu"))


def test_layers_of_one_shape_are_timed_once() -> None:
    named = [contraction.name for contraction in suites.distinct(SMALLEST.contractions)]
    assert named == ["q_proj A", "q_proj B", "v_proj B"]
    assert {contraction.calls for contraction in suites.distinct(SMALLEST.contractions)} == {1}


def test_keys_of_cases_are_unique() -> None:
    """Building a case allocates nothing, so the largest workload serves."""
    largest = max(WORKLOADS.values(), key=lambda workload: workload.elements)
    keys = [(case.suite, case.workload, case.part) for case in cases(SUITES, [SMALLEST, largest], "cpu")]
    assert len(set(keys)) == len(keys)
    assert {suite for suite, _, _ in keys} == set(SUITES)


QUICK = replace(SMALLEST, samples=2, tokens=8, activation_dtype="fp32")


@pytest.mark.parametrize("suite", SUITES)
def test_a_case_is_right_and_as_large_as_it_says(suite: str) -> None:
    """The footprint is each input and output once, but for a few numbers; some write over inputs."""
    for case in cases([suite], [QUICK], "cpu"):
        case.check()
        case.subject.build(0)()
        # EDGE over one gradient set, AdamW over parameters and both moments.
        written_over = {"edge": 1, "projected_adamw": 3}.get(suite, 0) * 4 * QUICK.elements
        assert case.traffic.least_bytes - case.subject.footprint == pytest.approx(written_over, abs=64)
        assert case.subject.launches >= 1


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_one_wrong_element_is_told(suite: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {"edge": "edge_", "projected_adamw": "projected_adamw_"}.get(suite, suite)
    real = getattr(fastproj, name)

    def broken(*arguments: object, **options: object) -> object:
        result = real(*arguments, **options)
        out = arguments[0] if suite == "edge" else options.get("out", result)
        out = arguments[2] if suite == "projected_adamw" else out
        field = {"cross_entropy": "losses", "balance_loss": "discrimination"}.get(suite)
        out = getattr(out, field).detach() if field else out
        tensor = out if isinstance(out, Tensor) else out[-1]
        tensor.view(-1)[-1] += value * tensor.abs().max()
        return result

    monkeypatch.setattr(fastproj, name, broken)
    case = next(cases([suite], [QUICK], "cpu"))
    with pytest.raises(WrongResultError, match=f"{suite}: result .* fp64 reference"):
        case.check()


def test_a_projection_that_does_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastproj, "edge_", lambda *arguments, **options: None)
    with pytest.raises(WrongResultError, match="edge"):
        next(cases(["edge"], [QUICK], "cpu")).check()
