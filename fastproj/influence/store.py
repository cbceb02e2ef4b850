"""Sketches of per-sample gradients on disk: sharded, memory-mapped, checked row by row as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from fastproj.influence.durable import Lock
from fastproj.influence.manifest import Manifest
from fastproj.influence.parts import (
    LOCK_NAME,
    checked_content,
    missing_rows,
    read_manifest,
    require_size,
)
from fastproj.influence.rows import RowWriter
from fastproj.influence.scores import Scores, require_names
from fastproj.influence.shard import Shard, ShardCodec

CHUNK_BYTES = 1 << 26


class SketchWriter:
    """Writes sketches (N, k) to the folder ``path``, row by row in the order of the data.

    Each ``rows_per_part`` rows are a safetensors file of sketches (n, k) fp32, ids and a checksum per row.
    ``manifest`` says what they come from; its ``dimension`` is k. The bytes of the folder are the same
    however often the writing was killed and begun again.

    Raises ValueError where the folder was made from something else, naming each field that differs with both
    values, DamagedPartError where a shard has another size than was written, BlockingIOError where another
    process writes the folder, OSError where it cannot be made.
    """

    def __init__(self, path: str | Path, manifest: Manifest, rows_per_part: int = 256) -> None:
        if manifest.dimension is None or manifest.dimension < 1:
            raise ValueError(f"expected a manifest with a dimension from 1 up, got {manifest.dimension}")
        self.path = Path(path)
        origin = replace(manifest.without_progress(), content="sketches")
        self._lock = Lock(self.path / LOCK_NAME)
        try:
            self._rows = RowWriter(
                self.path, origin, ShardCodec(), width=manifest.dimension, rows_per_part=rows_per_part
            )
        except BaseException:
            self._lock.release()
            raise

    @property
    def done(self) -> int:
        """The number of rows on disk before the first that is not: where to go on."""
        return self._rows.done

    def holds(self, start: int, stop: int) -> bool:
        """Whether rows ``start`` … ``stop`` − 1 are all on disk, so that nobody need compute them."""
        return self._rows.holds(start, stop)

    def append(self, ids: Sequence[str], sketches: Tensor, *, start: int | None = None) -> None:
        """Take rows ``start`` and following, by default those after the last taken (at first ``done``).

        ``sketches`` (n, k) of any float dtype and device, kept in fp32. Rows that are on disk already are
        passed over. Raises ValueError where shapes do not fit or a row before ``start`` is missing, OSError
        where the disk does not take them: what is sealed stays, what is not is to be appended again.
        """
        self._rows.append(ids, sketches, start=start)

    def finish(self, rows: int | None = None) -> SketchStore:
        """Seal what is left and open the store.

        Raises ValueError where rows are missing, or where there are not ``rows`` where that is given.
        """
        self._rows.finish(rows)
        self.close()
        return SketchStore(self.path)

    def close(self) -> None:
        """Let another process write; rows not sealed are dropped."""
        self._lock.release()

    def __enter__(self) -> SketchWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Seal what was taken where the block ended before :meth:`finish`, and let another process write."""
        try:
            if not isinstance(error, OSError):
                self._rows.seal()
        finally:
            self.close()


class SketchStore:
    """The finished sketches in the folder ``path``: N rows of dimension k, read as they are asked for.

    Every row that is read is checked against its checksum. Raises FileNotFoundError where there is no store,
    ValueError where it is not finished or rows are missing, DamagedPartError where a shard is missing or has
    another size than was written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if manifest is None:
            raise FileNotFoundError(f"{path} holds no store of sketches")
        if manifest.content != "sketches" or manifest.dimension is None:
            raise ValueError(f"expected sketches in {path}, got {manifest.content}")
        for part in manifest.parts:
            require_size(self.path, part)
        missing = missing_rows(manifest)
        if manifest.rows is None or missing:
            have = sum(part.stop - part.start for part in manifest.parts)
            raise ValueError(f"{path} is not finished: it has {have} rows; go on with a SketchWriter")
        self.manifest = manifest
        self.dimension = manifest.dimension
        self._length = manifest.rows

    def __len__(self) -> int:
        return self._length

    def ids(self) -> tuple[str, ...]:
        """The ids of all rows (N)."""
        return tuple(id for part in self.manifest.parts for id in Shard(self.path, part).ids)

    def rows(self, start: int, stop: int) -> Tensor:
        """Sketches of rows ``start`` … ``stop`` − 1, (stop − start, k) fp32; only these are read.

        Raises IndexError where there are no such rows, DamagedPartError where one is not what was written.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"expected rows within 0 to {len(self)}, got {start} to {stop}")
        pieces = [torch.empty(0, self.dimension)]
        for part in self.manifest.parts:
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                pieces.append(Shard(self.path, part).rows(first, last)[1])
        return torch.cat(pieces)

    def chunks(self, rows: int | None = None) -> Iterator[tuple[list[str], Tensor]]:
        """Ids and sketches (n, k) fp32 of all rows in order, at most ``rows`` (by default 64 MiB) at a time.

        Raises as :meth:`rows`, and ValueError for ``rows`` below 1.
        """
        if rows is None:
            rows = max(1, CHUNK_BYTES // (4 * self.dimension))
        if rows < 1:
            raise ValueError(f"expected chunks of at least one row, got {rows}")
        for part in self.manifest.parts:
            shard = Shard(self.path, part)
            for first in range(part.start, part.stop, rows):
                yield shard.rows(first, min(first + rows, part.stop))

    def scores(
        self,
        queries: Tensor,
        *,
        names: Sequence[str] | None = None,
        normalize: bool = True,
        rows_per_chunk: int | None = None,
    ) -> Scores:
        """``<s_i, q_j>``, divided by ``|s_i| |q_j|`` if ``normalize`` (0 where a norm is 0), for every row.

        ``queries`` (M, k), sketches of the same seed, kind and dimension; taken in fp64, kept in fp32
        (N, M). ``names`` (M) are those of the queries, by default ``"0"``, ``"1"``, …. Memory is that of a
        chunk and of the result, whatever the size of the store.

        Raises ValueError where shapes do not fit, and as :meth:`chunks`.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise ValueError(f"expected queries (M, {self.dimension}), got {tuple(queries.shape)}")
        names = [str(number) for number in range(len(queries))] if names is None else names
        require_names(names)
        if len(names) != len(queries):
            raise ValueError(f"expected a name per query, got {len(names)} for {len(queries)}")
        exact = _directions(queries.detach().cpu().double(), normalize)
        values = torch.empty(len(self), len(queries))
        ids: list[str] = []
        for chunk_ids, sketches in self.chunks(rows_per_chunk):
            rows = slice(len(ids), len(ids) + len(chunk_ids))
            values[rows] = (_directions(sketches.double(), normalize) @ exact.T).float()
            ids += chunk_ids
        return Scores(tuple(ids), tuple(names), values)

    def verify(self) -> None:
        """Read everything. Raises DamagedPartError for the first shard that is not what was written."""
        for part in self.manifest.parts:
            checked_content(self.path, part)


def _directions(vectors: Tensor, normalize: bool) -> Tensor:
    """Rows divided by their norms if ``normalize``; a row of norm 0 stays 0."""
    if not normalize:
        return vectors
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / norms.masked_fill(norms == 0, 1)
