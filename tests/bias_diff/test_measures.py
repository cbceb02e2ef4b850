"""Coverage, precision, their curves and AUC against numbers worked out by hand and against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastproj.bias_diff.measures import FRACTIONS, auc, coverage, curves, precision

RANKED = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=7).filter(
    lambda rows: len({biased for _, biased in rows}) == 2
)


def test_coverage_and_precision_count_ids() -> None:
    biased, selected = {"a", "b", "c", "d"}, ["a", "x", "b", "b", "y"]
    assert coverage(selected, biased) == 2 / 4
    assert precision(selected, biased) == 2 / 4


def test_nothing_to_divide_by_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one biased id"):
        coverage(["a"], [])
    with pytest.raises(ValueError, match="at least one selected id"):
        precision([], ["a"])
    assert coverage([], ["a"]) == 0


def test_a_ranking_by_hand() -> None:
    found = curves([5.0, 4, 3, 2, 1], [True, False, True, False, False], [0.2, 0.4, 0.6, 1.0])
    assert found.counts == (1, 2, 3, 5)
    assert found.coverage == (0.5, 0.5, 1.0, 1.0)
    assert found.precision == (1.0, 0.5, 2 / 3, 2 / 5)
    # 5 beats three others; 3 beats two of three.
    assert auc([5.0, 4, 3, 2, 1], [True, False, True, False, False]) == 5 / 6


def test_reported_fractions() -> None:
    assert FRACTIONS[0] == 0.05
    assert FRACTIONS[-1] == 0.65
    assert len(curves(torch.arange(100.0), torch.arange(100) > 70).coverage) == 13


@given(RANKED, st.floats(0.01, 1))
def test_ties_take_the_mean_over_all_orders(rows: list[tuple[int, bool]], fraction: float) -> None:
    scores, biased = [float(score) for score, _ in rows], [label for _, label in rows]
    count = max(1, round(fraction * len(rows)))
    orders = [
        order
        for order in itertools.permutations(range(len(rows)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    hits = sum(sum(biased[row] for row in order[:count]) for order in orders) / len(orders)
    found = curves(scores, biased, [fraction])
    # Quotients of small integers.
    assert found.coverage[0] == pytest.approx(hits / sum(biased), abs=1e-12)
    assert found.precision[0] == pytest.approx(hits / count, abs=1e-12)


@given(RANKED)
def test_auc_is_the_share_of_pairs_in_order(rows: list[tuple[int, bool]]) -> None:
    pairs = [(s, t) for s, biased in rows if biased for t, other in rows if not other]
    wins = sum(1.0 if s > t else 0.5 if s == t else 0.0 for s, t in pairs)
    found = auc([float(score) for score, _ in rows], [biased for _, biased in rows])
    assert found == pytest.approx(wins / len(pairs), abs=1e-12)


def test_constant_scores_say_nothing() -> None:
    biased = [True, False, False, True]
    assert auc([0.0] * 4, biased) == 0.5
    assert curves([0.0] * 4, biased, [0.5]).coverage == (0.5,)


def test_scales_infinities_and_strides_keep_the_order() -> None:
    biased = torch.tensor([True, False, True, False])
    assert auc(torch.tensor([math.inf, 1e30, 1e-30, -math.inf]), biased) == 0.75
    strided = torch.tensor([[3.0, 0], [2, 0], [1, 0], [0, 0]], dtype=torch.float16)[:, 0]
    assert auc(strided, biased) == 0.75


@pytest.mark.parametrize(
    ("scores", "biased", "message"),
    [
        ([1.0, math.nan], [True, False], "1 NaN"),
        ([1.0, 2.0], [True], r"got \(2,\) and \(1,\)"),
        ([1.0, 2.0], [True, True], "2 biased of 2"),
        ([1.0, 2.0], [False, False], "0 biased of 2"),
        ([], [], "0 biased of 0"),
    ],
)
def test_what_cannot_be_ranked_is_refused(scores: list[float], biased: list[bool], message: str) -> None:
    for measure in (auc, curves):
        with pytest.raises(ValueError, match=message):
            measure(scores, biased)


@pytest.mark.parametrize("fraction", [0.0, 1.1, math.nan])
def test_a_fraction_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="expected fractions above 0 and up to 1"):
        curves([1.0, 2.0], [True, False], [fraction])
