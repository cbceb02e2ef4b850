"""What a loader yields: how many samples, their ids, and whether it is the same each time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from fastproj.influence.fingerprint import rows_fingerprint

ID = "id"
Batch = Mapping[str, Any]


def batch_size(batch: Batch) -> int:
    """The number of samples: the first axis of the first tensor.

    Raises TypeError where the batch is no mapping, ValueError where it has no tensor.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"expected a loader of batches that map names to tensors, it gave a {type(batch).__name__}"
        )
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    raise ValueError(f"expected a batch with a tensor of samples, got the keys {sorted(batch)}")


def batch_ids(batch: Batch, start: int, stop: int) -> list[str]:
    """The ids of rows ``start`` … ``stop`` − 1 as strings, by default their numbers.

    Raises ValueError where there is not one for each sample.
    """
    ids = batch.get(ID, range(start, stop))
    found = [str(one) for one in (ids.tolist() if isinstance(ids, Tensor) else ids)]
    if len(found) != stop - start:
        raise ValueError(f"expected {stop - start} ids, one for each sample, got {len(found)}")
    return found


def first_and_last(batch: Batch) -> dict[str, Any]:
    """The first and the last sample: of tensors and lists that have an entry for each, those two."""
    samples = batch_size(batch)
    chosen = sorted({0, samples - 1})
    two: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == samples:
            two[key] = value[chosen]
        elif isinstance(value, list) and len(value) == samples:
            two[key] = [value[row] for row in chosen]
        else:
            two[key] = value
    return two


class SameBatches:
    """The batches of a loader that is gone through more than once, held to be the same each time.

    Raises TypeError for an iterator, which can be gone through once only; iterating raises ValueError where
    a batch is not what it was the first time, and TypeError for a batch that has no fingerprint.
    """

    def __init__(self, loader: Iterable[Batch]) -> None:
        if isinstance(loader, Iterator):
            raise TypeError(
                "expected a loader that can be gone through several times, such as a list or a DataLoader, "
                f"got an iterator, {type(loader).__name__}"
            )
        self._loader = loader
        self._first: list[str] | None = None

    def fingerprint(self) -> str:
        """A digest of all batches in order; goes through the loader where that has not been done."""
        for _ in self if self._first is None else ():
            pass
        return rows_fingerprint(self._first or ())

    def __iter__(self) -> Iterator[Batch]:
        digests: list[str] = []
        for batch in self._loader:
            digests.append(rows_fingerprint([batch]))
            if self._first is not None and digests[-1:] != self._first[len(digests) - 1 : len(digests)]:
                raise ValueError(f"batch {len(digests) - 1} of the loader {_OTHERWISE}")
            yield batch
        if self._first is not None and len(digests) != len(self._first):
            raise ValueError(f"the end of the loader, after {len(digests)} batches, {_OTHERWISE}")
        self._first = digests


_OTHERWISE = "is not what it was the first time: the loader must not shuffle or change its samples"
