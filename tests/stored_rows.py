"""Deterministic rows to write to disk and the manifests they are written under."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from fastproj.influence.manifest import Manifest
from fastproj.influence.store import SketchStore, SketchWriter
from fastproj.influence.writer import ScoreWriter

NAMES = ("gender", "age")
DIMENSION = 8
SCORES = Manifest("scores", model="m0", adapter="a0", data="d0", names=NAMES)
SKETCHES = Manifest(
    "sketches", model="m0", adapter="a0", data="d0", seed=3, kind="rademacher", dimension=DIMENSION
)


def ids_of(rows: int) -> list[str]:
    return [f"sample-{row}-é" for row in range(rows)]


def values_of(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def written_store(path: Path, rows: int = 50, rows_per_part: int = 16) -> SketchStore:
    """A finished store of ``values_of(rows, DIMENSION)``."""
    with SketchWriter(path, SKETCHES, rows_per_part) as writer:
        writer.append(ids_of(rows), values_of(rows, DIMENSION))
        return writer.finish(rows)


def write_slowly(kind: str, path: Path, rows: int, share: int, said: Connection) -> None:
    """Go over the rows in fives and hand in those not held, saying first how many are, then each step."""
    opened = (
        ScoreWriter(path, SCORES, NAMES, share) if kind == "scores" else SketchWriter(path, SKETCHES, share)
    )
    ids, values = ids_of(rows), values_of(rows, len(NAMES) if kind == "scores" else DIMENSION)
    with opened as writer:
        said.send(writer.done)
        for start in range(0, rows, 5):
            if not writer.holds(start, start + 5):
                writer.append(ids[start : start + 5], values[start : start + 5], start=start)
                said.send("appended")
        said.send("finishing")
        writer.finish(rows)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file, counted from the end where ``offset`` is negative."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)
