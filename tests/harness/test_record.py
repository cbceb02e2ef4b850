"""Records are read back as they were written, and nothing else is read as one."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from bench_records import record, row

from fastproj.bench.harness.record import SCHEMA, read_record, write_record


def test_a_record_comes_back_as_it_went(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    written = record(row(), row(part="q_proj A, 8 × 2048 tokens", floor_seconds=None))
    write_record(written, path)
    assert read_record(path) == written
    assert os.listdir(path.parent) == ["record.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644  # others may read it


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_record(record(row()), path)

    def refuse(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_record(record(row(), row(part="other")), path)
    monkeypatch.undo()
    assert len(read_record(path).rows) == 1
    assert os.listdir(tmp_path) == ["record.json"]


def test_what_json_cannot_say_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_record(record(row(seconds=float("nan"))), tmp_path / "record.json")
    assert os.listdir(tmp_path) == []


def changed(tmp_path: Path, change: dict[str, Any], where: str = "record") -> Path:
    """A written record with fields changed at the top or in its row; None takes a field out."""
    path = tmp_path / "record.json"
    write_record(record(row()), path)
    document = json.loads(path.read_text(encoding="utf-8"))
    target = document if where == "record" else document["rows"][0]
    for name, value in change.items():
        if value is None:
            del target[name]
        else:
            target[name] = value
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        ({"kind": "another"}, "record", "expected a file that"),
        ({"schema": SCHEMA + 1}, "record", f"expected schema {SCHEMA}, got {SCHEMA + 1}"),
        ({"schema": None}, "record", "got None"),
        ({"rows": {}}, "record", "list of rows, got dict"),
        ({"rows": [3]}, "record", "row 0: expected an object, got int"),
        ({"machine": None}, "record", r"missing fields \['machine'\]"),
        ({"machine": "mine"}, "record", "machine must be"),
        ({"surplus": 1}, "record", r"unknown fields \['surplus'\]"),
        ({"seconds": None}, "row", r"row 0: missing fields \['seconds'\]"),
        ({"seconds": "1"}, "row", "row 0: seconds must be"),
        ({"seconds": float("inf")}, "row", "row 0: seconds must be"),
        ({"seconds": True}, "row", "row 0: seconds must be"),
        ({"rounds": 1.5}, "row", "row 0: rounds must be"),
        ({"floor_seconds": "low"}, "row", "row 0: floor_seconds must be"),
        ({"cache": 1}, "row", "row 0: cache must be"),
        ({"seconds": 0}, "row", "row 0: expected 0 < low <= seconds <= high"),
        ({"seconds": 0, "low": 0, "high": 0}, "row", "expected 0 < low <= seconds <= high, got 0, 0 and 0"),
        ({"low": 2}, "row", "row 0: expected 0 < low <= seconds <= high"),
        ({"high": 1e-9}, "row", "row 0: expected 0 < low <= seconds <= high"),
        ({"low": -1.0}, "row", "row 0: expected 0 < low <= seconds <= high"),
    ],
)
def test_a_file_that_is_no_record_is_named_with_what_is_wrong(
    tmp_path: Path, change: dict[str, Any], where: str, message: str
) -> None:
    path = changed(tmp_path, change, where)
    with pytest.raises(ValueError, match=f"record.json.*{message}"):
        read_record(path)


def test_whole_numbers_serve_as_seconds(tmp_path: Path) -> None:
    assert read_record(changed(tmp_path, {"seconds": 1, "high": 2}, "row")).rows[0].seconds == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_what_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"record\.json"):
        read_record(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_record(tmp_path / "absent.json")


def test_two_rows_of_one_measurement_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(record(row(), row(seconds=2e-3)), path)
    with pytest.raises(ValueError, match="two rows"):
        read_record(path)
