"""Writers killed at random moments and begun again end with the bytes of one that never was."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
from stored_rows import contents, write_slowly

from fastproj.influence.scores import Scores
from fastproj.influence.store import SketchStore

KILLS, ROWS, SHARE = 5, 240, 7
STEPS = ROWS // 5

# Forked from a process that has loaded all a writer needs, so that a run begins at once.
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["stored_rows", "pyarrow.parquet", "safetensors.torch"])


@dataclass(frozen=True)
class Moment:
    """When a run dies: ``seconds`` after it said ``steps`` things, or after it said that it finishes."""

    steps: int
    seconds: float


def run(kind: str, path: Path, moment: Moment | None) -> int:
    """Write what is missing and die at ``moment``, or end; the number of rows that were there already."""
    listening, saying = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=write_slowly, args=(kind, path, ROWS, SHARE, saying))
    process.start()
    saying.close()
    said = []
    try:
        while moment is None or len(said) <= moment.steps:
            said.append(listening.recv())
            if moment is not None and said[-1] == "finishing":
                break
        time.sleep(moment.seconds if moment else 0)
        process.kill()
    except EOFError:  # it has nothing more to say
        pass
    process.join()
    assert process.exitcode == 0 or (moment and process.exitcode == -signal.SIGKILL), process.exitcode
    return int(said[0])


def random_moments(kills: int, seed: int) -> list[Moment]:
    """Spread over the writing, the last ones while it finishes: a share is sealed in a few milliseconds."""
    chance = random.Random(seed)
    spread = [
        Moment(chance.randint(0, 2 * STEPS // kills), chance.uniform(0, 0.006)) for _ in range(kills - 2)
    ]
    return [*spread, *(Moment(STEPS, chance.uniform(0, 0.02)) for _ in range(2))]


@pytest.mark.parametrize("kind", ["scores", "sketches"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path, kind: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(kind, whole, None) == 0
    found = [run(kind, killed, moment) for moment in [*random_moments(KILLS, seed=4), None]]
    assert found == sorted(found), "a run lost rows that the one before had on disk"
    assert found[-1] > 0, "no run was killed that had written"
    if kind == "scores":
        assert killed.read_bytes() == whole.read_bytes()
        assert len(Scores.load(killed)) == ROWS
    else:
        assert contents(killed) == contents(whole)
        assert len(SketchStore(killed)) == ROWS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]
