"""Scores of samples against references, in memory and as one Parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fastproj.influence.durable import durable_file

if TYPE_CHECKING:
    import pyarrow

Aggregate = Literal["mean", "max"]
ID_COLUMN, SCORE_PREFIX = "id", "score:"


@dataclass(frozen=True)
class Scores:
    """``values[i, j]`` is the influence of sample i on reference j.

    ``ids`` (N) and ``values`` (N, M), fp32 on the CPU, follow the order of the data; ``names`` (M) are those
    of the references, at least one, all different. Raises ValueError or TypeError where they do not fit.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    values: Tensor

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float32 or self.values.device.type != "cpu":
            raise TypeError(
                f"expected values in float32 on the CPU, got {self.values.dtype} on {self.values.device}"
            )
        if tuple(self.values.shape) != (len(self.ids), len(self.names)):
            raise ValueError(
                f"expected values of shape {(len(self.ids), len(self.names))} for {len(self.ids)} ids and "
                f"{len(self.names)} names, got {tuple(self.values.shape)}"
            )
        require_names(self.names)

    def __len__(self) -> int:
        return len(self.ids)

    def aggregate(self, how: Aggregate = "mean") -> Tensor:
        """One score per sample, (N,) fp32: the mean over references, taken in fp64, or the maximum.

        Raises ValueError for another ``how``.
        """
        if how not in ("mean", "max"):
            raise ValueError(f"expected aggregate 'mean' or 'max', got {how!r}")
        return self.values.double().mean(1).float() if how == "mean" else self.values.amax(1)

    def save(self, path: str | Path) -> None:
        """Write Parquet whole or not at all: a string column ``id``, a float32 column per reference.

        The column of a reference is named ``score:<name>``. Raises OSError where the writing fails.
        """
        import pyarrow.parquet as pq

        with durable_file(Path(path)) as file:
            pq.write_table(to_table(self.ids, self.values, self.names), file, **PARQUET_OPTIONS)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what :meth:`save` or a ScoreWriter wrote; other columns are left alone.

        Raises FileNotFoundError where there is no such file, ValueError where it is damaged or holds no
        scores.
        """
        import pyarrow
        import pyarrow.parquet as pq

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is no file; expected scores in Parquet")
        try:
            table = pq.read_table(path, page_checksum_verification=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no whole Parquet file, or is damaged: {error}") from error
        return from_table(table, str(path))


# A checksum on every page makes damage show on reading; ids and scores repeat too little for dictionaries.
PARQUET_OPTIONS = {"use_dictionary": False, "write_page_checksum": True}


def require_names(names: Sequence[str]) -> None:
    """Raises ValueError unless there is a reference and all their names differ."""
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expected different names of one reference or more, got {list(names)}")


def to_table(ids: Sequence[str], values: Tensor, names: Sequence[str]) -> pyarrow.Table:
    """An Arrow table of ids (N) and values (N, M): ``id``, then ``score:<name>`` per reference."""
    import pyarrow

    columns = [pyarrow.array(ids, pyarrow.string())]
    columns += [pyarrow.array(column.contiguous().numpy(), pyarrow.float32()) for column in values.unbind(1)]
    return pyarrow.table(columns, names=column_names(names))


def column_names(names: Sequence[str]) -> list[str]:
    """The columns of a table of scores for references of these names."""
    return [ID_COLUMN, *(SCORE_PREFIX + name for name in names)]


def from_table(table: pyarrow.Table, source: str) -> Scores:
    """The scores of a table. Raises ValueError, naming ``source``, where columns are missing or null."""
    names = [name[len(SCORE_PREFIX) :] for name in table.column_names if name.startswith(SCORE_PREFIX)]
    wanted = column_names(names)
    if ID_COLUMN not in table.column_names or not names:
        raise ValueError(
            f"expected a column {ID_COLUMN!r} and columns '{SCORE_PREFIX}<name>' in {source}, "
            f"got {table.column_names}"
        )
    empty = [name for name in wanted if table.column(name).null_count]
    if empty:
        raise ValueError(f"expected a value in every row of {source}, got nulls in {empty}")
    columns = [torch.tensor(table.column(name).to_numpy(), dtype=torch.float32) for name in wanted[1:]]
    ids = tuple(str(id) for id in table.column(ID_COLUMN).to_pylist())
    return Scores(ids, tuple(names), torch.stack(columns, 1))
