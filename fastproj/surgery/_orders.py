"""The orders in which tasks visit each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Orders = Sequence[Sequence[int]]


def check_orders(orders: Orders, size: int) -> None:
    """Raise ValueError unless every task visits each other task once."""
    wanted = [sorted(set(range(size)) - {i}) for i in range(size)]
    if [sorted(own) for own in orders] != wanted:
        raise ValueError(
            f"order must list, for each of {size} tasks, the {size - 1} others once, got {orders!r}"
        )


def visits(orders: Orders, like: Tensor) -> Tensor:
    """``E[t,i,j]`` = 1 where task i meets task j at its t-th visit, (K−1, K, K), in the dtype of ``like``."""
    # Not waiting for the copy is safe from memory that is not pinned: it is staged first.
    met = torch.tensor(orders, dtype=torch.int64).mT.to(like.device, non_blocking=True)
    return (met[..., None] == torch.arange(len(orders), device=like.device)).to(like.dtype)


def shuffled_all(size: int, generator: torch.Generator | None) -> Orders:
    """For each task a permutation of all tasks, itself then left out."""
    return [[j for j in _permutation(size, generator) if j != i] for i in range(size)]


def shuffled_others(size: int, generator: torch.Generator | None) -> Orders:
    """For each task a permutation of the other tasks."""
    others = [[j for j in range(size) if j != i] for i in range(size)]
    return [[own[j] for j in _permutation(size - 1, generator)] for own in others]


def _permutation(size: int, generator: torch.Generator | None) -> list[int]:
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            f"generator must be on the CPU, where orders are drawn without waiting for a device, "
            f"got one on {generator.device}"
        )
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order
