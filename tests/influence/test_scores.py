"""Scores in memory and as Parquet."""

from __future__ import annotations

import errno
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastproj.influence import durable
from fastproj.influence.scores import Scores


def scores_of(values: Tensor) -> Scores:
    rows, references = values.shape
    return Scores(tuple(map(str, range(rows))), tuple(f"r{j}" for j in range(references)), values)


@given(rows=st.integers(0, 40), references=st.integers(1, 4), strided=st.booleans())
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, rows: int, references: int, strided: bool
) -> None:
    values = torch.randn(references, rows).T if strided else torch.randn(rows, references)
    if rows > 3:
        values[:4, 0] = torch.tensor([float("nan"), float("inf"), 1e30, 1e-30])
    saved = Scores(tuple(f"é {i}\n" for i in range(rows)), tuple(f"r:{j}" for j in range(references)), values)
    path = tmp_path_factory.mktemp("scores") / "deeper" / "scores.parquet"
    saved.save(path)
    loaded = Scores.load(path)
    assert (loaded.ids, loaded.names, len(loaded)) == (saved.ids, saved.names, rows)
    assert loaded.values.dtype == torch.float32
    assert torch.equal(loaded.values.view(torch.int32), values.contiguous().view(torch.int32))


def test_the_columns_are_those_promised(tmp_path: Path) -> None:
    scores_of(torch.ones(2, 2)).save(tmp_path / "s.parquet")
    schema = pq.read_schema(tmp_path / "s.parquet")
    assert schema.names == ["id", "score:r0", "score:r1"]
    assert [str(kind) for kind in schema.types] == ["string", "float", "float"]


def test_aggregates() -> None:
    scores = scores_of(torch.tensor([[1.0, 3.0], [-2.0, -4.0], [3e38, 3e38]]))
    # The last row's sum passes fp32's largest number; its mean does not.
    assert torch.equal(scores.aggregate("mean"), torch.tensor([2.0, -3.0, 3e38]))
    assert torch.equal(scores.aggregate("max"), torch.tensor([3.0, -2.0, 3e38]))
    with pytest.raises(ValueError, match="'mean' or 'max', got 'sum'"):
        scores.aggregate("sum")  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 1\) for 1 ids and 1 names, got \(2, 1\)"):
        Scores(("a",), ("r",), torch.ones(2, 1))
    with pytest.raises(TypeError, match=r"float32 on the CPU, got torch.float64"):
        Scores(("a",), ("r",), torch.ones(1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"different names.*got \['r', 'r'\]"):
        Scores(("a",), ("r", "r"), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"one reference or more, got \[\]"):
        Scores(("a",), (), torch.ones(1, 0))


def test_files_without_scores_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    with pytest.raises(FileNotFoundError, match=r"s\.parquet is no file"):
        Scores.load(path)
    pq.write_table(pyarrow.table({"id": ["a"], "text": ["b"]}), path)
    with pytest.raises(ValueError, match=r"columns 'score:<name>' in .*got \['id', 'text'\]"):
        Scores.load(path)
    pq.write_table(pyarrow.table({"id": ["a", None], "score:r": [1.0, 2.0]}), path)
    with pytest.raises(ValueError, match=r"nulls in \['id'\]"):
        Scores.load(path)


def test_other_columns_and_numbers_as_ids_are_read(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["b", "c"], "score:r": [0.5, 2.0], "id": [7, 8]})
    pq.write_table(table, tmp_path / "s.parquet")
    loaded = Scores.load(tmp_path / "s.parquet")
    assert (loaded.ids, loaded.names) == (("7", "8"), ("r",))
    assert loaded.values.tolist() == [[0.5], [2.0]]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    scores_of(torch.randn(5000, 1)).save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20000] + bytes([whole[20000] ^ 1]) + whole[20001:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"s\.parquet is no whole Parquet file, or is damaged"):
            Scores.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.parquet"
    scores_of(torch.ones(3, 1)).save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        scores_of(torch.zeros(3, 1)).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
