"""Rows that come in order, gathered into parts of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastproj.influence.manifest import Manifest
from fastproj.influence.parts import Codec, PartFolder, missing_rows


class RowWriter:
    """Takes rows of an id and ``width`` values (fp32 on disk) in order and seals every ``rows_per_part``.

    Parts begin at multiples of ``rows_per_part`` whoever wrote them and whenever, so that the bytes on disk
    do not tell how often the writing was begun. A folder that has parts keeps its own ``rows_per_part``.

    Killed, it has lost less than ``rows_per_part`` rows. The caller holds the folder's lock. Raises as
    PartFolder does, and ValueError for a ``rows_per_part`` below 1.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, codec: Codec, *, width: int, rows_per_part: int
    ) -> None:
        if rows_per_part < 1:
            raise ValueError(f"expected at least one row per part, got {rows_per_part}")
        self.width = width
        self._pieces: list[tuple[Sequence[str], Tensor]] = []
        self.folder = PartFolder(folder, replace(manifest, rows_per_part=rows_per_part), codec)
        self._start = self._next = self.done

    @property
    def done(self) -> int:
        """The number of rows on disk before the first that is not: where to go on."""
        manifest = self.folder.manifest
        missing = missing_rows(manifest)
        if missing:
            return missing[0][0]
        return manifest.parts[-1].stop if manifest.parts else 0

    def holds(self, start: int, stop: int) -> bool:
        """Whether rows ``start`` … ``stop`` − 1 are all on disk, so that nobody need compute them."""
        row = start
        while row < stop:
            part = self.folder.part_of(row)
            if part is None or part.stop <= row:
                return False
            row = part.stop
        return True

    def append(self, ids: Sequence[str], values: Tensor, *, start: int | None = None) -> None:
        """Take rows ``start`` and following, by default those after the last taken (at first ``done``).

        ``values`` (n, width) of any float dtype and device. Rows that are on disk already are passed over,
        so a run that goes over the data again may hand all of it in, or leave out batches that are held.
        Raises ValueError where shapes do not fit or a row before ``start`` is missing, OSError where the disk
        does not take them.
        """
        rows = self._checked(ids, values)
        first = self._next if start is None else start
        share = self.folder.manifest.rows_per_part
        taken = 0
        while taken < len(ids):
            row = first + taken
            until = min(len(ids), taken + share - row % share)
            if not self.holds(row, first + until):
                self._take(ids[taken:until], rows[taken:until], row)
            taken = until
        self._next = first + len(ids)

    def _checked(self, ids: Sequence[str], values: Tensor) -> Tensor:
        if tuple(values.shape) != (len(ids), self.width) or not values.is_floating_point():
            raise ValueError(
                f"expected float values of shape {(len(ids), self.width)} for {len(ids)} ids, got "
                f"{values.dtype} of shape {tuple(values.shape)}"
            )
        if not all(isinstance(id, str) for id in ids):
            raise TypeError(
                f"expected ids as strings, got {next(id for id in ids if not isinstance(id, str))!r}"
            )
        return values.detach().to("cpu", torch.float32, copy=True)

    def _take(self, ids: Sequence[str], values: Tensor, row: int) -> None:
        """Add rows of one share to those held in memory; seal the share where it is full."""
        share = self.folder.manifest.rows_per_part
        first = row - row % share
        if not self._pieces or self._end == first:
            self.seal()
            self._begin(first)
        if first != self._start or row > self._end:
            raise ValueError(f"expected row {self._end} next, got {row}")
        fresh = self._end - row
        if fresh < len(ids):
            self._pieces.append((ids[fresh:], values[fresh:]))
        if self._end == self._start + share:
            self.seal()

    @property
    def _end(self) -> int:
        """The row after those held in memory."""
        return self._start + sum(len(ids) for ids, _ in self._pieces)

    def _begin(self, start: int) -> None:
        """Start a share with the rows of it that are on disk."""
        part = self.folder.part_of(start)
        self._start = start
        self._pieces = [] if part is None else [self.folder.read(part)]

    def seal(self) -> None:
        """Put what was taken on the disk, also where its part is not full yet."""
        if self._pieces:
            ids = [id for piece, _ in self._pieces for id in piece]
            self.folder.seal(ids, torch.cat([values for _, values in self._pieces]), self._start)
        self._pieces = []

    def finish(self, rows: int | None = None) -> None:
        """Seal what is left and note that all rows are there, ``rows`` in number where it is given.

        Raises ValueError where rows are missing or too many, OSError where the disk does not take them.
        """
        self.seal()
        self.folder.finish(rows)
