"""Difference of means: an orthogonal projection after which the classes' means are one."""

from __future__ import annotations

import pytest
import torch
from erasure_families import CLASSES, families, indicators, largest_correlation, normal, plain
from torch import Tensor

from fastproj import DifferenceOfMeans
from fastproj.erasure import OrthogonalEraser
from fastproj.reference.erasure import difference_of_means as reference

FAMILIES = families()


def fitted(x: Tensor, labels: Tensor, classes: int = CLASSES, affine: bool = False) -> OrthogonalEraser:
    fit = DifferenceOfMeans(classes, affine=affine)
    fit.update(x, labels)
    return fit.eraser


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mixed units"])
def test_it_is_the_reference(name: str) -> None:
    x, labels = FAMILIES[name]
    want = x @ reference(x, labels).mT
    # Means are off by a few eps of the largest value, beside differences a few times smaller.
    torch.testing.assert_close(fitted(x, labels)(x), want, rtol=0, atol=1e-12 * float(x.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_means_are_one_afterwards(name: str) -> None:
    x, labels = FAMILIES[name]
    erased = fitted(x, labels)(x)
    means = torch.stack([erased[labels == label].mean(0) for label in labels.unique()])
    apart = float((means - means[0]).norm())
    assert apart < 1e-13 * float(x.norm(dim=1).max())


def test_of_two_classes_it_is_the_unit_difference() -> None:
    x, labels = plain(classes=2)
    eraser = fitted(x, labels, 2)
    difference = x[labels == 1].mean(0) - x[labels == 0].mean(0)
    direction = eraser.basis.matrix[:, 0]
    assert eraser.rank == 1
    assert float(direction @ difference).__abs__() == pytest.approx(float(difference.norm()), rel=1e-13)


def test_the_longest_direction_comes_first() -> None:
    """By the classes' means, however many samples each has."""
    x, labels = FAMILIES["a rare class"]
    means = torch.stack([x[labels == label].mean(0) for label in range(CLASSES)], 1)
    want = torch.linalg.svd(means - x.mean(0)[:, None]).U[:, :2]
    got = fitted(x, labels).basis.matrix
    torch.testing.assert_close(got, want * torch.sign((want * got).sum(0)), rtol=0, atol=1e-12)


def test_numbers_give_the_covariance() -> None:
    """As indicators of labels they give what labels give, in whatever unit."""
    x, labels = plain()
    want = fitted(x, labels)(x)
    for unit in (1e-12, 1.0, 1e12):
        fit = DifferenceOfMeans()
        fit.update(x, unit * indicators(labels))
        torch.testing.assert_close(fit.eraser(x), want, rtol=0, atol=1e-12)
    fit = DifferenceOfMeans()
    z = torch.stack([x[:, 0], normal(len(x), seed=8)], 1)
    fit.update(x, z)
    assert fit.eraser.rank == 2
    assert largest_correlation(fit.eraser(x), z, x) < 1e-13


def test_around_the_mean() -> None:
    x, labels = plain()
    eraser = fitted(x, labels, affine=True)
    torch.testing.assert_close(eraser(x).mean(0), x.mean(0), rtol=1e-13, atol=0)
    assert largest_correlation(eraser(x), indicators(labels), x) < 1e-13
    assert fitted(x, labels).mean is None


def test_equal_means_leave_nothing_to_erase() -> None:
    x, labels = plain(60)
    twice = torch.cat([x, x.flip(0)]) + 1e4  # sums in another order, so that they differ by rounding
    other = torch.cat([torch.zeros_like(labels), torch.ones_like(labels)])
    batches = DifferenceOfMeans(2)
    for rows, some in zip(twice.split(7), other.split(7), strict=True):
        batches.update(rows, some)
    assert batches.eraser.rank == fitted(twice, other, 2).rank == 0
    assert fitted(torch.zeros(120, 3), other, 2).rank == 0
    assert fitted(torch.full((120, 3), 0.1), other, 2).rank == 0
    assert torch.equal(fitted(twice, other, 2)(twice), twice)


def test_more_classes_than_features_or_directions() -> None:
    x, labels = plain(90, 4, 9)
    assert fitted(x, labels, 9).rank == 4
    x, labels = plain(140, 70, 70)
    with pytest.raises(ValueError, match="at most 64 columns, got 69"):
        fitted(x, labels, 70)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="tolerance must be between 0 and 1, got 1"):
        DifferenceOfMeans(tolerance=1.0)
