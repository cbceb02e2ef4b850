"""Gradient surgery on whole vectors in fp64, step by step as the papers write it.

Every function takes the gradients of one segment as the rows of a matrix (K, n) and returns the combined
gradient, (n,). Projections onto cones and hulls are found by trying every face, so K stays small; nothing
here looks at a Gram matrix. The fast path is ``fastproj.surgery``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

Orders = Sequence[Sequence[int]]
# Rounding that a constraint is held to, in units of its gradient and of the vector.
_SLACK = 1e-9


def pcgrad(gradients: Tensor, order: Orders) -> Tensor:
    """Yu et al. (2020), Algorithm 1: on conflict ``h_i ← h_i − ⟨h_i,g_j⟩/|g_j|² g_j``; the sum of the h."""
    total = torch.zeros_like(gradients[0])
    for own, visits in zip(gradients, order, strict=True):
        h = own.clone()
        for j in visits:
            inner = torch.dot(h, gradients[j])
            if inner < 0:
                h -= inner / torch.dot(gradients[j], gradients[j]) * gradients[j]
        total += h
    return total


def gradvac(gradients: Tensor, targets: Tensor, beta: float, order: Orders) -> tuple[Tensor, Tensor]:
    """Wang et al. (2021), Algorithm 1; also the targets (K, K) after the step."""
    total, targets = torch.zeros_like(gradients[0]), targets.clone()
    for i, visits in enumerate(order):
        h = gradients[i].clone()
        for j in visits:
            length, other = h.norm(), gradients[j].norm()
            phi = torch.dot(h, gradients[j]) / (length * other) if length * other > 0 else torch.zeros(())
            target = targets[i, j].clone()
            if phi < target and other > 0 and target < 1:
                rise = target * (1 - phi**2).clamp_min(0).sqrt() - phi * (1 - target**2).sqrt()
                h += length * rise / (other * (1 - target**2).sqrt()) * gradients[j]
            targets[i, j] = (1 - beta) * target + beta * phi
        total += h
    return total, targets


def dual_cone_projection(vector: Tensor, gradients: Tensor, least: float = 0.0) -> Tensor:
    """The point of ``{d: ⟨d, g_k⟩ ≥ least for all k}`` nearest to ``vector``, by trying every active set.

    Gradients of norm 0 bind nothing. Where ``least`` > 0 and nothing is feasible, ValueError.
    """
    norms = gradients.norm(dim=1)
    if least > 0 and bool((norms == 0).any()):
        raise ValueError("no direction satisfies the constraints")
    units, bounds = gradients[norms > 0] / norms[norms > 0, None], least / norms[norms > 0]
    slack = _SLACK * max(float(vector.norm()), float(bounds.abs().max()) if len(bounds) else 0.0)
    best, shortest = None, float("inf")
    for face in _subsets(len(units)):
        rows = units[list(face)]
        # Nearest point with equality on this face; inconsistent equalities show as infeasible below.
        move = _least_norm(rows, bounds[list(face)] - rows @ vector)
        point, distance = vector + move, float(move.norm())
        if bool((units @ point >= bounds - slack).all()) and distance < shortest:
            best, shortest = point, distance
    if best is None:
        raise ValueError("no direction satisfies the constraints")
    return best


def upgrad(gradients: Tensor, preference: Tensor) -> Tensor:
    """Quinton & Rey (2024): ``Σ_i u_i π(g_i)``, each gradient projected onto the dual cone of all."""
    projected = [dual_cone_projection(own, gradients) for own in gradients]
    return torch.stack([u * d for u, d in zip(preference, projected, strict=True)]).sum(0)


def dual_proj(gradients: Tensor, preference: Tensor) -> Tensor:
    """``π(Σ_i u_i g_i)``: the mean gradient projected onto the dual cone."""
    return dual_cone_projection(preference @ gradients, gradients)


def mgda(gradients: Tensor) -> Tensor:
    """Désidéri (2012): the convex hull's point of least norm, by trying the affine hull of every subset."""
    best, shortest = gradients[0], float("inf")
    for face in _subsets(len(gradients)):
        if not face:
            continue
        corner, rest = gradients[face[0]], gradients[list(face[1:])] - gradients[face[0]]
        scale = rest.norm(dim=1).clamp_min(1e-300)
        along = torch.linalg.lstsq((rest / scale[:, None]).T, -corner[:, None], driver="gelsd").solution[:, 0]
        weights = torch.cat([1 - (along / scale).sum(0, keepdim=True), along / scale])
        point = corner + (along / scale) @ rest
        if bool((weights >= -_SLACK).all()) and float(point.norm()) < shortest:
            best, shortest = point, float(point.norm())
    return best


def cagrad(gradients: Tensor, c: float) -> Tensor:
    """Liu et al. (2021), eq. 1: ``argmax_d min_k ⟨g_k,d⟩`` over ``|d − ḡ| ≤ c|ḡ|``, by bisection.

    The nearest d that reaches a value is a projection; the largest value whose d is in the ball is sought.
    """
    mean = gradients.mean(0)
    radius = c * mean.norm()
    scale = float(gradients.norm(dim=1).max() * mean.norm())
    low, high = float((gradients @ mean).min()), (1 + c) * scale + 1e-300
    best = mean
    for _ in range(250):
        middle = 0.5 * (low + high)
        try:
            d = dual_cone_projection(mean, gradients, middle)
        except ValueError:
            high = middle
            continue
        if (d - mean).norm() <= radius:
            low, best = middle, d
        else:
            high = middle
    return best


def nash_mtl(gradients: Tensor) -> Tensor:
    """Navon et al. (2022), Claim 3.1: ``⟨g_k, d⟩ = 1/α_k`` with ``d = Σ α_k g_k``, one α at a time.

    Each α_k > 0 solves its own quadratic equation, the others held; repeated until nothing moves. Gradients
    must be independent.
    """
    alpha = 1 / gradients.norm(dim=1)
    d = alpha @ gradients
    for _ in range(100_000):
        before = alpha.clone()
        for k, own in enumerate(gradients):
            others = d - alpha[k] * own
            square, inner = torch.dot(own, own), torch.dot(own, others)
            root = (inner**2 + 4 * square).sqrt()
            # The positive root, in the form that does not cancel.
            new = 2 / (inner + root) if inner > 0 else (root - inner) / (2 * square)
            d, alpha[k] = others + new * own, new
        if bool(((alpha - before).abs() <= 1e-15 * alpha).all()):
            break
    return alpha @ gradients


def imtl_g(gradients: Tensor) -> Tensor:
    """Liu et al. (2021), Section 3.1, for independent gradients: ``α_{2…K} = g_1 Uᵀ (D Uᵀ)⁻¹``, ``Σ α = 1``.

    D has rows ``g_1 − g_k`` and U has rows ``ĝ_1 − ĝ_k``.
    """
    units = gradients / gradients.norm(dim=1, keepdim=True)
    differences, turned = gradients[0] - gradients[1:], units[0] - units[1:]
    later = torch.linalg.solve((differences @ turned.T).T, turned @ gradients[0])
    return torch.cat([1 - later.sum(0, keepdim=True), later]) @ gradients


def a_gem(gradients: Tensor) -> Tensor:
    """Chaudhry et al. (2019), eq. 11, with the mean of the later rows as reference."""
    own, reference = gradients[0], gradients[1:].mean(0)
    inner, square = torch.dot(own, reference), torch.dot(reference, reference)
    return own - inner / square * reference if inner < 0 and square > 0 else own.clone()


def gem(gradients: Tensor, margin: float = 0.0) -> Tensor:
    """Lopez-Paz & Ranzato (2017), eq. 11: the nearest point that no memory conflicts with.

    Nearest to ``g + margin Σ_k g_k``: in ``out = g + Σ v_k g_k`` each v is at least the margin.
    """
    own, memories = gradients[0], gradients[1:]
    if not bool((memories @ own < 0).any()):
        return own.clone()
    return dual_cone_projection(own + margin * memories.sum(0), memories)


def i_gem(gradients: Tensor, margin: float, iterations: int) -> Tensor:
    """Projected gradient on GEM's dual, in coefficients of gradients of norm 1, one step after the other."""
    own, memories = gradients[0], gradients[1:]
    if not bool((memories @ own < 0).any()):
        return own.clone()
    norms = memories.norm(dim=1)
    units = memories[norms > 0] / norms[norms > 0, None]
    step = 1 / (units @ units.T).abs().sum(1).max()
    least = margin * norms[norms > 0]
    v = least.clone()
    for _ in range(iterations):
        v = torch.maximum(least, v - step * (units @ (own + v @ units)))
    return own + v @ units


def ogd(gradients: Tensor) -> Tensor:
    """Farajtabar et al. (2020), eq. 6: the first row without its part in the span of the others."""
    norms = gradients[1:].norm(dim=1)
    units = gradients[1:][norms > 0] / norms[norms > 0, None]
    return gradients[0] + _least_norm(units, -(units @ gradients[0]))


def safegrad(gradients: Tensor, alignment: float) -> Tensor:
    """Yi et al. (2025): the task's gradient on the plane orthogonal to alignment's where they conflict."""
    own, aligned = gradients
    return a_gem(torch.stack([own, aligned])) + alignment * aligned


def _subsets(size: int) -> Iterator[tuple[int, ...]]:
    for length in range(size + 1):
        yield from combinations(range(size), length)


def _least_norm(rows: Tensor, values: Tensor) -> Tensor:
    """The shortest x with ``rows x = values``, or nearest to it where there is none."""
    if not len(rows):
        return rows.new_zeros(rows.shape[1])
    return torch.linalg.lstsq(rows, values[:, None], driver="gelsd", rcond=1e-13).solution[:, 0]
