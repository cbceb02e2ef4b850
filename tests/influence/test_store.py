"""The store of sketches: begun again, refused, damaged, and read without loading it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stored_rows import DIMENSION, SCORES, SKETCHES, contents, flip, ids_of, values_of, written_store
from torch import Tensor

from fastproj.influence import durable
from fastproj.influence.parts import DamagedPartError
from fastproj.influence.shard import Shard
from fastproj.influence.store import SketchStore, SketchWriter

ROWS = 50
IDS, VALUES = ids_of(ROWS), values_of(ROWS, DIMENSION)


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip what only a power cut would show."""
    monkeypatch.setattr(durable.os, "fsync", lambda _: None)


def cosines(sketches: Tensor, queries: Tensor) -> Tensor:
    """By the definition, row by row in fp64; 0 where a norm is 0."""
    out = torch.zeros(len(sketches), len(queries), dtype=torch.float64)
    for i, sketch in enumerate(sketches.double()):
        for j, query in enumerate(queries.double()):
            norms = sketch.norm() * query.norm()
            out[i, j] = (sketch / sketch.norm() * (query / query.norm())).sum() if norms > 0 else 0
    return out.float()


# Writing and reading


@pytest.mark.usefixtures("unsynced")
@given(rows=st.integers(0, 30), share=st.integers(1, 12), data=st.data())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: int, share: int, data: st.DataObject
) -> None:
    store = written_store(tmp_path_factory.mktemp("store"), rows, share)
    want = values_of(rows, DIMENSION)
    assert (len(store), store.dimension, store.ids()) == (rows, DIMENSION, tuple(ids_of(rows)))
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    assert torch.equal(store.rows(start, stop), want[start:stop])
    chunks = list(store.chunks(data.draw(st.integers(1, 9))))
    assert [id for ids, _ in chunks for id in ids] == ids_of(rows)
    assert torch.equal(torch.cat([torch.empty(0, DIMENSION), *(values for _, values in chunks)]), want)
    store.verify()


def test_odd_ids_and_values_survive(tmp_path: Path) -> None:
    ids = ["", "a\n\0b", "", "żółw " * 50]
    values = torch.tensor([[torch.nan, torch.inf, -0.0, 0.0, 1e30, 1e-30, 1e-45, -1.0]]).repeat(4, 1)
    strided = torch.stack([values, values], -1)[..., 1].double()
    for part in (2, 4):
        with SketchWriter(tmp_path / str(part), SKETCHES, part) as writer:
            writer.append(ids, strided)
            store = writer.finish()
        assert store.ids() == tuple(ids)
        assert torch.equal(store.rows(0, 4).view(torch.int32), values.view(torch.int32))
    empty = replace(SKETCHES, dimension=1)
    with SketchWriter(tmp_path / "empty ids", empty) as writer:
        writer.append(["", ""], torch.ones(2, 1))
        assert writer.finish().ids() == ("", "")


@pytest.mark.usefixtures("unsynced")
@given(stops=st.lists(st.integers(0, ROWS), max_size=3), batch=st.integers(1, 40))
def test_the_bytes_do_not_tell_how_often_it_was_begun(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], batch: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    for stop in [*stops, ROWS]:
        with SketchWriter(folder / "b", SKETCHES, 16) as writer:
            for start in range(writer.done, stop, batch):
                rows = slice(start, min(start + batch, stop))
                writer.append(IDS[rows], VALUES[rows])
            if stop == ROWS:
                writer.finish(ROWS)
    written_store(folder / "a")
    assert contents(folder / "a") == contents(folder / "b")


def test_nothing_unfinished_or_foreign_is_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no store of sketches"):
        SketchStore(tmp_path)
    with SketchWriter(tmp_path / "s", SKETCHES, 16) as writer:
        writer.append(IDS[:20], VALUES[:20])
    with pytest.raises(ValueError, match="is not finished: it has 20 rows; go on with a SketchWriter"):
        SketchStore(tmp_path / "s")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "manifest.json").write_text(SCORES.to_json())
    with pytest.raises(ValueError, match=r"expected sketches in .*, got scores"):
        SketchStore(tmp_path / "t")


@pytest.mark.parametrize(
    ("field", "new"),
    [("model", "m1"), ("adapter", "a1"), ("data", "d1"), ("seed", 4), ("kind", "srht"), ("dimension", 16)],
)
def test_sketches_of_another_origin_are_refused_and_kept(tmp_path: Path, field: str, new: Any) -> None:
    written_store(tmp_path / "s")
    before = contents(tmp_path / "s")
    old = getattr(SKETCHES, field)
    with pytest.raises(
        ValueError, match=f"something else: {field} is {old!r} there and {new!r} here. Remove"
    ):
        SketchWriter(tmp_path / "s", replace(SKETCHES, **{field: new}))
    assert contents(tmp_path / "s") == before


def test_a_second_writer_is_kept_out(tmp_path: Path) -> None:
    with SketchWriter(tmp_path / "s", SKETCHES), pytest.raises(BlockingIOError, match="another process"):
        SketchWriter(tmp_path / "s", SKETCHES)
    with pytest.raises(ValueError, match="a dimension from 1 up, got None"):
        SketchWriter(tmp_path / "s", SCORES)


def test_rows_out_of_range_are_refused(tmp_path: Path) -> None:
    store = written_store(tmp_path / "s")
    for start, stop in ((-1, 3), (4, 3), (0, ROWS + 1)):
        with pytest.raises(IndexError, match=f"within 0 to {ROWS}, got {start} to {stop}"):
            store.rows(start, stop)
    with pytest.raises(ValueError, match="at least one row, got 0"):
        next(store.chunks(0))


# Damage


def part(folder: Path, number: int) -> Path:
    return sorted(folder.glob("rows-*"))[number]


def swap(path: Path) -> None:
    """Put the rows of the shard after in place of this one's."""
    path.write_bytes(part(path.parent, 2).read_bytes())


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, r"it has \d+ bytes, \d+ were written"),
        (Path.unlink, "the file is missing"),
        (overwrite_header, "it cannot be read"),
        (swap, "16 rows do not match their checksums, the first 16"),
    ],
)
def test_a_damaged_shard_is_named_and_mended_alone(
    tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "s"
    written_store(folder)
    before = contents(folder)
    damaged = part(folder, 1)
    harm(damaged)
    with pytest.raises(DamagedPartError, match=f"{damaged.name} is damaged: {message}.*Delete it.*run again"):
        SketchStore(folder).scores(VALUES[:1])
    damaged.unlink(missing_ok=True)
    made = []
    with SketchWriter(folder, SKETCHES) as writer:
        for start in range(writer.done, ROWS, 8):
            rows = slice(start, min(start + 8, ROWS))
            if not writer.holds(rows.start, rows.stop):
                made.append(rows.start)
                writer.append(IDS[rows], VALUES[rows], start=start)
        writer.finish(ROWS)
    assert made == [16, 24]
    assert contents(folder) == before


def test_a_flipped_bit_anywhere_in_a_shard_shows(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    store = written_store(folder)
    path = part(folder, 1)
    size = path.stat().st_size
    read_of = lambda: (store.ids(), store.rows(0, ROWS))  # noqa: E731
    for offset in range(0, size, 37):
        flip(path, offset)
        with pytest.raises(DamagedPartError, match=path.name):
            store.verify()
        header = offset < size - 16 * (4 * DIMENSION + 8 + 8)  # its padding may change and mean the same
        if not header:
            with pytest.raises(DamagedPartError, match=path.name):
                read_of()
        flip(path, offset)
    assert torch.equal(read_of()[1], VALUES)


def test_only_what_is_read_is_checked(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    store = written_store(folder)
    flip(part(folder, 3), -1)
    assert torch.equal(store.rows(0, 48), VALUES[:48])
    with pytest.raises(DamagedPartError, match="rows-0000000048"):
        store.verify()


def test_a_shard_that_is_gone_from_the_end_is_missed(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    written_store(folder)
    part(folder, -1).unlink()
    with SketchWriter(folder, SKETCHES) as writer:
        assert writer.done == 48
        with pytest.raises(ValueError, match=r"expected 50 rows in .*, missing: 48 to 49"):
            writer.finish()


# Scores


@pytest.mark.parametrize("chunk", [1, 3, 16, None])
def test_scores_are_cosines_and_dots(tmp_path: Path, chunk: int | None) -> None:
    sketches = VALUES.clone()
    sketches[3] = 0
    sketches[4] *= 1e-30
    sketches[5] *= 1e30
    with SketchWriter(tmp_path / "s", SKETCHES, 16) as writer:
        writer.append(IDS, sketches)
        store = writer.finish()
    queries = torch.cat([values_of(3, DIMENSION, seed=1), torch.zeros(1, DIMENSION)])
    scores = store.scores(queries, names=list("abcd"), rows_per_chunk=chunk)
    assert (scores.ids, scores.names) == (tuple(IDS), ("a", "b", "c", "d"))
    # Taken in fp64 and rounded once to fp32, whose spacing below 1 is at most 6e-8.
    torch.testing.assert_close(scores.values, cosines(sketches, queries), rtol=1.2e-7, atol=1e-9)
    dots = store.scores(queries, normalize=False, rows_per_chunk=chunk)
    assert dots.names == ("0", "1", "2", "3")
    want = (sketches.double() @ queries.double().T).float()
    torch.testing.assert_close(dots.values, want, rtol=1.2e-7, atol=0)


def test_queries_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    store = written_store(tmp_path / "s")
    for queries in (torch.ones(DIMENSION), torch.ones(2, DIMENSION + 1)):
        with pytest.raises(ValueError, match=r"expected queries \(M, 8\)"):
            store.scores(queries)
    with pytest.raises(ValueError, match="a name per query, got 1 for 2"):
        store.scores(torch.ones(2, DIMENSION), names=["a"])
    with pytest.raises(ValueError, match="one reference or more"):
        store.scores(torch.ones(0, DIMENSION))


def anonymous_kilobytes() -> int:
    """Memory of this process that is no mapped file."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


def test_scoring_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, dimension, chunk = 2048, 8192, 32
    store_kilobytes, chunk_kilobytes = rows * dimension * 4 // 1024, chunk * dimension * 4 // 1024
    with SketchWriter(tmp_path / "s", replace(SKETCHES, dimension=dimension), 512) as writer:
        for start in range(0, rows, 256):
            writer.append(ids_of(256), torch.full((256, dimension), float(start)))
        store = writer.finish()
    read, memory, rows_of = [], [], Shard.rows

    def counted(self: Shard, start: int, stop: int) -> tuple[list[str], Tensor]:
        read.append(stop - start)
        memory.append(anonymous_kilobytes())
        return rows_of(self, start, stop)

    monkeypatch.setattr(Shard, "rows", counted)
    store.scores(torch.ones(2, dimension), rows_per_chunk=chunk)
    assert sum(read) == rows
    assert max(read) == chunk
    # A chunk in fp32 and twice in fp64, with as much again for the allocator, of a store of 64 chunks.
    assert max(memory) - memory[0] <= 10 * chunk_kilobytes < store_kilobytes / 6
