"""Selection by score: how many, in which order, and balanced over references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastproj
from fastproj.influence.scores import Scores
from fastproj.influence.select import select


def scores_of(values: Tensor) -> Scores:
    rows, references = values.shape
    return Scores(tuple(f"s{i}" for i in range(rows)), tuple(f"r{j}" for j in range(references)), values)


def rounded(rows: int, references: int, seed: int) -> Tensor:
    """Scores in steps of a quarter, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, references, generator=generator).mul(4).round().div(4)


def shortfalls(values: Tensor, picked: list[int]) -> list[float]:
    """By how much each sample taken fell short of the largest gain then, over all rows and columns."""
    exact = values.double()
    deviation = exact.std(0, correction=0)
    normalised = torch.where(exact.amax(0) > exact.amin(0), (exact - exact.mean(0)) / deviation, 0.0)
    found = []
    for taken, row in enumerate(picked):
        gains = (normalised - normalised[picked[:taken]].sum(0) / max(taken, 1)).amax(1)
        gains[picked[:taken]] = -torch.inf
        found.append(float(gains.max() - gains[row]))
    return found


# How many


@pytest.mark.parametrize(
    ("fraction", "taken"), [(0.35, 7), (1.0, 20), (0.01, 1), (1e-9, 1), (0.07, 1), (0.1, 2)]
)
def test_a_fraction_is_rounded_to_a_count_of_one_or_more(fraction: float, taken: int) -> None:
    assert len(select(scores_of(torch.randn(20, 2)), fraction=fraction)) == taken


def test_exactly_one_of_fraction_and_count_within_its_range() -> None:
    scores = scores_of(torch.randn(4, 1))
    for bad in ({}, {"fraction": 0.5, "count": 2}):
        with pytest.raises(ValueError, match="expected one of fraction and count"):
            select(scores, **bad)  # type: ignore[arg-type]
    for fraction in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="fraction above 0 and up to 1"):
            select(scores, fraction=fraction)
    for count in (0, -1, 5):
        with pytest.raises(ValueError, match=f"count from 1 to 4, the number of samples, got {count}"):
            select(scores, count=count)
    with pytest.raises(ValueError, match="at least one sample"):
        select(scores_of(torch.empty(0, 2)), count=1)


@pytest.mark.parametrize("balanced", [False, True])
def test_scores_that_are_no_numbers_are_counted_and_refused(balanced: bool) -> None:
    values = torch.randn(5, 2)
    values[1] = torch.nan
    values[3, 0] = -torch.inf
    with pytest.raises(ValueError, match="got 2 NaN and 1 infinite ones of 10"):
        select(scores_of(values), count=1, balanced=balanced)


# Order


@given(
    rows=st.integers(1, 30),
    references=st.integers(1, 3),
    seed=st.integers(0, 99),
    aggregate=st.sampled_from(["mean", "max"]),
)
def test_the_highest_come_first_and_of_equals_the_earlier(
    rows: int, references: int, seed: int, aggregate: str
) -> None:
    scores = scores_of(rounded(rows, references, seed))
    count = 1 + seed % rows
    picked = select(scores, count=count, aggregate=aggregate)  # type: ignore[arg-type]
    totals = scores.values.double()
    totals = totals.mean(1).float() if aggregate == "mean" else totals.amax(1).float()
    want = sorted(range(rows), key=lambda row: (-float(totals[row]), row))[:count]
    assert picked.indices.tolist() == want
    assert picked.ids == tuple(f"s{row}" for row in want)
    assert torch.equal(picked.scores, totals[want])
    assert picked.threshold == float(picked.scores.min())
    left = torch.ones(rows, dtype=torch.bool).index_fill_(0, picked.indices, False)
    assert (totals[left] <= picked.threshold).all()


def test_the_package_offers_it() -> None:
    assert fastproj.select is select


# Balanced


@given(rows=st.integers(1, 25), references=st.integers(1, 4), seed=st.integers(0, 99), constant=st.booleans())
def test_balanced_is_the_greedy_choice(rows: int, references: int, seed: int, constant: bool) -> None:
    values = rounded(rows, references, seed)
    if constant:
        values[:, 0] = 0.3
    count = 1 + seed % rows
    picked = select(scores_of(values), count=count, balanced=True).indices.tolist()
    assert len(set(picked)) == count
    # Gains are a few units; fp64 rounds them at about 1e-15 over as many additions as samples.
    assert max(shortfalls(values, picked)) < 1e-12


def test_balanced_takes_the_earlier_of_two_equal_samples() -> None:
    once = rounded(20, 3, 7).unique(dim=0)
    rows = len(once)
    order = select(scores_of(once.repeat(2, 1)), fraction=1.0, balanced=True).indices.tolist()
    assert all(order.index(row) < order.index(row + rows) for row in range(rows))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_balanced_does_not_see_the_scale_or_the_level_of_a_reference(scale: float) -> None:
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    other = values.clone()
    other[:, 1] = other[:, 1] * scale
    other[:, 2] = other[:, 2] * 8 + 16
    first = select(scores_of(values), count=15, balanced=True)
    assert torch.equal(select(scores_of(other), count=15, balanced=True).indices, first.indices)


def test_balanced_serves_the_reference_that_the_mean_forgets() -> None:
    loud, quiet = torch.zeros(100, 2), torch.zeros(100, 2)
    loud[:, 0] = torch.linspace(50, 100, 100)
    quiet[:, 1] = torch.linspace(0.5, 1, 100)
    scores = scores_of(torch.cat([loud, quiet]))
    plain, balanced = select(scores, count=40), select(scores, count=40, balanced=True)
    assert int((plain.indices >= 100).sum()) == 0
    assert 15 <= int((balanced.indices >= 100).sum()) <= 25


def test_balanced_takes_every_sample_once_where_all_are_wanted() -> None:
    picked = select(scores_of(rounded(3000, 5, 0)), fraction=1.0, balanced=True)
    assert torch.equal(picked.indices.sort().values, torch.arange(3000))


def test_balanced_reads_each_column_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand samples take no pass over all of them per sample taken."""
    import numpy as np

    sorts = []
    sort = np.argsort
    monkeypatch.setattr(np, "argsort", lambda *a, **k: (sorts.append(a[0].shape), sort(*a, **k))[1])
    picked = select(scores_of(torch.randn(100_000, 3)), count=500, balanced=True)
    assert len(set(picked.ids)) == 500
    assert sorts == [(100_000, 3)]
