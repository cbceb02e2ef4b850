"""Rows in sealed parts of a folder: each part whole or absent, whatever moment the writer is killed at.

A part is written beside its place, brought to the disk and renamed; only then does the manifest name it,
written the same way. A part that the manifest does not name is left from a killed run and is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fastproj.influence.durable import TEMPORARY_SUFFIX, write_durably
from fastproj.influence.manifest import Manifest, Part, checksum_of

MANIFEST_NAME, LOCK_NAME, PART_PREFIX = "manifest.json", "lock", "rows-"


class DamagedPartError(ValueError):
    """A part on disk is not what was written; the message names it and says how to mend the store."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(
            f"{path} is damaged: {what}. Delete it, if it is there, and run again to make its rows anew; all "
            "other parts are kept"
        )


class Codec(Protocol):
    """How rows become the bytes of a part and come back."""

    @property
    def suffix(self) -> str:
        """The end of a part's file name."""

    def encode(self, ids: Sequence[str], values: Tensor, start: int) -> bytes:
        """The file of rows that begin at row ``start``; the same bytes for the same rows."""

    def decode(self, content: bytes) -> tuple[list[str], Tensor]:
        """What :meth:`encode` was given."""


class PartFolder:
    """The parts that the manifest of a folder names, to read and to add to; the caller holds its lock.

    Raises ValueError where the folder holds parts of another origin or without a manifest, and
    DamagedPartError where a part has another size than was written. A part whose file is gone counts as not
    yet made.
    """

    def __init__(self, folder: Path, manifest: Manifest, codec: Codec) -> None:
        self.folder, self._codec = folder, codec
        found = read_manifest(folder)
        if found is None:
            if any(folder.glob(f"{PART_PREFIX}*")):
                raise ValueError(f"{folder} holds parts but no {MANIFEST_NAME}; remove the folder")
            self.manifest = manifest
            with self.explaining("the manifest"):
                self._save(manifest)
        else:
            found.require_origin(manifest, str(folder))
            self.manifest = replace(found, parts=tuple(p for p in found.parts if (folder / p.name).exists()))
        for part in self.manifest.parts:
            require_size(folder, part)
        self._remove_strangers()

    def part_of(self, row: int) -> Part | None:
        """The part of the share of rows that ``row`` falls in, where it has begun to be on disk."""
        first = row - row % self.manifest.rows_per_part
        return next((part for part in self.manifest.parts if part.start == first), None)

    def seal(self, ids: Sequence[str], values: Tensor, start: int) -> None:
        """Put rows on the disk as one part, in place of a shorter one that began at the same row.

        Does nothing where that one is as long. Raises OSError, with the reason and what is kept, where the
        part cannot be written; nothing is left of it then.
        """
        stop, shorter = start + len(ids), self.part_of(start)
        if shorter is not None and shorter.stop >= stop:
            return
        path = self.folder / f"{PART_PREFIX}{start:010d}-{stop:010d}{self._codec.suffix}"
        payload = self._codec.encode(ids, values, start)
        part = Part(path.name, start, stop, len(payload), checksum_of(payload))
        kept = [other for other in self.manifest.parts if other.start != start]
        with self.explaining(f"rows {start} to {stop - 1}"):
            try:
                write_durably(path, payload)
                self._save(replace(self.manifest, parts=tuple(sorted([*kept, part], key=lambda p: p.start))))
            except OSError:
                path.unlink(missing_ok=True)
                raise
        if shorter is not None:
            (self.folder / shorter.name).unlink(missing_ok=True)

    def read(self, part: Part) -> tuple[list[str], Tensor]:
        """The rows of a part. Raises DamagedPartError where its checksum is not what was written."""
        return self._codec.decode(checked_content(self.folder, part))

    def finish(self, rows: int | None) -> None:
        """Note that all rows are there, ``rows`` in number if given. Raises ValueError where they are not."""
        manifest = self.manifest
        stop = manifest.parts[-1].stop if manifest.parts else 0
        expected = next((known for known in (rows, manifest.rows) if known is not None), stop)
        missing = missing_rows(replace(manifest, rows=expected))
        if missing or stop != expected:
            gaps = ", ".join(f"{first} to {end - 1}" for first, end in missing) or "none"
            raise ValueError(
                f"expected {expected} rows in {self.folder}, got rows up to {stop - 1}, missing: {gaps}"
            )
        with self.explaining("the manifest"):
            self._save(replace(manifest, rows=stop))

    @contextmanager
    def explaining(self, what: str) -> Iterator[None]:
        """Say of an OSError in the block what could not be written and what is kept."""
        try:
            yield
        except OSError as error:
            rows = sum(part.stop - part.start for part in self.manifest.parts)
            raise OSError(
                error.errno,
                f"{what} could not be written ({error.strerror or error}); {rows} rows are whole on disk. "
                "Once that is mended, run again to go on from there",
                str(self.folder),
            ) from error

    def _save(self, manifest: Manifest) -> None:
        write_durably(self.folder / MANIFEST_NAME, manifest.to_json().encode())
        self.manifest = manifest

    def _remove_strangers(self) -> None:
        own = {part.name for part in self.manifest.parts}
        for path in own_files(self.folder):
            if path.name not in own:
                path.unlink()


def own_files(folder: Path) -> list[Path]:
    """The parts in a folder, and files that a killed run was writing there."""
    return [*folder.glob(f"{PART_PREFIX}*"), *folder.glob(f".*{TEMPORARY_SUFFIX}")]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None where there is none. Raises ValueError where it is damaged."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    return Manifest.from_json(path.read_text(encoding="utf-8", errors="replace"), str(path))


def require_size(folder: Path, part: Part) -> None:
    """Raises DamagedPartError where the file of a part is missing or has not the size it was written with."""
    path = folder / part.name
    if not path.exists():
        raise DamagedPartError(path, "the file is missing")
    size = path.stat().st_size
    if size != part.size:
        raise DamagedPartError(path, f"it has {size} bytes, {part.size} were written")


def checked_content(folder: Path, part: Part) -> bytes:
    """The bytes of a part. Raises DamagedPartError where they are not those that were written."""
    require_size(folder, part)
    content = (folder / part.name).read_bytes()
    if checksum_of(content) != part.checksum:
        raise DamagedPartError(folder / part.name, "its checksum does not match")
    return content


def missing_rows(manifest: Manifest) -> list[tuple[int, int]]:
    """The ranges [start, stop) of rows that no part has, up to ``manifest.rows`` or else the last part."""
    missing, reached = [], 0
    for part in manifest.parts:
        if part.start > reached:
            missing.append((reached, part.start))
        reached = part.stop
    if manifest.rows is not None and reached < manifest.rows:
        missing.append((reached, manifest.rows))
    return missing
