"""Principal directions of activations and of differences of activations."""

from __future__ import annotations

import pytest
import torch
from erasure_families import families, normal, plain
from torch import Tensor

from fastproj import PrincipalDirections
from fastproj.reference.erasure import principal_directions as reference

FAMILIES = families()


def fitted(x: Tensor, rank: int, base: Tensor | None = None) -> PrincipalDirections:
    fit = PrincipalDirections(rank)
    fit.update(x, base)
    return fit


@pytest.mark.parametrize("name", ["plain", "1e-15", "1e15", "constant features", "far from 0"])
@pytest.mark.parametrize("rank", [1, 3])
def test_they_are_the_first_singular_vectors(name: str, rank: int) -> None:
    x = FAMILIES[name][0]
    eraser = fitted(x, rank).eraser
    want = reference(x, rank)
    # Squares of singular values that differ by some per cent; far from 0 their rounding is 1e6 times eps.
    atol = 1e-7 if name == "far from 0" else 1e-12
    aligned = want * torch.sign((want * eraser.left).sum(0))
    torch.testing.assert_close(eraser.left, aligned, rtol=0, atol=atol)
    assert eraser.mean is None


def test_variances_and_signs() -> None:
    x = plain()[0]
    fit = fitted(x, 4)
    want = torch.linalg.svdvals(x - x.mean(0))[:4].square() / len(x)
    torch.testing.assert_close(fit.variances, want, rtol=1e-12, atol=0)
    along = torch.var(x @ fit.eraser.left, dim=0, correction=0)
    torch.testing.assert_close(along, want, rtol=1e-12, atol=0)
    largest = fit.eraser.left.gather(0, fit.eraser.left.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())


def test_differences_of_two_models() -> None:
    """What one direction makes all the difference is found in it, in half precision too."""
    base = normal(4, 30, 7).bfloat16()
    direction = torch.tensor([0, 0, 1.0, 0, 0, 0, 0])
    tuned = base.float() + normal(4, 30, 1, seed=3).float() * direction
    eraser = fitted(tuned, 1, base).eraser
    torch.testing.assert_close(eraser.left[:, 0], direction.double(), rtol=0, atol=1e-6)
    assert torch.equal(eraser(base)[..., [0, 1, 3]], base[..., [0, 1, 3]])


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="rank must be a whole number, got str"):
        PrincipalDirections("1")  # type: ignore[arg-type]
    for rank in (0, 65):
        with pytest.raises(ValueError, match=f"from 1 to 64, got {rank}"):
            PrincipalDirections(rank)
    x = plain()[0]
    fit = PrincipalDirections(3)
    with pytest.raises(ValueError, match=r"one shape, got \(120, 7\) and \(119, 7\)"):
        fit.update(x, x[1:])
    with pytest.raises(TypeError, match="floating-point tensor"):
        fit.update(x, x.long())
    fit.update(x[:3])
    with pytest.raises(ValueError, match="vary along 3 directions, got 2"):
        _ = fit.eraser
    with pytest.raises(ValueError, match="vary along 3 directions, got 0"):
        _ = fitted(torch.full((9, 4), 0.1), 3).variances
