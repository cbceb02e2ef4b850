"""Segments: the shards, or the rows of shards, over which norms and dot products are taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

Segments = str | Sequence[int]
GRANULARITIES = ("global", "tensor", "row")


@dataclass(frozen=True)
class Segmentation:
    """Which segment each shard belongs to.

    ``first[i]`` is the segment of shard i; where ``rows`` is set, it is the segment of the shard's first
    row and the following rows take the following segments. ``count`` is the number of segments S.
    """

    first: tuple[int, ...]
    rows: bool
    count: int


def row_shape(shard: Tensor) -> tuple[int, int]:
    """(number of rows, elements in a row): the first dimension against the rest; a vector is one row."""
    if shard.dim() < 2:
        return (1, shard.numel()) if shard.numel() else (0, 0)
    rows = shard.shape[0]
    return rows, (shard.numel() // rows if rows else 0)


def segmentation(shards: Sequence[Tensor | None], segments: Segments) -> Segmentation:
    """Resolve ``segments`` for one gradient set.

    ``"global"`` is one segment over everything (S = 1), ``"tensor"`` one per shard (S = n, a missing
    shard keeps its place), ``"row"`` one per row (S = all rows), and a sequence gives one id per shard,
    where the ids must cover 0 … S−1.

    Raises ValueError for an unknown name, a wrong number of ids, negative or missing ids; TypeError for
    ids that are not integers.
    """
    n = len(shards)
    if isinstance(segments, str):
        if segments == "global":
            return Segmentation((0,) * n, False, 1)
        if segments == "tensor":
            return Segmentation(tuple(range(n)), False, n)
        if segments == "row":
            first, count = [], 0
            for shard in shards:
                first.append(count)
                count += 0 if shard is None else row_shape(shard)[0]
            return Segmentation(tuple(first), True, count)
        raise ValueError(f"segments must be one of {GRANULARITIES} or a sequence of ids, got {segments!r}")
    return _from_ids(segments, n)


def _from_ids(ids: Sequence[int], n: int) -> Segmentation:
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    for position, segment in enumerate(ids):
        if isinstance(segment, bool) or not hasattr(segment, "__index__"):
            raise TypeError(
                f"segment ids must be integers, got {type(segment).__name__} at position {position}"
            )
    if len(ids) != n:
        raise ValueError(f"segments must have one id per shard: expected {n} ids, got {len(ids)}")
    count = max(ids, default=-1) + 1
    unused = count - len(set(ids)) if min(ids, default=0) >= 0 else None
    if unused is None or unused:
        raise ValueError(
            f"segment ids must be non-negative and cover 0 … S−1 without gaps, got {sorted(set(ids))[:8]}"
        )
    return Segmentation(tuple(map(int, ids)), False, count)


def segment_views(shard: Tensor, first: int, rows: bool) -> Iterator[tuple[int, Tensor]]:
    """The pieces of one shard that lie in one segment each, as (segment, flat tensor)."""
    if not rows:
        yield first, shard.reshape(-1)
        return
    count, _ = row_shape(shard)
    for index, row in enumerate(shard.reshape(count, -1) if count else ()):
        yield first + index, row


def per_element(values: Tensor, shard: Tensor, first: int, rows: bool) -> Tensor:
    """``values[s]`` of the segment of each element, in a shape that broadcasts against the shard."""
    if not rows:
        return values[first]
    count, _ = row_shape(shard)
    return values[first : first + count].reshape([count, *[1] * (shard.dim() - 1)][: shard.dim()])
