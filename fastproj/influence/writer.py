"""Writing scores so that a run killed at any moment goes on at the row where it was."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastproj.influence.durable import Lock, durable_file
from fastproj.influence.manifest import Manifest
from fastproj.influence.parts import LOCK_NAME, MANIFEST_NAME, own_files
from fastproj.influence.rows import RowWriter
from fastproj.influence.scores import PARQUET_OPTIONS, from_table, require_names, to_table

if TYPE_CHECKING:
    import pyarrow

MANIFEST_KEY = b"fastproj"
ROWS_PER_GROUP = 1 << 16


class ScoreWriter:
    """Writes scores (N, M) to one Parquet file at ``path``, row by row in the order of the data.

    Until :meth:`finish` the rows are parts of ``rows_per_part`` in the folder ``<path>.parts``; then ``path``
    appears whole, with the manifest in its metadata, and the folder goes. The bytes of ``path`` are the same
    whatever ``rows_per_part`` and however often the writing was killed and begun again.

    ``manifest`` says what the scores come from, ``names`` (M) are those of the references. Where ``path`` is
    finished already, every row is held and nothing is written.

    Raises ValueError where ``path`` or its parts were made from something else, naming each field that
    differs with both values, or are damaged; BlockingIOError where another process writes ``path``; OSError
    where the folder cannot be made.
    """

    def __init__(
        self, path: str | Path, manifest: Manifest, names: Sequence[str], rows_per_part: int = 256
    ) -> None:
        self.path = Path(path)
        self._parts = self.path.with_name(f"{self.path.name}.parts")
        require_names(names)
        self._manifest = replace(manifest.without_progress(), content="scores", names=tuple(names))
        self._finished: int | None = None
        self._lock = Lock(self._parts / LOCK_NAME)
        try:
            self._finished = _finished_rows(self.path, self._manifest)
            if self._finished is None:
                codec = TableCodec(self._manifest.names)
                self._rows = RowWriter(
                    self._parts, self._manifest, codec, width=len(names), rows_per_part=rows_per_part
                )
        except BaseException:
            self._lock.release()
            raise
        if self._finished is not None:
            self._remove_parts()

    @property
    def done(self) -> int:
        """The number of rows on disk before the first that is not: where to go on."""
        return self._rows.done if self._finished is None else self._finished

    def holds(self, start: int, stop: int) -> bool:
        """Whether rows ``start`` … ``stop`` − 1 are all on disk, so that nobody need compute them."""
        return self._rows.holds(start, stop) if self._finished is None else stop <= self._finished

    def append(self, ids: Sequence[str], values: Tensor, *, start: int | None = None) -> None:
        """Take rows ``start`` and following, by default those after the last taken (at first ``done``).

        ``values`` (n, M) of any float dtype and device, kept in fp32. Rows that are on disk already are
        passed over. Raises ValueError where shapes do not fit or a row before ``start`` is missing, OSError
        where the disk does not take them: what is sealed stays, what is not is to be appended again.
        """
        if self._finished is None:
            self._rows.append(ids, values, start=start)
        elif (self._finished if start is None else start) + len(ids) > self._finished:
            raise ValueError(f"{self.path} is finished with {self._finished} rows, got one more")

    def finish(self, rows: int | None = None) -> None:
        """Join the parts to ``path`` and remove them.

        Raises ValueError where rows are missing, where there are not ``rows`` where that is given, or where a
        part is damaged (DamagedPartError, naming it); OSError where the disk does not take ``path``. The
        parts stay then.
        """
        if self._finished is not None:
            if rows not in (None, self._finished):
                raise ValueError(f"expected {rows} rows, {self.path} has {self._finished}")
            return
        self._rows.finish(rows)
        self._join()
        self._finished = self._rows.done
        self._remove_parts()

    def _join(self) -> None:
        import pyarrow.parquet as pq

        folder, names = self._rows.folder, self._manifest.names
        schema = to_table([], torch.empty(0, len(names)), names).schema
        schema = schema.with_metadata({MANIFEST_KEY: self._manifest.to_json().encode()})
        with (
            folder.explaining(str(self.path)),
            durable_file(self.path, folder=self._parts) as file,
            pq.ParquetWriter(file, schema, **PARQUET_OPTIONS) as writer,
        ):
            for group in _row_groups(to_table(*folder.read(part), names) for part in folder.manifest.parts):
                writer.write_table(group)

    def _remove_parts(self) -> None:
        for path in [*own_files(self._parts), self._parts / MANIFEST_NAME]:
            path.unlink(missing_ok=True)
        self._lock.remove()
        with suppress(OSError):  # another process may lock it again, or the user keep something there
            self._parts.rmdir()

    def close(self) -> None:
        """Let another process write; rows not sealed are dropped."""
        self._lock.release()

    def __enter__(self) -> ScoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Seal what was taken where the block ended by an exception, and let another process write."""
        try:
            if self._finished is None and not isinstance(error, OSError):
                self._rows.seal()
        finally:
            self.close()


class TableCodec:
    """Scores as the bytes of a Parquet file."""

    suffix = ".parquet"

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)

    def encode(self, ids: Sequence[str], values: Tensor, start: int) -> bytes:
        import pyarrow.parquet as pq

        file = io.BytesIO()
        pq.write_table(to_table(ids, values, self._names), file, **PARQUET_OPTIONS)
        return file.getvalue()

    def decode(self, content: bytes) -> tuple[list[str], Tensor]:
        import pyarrow.parquet as pq

        scores = from_table(pq.read_table(io.BytesIO(content)), "a part")
        return list(scores.ids), scores.values


def _row_groups(tables: Iterable[pyarrow.Table]) -> Iterator[pyarrow.Table]:
    """The same rows in tables of ``ROWS_PER_GROUP``, the last one shorter; memory is that of one."""
    import pyarrow

    waiting: list[pyarrow.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(map(len, waiting)) >= ROWS_PER_GROUP:
            joined = pyarrow.concat_tables(waiting)
            yield joined.slice(0, ROWS_PER_GROUP).combine_chunks()
            waiting = [joined.slice(ROWS_PER_GROUP)]
    if sum(map(len, waiting)):
        yield pyarrow.concat_tables(waiting).combine_chunks()


def _finished_rows(path: Path, manifest: Manifest) -> int | None:
    """How many rows ``path`` has, None where it is not there. Raises ValueError unless its origin is ours."""
    import pyarrow
    import pyarrow.parquet as pq

    if not path.exists():
        return None
    try:
        metadata = pq.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is no whole Parquet file: {error}. Remove it to write scores here"
        ) from error
    origin = (metadata.metadata or {}).get(MANIFEST_KEY)
    if origin is None:
        raise ValueError(
            f"{path} is there and does not say what it was made from; remove it to write scores here"
        )
    Manifest.from_json(origin.decode(), str(path)).require_origin(manifest, str(path))
    return int(metadata.num_rows)
