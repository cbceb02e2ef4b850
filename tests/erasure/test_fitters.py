"""All fitters take batches for the whole and two fits for one, and refuse the same samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from erasure_families import CLASSES, FEATURES, WELL_CONDITIONED, families, in_batches, normal, plain
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastproj import INLP, LEACE, DifferenceOfMeans, Eraser, PrincipalDirections


class Unlabelled(PrincipalDirections):
    """Principal directions that are given labels as well."""

    def __init__(self) -> None:
        super().__init__(2)

    def update(self, x: Tensor, base: Tensor | None = None) -> None:
        super().update(x)


FITTERS: dict[str, Callable[[], Any]] = {
    "LEACE": lambda: LEACE(CLASSES),
    "LEACE, shrinkage": lambda: LEACE(CLASSES, shrinkage=True),
    "difference of means": lambda: DifferenceOfMeans(CLASSES, affine=True),
    "INLP": lambda: INLP(2, CLASSES, affine=True),
    "principal directions": Unlabelled,
}
WITH_LABELS = [name for name in FITTERS if name != "principal directions"]
FAMILIES = families()


def fitted(name: str, *batches: tuple[Tensor, ...]) -> Any:
    fit = FITTERS[name]()
    for x, labels in batches:
        fit.update(x, labels)
    return fit


def assert_same(got: Eraser, want: Eraser, x: Tensor) -> None:
    """Up to the rounding of sums in another order, which conditions of some thousands multiply."""
    assert got.rank == want.rank
    torch.testing.assert_close(got(x), want(x), rtol=0, atol=1e-9 * float(x.abs().max()))


@pytest.mark.parametrize("family", [*WELL_CONDITIONED, "far from 0"])
@pytest.mark.parametrize("name", FITTERS)
def test_batches_are_the_whole(name: str, family: str) -> None:
    x, labels = FAMILIES[family]
    want = fitted(name, (x, labels))
    got = fitted(name, *in_batches((x, labels), [1, 2, 50, 0, 7]))
    assert got.count == want.count == len(x)
    assert_same(got.eraser, want.eraser, x)


@pytest.mark.parametrize("name", FITTERS)
def test_samples_one_by_one(name: str) -> None:
    """Each batch is constant, all of them are not."""
    x, labels = plain(40)
    got = fitted(name, *in_batches((x, labels), [1] * 39))
    assert_same(got.eraser, fitted(name, (x, labels)).eraser, x)


@pytest.mark.parametrize("name", [name for name in FITTERS if name != "LEACE, shrinkage"])
def test_constant_features_are_left_alone_exactly(name: str) -> None:
    """Means of 0.1 in batches leave rounding, which is no concept."""
    x, labels = FAMILIES["constant features"]
    eraser = fitted(name, *in_batches((x, labels), [1, 2, 50, 7])).eraser
    assert not bool(eraser.left[[1, 4]].any())
    assert eraser.rank >= 2


@given(sizes=st.lists(st.integers(0, 30), max_size=4), name=st.sampled_from(list(FITTERS)))
def test_any_batches(sizes: list[int], name: str) -> None:
    x, labels = plain()
    got = fitted(name, *in_batches((x, labels), sizes))
    assert_same(got.eraser, fitted(name, (x, labels)).eraser, x)


@pytest.mark.parametrize("name", FITTERS)
def test_two_fits_are_one(name: str) -> None:
    """Sorted by label, so that each saw classes the other did not."""
    x, labels = plain()
    order = labels.argsort()
    one = fitted(name, (x[order[:50]], labels[order[:50]]))
    other = fitted(name, (x[order[50:]], labels[order[50:]]))
    known = other.eraser
    one.merge(other)
    assert one.count == len(x)
    assert_same(one.eraser, fitted(name, (x, labels)).eraser, x)
    assert torch.equal(other.eraser.left, known.left)
    empty = FITTERS[name]()
    one.merge(empty)
    assert one.count == len(x)
    empty.merge(one)
    assert torch.equal(empty.eraser.left, one.eraser.left)


@pytest.mark.parametrize("name", WITH_LABELS)
def test_leading_dimensions_and_strides(name: str) -> None:
    x, labels = plain()
    want = fitted(name, (x, labels)).eraser
    stacked = fitted(name, (x.reshape(4, 30, FEATURES), labels.reshape(4, 30).to(torch.uint8)))
    torch.testing.assert_close(stacked.eraser(x), want(x), rtol=0, atol=1e-10)
    columns = x.mT.contiguous().mT
    assert not columns.is_contiguous()
    torch.testing.assert_close(fitted(name, (columns, labels)).eraser(x), want(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FITTERS)
def test_samples_of_less_precision_are_taken_exactly(name: str, dtype: torch.dtype) -> None:
    """As their conversion to fp64 is, with a gradient or without."""
    x, labels = plain()
    x = x.to(dtype).requires_grad_()
    got, want = fitted(name, (x, labels)).eraser, fitted(name, (x.detach().double(), labels)).eraser
    assert torch.equal(got.left, want.left)
    assert got.left.dtype == torch.float64
    assert not got.left.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("name", FITTERS)
def test_what_is_refused_is_not_taken_in(name: str, bad: float) -> None:
    x, labels = plain()
    if name == "difference of means":
        bad = bad if bad != 1e200 else 1e308 * 10  # it has no use for squares
    fit = fitted(name, (x, labels))
    known = fit.eraser
    wrong = x.clone()
    wrong[3, 1] = bad
    with pytest.raises(ValueError, match="finite samples"):
        fit.update(wrong, labels)
    with pytest.raises(ValueError, match=r"7 features|of 7"):
        fit.update(x[:, :3], labels)
    assert fit.count == len(x)
    assert torch.equal(fit.eraser.left, known.left)


@pytest.mark.parametrize("name", FITTERS)
def test_no_samples(name: str) -> None:
    fit = FITTERS[name]()
    fit.update(torch.zeros(0, FEATURES), torch.zeros(0, dtype=torch.long))
    assert fit.count == 0
    with pytest.raises(ValueError, match="call update first"):
        _ = fit.eraser


@pytest.mark.parametrize("name", WITH_LABELS)
def test_samples_of_one_class(name: str) -> None:
    x, labels = plain()
    fit = fitted(name, (x, torch.ones_like(labels)))
    with pytest.raises(ValueError, match="two classes or more, got 120 of one class only"):
        _ = fit.eraser
    fit.update(x[:1], labels[:1])
    assert fit.eraser.rank >= 1


@pytest.mark.parametrize("name", WITH_LABELS)
def test_bad_samples(name: str) -> None:
    x, labels = plain()
    fit = FITTERS[name]()
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch.int64"):
        fit.update(labels, labels)
    with pytest.raises(TypeError, match="x must be a floating-point tensor, got list"):
        fit.update([1.0], labels)
    with pytest.raises(ValueError, match=r"samples of d features, got \(7,\)"):
        fit.update(x[0], labels[0])
    with pytest.raises(TypeError, match="z must be a tensor, got list"):
        fit.update(x, labels.tolist())
    with pytest.raises(TypeError, match=r"whole numbers, got torch.float32"):
        fit.update(x, labels.float())
    with pytest.raises(ValueError, match=r"one label for each sample, \(120,\), got \(119,\)"):
        fit.update(x, labels[:-1])
    with pytest.raises(ValueError, match="from 0 to 2, got 0 to 3"):
        fit.update(x, torch.where(labels == 1, 3, labels))
    with pytest.raises(ValueError, match="from 0 to 2, got -1 to 2"):
        fit.update(x, torch.where(labels == 1, -1, labels))
    assert fit.count == 0


def test_bad_numbers() -> None:
    x, labels = plain()
    fit = LEACE()
    with pytest.raises(TypeError, match=r"got torch.int64: for labels say how many classes"):
        fit.update(x, labels)
    with pytest.raises(TypeError, match="complex"):
        fit.update(x, labels.to(torch.complex64))
    with pytest.raises(ValueError, match=r"z must be \(120,\) or have one more dimension, got \(119, 2\)"):
        fit.update(x, normal(119, 2))
    with pytest.raises(ValueError, match="finite samples"):
        fit.update(x, torch.full((120,), torch.inf))
    with pytest.raises(ValueError, match="on one device, got cpu and meta"):
        fit.update(x, torch.empty(120, device="meta"))
    fit.update(x[:0], torch.zeros(0, 2))
    fit.update(x, normal(120, 2))
    with pytest.raises(ValueError, match="z of 2, got 7 and 1"):
        fit.update(x, normal(120))


def test_bad_fits() -> None:
    with pytest.raises(TypeError, match="classes must be a whole number or None, got float"):
        LEACE(2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="classes must be 2 or more, got 1"):
        DifferenceOfMeans(1)
    with pytest.raises(TypeError, match="expected another LEACE, got INLP"):
        LEACE(2).merge(INLP(1, 2))
    with pytest.raises(ValueError, match="classes=2, got classes=3"):
        LEACE(2).merge(LEACE(3))
    x, labels = plain()
    one, other = fitted("LEACE", (x, labels)), fitted("LEACE", (x[:, 1:], labels))
    with pytest.raises(ValueError, match="7 features and z of 3, got 6 and 3"):
        one.merge(other)
    with pytest.raises(TypeError, match="expected PrincipalDirections, got LEACE"):
        PrincipalDirections(1).merge(one)
