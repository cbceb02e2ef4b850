"""Small quadratic programmes over the non-negative orthant, batched and without a host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

# Bounds the solution where several are optimal: of these the one of least norm, to this precision.
RIDGE = 1e-12
ITERATIONS = 25
MOST_TRIED = 3  # unknowns, of which all active sets are tried at once
_CONVERGED = 1e-26  # products x·z below this are left alone: the next Newton matrix would overflow
_STEP = 0.995  # of the way to the boundary


def nonnegative_qp(matrix: Tensor, linear: Tensor) -> Tensor:
    """``argmin_x ½ xᵀHx + qᵀx`` over ``x ≥ 0``.

    matrix is H, (..., K, K), positive semidefinite with a diagonal of order 1 and q in its range; linear is
    q, (..., K), which broadcasts against it; both fp64. The result is (..., K): where several x are optimal,
    the one of least norm (``H + 1e-12 I`` is solved for).

    Up to three unknowns: the equations are solved on every active set, and the one of least residual is it.
    More: Mehrotra's predictor-corrector interior point method with a fixed number of iterations, then one
    solution of the equations on the active set that it has found, kept where its residual is the smaller.
    Accuracy: the residual ``max |min(x, Hx + q)|`` is some roundings of ``max |q|``.
    """
    size = linear.shape[-1]
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    matrix = matrix + RIDGE * identity
    largest = linear.abs().amax(-1, keepdim=True)
    q = linear / torch.where(largest > 0, largest, 1.0)
    if size <= MOST_TRIED:
        return _best_of_all(matrix, q, identity) * largest
    x = torch.ones_like(q + matrix[..., 0])
    z = torch.ones_like(x)
    for _ in range(ITERATIONS):
        x, z = _iterate(matrix, q, x, z, identity)
    return _polished(matrix, q, x, z, identity) * largest


def residual(matrix: Tensor, linear: Tensor, x: Tensor) -> Tensor:
    """``max_i |min(x_i, (Hx + q)_i)|``, (...): 0 at the solution and nowhere else."""
    return torch.minimum(x, _times(matrix, x) + linear).abs().amax(-1)


def _iterate(matrix: Tensor, q: Tensor, x: Tensor, z: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    """One step towards ``Hx + q = z``, ``x z = 0``, ``x, z ≥ 0``."""
    gradient = _times(matrix, x) + q
    gap = (x * z).mean(-1, keepdim=True)
    # With D = √(x/z) the Newton matrix is I + DHD, whose eigenvalues are 1 and more.
    scale = (x / z).sqrt()
    factor = torch.linalg.cholesky_ex(
        identity + scale[..., :, None] * matrix * scale[..., None, :], check_errors=False
    ).L

    def direction(target: Tensor | float) -> tuple[Tensor, Tensor]:
        right = scale * (target / x - gradient)
        dx = scale * torch.cholesky_solve(right[..., None], factor)[..., 0]
        return dx, (target - x * z - z * dx) / x

    dx, dz = direction(0.0)
    length = _longest_step(x, dx, z, dz)
    affine = ((x + length * dx) * (z + length * dz)).mean(-1, keepdim=True)
    dx, dz = direction(gap * (affine / gap) ** 3 - dx * dz)
    length = _STEP * _longest_step(x, dx, z, dz)
    length = torch.where(gap > _CONVERGED, length, 0.0)
    return torch.addcmul(x, length, dx), torch.addcmul(z, length, dz)


def _longest_step(x: Tensor, dx: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    """How far one can go, up to 1, before an entry of x or z is 0."""
    shrinking = torch.maximum((-dx / x).amax(-1, keepdim=True), (-dz / z).amax(-1, keepdim=True))
    return 1 / shrinking.clamp_min(1.0)


def _polished(matrix: Tensor, q: Tensor, x: Tensor, z: Tensor, identity: Tensor) -> Tensor:
    """x on the active set that it shows, or the solution there, whichever is better."""
    active = (x > z).to(x.dtype)
    x = x * active
    exact = _on_active_set(matrix, q, active, identity)
    better = residual(matrix, q, exact) <= residual(matrix, q, x)
    return torch.where(better[..., None], exact, x)


def _best_of_all(matrix: Tensor, q: Tensor, identity: Tensor) -> Tensor:
    """The solution by trying the 2^K active sets."""
    size = q.shape[-1]
    sets = torch.arange(2**size, device=q.device)[:, None] >> torch.arange(size, device=q.device) & 1
    matrix, q = matrix[..., None, :, :], q[..., None, :]
    x = _on_active_set(matrix, q, sets.to(q.dtype), identity)
    best = residual(matrix, q, x).argmin(-1, keepdim=True)
    return x.gather(-2, best[..., None].expand(*best.shape, size))[..., 0, :]


def _on_active_set(matrix: Tensor, q: Tensor, active: Tensor, identity: Tensor) -> Tensor:
    """``H_AA x_A = −q_A``, at least 0, and 0 outside A, whose members are 1 in ``active``."""
    restricted = active[..., :, None] * matrix * active[..., None, :] + (1 - active)[..., None, :] * identity
    factor = torch.linalg.cholesky_ex(restricted, check_errors=False).L
    return torch.cholesky_solve(-(active * q)[..., None], factor)[..., 0].clamp_min(0)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
