"""A measurement as a file: what was timed, on what machine, after which tests, and all it found."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from fastproj.files import write_atomically

KIND = "fastproj bench"
SCHEMA = 2


@dataclass(frozen=True)
class Row:
    """One timed call. Times in seconds, sizes in bytes, energy in joules.

    ``part`` names the layer of the workload, "" for all of it. ``seconds``, ``low`` and ``high`` are median
    and quartiles over ``rounds`` rounds; ``route`` and ``cache`` say how it was timed (see ``clock.Timing``).
    ``bytes_moved`` is what the launches read from memory and write to it by the traffic model,
    ``bytes_least`` each input and output once. ``of_copy`` is bytes_moved / seconds over the measured copy
    bandwidth, ``of_floor`` the roofline floor over seconds. What is None has its reason in ``missing``.
    """

    suite: str
    workload: str
    part: str
    device: str
    dtype: str
    seconds: float
    low: float
    high: float
    rounds: int
    copies: int
    cache: str
    route: str
    route_reason: str
    host_seconds: float | None
    launches: int
    bytes_moved: int
    bytes_least: int
    flops: int
    gigabytes_per_second: float
    of_copy: float
    floor_seconds: float | None
    bound: str | None
    of_floor: float | None
    energy_joules: float | None
    energy_source: str
    telemetry: dict[str, Any]
    missing: dict[str, str]

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows the same measurement."""
        return self.suite, self.workload, self.part, self.device, self.dtype

    @property
    def name(self) -> str:
        """The key in words."""
        return ", ".join(filter(None, self.key))


@dataclass(frozen=True)
class Record:
    """A whole measurement; ``machine``, ``gate``, ``options`` and ``copy`` are plain JSON objects.

    ``skipped`` names the calls that were not timed, and why.
    """

    date: str
    command: str
    options: dict[str, Any]
    machine: dict[str, Any]
    gate: dict[str, Any]
    copy: dict[str, Any]
    rows: tuple[Row, ...]
    skipped: dict[str, str]


def write_record(record: Record, path: Path) -> None:
    """Write the record as JSON; the file appears whole or not at all."""
    document = {"kind": KIND, "schema": SCHEMA, **asdict(record)}
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(path, text)


def read_record(path: Path) -> Record:
    """Read a record back.

    Raises ValueError that names the file and what is wrong with it: not JSON, not a record, another schema, a
    field that is missing, unknown, of another type or not finite, times that are not positive or not in the
    order of quartiles, two rows of one measurement.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise ValueError(f"{path}: expected a file that `{KIND} --output` wrote")
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {document.get('schema')!r}: measure again")
    body = {name: value for name, value in document.items() if name not in ("kind", "schema")}
    rows = body.get("rows")
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, got {type(rows).__name__}")
    body["rows"] = tuple(_checked_row(row, f"{path}: row {index}") for index, row in enumerate(rows))
    record = _checked(Record, body, str(path))
    keys = [row.key for row in record.rows]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{path}: holds two rows of one suite, workload, part, device and dtype")
    return record


def _checked_row(values: Any, where: str) -> Row:
    """A row whose times can be divided by and compared."""
    row: Row = _checked(Row, values, where)
    if not 0 < row.low <= row.seconds <= row.high:
        raise ValueError(
            f"{where}: expected 0 < low <= seconds <= high, got {row.low}, {row.seconds} and {row.high}"
        )
    return row


def _checked(kind: type[Any], values: Any, where: str) -> Any:
    """An instance of a dataclass out of a JSON object, field by field."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object, got {type(values).__name__}")
    names = {field.name for field in fields(kind)}
    if names != set(values):
        absent, unknown = sorted(names - set(values)), sorted(set(values) - names)
        raise ValueError(f"{where}: missing fields {absent}, unknown fields {unknown}")
    hints = get_type_hints(kind)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"{where}: {name} must be {hints[name]}, got {value!r}")
    return kind(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of the type; whole numbers serve as floats, truth values as no numbers."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    kind = get_origin(hint) or hint
    if kind in (int, float):
        allowed = (int, float) if kind is float else int
        return isinstance(value, allowed) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)
