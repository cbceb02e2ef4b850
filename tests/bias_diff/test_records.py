"""Records: what is read from each kind of file, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastproj.bias_diff.records import Records, read_records


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_cells_are_taken_as_they_are_written(tmp_path: Path) -> None:
    text = 'id,text,label,other\n007,NA,1,x\n8,"a, ""b""\nc",,y\n9,1.50,01,\n'
    found = read_records(written(tmp_path, "rows.csv", text))
    assert found == Records(("007", "8", "9"), ("NA", 'a, "b"\nc', "1.50"), ("1", None, "01"))


def test_tsv_jsonl_and_parquet(tmp_path: Path) -> None:
    tabbed = read_records(written(tmp_path, "rows.tsv", "id\ttext\na\tone, two\n"))
    assert tabbed == Records(("a",), ("one, two",))
    lines = '{"text": "über", "id": 3, "label": 1}\n{"text": "b", "id": 4, "label": null}\n'
    expected = Records(("3", "4"), ("über", "b"), (1, None))
    assert read_records(written(tmp_path, "rows.jsonl", lines)) == expected
    table = pa.table({"id": [3, 4], "text": ["über", "b"], "label": [1.0, None]})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert read_records(tmp_path / "rows.parquet") == expected


def test_json_strings_that_look_like_dates_stay_as_they_are(tmp_path: Path) -> None:
    first = '{"id": "2024-01-31", "text": "2024-02-01"}'
    second = '{"id": "2024-02-29 10:00:00", "text": "b"}'
    expected = Records(("2024-01-31", "2024-02-29 10:00:00"), ("2024-02-01", "b"))
    for name, text in (("rows.jsonl", f"{first}\n\n{second}\n"), ("rows.json", f"[{first},\n {second}]")):
        assert read_records(written(tmp_path, name, text)) == expected
    alone = written(tmp_path, "alone.jsonl", f"{first}\n")
    assert read_records(alone) == Records(("2024-01-31",), ("2024-02-01",))


def test_long_cells_are_read_and_other_encodings_refused_by_name(tmp_path: Path) -> None:
    text = "word " * 40_000
    assert read_records(written(tmp_path, "rows.csv", f"text\n{text}\n")).texts == (text,)
    for name, content in (("latin.csv", "text\n\xe9\n"), ("latin.jsonl", '{"text": "\xe9"}\n')):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=rf"{name}: .*'utf-8' codec"):
            read_records(tmp_path / name)


def test_ids_are_row_numbers_where_there_are_none(tmp_path: Path) -> None:
    found = read_records(written(tmp_path, "rows.csv", "text\nb\na\n"))
    assert found == Records(("0", "1"), ("b", "a"))


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", "id,name,body,bias,label\n0,n,hello,1,2\n")
    found = read_records(path, text_column="body", id_column="name", label_column="bias")
    assert found == Records(("n",), ("hello",), ("1",))


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("rows.jsonl", "", {}, "the file is empty"),
        ("rows.csv", "id,text\n", {}, "the file has no rows"),
        ("rows.jsonl", "{nope\n", {}, "cannot be read as json"),
        ("rows.parquet", "nope", {}, "cannot be read as parquet"),
        ("rows.csv", "id,body\n1,a\n", {}, "expected a column 'text', got 'body', 'id'"),
        ("rows.jsonl", '{"body": "a"}\n', {}, "expected a column 'text', got 'body'"),
        ("rows.csv", "text\na\n", {"id_column": "id"}, "expected a column 'id', got 'text'"),
        ("rows.csv", "text\na\n", {"label_column": "bias"}, "expected a column 'bias'"),
        ("rows.csv", "id,text\n1,a\n2,b\n1,c\n", {}, "expected every id once, got these more often: '1'"),
        ("rows.csv", "id,text\n1,a\n,b\n", {}, "expected an id in every row, got none in 1"),
        ("rows.csv", "id,text\n1,a\n2,\n", {}, "expected a text in every row, got none in 1"),
        ("rows.jsonl", '{"text": "a"}\n{"text": null}\n', {}, "expected a text in every row, got none in 1"),
        ("rows.csv", "id,text\n1,hello, you\n", {}, "line 2: expected 2 cells, as in the header, got 3"),
        ("rows.txt", "a", {}, "expected a file that ends in .jsonl"),
        ("rows.jsonl", '{"text": ["a"]}\n', {}, "expected strings in column 'text', got list in 0"),
        ("rows.jsonl", '{"text": 3}\n', {}, "expected strings in column 'text', got int in 0"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, text: str, options: dict[str, Any], message: str
) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_records(path, **options)
    assert str(path) in str(caught.value)


def test_a_table_without_rows_and_a_missing_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="the file has no rows"):
        read_records(tmp_path / "rows.parquet")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_records(tmp_path / "other.csv")


def test_parts_of_records() -> None:
    records = Records(("a", "b", "c"), ("x", "y", "z"), (1, 0, None))
    assert records.take([2, 0]) == Records(("c", "a"), ("z", "x"), (None, 1))
    assert records.only({"c", "a"}) == records.take([0, 2])
    assert records.without(["b"]) == records.take([0, 2])
    assert len(records.without(records.ids)) == 0
    with pytest.raises(ValueError, match="expected ids of these records, got 'd'"):
        records.without(["d"])


@pytest.mark.parametrize("labels", [(1, 0, 1), ("1", "0", "1"), (1.0, 0.0, 1.0)])
def test_labels_are_compared_as_they_are_written(labels: tuple[Any, ...]) -> None:
    records = Records(("a", "b", "c"), ("x", "y", "z"), labels)
    assert records.ids_labelled(1) == records.ids_labelled("1") == {"a", "c"}
    with pytest.raises(ValueError, match="no record has label 2"):
        records.ids_labelled(2)
    with pytest.raises(ValueError, match="no labels"):
        Records(("a",), ("x",)).ids_labelled(1)


def test_records_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="as many ids as texts"):
        Records(("a",), ("x", "y"))
    with pytest.raises(ValueError, match="every id once"):
        Records(("a", "a"), ("x", "y"))
