"""INLP from moments is INLP on samples; with a classifier of its own, whatever that gives."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from erasure_families import CLASSES, families, indicators, largest_correlation, normal, plain
from torch import Tensor

from fastproj import INLP, nullspace_projection
from fastproj.erasure import OrthogonalEraser
from fastproj.reference.erasure import inlp as reference

FAMILIES = families()
CONDITIONED = ("plain", "1e-15", "1e15", "constant features", "a rare class", "a class missing")


def fitted(x: Tensor, labels: Tensor, iterations: int, classes: int = CLASSES) -> OrthogonalEraser:
    fit = INLP(iterations, classes)
    fit.update(x, labels)
    return fit.eraser


def least_squares(labels: Tensor) -> object:
    """A classifier for nullspace_projection: least squares on samples."""
    z = indicators(labels) - indicators(labels).mean(0)
    return lambda x: (torch.linalg.pinv(x - x.mean(0), rtol=1e-10) @ z).mT


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("name", CONDITIONED)
def test_moments_are_enough(name: str, iterations: int) -> None:
    x, labels = FAMILIES[name]
    want = x @ reference(x, indicators(labels), iterations).mT
    got = fitted(x, labels, iterations)
    # Each iteration solves with Σ, at a condition of some 1e4, for directions that the next ones follow from.
    torch.testing.assert_close(got(x), want, rtol=0, atol=1e-9 * float(x.abs().max()))
    by_samples = nullspace_projection(x / x.abs().max(), least_squares(labels), iterations)
    torch.testing.assert_close(by_samples(x), want, rtol=0, atol=1e-9 * float(x.abs().max()))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mixed units"])
def test_directions_are_orthonormal_and_in_order(name: str) -> None:
    x, labels = FAMILIES[name]
    basis = fitted(x, labels, 4).basis.matrix
    identity = torch.eye(basis.shape[1], dtype=torch.float64)
    torch.testing.assert_close(basis.mT @ basis, identity, rtol=0, atol=1e-13)
    first = fitted(x, labels, 1).basis.matrix
    size = first.shape[1]
    torch.testing.assert_close(basis[:, :size], first, rtol=0, atol=1e-12)


def test_each_iteration_leaves_less() -> None:
    x, labels = plain(300, 12, 2)
    explained = []
    for iterations in range(1, 12):
        erased = fitted(x, labels, iterations, 2)(x)
        ones = torch.ones(len(x), 1, dtype=torch.float64)
        design = torch.cat([erased, ones], 1)
        predicted = design @ torch.linalg.pinv(design, rtol=1e-9) @ labels.double()
        explained.append(float((predicted - predicted.mean()).square().sum()))
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(explained))
    assert explained[-1] < 1e-3 * explained[0]


def test_it_ends_where_no_predictor_is_left() -> None:
    x, labels = plain()
    eraser = fitted(x, labels, 30)
    assert eraser.rank <= x.shape[1]
    assert largest_correlation(eraser(x), indicators(labels), x) < 1e-7
    twice = torch.cat([x, x])
    other = torch.cat([torch.zeros_like(labels), torch.ones_like(labels)])
    assert fitted(twice, other, 3, 2).rank == 0
    assert fitted(torch.full((120, 2), 0.1), labels, 3).rank == 0


def test_a_concept_of_one_direction_takes_one_iteration() -> None:
    """Isotropic features of which one alone knows: its direction goes first, and then nothing is left."""
    x = torch.linalg.qr(normal(60, 6)).Q * 60**0.5
    x = x - x.mean(0)
    x = torch.linalg.qr(x).Q
    fit = INLP(5)
    fit.update(x, 3 * x[:, 2] + 1)
    assert fit.eraser.rank == 1
    assert abs(float(fit.eraser.basis.matrix[2, 0])) == pytest.approx(1, abs=1e-13)


def test_the_product_of_projections_is_none_where_weights_are_not_orthogonal() -> None:
    """What one published version returns, beside an orthogonal projection onto all that was removed."""
    x, _ = plain()
    weights = [normal(1, 7, seed=1), normal(1, 7, seed=2), normal(1, 7, seed=1)]
    left = list(weights)
    eraser = nullspace_projection(x, lambda _: left.pop(0), 3)
    product = torch.eye(7, dtype=torch.float64)
    for weight in weights:
        product = product @ (torch.eye(7, dtype=torch.float64) - torch.linalg.pinv(weight) @ weight)
    assert float((product @ product - product).abs().max()) > 1e-3
    ours = torch.eye(7, dtype=torch.float64) - eraser.basis.matrix @ eraser.basis.matrix.mT
    assert float((ours @ ours - ours).abs().max()) < 1e-15 * 8
    assert eraser.rank == 2  # the third was removed before
    assert float((torch.cat(weights) @ ours).abs().max()) < 1e-14


def test_weights_that_are_nearly_removed_give_orthonormal_directions() -> None:
    x, first = plain()[0], normal(1, 7, seed=1)
    weights = [first, first + 1e-6 * normal(1, 7, seed=2), first - 1e-6 * normal(1, 7, seed=3)]
    basis = nullspace_projection(x, lambda _: weights.pop(0), 3).basis.matrix
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3).double(), rtol=0, atol=1e-15)


def test_a_classifier_may_end_it_and_sees_what_is_left() -> None:
    x, _ = plain()
    seen = []

    def classifier(rows: Tensor) -> Tensor | None:
        seen.append(rows)
        return torch.eye(7, dtype=torch.float32)[len(seen) - 1] if len(seen) < 3 else None

    eraser = nullspace_projection(x.float().reshape(2, 60, 7), classifier, 9)
    assert eraser.rank == 2
    assert len(seen) == 3
    assert torch.equal(seen[0], x.float().double())
    assert float(seen[2][:, :2].abs().max()) == 0
    assert torch.equal(seen[2][:, 2:], seen[0][:, 2:])
    assert nullspace_projection(x, lambda _: torch.zeros(2, 7), 3).rank == 0


def test_bad_input() -> None:
    x, _ = plain()
    with pytest.raises(TypeError, match="iterations must be a whole number, got float"):
        INLP(2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="iterations must be 1 or more, got 0"):
        nullspace_projection(x, lambda _: None, 0)
    with pytest.raises(ValueError, match="tolerance"):
        INLP(1, tolerance=0)
    with pytest.raises(TypeError, match="its weights or None, got int"):
        nullspace_projection(x, lambda _: 3, 1)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=r"weights \(k, 7\) of the classifier, got \(2, 6\)"):
        nullspace_projection(x, lambda _: torch.ones(2, 6), 1)
    with pytest.raises(ValueError, match="expected finite weights"):
        nullspace_projection(x, lambda _: torch.full((7,), torch.nan), 1)
    wide, many = plain(400, 80, 5)
    fit = INLP(20, 5)
    fit.update(wide, many)
    with pytest.raises(ValueError, match="64 directions at most, got 68"):
        _ = fit.eraser
