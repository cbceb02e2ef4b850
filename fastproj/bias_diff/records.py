"""Texts with ids and, where known, labels: read from JSONL, CSV or Parquet."""

from __future__ import annotations

import csv
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
ID_COLUMN, TEXT_COLUMN, LABEL_COLUMN = "id", "text", "label"
LONGEST_CELL = 2**31 - 1  # characters; csv's own limit is too short for a document
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Records:
    """N texts with an id each, and labels (None for one that is not known) or no labels at all.

    Raises ValueError where the lengths differ, an id occurs twice, or a text is blank.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    labels: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        lengths = [len(self.ids), len(self.texts)]
        lengths += [] if self.labels is None else [len(self.labels)]
        if len(set(lengths)) > 1:
            raise ValueError(f"expected as many ids as texts and labels, got {lengths}")
        _check_unique(self.ids)
        blank = [number for number, text in enumerate(self.texts) if not text.strip()]
        if blank:
            raise ValueError(f"expected a text in every row, got none in {_listed(blank)} (counted from 0)")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Iterable[int]) -> Records:
        """The records of ``rows``, in their order."""
        chosen = list(rows)
        return Records(
            tuple(self.ids[row] for row in chosen),
            tuple(self.texts[row] for row in chosen),
            None if self.labels is None else tuple(self.labels[row] for row in chosen),
        )

    def only(self, ids: Collection[str]) -> Records:
        """The records with these ids, in the order that they have here. ValueError for an unknown id."""
        wanted = self._known(ids)
        return self.take(row for row, name in enumerate(self.ids) if name in wanted)

    def without(self, ids: Collection[str]) -> Records:
        """The records without these ids. ValueError for an unknown id."""
        unwanted = self._known(ids)
        return self.take(row for row, name in enumerate(self.ids) if name not in unwanted)

    def ids_labelled(self, value: Any) -> frozenset[str]:
        """Ids of the records whose label is written like ``value``: 1, "1" and 1.0 are one label.

        Raises ValueError where there are no labels, or none such.
        """
        if self.labels is None:
            raise ValueError("these records have no labels")
        wanted = str(_plain(value))
        found = frozenset(
            name for name, label in zip(self.ids, self.labels, strict=True) if str(_plain(label)) == wanted
        )
        if not found:
            seen = sorted({str(label) for label in self.labels})
            raise ValueError(f"no record has label {value!r}; there are {_listed(seen)}")
        return found

    def _known(self, ids: Collection[str]) -> frozenset[str]:
        unknown = sorted(set(ids) - set(self.ids))
        if unknown:
            raise ValueError(f"expected ids of these records, got {_listed(unknown)}")
        return frozenset(ids)


def read_records(
    path: Path,
    *,
    text_column: str = TEXT_COLUMN,
    id_column: str | None = None,
    label_column: str | None = None,
) -> Records:
    """Records of a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, in its order.

    Without ``id_column``, column ``id`` where there is one, otherwise row numbers from 0; without
    ``label_column``, column ``label`` where there is one, otherwise no labels. Cells of CSV files are taken
    as they are written: ids and labels are strings, an empty label is None. So are strings of JSON files
    that look like dates.

    Raises FileNotFoundError where there is no file; ValueError for an unknown ending, a file without rows or
    that cannot be parsed, a missing column, a missing or repeated id, a text that is blank or no string.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(FORMATS)}")
    columns = _read_columns(path, kind, [text_column, id_column, label_column])
    try:
        return _records(columns, text_column, id_column, label_column)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _records(
    columns: dict[str, list[Any]], text_column: str, id_column: str | None, label_column: str | None
) -> Records:
    number = len(columns[text_column])
    texts = ["" if text is None else text for text in columns[text_column]]
    other = [row for row, text in enumerate(texts) if not isinstance(text, str)]
    if other:
        kind = type(texts[other[0]]).__name__
        raise ValueError(
            f"expected strings in column {text_column!r}, got {kind} in {_listed(other)} (counted from 0)"
        )
    return Records(
        _ids(columns.get(id_column or ID_COLUMN), number),
        tuple(texts),
        _labels(columns.get(label_column or LABEL_COLUMN)),
    )


def _ids(cells: list[Any] | None, number: int) -> tuple[str, ...]:
    if cells is None:
        return tuple(str(row) for row in range(number))
    missing = [row for row, cell in enumerate(cells) if cell is None or not str(cell).strip()]
    if missing:
        raise ValueError(f"expected an id in every row, got none in {_listed(missing)} (counted from 0)")
    return tuple(str(_plain(cell)) for cell in cells)


def _labels(cells: list[Any] | None) -> tuple[Any, ...] | None:
    return None if cells is None else tuple(None if cell == "" else _plain(cell) for cell in cells)


def _plain(value: Any) -> Any:
    """Whole floats as integers: a column of integers with a gap is read as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read_columns(path: Path, kind: str, named: Sequence[str | None]) -> dict[str, list[Any]]:
    """The columns of a file as lists, those of ``named`` known to be there."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    if kind == "parquet":
        _check_parquet(path)
    options = _csv_options(path, named) if kind == "csv" else {}
    # A cache of its own: one left elsewhere would outlive the file.
    with tempfile.TemporaryDirectory() as cache:
        table = _table(path, kind, cache_dir=cache, keep_in_memory=True, **options)
        _check_columns(path, table.column_names, named)
        wanted = _wanted(table.column_names, named)
        try:
            columns = {name: table[name][:] for name in wanted}
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected text in UTF-8: {error}") from error
        dates = [name for name in wanted if str(table.data.schema.field(name).type).startswith("timestamp")]
    return columns | (_as_written(path, dates) if kind == "json" and dates else {})


def _as_written(path: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of a JSON file whose strings were read as dates; an id "2024-01-31" is to stay one."""
    text, rows, at = path.read_text(encoding="utf-8-sig").strip(), [], 0
    while at < len(text):
        row, end = json.JSONDecoder().raw_decode(text, at)
        rows += row if isinstance(row, list) else [row]
        space = _SPACE.match(text, end)
        at = space.end() if space else end
    return {name: [row.get(name) if isinstance(row, dict) else row for row in rows] for name in names}


def _table(path: Path, kind: str, **options: Any) -> Any:
    """The file as ``datasets.Dataset``."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        return load_dataset(kind, data_files=str(path), split="train", **options)
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as {kind}: {error.__cause__ or error}") from error
    finally:
        if shown:
            enable_progress_bar()


def _csv_options(path: Path, named: Sequence[str | None]) -> dict[str, Any]:
    """Only the wanted columns, every cell as it is written: an id "007" stays one, a text "NA" is a text."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        header, rows = _header_and_rows(path, separator)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as csv: {error}") from error
    finally:
        csv.field_size_limit(limit)
    _check_columns(path, header, named)
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    wanted = _wanted(header, named)
    return {
        "sep": separator,
        "usecols": wanted,
        "converters": dict.fromkeys(wanted, str),
        "na_filter": False,
    }


def _header_and_rows(path: Path, separator: str) -> tuple[list[str], int]:
    """The header and the number of rows that are not blank. ValueError for a row of another length."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator)
        header, rows = next(reader, []), 0
        for row in reader:
            rows += any(cell.strip() for cell in row)
            # A text with a comma but no quotes would be cut at it.
            if row and len(row) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: expected {len(header)} cells, as in the header, "
                    f"got {len(row)}"
                )
    return header, rows


def _check_parquet(path: Path) -> None:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_metadata

    try:
        rows = read_metadata(path).num_rows
    except ArrowInvalid as error:
        raise ValueError(f"{path}: cannot be read as parquet: {error}") from error
    if not rows:
        raise ValueError(f"{path}: the file has no rows")


def _wanted(present: Sequence[str], named: Sequence[str | None]) -> list[str]:
    return [name for name in present if name in {*named, ID_COLUMN, LABEL_COLUMN}]


def _check_columns(path: Path, present: Sequence[str], named: Sequence[str | None]) -> None:
    missing = [name for name in named if name is not None and name not in present]
    if missing:
        raise ValueError(f"{path}: expected a column {missing[0]!r}, got {_listed(sorted(present))}")


def _check_unique(ids: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ValueError(f"expected every id once, got these more often: {_listed(repeated)}")


def _listed(things: Sequence[Any]) -> str:
    shown = ", ".join(repr(thing) for thing in things[:5])
    return shown + (f" and {len(things) - 5} more" if len(things) > 5 else "")
