"""Writing scores in parts: begun again, refused, damaged, on a full disk, locked."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stored_rows import NAMES, SCORES, contents, flip, ids_of, values_of

from fastproj.influence import durable, writer
from fastproj.influence.durable import Lock
from fastproj.influence.parts import DamagedPartError
from fastproj.influence.scores import Scores
from fastproj.influence.writer import ScoreWriter

ROWS = 50
IDS, VALUES = ids_of(ROWS), values_of(ROWS, len(NAMES))


def fill(path: Path, stop: int = ROWS, *, batch: int = 7, finish: bool = True) -> None:
    """Go over all rows in batches and hand in what is not held, as a scorer does."""
    with ScoreWriter(path, SCORES, NAMES, rows_per_part=16) as scores:
        for start in range(0, stop, batch):
            rows = slice(start, min(start + batch, stop))
            if not scores.holds(rows.start, rows.stop):
                scores.append(IDS[rows], VALUES[rows], start=start)
        if finish:
            scores.finish(stop)


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip what only a power cut would show."""
    monkeypatch.setattr(durable.os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "s.parquet"
    fill(path)
    return path.read_bytes()


# Whole runs and runs begun again


def test_a_finished_file_holds_every_row_and_nothing_else_is_left(tmp_path: Path) -> None:
    fill(tmp_path / "s.parquet")
    loaded = Scores.load(tmp_path / "s.parquet")
    assert (loaded.ids, loaded.names) == (tuple(IDS), NAMES)
    assert torch.equal(loaded.values, VALUES)
    assert [path.name for path in tmp_path.iterdir()] == ["s.parquet"]


@pytest.mark.usefixtures("unsynced")
@given(stops=st.lists(st.integers(0, ROWS), max_size=4), batches=st.lists(st.integers(1, 40), min_size=5))
def test_the_bytes_do_not_tell_how_often_it_was_begun(
    tmp_path_factory: pytest.TempPathFactory, uninterrupted: bytes, stops: list[int], batches: list[int]
) -> None:
    path = tmp_path_factory.mktemp("scores") / "s.parquet"
    for stop, batch in zip(stops, batches, strict=False):
        fill(path, stop, batch=batch, finish=False)
    fill(path, batch=batches[-1])
    assert path.read_bytes() == uninterrupted


@pytest.mark.parametrize(("share", "group"), [(1, 4), (5, 4), (50, 16), (7, 50)])
def test_the_bytes_do_not_tell_the_size_of_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: int, group: int
) -> None:
    monkeypatch.setattr(writer, "ROWS_PER_GROUP", group)
    fill(tmp_path / "s.parquet")
    with ScoreWriter(tmp_path / "t.parquet", SCORES, NAMES, rows_per_part=share) as scores:
        scores.append(IDS, VALUES.double())
        scores.finish()
    assert (tmp_path / "t.parquet").read_bytes() == (tmp_path / "s.parquet").read_bytes()
    assert torch.equal(Scores.load(tmp_path / "t.parquet").values, VALUES)


def test_it_goes_on_after_the_rows_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    with ScoreWriter(path, SCORES, NAMES, rows_per_part=16) as scores:
        assert scores.done == 0
        scores.append(IDS[:40], VALUES[:40])
        assert scores.done == 32  # two parts; eight rows wait for the third
        scores.close()
        scores._rows._pieces = []  # as if killed
    with ScoreWriter(path, SCORES, NAMES, rows_per_part=99) as scores:
        assert scores.done == 32
        assert (scores.holds(0, 32), scores.holds(31, 33), scores.holds(5, 5)) == (True, False, True)
        scores.append(IDS[32:], VALUES[32:])
        scores.finish(ROWS)
    assert Scores.load(path).ids == tuple(IDS)


def test_an_exception_loses_no_row(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ScoreWriter(tmp_path / "s.parquet", SCORES, NAMES) as scores:
            scores.append(IDS[:11], VALUES[:11])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with ScoreWriter(tmp_path / "s.parquet", SCORES, NAMES) as scores:
        assert scores.done == 11


def test_a_finished_file_is_left_as_it_is(tmp_path: Path, uninterrupted: bytes) -> None:
    path = tmp_path / "s.parquet"
    for _ in range(2):
        fill(path)
        assert path.read_bytes() == uninterrupted
    with ScoreWriter(path, SCORES, NAMES) as scores:
        assert (scores.done, scores.holds(0, ROWS), scores.holds(0, ROWS + 1)) == (ROWS, True, False)
        scores.append(IDS[3:5], VALUES[3:5], start=3)
        with pytest.raises(ValueError, match="is finished with 50 rows"):
            scores.append(["more"], VALUES[:1])
        with pytest.raises(ValueError, match="expected 51 rows"):
            scores.finish(51)
    assert list(tmp_path.iterdir()) == [path]


def test_no_rows_are_scores_too(tmp_path: Path) -> None:
    fill(tmp_path / "s.parquet", 0)
    assert len(Scores.load(tmp_path / "s.parquet")) == 0


# What is refused


@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize("field", ["model", "adapter", "data"])
def test_scores_of_another_origin_are_refused_and_kept(tmp_path: Path, field: str, finish: bool) -> None:
    path = tmp_path / "s.parquet"
    fill(path, finish=finish)
    before = contents(path.parent / "s.parquet.parts") if not finish else path.read_bytes()
    with pytest.raises(
        ValueError, match=f"made from something else: {field} is '{field[0]}0' there and 'new' here"
    ):
        ScoreWriter(path, replace(SCORES, **{field: "new"}), NAMES)
    with pytest.raises(ValueError, match=r"names is \('gender', 'age'\) there and \('age',\) here"):
        ScoreWriter(path, SCORES, ["age"])
    assert (contents(path.parent / "s.parquet.parts") if not finish else path.read_bytes()) == before


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    Scores(("a",), ("r",), torch.ones(1, 1)).save(path)
    with pytest.raises(ValueError, match="does not say what it was made from"):
        ScoreWriter(path, SCORES, NAMES)
    path.write_text("scores")
    with pytest.raises(ValueError, match="is no whole Parquet file"):
        ScoreWriter(path, SCORES, NAMES)
    assert path.read_text() == "scores"


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with ScoreWriter(tmp_path / "s.parquet", SCORES, NAMES, rows_per_part=4) as scores:
        with pytest.raises(
            ValueError, match=r"shape \(2, 2\) for 2 ids, got torch.float32 of shape \(1, 2\)"
        ):
            scores.append(["a", "b"], VALUES[:1])
        with pytest.raises(ValueError, match="expected float values"):
            scores.append(["a"], torch.ones(1, 2, dtype=torch.int64))
        with pytest.raises(TypeError, match="ids as strings, got 3"):
            scores.append([3], VALUES[:1])  # type: ignore[list-item]
        with pytest.raises(ValueError, match="expected row 0 next, got 1"):
            scores.append(["a"], VALUES[:1], start=1)
        scores.append(IDS[:2], VALUES[:2])
        with pytest.raises(ValueError, match="expected row 2 next, got 9"):
            scores.append(["a"], VALUES[:1], start=9)
        with pytest.raises(ValueError, match=r"expected 9 rows in .*, got rows up to 1, missing: 2 to 8"):
            scores.finish(9)
        with pytest.raises(ValueError, match=r"expected 1 rows in .*, got rows up to 1"):
            scores.finish(1)
    with pytest.raises(ValueError, match="at least one row per part, got 0"):
        ScoreWriter(tmp_path / "t.parquet", SCORES, NAMES, rows_per_part=0)
    with pytest.raises(ValueError, match="one reference or more"):
        ScoreWriter(tmp_path / "t.parquet", SCORES, [])


# Damage


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("harm", "message"),
    [(lambda p: flip(p, 60), "its checksum does not match"), (cut, r"it has \d+ bytes, \d+")],
)
def test_a_damaged_part_is_named_and_mended_alone(
    tmp_path: Path, uninterrupted: bytes, harm: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "s.parquet"
    fill(path, finish=False)
    parts = tmp_path / "s.parquet.parts"
    damaged = parts / "rows-0000000016-0000000032.parquet"
    before = contents(parts)
    harm(damaged)
    with pytest.raises(DamagedPartError, match=f"{damaged.name} is damaged: {message}.*Delete it"):
        fill(path)
    damaged.unlink()
    assert {**before, **contents(parts)}.keys() == before.keys()
    with ScoreWriter(path, SCORES, NAMES) as scores:
        assert (scores.done, scores.holds(32, 50), scores.holds(16, 32)) == (16, True, False)
    fill(path)
    assert path.read_bytes() == uninterrupted


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "s.parquet", finish=False)
    manifest = tmp_path / "s.parquet.parts" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"m0"', '"m1"'))
    with pytest.raises(ValueError, match=r"manifest\.json does not match its checksum"):
        fill(tmp_path / "s.parquet")
    manifest.unlink()
    with pytest.raises(ValueError, match="holds parts but no manifest"):
        fill(tmp_path / "s.parquet")


# A full disk


def fail_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> list[int]:
    """Let ``calls`` syncs to the disk succeed and the following fail as on a full disk, until emptied."""
    left = [calls]

    def fsync(_: int) -> None:
        if left:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", fsync)
    return left


@pytest.mark.parametrize("calls", range(22))  # all syncs of a whole run
def test_a_full_disk_at_any_write_keeps_whole_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: bytes, calls: int
) -> None:
    path = tmp_path / "s.parquet"
    left = fail_after(monkeypatch, calls)
    with pytest.raises(OSError, match=r"\(No space left on device\); \d+ rows are whole on disk") as caught:
        fill(path)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.rglob(".*.part")), "something half written is left"
    left.clear()
    fill(path)
    assert path.read_bytes() == uninterrupted


def test_rows_are_taken_again_once_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScoreWriter(tmp_path / "s.parquet", SCORES, NAMES, rows_per_part=16) as scores:
        scores.append(IDS[:20], VALUES[:20])
        left = fail_after(monkeypatch, 0)
        for _ in range(2):
            with pytest.raises(
                OSError, match=r"rows 16 to 31 could not be written .No space.*; 16 rows are whole"
            ):
                scores.append(IDS[20:40], VALUES[20:40])
        left.clear()
        scores.append(IDS[20:40], VALUES[20:40])
        scores.append(IDS[40:], VALUES[40:])
        scores.finish(ROWS)
    assert torch.equal(Scores.load(tmp_path / "s.parquet").values, VALUES)


def test_a_limit_of_the_system_on_files_is_told(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1500, hard)
    )  # a manifest fits, sixteen rows do too, all do not
    try:
        with pytest.raises(OSError, match="could not be written") as caught:
            fill(tmp_path / "s.parquet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    fill(tmp_path / "s.parquet")
    assert torch.equal(Scores.load(tmp_path / "s.parquet").values, VALUES)


# The lock

HOLD = """
import sys
from pathlib import Path
from fastproj.influence.durable import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_kept_out_until_the_first_is_dead(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    command = [sys.executable, "-c", HOLD, str(tmp_path / "s.parquet.parts" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=r"another process is writing here.*s\.parquet\.parts"):
            fill(path)
        holder.kill()
        holder.wait()
    fill(path)


def test_a_second_writer_in_one_process_is_kept_out(tmp_path: Path) -> None:
    with (
        ScoreWriter(tmp_path / "s.parquet", SCORES, NAMES),
        pytest.raises(BlockingIOError, match="another process is writing"),
    ):
        ScoreWriter(tmp_path / "s.parquet", SCORES, NAMES)
    fill(tmp_path / "s.parquet")


def test_a_refused_store_is_not_kept_locked(tmp_path: Path) -> None:
    fill(tmp_path / "s.parquet", finish=False)
    refused: Any = None
    try:
        ScoreWriter(tmp_path / "s.parquet", replace(SCORES, data="new"), NAMES)
    except ValueError as error:
        refused = error  # its traceback keeps what it refers to alive
    fill(tmp_path / "s.parquet")
    assert refused is not None


FORK = """
import os
import sys
from pathlib import Path
from fastproj.influence.durable import Lock
lock = Lock(Path(sys.argv[1]))
if os.fork() == 0:
    print("forked", flush=True)
sys.stdin.read()
"""


def test_a_child_that_outlives_its_parent_keeps_nobody_out(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORK, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "forked\n"
        with pytest.raises(BlockingIOError):
            Lock(tmp_path / "lock")
        parent.kill()
        parent.wait()
        Lock(tmp_path / "lock").release()  # the child lives until its standard input closes


def test_a_removed_lock_is_not_taken_for_the_one_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    flock, once = durable.fcntl.flock, [True]

    def removed_between(file: Any, how: int) -> None:
        flock(file, how)
        if once and once.pop():
            path.unlink()

    monkeypatch.setattr(durable.fcntl, "flock", removed_between)
    lock = Lock(path)
    assert path.exists()
    with pytest.raises(BlockingIOError):
        Lock(path)
    lock.remove()
    assert not path.exists()
