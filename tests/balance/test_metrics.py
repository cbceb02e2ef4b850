"""Accuracy and F1 by hand, and against counts made one at a time."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastproj.balance.metrics import Classification, classification

NAMES = ("x", "y", "z")


def test_one_label_a_sample_by_hand() -> None:
    # x: 2 right, 1 too many (the y), none missed. y: 1 right, 1 missed. z: nothing right, one missed.
    found = classification([0, 0, 0, 1, 1], [0, 0, 1, 1, 2], NAMES)
    f1 = {"x": 4 / 5, "y": 2 / 4, "z": 0.0}
    assert found.per_label_f1 == pytest.approx(f1)
    assert found.support == {"x": 2, "y": 2, "z": 1}
    assert found.accuracy == pytest.approx(3 / 5)
    assert found.macro_f1 == pytest.approx((0.8 + 0.5) / 3)
    assert found.weighted_f1 == pytest.approx((2 * 0.8 + 2 * 0.5) / 5)
    assert (found.worst_label, found.worst_f1) == ("z", 0.0)


def test_several_labels_a_sample_by_hand() -> None:
    gold = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)
    said = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    found = classification(said, gold, NAMES)
    # y: one right, one too many, one missed.
    assert found.per_label_f1 == pytest.approx({"x": 1.0, "y": 0.5, "z": 1.0})
    assert found.support == {"x": 2, "y": 2, "z": 1}
    # The second and the third sample are right as a whole.
    assert found.accuracy == 0.5
    assert found.macro_f1 == pytest.approx(2.5 / 3)
    assert found.weighted_f1 == pytest.approx((2 * 1 + 2 * 0.5 + 1) / 5)
    assert (found.worst_label, found.worst_f1) == ("y", 0.5)
    assert classification(said.tolist(), gold.tolist(), NAMES) == found


def test_a_label_that_no_sample_has_counts_in_the_macro_mean_and_is_not_the_worst() -> None:
    found = classification([0, 1, 1], [0, 0, 1], NAMES)
    assert found.per_label_f1 == pytest.approx({"x": 2 / 3, "y": 2 / 3, "z": 0.0})
    assert found.macro_f1 == pytest.approx(4 / 9)
    assert found.weighted_f1 == pytest.approx(2 / 3)
    # Of equals the first.
    assert found.worst_label == "x"
    assert classification([2], [0], NAMES).per_label_f1["z"] == 0.0


def test_all_right_and_all_wrong() -> None:
    right = classification([0, 1, 2], [0, 1, 2], NAMES)
    assert (right.accuracy, right.weighted_f1, right.macro_f1, right.worst_f1) == (1, 1, 1, 1)
    wrong = classification([1], [0], ("x", "y"))
    assert (wrong.accuracy, wrong.weighted_f1, wrong.macro_f1, wrong.worst_f1) == (0, 0, 0, 0)
    assert classification([0, 0], [0, 0], ("x",)).accuracy == 1


@given(st.data())
def test_counts_made_one_at_a_time(data: st.DataObject) -> None:
    number = data.draw(st.integers(1, 5))
    row = st.sets(st.integers(0, number - 1))
    one = st.integers(0, number - 1).map(lambda label: {label})
    samples = data.draw(st.lists(st.tuples(*[data.draw(st.sampled_from([row, one]))] * 2), min_size=1))
    if not any(gold for _, gold in samples):
        return
    f1, support = [], []
    for label in range(number):
        right = sum(label in said and label in gold for said, gold in samples)
        extra = sum(label in said and label not in gold for said, gold in samples)
        missed = sum(label not in said and label in gold for said, gold in samples)
        support.append(right + missed)
        f1.append(Fraction(2 * right, max(1, 2 * right + extra + missed)))
    tables = [
        torch.tensor([[label in sample[side] for label in range(number)] for sample in samples])
        for side in (0, 1)
    ]
    names = tuple(map(str, range(number)))
    found = classification(*tables, names)
    # Sums of a few fractions in fp64.
    weighted = sum(f * n for f, n in zip(f1, support, strict=True)) / sum(support)
    assert found.weighted_f1 == pytest.approx(float(weighted), abs=1e-12)
    assert found.macro_f1 == pytest.approx(float(sum(f1) / number), abs=1e-12)
    assert found.worst_f1 == float(min(f for f, n in zip(f1, support, strict=True) if n))
    assert found.accuracy == pytest.approx(sum(said == gold for said, gold in samples) / len(samples))
    assert tuple(found.support.values()) == tuple(support)
    if all(len(said) == len(gold) == 1 for said, gold in samples):
        numbers = [[min(sample[side]) for sample in samples] for side in (0, 1)]
        assert classification(*numbers, names) == found
        tensors = [torch.tensor(side, dtype=torch.int32) for side in numbers]
        assert classification(*tensors, names) == found


def test_measures_are_fixed_and_go_into_json() -> None:
    found = classification([0, 1], [0, 0], NAMES)
    assert Classification(**json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(FrozenInstanceError):
        found.accuracy = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("predicted", "gold", "message"),
    [
        ([], [], "predicted: expected at least one sample, got none"),
        ([0], [0, 1], "as many predictions as samples, got 1 and 2"),
        ([3], [0], "predicted: expected label numbers from 0 to 2, got 3"),
        ([0], [-1], "gold: expected label numbers from 0 to 2, got -1"),
        ([[0, 1]], [0], r"predicted: expected label numbers \(N,\), got shape \(1, 2\)"),
        ([True], [0], r"predicted: expected booleans \(N, 3\), got shape \(1,\)"),
        ([[True, False]], [0], r"got shape \(1, 2\)"),
        ([[True] * 3], [[False] * 3], "at least one sample with a label"),
    ],
)
def test_bad_values_are_refused(predicted: Any, gold: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification(predicted, gold, NAMES)


@pytest.mark.parametrize("values", [[0.0], [1j], torch.zeros(1)])
def test_values_of_another_kind_are_refused(values: Any) -> None:
    with pytest.raises(TypeError, match="gold: expected label numbers or booleans, got torch"):
        classification([0], values, NAMES)
