"""LEACE and difference of means beside EleutherAI's concept-erasure: where they are equal, and where not.

Seen with concept-erasure 0.2.4; of what it gave, some numbers are kept for where it is not installed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from erasure_families import (
    CLASSES,
    WELL_CONDITIONED,
    families,
    indicators,
    largest_correlation,
    plain,
)
from torch import Tensor

from fastproj import LEACE, DifferenceOfMeans
from fastproj.erasure.leace import shrunk

FAMILIES = families()
RECORDED = [
    [5.45292652752095641, 5.88766878403958849],
    [3.98821509839283994, 5.80304609928346782],
    [6.49242521691669783, 6.77454312025257899],
]
UNSHRUNK: dict[str, Any] = {"shrinkage": False, "constrain_cov_trace": False}


@pytest.fixture
def peer() -> Any:
    return pytest.importorskip("concept_erasure", reason="concept-erasure is not installed")


def ours(x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    fit = LEACE(CLASSES, **options)
    fit.update(x, labels)
    return fit.eraser(x)


def left(erased: Tensor, x: Tensor, labels: Tensor) -> float:
    return largest_correlation(erased, indicators(labels), x)


# Sums in another order, at a condition of some hundreds.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("mixed units", "far from 0")])
def test_leace_is_equal(peer: Any, name: str) -> None:
    x, labels = FAMILIES[name]
    theirs = peer.LeaceFitter.fit(x, indicators(labels), **UNSHRUNK).eraser(x)
    torch.testing.assert_close(ours(x, labels), theirs, rtol=0, atol=1e-10 * float(x.abs().max()))


@pytest.mark.parametrize("name", WELL_CONDITIONED)
def test_leace_around_zero_is_equal(peer: Any, name: str) -> None:
    """Where Σ is singular the mean is off the span of the samples, and the two need not agree on it."""
    x, labels = FAMILIES[name]
    theirs = peer.LeaceFitter.fit(x, indicators(labels), affine=False, **UNSHRUNK).eraser(x)
    torch.testing.assert_close(
        ours(x, labels, affine=False), theirs, rtol=0, atol=1e-10 * float(x.abs().max())
    )


@pytest.mark.parametrize("name", ["plain", "1e15", "a rare class", "a class missing"])
def test_leace_with_shrinkage_is_equal(peer: Any, name: str) -> None:
    x, labels = FAMILIES[name]
    theirs = peer.LeaceFitter.fit(x, indicators(labels)).eraser(x)
    atol = 1e-10 * float(x.abs().max())
    torch.testing.assert_close(ours(x, labels, shrinkage=True), theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["plain", "constant features", "a class missing", "equal features"])
def test_difference_of_means_is_equal(peer: Any, name: str) -> None:
    x, labels = FAMILIES[name]
    theirs = peer.LeaceFitter.fit(x, indicators(labels), method="orth").eraser(x)
    fit = DifferenceOfMeans(CLASSES, affine=True)
    fit.update(x, labels)
    torch.testing.assert_close(fit.eraser(x), theirs, rtol=0, atol=1e-11 * float(x.abs().max()))


def test_a_small_concept_is_erased_here_and_not_there(peer: Any) -> None:
    """Singular values below 0.01 in units of z are cut off."""
    x, labels = plain()
    z = 1e-3 * indicators(labels)
    theirs = peer.LeaceFitter.fit(x, z, **UNSHRUNK).eraser(x)
    torch.testing.assert_close(theirs, x, rtol=0, atol=1e-12)
    fit = LEACE()
    fit.update(x, z)
    assert largest_correlation(fit.eraser(x), z, x) < 1e-13


def test_small_activations_are_erased_here_and_not_there(peer: Any) -> None:
    """Of its method "orth", singular values below 0.01 in units of x and z are cut off."""
    x, labels = plain()
    x = 1e-3 * x
    theirs = peer.LeaceFitter.fit(x, indicators(labels), method="orth").eraser(x)
    torch.testing.assert_close(theirs, x, rtol=0, atol=1e-15)
    fit = DifferenceOfMeans(CLASSES)
    fit.update(x, labels)
    assert left(fit.eraser(x), x, labels) < 1e-13


def test_features_of_small_units_lose_the_concept_here_and_keep_it_there(peer: Any) -> None:
    x, labels = FAMILIES["mixed units"]
    theirs = peer.LeaceFitter.fit(x, indicators(labels), **UNSHRUNK).eraser(x)
    assert left(theirs, x, labels) > 0.05
    assert left(ours(x, labels), x, labels) < 1e-12


def test_large_activations_lose_no_more_than_the_concept_here_and_do_there(peer: Any) -> None:
    """Of its method "orth" again: 0.01 is less than rounding, which counts as a direction."""
    x, labels = FAMILIES["1e15"]
    theirs = peer.LeaceFitter.fit(x, indicators(labels), method="orth").eraser.proj_left
    assert int((theirs.norm(dim=0) > 0.5).sum()) == 3
    fit = DifferenceOfMeans(CLASSES)
    fit.update(x, labels)
    assert fit.eraser.rank == 2


def test_activations_far_from_zero_lose_the_concept_here_and_keep_some_there(peer: Any) -> None:
    """Its sums are in the precision of x and begin at a mean of 0, so that they cancel; x is as it was."""
    x, labels = plain()
    x = (x + 1e4).float()
    theirs = peer.LeaceFitter.fit(x, indicators(labels).float(), **UNSHRUNK).eraser(x)
    assert left(theirs, x, labels) > 5e-3
    # What fp32 rounds 1e4 by, 5e-4, averaged over 120 samples, beside spreads of 3 or so.
    assert left(ours(x, labels), x, labels) < 1e-4


def test_labels_are_classes_here_and_numbers_there(peer: Any) -> None:
    """Of three classes the trend from 0 to 2 alone is erased."""
    x, labels = plain()
    theirs = peer.LeaceFitter.fit(x, labels, **UNSHRUNK).eraser(x)
    assert left(theirs, x, labels) > 0.05
    assert largest_correlation(theirs, labels.double()[:, None], x) < 1e-12
    assert left(ours(x, labels), x, labels) < 1e-12


def test_shrinkage_does_not_depend_on_units_here_and_does_there(peer: Any) -> None:
    """An epsilon is added to fourth powers of x: at 1e-6 it alone counts, and the estimate is a sphere."""
    covariance = torch.cov(plain()[0].mT, correction=0)
    small = 1e-12 * covariance
    sphere = torch.eye(len(covariance), dtype=torch.float64) * covariance.trace() / len(covariance)
    there = 1e12 * peer.optimal_linear_shrinkage(small, 120)
    torch.testing.assert_close(there, sphere, rtol=1e-6, atol=1e-6)
    here = 1e12 * shrunk(small, 120)
    want = peer.optimal_linear_shrinkage(covariance, 120)
    torch.testing.assert_close(here, want, rtol=1e-12, atol=1e-12)
    assert float((want - sphere).abs().max()) > 1


def test_shrinkage_stays_a_covariance_here_and_not_there(peer: Any) -> None:
    """Uncorrelated features of equal variance leave 0/0, which the epsilon makes −1e15; nothing is erased."""
    h = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    x = torch.kron(torch.kron(h, h), h)[:, 1:5]
    z = (x[:, :1] > 0).double()
    theirs = peer.LeaceFitter.fit(x, z, constrain_cov_trace=False).eraser(x)
    assert largest_correlation(theirs, z, x) > 0.5
    fit = LEACE(shrinkage=True)
    fit.update(x, z)
    assert largest_correlation(fit.eraser(x), z, x) < 1e-14


def test_samples_of_one_class_are_an_error_here_and_nothing_there(peer: Any) -> None:
    x, labels = plain()
    one = torch.zeros_like(labels)
    theirs = peer.LeaceFitter.fit(x, indicators(one), **UNSHRUNK).eraser(x)
    torch.testing.assert_close(theirs, x, rtol=0, atol=0)
    with pytest.raises(ValueError, match="two classes or more"):
        ours(x, one)


def test_what_concept_erasure_gave() -> None:
    """The first three samples of the plain family, by 0.2.4 in fp64: kept for where it is not installed."""
    x, labels = plain()
    got = ours(x, labels)[:3, :2]
    torch.testing.assert_close(got, torch.tensor(RECORDED, dtype=torch.float64), rtol=0, atol=1e-10)


def test_the_record_is_what_it_gives(peer: Any) -> None:
    x, labels = plain()
    theirs = peer.LeaceFitter.fit(x, indicators(labels), **UNSHRUNK).eraser(x)[:3, :2]
    torch.testing.assert_close(theirs, torch.tensor(RECORDED, dtype=torch.float64), rtol=0, atol=1e-10)
