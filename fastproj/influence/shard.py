"""One shard of a store of sketches: a safetensors file that knows its ids and checks its rows.

It holds ``sketches`` (n, k) fp32, ``ids`` in UTF-8 one after another, ``id_ends`` (n) their ends,
``id_checksum`` (1) over both, and ``checksums`` (n): CRC-32 of a row's number in the store, its id and its
sketch, so that rows of another place or another sample show as well as flipped bits.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastproj.influence.manifest import Part
from fastproj.influence.parts import DamagedPartError


class ShardCodec:
    """Sketches as the bytes of a shard."""

    suffix = ".safetensors"

    def encode(self, ids: Sequence[str], values: Tensor, start: int) -> bytes:
        from safetensors.torch import save

        encoded = [id.encode() for id in ids]
        blob = torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy())
        ends = torch.tensor(list(accumulate(map(len, encoded))), dtype=torch.int64)
        return save(
            {
                "sketches": values.contiguous(),
                "ids": blob,
                "id_ends": ends,
                "id_checksum": torch.tensor([_id_checksum(blob, ends)]),
                "checksums": torch.tensor(_row_checksums(encoded, values, start), dtype=torch.int64),
            }
        )

    def decode(self, content: bytes) -> tuple[list[str], Tensor]:
        from safetensors.torch import load

        tensors = load(content)
        encoded = _split(tensors["ids"], tensors["id_ends"])
        return [id.decode() for id in encoded], tensors["sketches"]


class Shard:
    """A shard on disk, memory-mapped; rows go by their number in the store.

    Raises DamagedPartError where the file cannot be read or what is read is not what was written.
    """

    def __init__(self, folder: Path, part: Part) -> None:
        self._path, self._part = folder / part.name, part

    @property
    def ids(self) -> list[str]:
        """The ids of all its rows."""
        return [id.decode() for id in self._encoded_ids]

    def rows(self, start: int, stop: int) -> tuple[list[str], Tensor]:
        """Ids and sketches (stop − start, k) of rows ``start`` … ``stop`` − 1; only these are read."""
        first, last = start - self._part.start, stop - self._part.start
        encoded = self._encoded_ids[first:last]
        sketches = self._read("sketches", first, last)
        written = self._read("checksums", first, last).tolist()
        found = _row_checksums(encoded, sketches, start)
        bad = [start + row for row, (was, now) in enumerate(zip(written, found, strict=True)) if was != now]
        if bad:
            raise DamagedPartError(
                self._path, f"{len(bad)} rows do not match their checksums, the first {bad[0]}"
            )
        return [id.decode() for id in encoded], sketches

    @cached_property
    def _encoded_ids(self) -> list[bytes]:
        blob, ends = self._read("ids"), self._read("id_ends")
        if self._read("id_checksum").tolist() != [_id_checksum(blob, ends)]:
            raise DamagedPartError(self._path, "its ids do not match their checksum")
        return _split(blob, ends)

    def _read(self, name: str, first: int | None = None, last: int | None = None) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path, framework="pt") as file:
                tensor: Tensor = file.get_slice(name)[first:last]
        except (SafetensorError, OSError) as error:
            raise DamagedPartError(self._path, f"it cannot be read ({error})") from error
        return tensor


def _split(blob: Tensor, ends: Tensor) -> list[bytes]:
    content = blob.numpy().tobytes()
    stops = ends.tolist()
    return [content[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


def _id_checksum(blob: Tensor, ends: Tensor) -> int:
    return zlib.crc32(ends.numpy().data, zlib.crc32(blob.numpy().data))


def _row_checksums(ids: Sequence[bytes], sketches: Tensor, start: int) -> list[int]:
    return [
        zlib.crc32(sketch.data, zlib.crc32(id, zlib.crc32(struct.pack("<Q", start + row))))
        for row, (id, sketch) in enumerate(zip(ids, sketches.numpy(), strict=True))
    ]
