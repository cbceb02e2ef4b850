"""LEACE erases what linear predictors find, changes least, and is the paper's projection."""

from __future__ import annotations

import pytest
import torch
from erasure_families import (
    CLASSES,
    FEATURES,
    WELL_CONDITIONED,
    families,
    indicators,
    largest_correlation,
    normal,
    plain,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastproj import LEACE
from fastproj.erasure import ObliqueEraser
from fastproj.erasure.leace import shrunk
from fastproj.reference.erasure import leace as reference

FAMILIES = families()
EPS = torch.finfo(torch.float64).eps


def fitted(x: Tensor, labels: Tensor, classes: int = CLASSES, **options: float | bool) -> ObliqueEraser:
    fit = LEACE(classes, **options)
    fit.update(x, labels)
    return fit.eraser


def spread(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().sum()


# Sums of 120 products are off by a few eps, of features that lie 5 standard deviations or so from 0; those
# 1e6 from 0 have values whose own rounding is 1e6 times that of their spread.
@pytest.mark.parametrize("shrinkage", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_linear_is_left(name: str, shrinkage: bool) -> None:
    x, labels = FAMILIES[name]
    erased = fitted(x, labels, shrinkage=shrinkage)(x)
    before = largest_correlation(x, indicators(labels), x)
    after = largest_correlation(erased, indicators(labels), x)
    assert before > 0.05
    assert after < (1e-8 if name == "far from 0" else 1e-12)


@pytest.mark.parametrize("name", WELL_CONDITIONED)
def test_it_is_the_papers_projection(name: str) -> None:
    x, labels = FAMILIES[name]
    mean = x.mean(0)
    want = (x - mean) @ reference(x, indicators(labels)).mT + mean
    # The reference whitens x, at a condition number of some hundreds, then takes that back.
    atol = 1e-11 * float(x.abs().max())
    torch.testing.assert_close(fitted(x, labels)(x), want, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["dependent features", "equal features", "fewer samples than features"])
def test_it_is_the_papers_projection_where_samples_are(name: str) -> None:
    """Off their span the two differ: any answer is as good there."""
    x, labels = FAMILIES[name]
    mean = x.mean(0)
    want = (x - mean) @ reference(x, indicators(labels)).mT + mean
    torch.testing.assert_close(fitted(x, labels)(x), want, rtol=0, atol=1e-10 * float(x.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_a_projection(name: str) -> None:
    x, labels = FAMILIES[name]
    eraser = fitted(x, labels)
    identity = torch.eye(eraser.rank, dtype=torch.float64)
    size = eraser.right.abs().mT @ eraser.left.abs()
    assert bool(((eraser.right.mT @ eraser.left - identity).abs() <= 32 * EPS * size).all())
    once = eraser(x)
    deviations = (x - x.mean(0)).norm(dim=0).clamp_min(1e-300)
    # Rounding of R (x − μ), where |R||x − μ| is many times its result, divided by what x varies.
    assert float(((eraser(once) - once) / deviations).abs().max()) < (1e-8 if name == "far from 0" else 1e-11)


def test_no_linear_classifier_beats_the_majority() -> None:
    """Least squares and logistic regression, trained on what is left, give the classes' shares to each."""
    x, labels = plain(150, classes=2, seed=4)
    labels[:30] = 1  # shares of 2/5 and 3/5
    erased = fitted(x, labels, 2)(x)
    z = indicators(labels, 2)
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    predicted = torch.cat([erased, ones], 1)
    predicted = predicted @ torch.linalg.lstsq(predicted, z).solution
    torch.testing.assert_close(predicted, z.mean(0).expand_as(z), rtol=0, atol=1e-10)

    features = torch.cat([(erased - erased.mean(0)) / erased.std(0), ones], 1)
    weights = torch.zeros(FEATURES + 1, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(features @ weights, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    share = z.mean(0)
    # No better than the constant, which has the entropy of the shares.
    assert float(closure().detach()) == pytest.approx(-float((share * share.log()).sum()), abs=1e-9)
    assert (features @ weights).argmax(1).unique().numel() == 1


@pytest.mark.parametrize("seed", range(4))
def test_of_all_maps_that_erase_it_changes_least(seed: int) -> None:
    """In each feature, so under any diagonal inner product, and in any direction, so under any other."""
    x, labels = plain(seed=seed)
    eraser = fitted(x, labels)
    change = (eraser(x) - x).square().mean(0)
    direction = normal(FEATURES, seed=300 + seed)
    along = ((eraser(x) - x) @ direction).square().mean()
    matrix = torch.eye(FEATURES, dtype=torch.float64) - eraser.left @ eraser.right.mT
    within = torch.linalg.qr(eraser.left).Q
    for number in range(20):
        other = normal(FEATURES, FEATURES, seed=1000 * seed + number) * 10.0 ** -(number % 5)
        another = matrix + other - (other @ within) @ within.mT  # takes L to 0 as well
        changed = (x - x.mean(0)) @ another.mT + x.mean(0)
        assert largest_correlation(changed, indicators(labels), x) < 1e-11
        assert bool(((changed - x).square().mean(0) >= change * (1 - 1e-9)).all())
        assert float(((changed - x) @ direction).square().mean()) >= float(along) * (1 - 1e-9)


@pytest.mark.parametrize("name", WELL_CONDITIONED)
def test_no_variance_grows(name: str) -> None:
    x, labels = FAMILIES[name]
    x = x / x.abs().max()
    erased = fitted(x, labels)(x)
    taken = torch.cov(x.mT) - torch.cov(erased.mT)
    assert float(torch.linalg.eigvalsh(taken).min()) > -1e-13


@given(st.integers(2, 40), st.integers(1, 9), st.integers(2, 4), st.integers(0, 99))
def test_any_shape(samples: int, features: int, classes: int, seed: int) -> None:
    x, labels = plain(max(samples, classes), features, classes, seed)
    eraser = fitted(x, labels, classes)
    assert eraser.left.shape == eraser.right.shape
    assert eraser.rank <= min(features, classes - 1)
    # The worst of 4,000 draws was 2e-14.
    assert largest_correlation(eraser(x), indicators(labels, classes), x) < 1e-12


@pytest.mark.parametrize("unit", [1e-15, 1e-3, 1e3, 1e15])
def test_units_make_no_difference(unit: float) -> None:
    x, labels = plain()
    want = fitted(x, labels)(x)
    torch.testing.assert_close(fitted(unit * x, labels)(unit * x) / unit, want, rtol=0, atol=1e-11)
    numbers = LEACE()
    numbers.update(x, unit * indicators(labels))
    torch.testing.assert_close(numbers.eraser(x), want, rtol=0, atol=1e-11)


def test_a_unit_for_each_feature_makes_no_difference() -> None:
    x, labels = plain()
    mixed, _ = FAMILIES["mixed units"]
    units = mixed[0] / x[0]
    got = fitted(mixed, labels)(mixed) / units
    torch.testing.assert_close(got, fitted(x, labels)(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_factors_fit_into_fp32_whatever_the_unit(unit: float) -> None:
    """Columns of L have unit length, so R has no unit either."""
    x, labels = plain()
    eraser = fitted(unit * x, labels)
    lengths = torch.linalg.vector_norm(eraser.left, dim=0)
    torch.testing.assert_close(lengths, torch.ones(2).double(), rtol=1e-14, atol=0)
    narrow = eraser.to(dtype=torch.float32)
    got = narrow((unit * x).float()).double() / unit
    # fp32 of numbers about 10, at a condition of ten or so.
    torch.testing.assert_close(got, fitted(x, labels)(x), rtol=0, atol=1e-4)


def test_numbers_and_labels() -> None:
    """One column of numbers, two of them, and bools, which are numbers 0 and 1."""
    x, labels = plain(classes=2)
    number = LEACE()
    number.update(x, labels.double())
    flag = LEACE()
    flag.update(x, labels == 1)
    want = fitted(x, labels, 2)(x)
    torch.testing.assert_close(number.eraser(x), want, rtol=0, atol=1e-11)
    torch.testing.assert_close(flag.eraser(x), want, rtol=0, atol=1e-11)
    two = LEACE()
    z = torch.stack([x[:, 0] + labels, normal(len(x), seed=9)], 1)
    two.update(x, z)
    assert two.eraser.rank == 2
    assert largest_correlation(two.eraser(x), z, x) < 1e-12


def test_what_is_uncorrelated_is_left_alone() -> None:
    x, labels = plain()
    erased = fitted(x, labels)(x)
    again = fitted(erased, labels)
    assert again.rank == 0
    assert torch.equal(again(erased), erased)
    constant = LEACE()
    constant.update(x, torch.full((len(x),), 0.3, dtype=torch.float64))
    assert constant.eraser.rank == 0
    equal = LEACE()
    equal.update(torch.full((9, 2), 0.1, dtype=torch.float64), normal(9))
    assert equal.eraser.rank == 0


def test_around_the_mean_or_around_zero() -> None:
    x, labels = plain()
    around_mean, around_zero = fitted(x, labels), fitted(x, labels, affine=False)
    torch.testing.assert_close(around_mean(x).mean(0), x.mean(0), rtol=1e-12, atol=0)
    assert around_zero.mean is None
    want = x - (x @ around_mean.right) @ around_mean.left.mT
    torch.testing.assert_close(around_zero(x), want, rtol=0, atol=1e-11)
    assert largest_correlation(around_zero(x), indicators(labels), x) < 1e-12


def test_shrinkage_is_between_the_samples_and_a_sphere() -> None:
    x, labels = plain(9)
    covariance = torch.cov(x.mT, correction=0)
    estimate = shrunk(covariance, len(x))
    sphere = torch.eye(FEATURES, dtype=torch.float64) * covariance.trace() / FEATURES
    weight = (estimate - sphere)[0, 1] / (covariance - sphere)[0, 1]
    assert 0 < float(weight) < 1
    torch.testing.assert_close(estimate, weight * covariance + (1 - weight) * sphere, rtol=1e-12, atol=1e-12)
    # Uncorrelated features of equal variance give the sphere, few samples of it no less.
    torch.testing.assert_close(shrunk(2 * sphere, 3), 2 * sphere, rtol=1e-15, atol=0)
    assert torch.equal(shrunk(0 * sphere, 3), 0 * sphere)
    # Nearly so, the optimum for many samples would be a weight of −1e14, for 3 of them.
    nearly = sphere + torch.diag(1e-7 * sphere.diagonal() * torch.tensor([1.0, -1, 1, -1, 0, 0, 0]))
    torch.testing.assert_close(shrunk(nearly, 3), sphere, rtol=1e-12, atol=0)
    # The least change is that of the samples' own covariance.
    assert spread(fitted(x, labels, shrinkage=True)(x) - x) > spread(fitted(x, labels)(x) - x)


def test_shrinkage_helps_samples_that_were_not_seen() -> None:
    """Fitted on fewer samples than features, less is left in new ones, for less change: means of 20 draws."""
    left, changed = {False: 0.0, True: 0.0}, {False: 0.0, True: 0.0}
    for seed in range(20):
        x, labels = plain(400, 30, 2, seed)
        new, z = x[20:], indicators(labels[20:], 2)
        for shrinkage in left:
            erased = fitted(x[:20], labels[:20], 2, shrinkage=shrinkage)(new)
            left[shrinkage] += largest_correlation(erased, z, new) / 20
            changed[shrinkage] += float(spread(erased - new) / spread(new)) / 20
    assert left[True] < left[False] - 0.02
    assert changed[True] < changed[False]


def test_bad_options() -> None:
    for tolerance in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="tolerance must be between 0 and 1"):
            LEACE(tolerance=tolerance)
    fit = LEACE()
    fit.update(1e-170 * normal(9, 2), normal(9))
    with pytest.raises(ValueError, match="variance fp64 can hold"):
        _ = fit.eraser
