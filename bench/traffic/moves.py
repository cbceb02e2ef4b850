"""What launches move, against the least possible, and the roofline of it on a chip.

*Accesses* are all bytes that the lanes of loads and stores ask for. *Memory traffic* is what of that reaches
the device memory of a chip: re-reads are served by its last cache where what is read again fits there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from fastproj.bench.traffic.chips import Chip

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Stream:
    """The loads or the stores of one operand by one kernel.

    ``accessed`` and ``distinct`` are bytes, with and without repetition; ``resident`` is how many bytes a
    cache must hold for repeated reads to stay off the memory; ``warm`` says that a launch before has touched
    the operand, so that even the first read is one of them.
    """

    kernel: str
    operand: str
    kind: Literal["load", "store"]
    accessed: int
    distinct: int
    resident: int = 0
    warm: bool = False

    def memory_bytes(self, l2_bytes: int) -> int:
        """Bytes that pass between the memory and a cache of ``l2_bytes``; every store arrives in the end."""
        if self.kind == "store" or self.resident > l2_bytes:
            return self.accessed
        return 0 if self.warm else self.distinct


@dataclass(frozen=True)
class KernelCount:
    """Launches of one kernel and the bytes that they access."""

    launches: int
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class Moves:
    """Launches by kernel and their streams; ``a + b`` is one after the other."""

    launched: Mapping[str, int]
    streams: tuple[Stream, ...]

    def __add__(self, other: Moves) -> Moves:
        names = {**self.launched, **other.launched}
        launched = {name: self.launched.get(name, 0) + other.launched.get(name, 0) for name in names}
        return Moves(launched, self.streams + other.streams)

    def repeated(self, times: int) -> Moves:
        """``times`` calls on operands of their own: each must fit the cache by itself."""
        streams = (replace(s, accessed=s.accessed * times, distinct=s.distinct * times) for s in self.streams)
        return Moves({name: count * times for name, count in self.launched.items()}, tuple(streams))

    def bytes(self, kind: Literal["load", "store"], *operands: str) -> int:
        """Accessed bytes of a kind, of all operands or of those named."""
        chosen = (s for s in self.streams if s.kind == kind and (not operands or s.operand in operands))
        return sum(stream.accessed for stream in chosen)

    def by_kernel(self) -> dict[str, KernelCount]:
        """Launches, bytes read and bytes written of each kernel that is launched."""
        counts = {}
        for kernel, launches in self.launched.items():
            own = Moves({}, tuple(stream for stream in self.streams if stream.kernel == kernel))
            if launches:
                counts[kernel] = KernelCount(launches, own.bytes("load"), own.bytes("store"))
        return counts


def total(moves: Iterable[Moves]) -> Moves:
    """All of them, one after the other."""
    return sum(moves, start=Moves({}, ()))


@dataclass(frozen=True)
class Traffic:
    """What an operator moves and computes in a workload; bytes and FLOPs of all its calls together.

    ``least_read_bytes`` and ``least_written_bytes`` take each input and each output once. ``flops`` counts a
    multiply-add as two and nothing for padding; ``rate`` is the dtype of the chip's rate that bounds them.
    """

    operator: str
    workload: str
    moves: Moves
    least_read_bytes: int
    least_written_bytes: int
    flops: int
    rate: str

    @cached_property
    def launches(self) -> int:
        return sum(self.moves.launched.values())

    @cached_property
    def read_bytes(self) -> int:
        """Bytes that loads ask for."""
        return self.moves.bytes("load")

    @cached_property
    def written_bytes(self) -> int:
        """Bytes that stores hand over."""
        return self.moves.bytes("store")

    @property
    def least_bytes(self) -> int:
        return self.least_read_bytes + self.least_written_bytes

    @property
    def access_ratio(self) -> float:
        """Accesses over the least possible."""
        return (self.read_bytes + self.written_bytes) / self.least_bytes

    def memory_bytes(self, l2_bytes: int) -> int:
        """Memory traffic with a last cache of ``l2_bytes``."""
        return sum(stream.memory_bytes(l2_bytes) for stream in self.moves.streams)

    def memory_ratio(self, l2_bytes: int) -> float:
        """Memory traffic over the least possible."""
        return self.memory_bytes(l2_bytes) / self.least_bytes


@dataclass(frozen=True)
class Floor:
    """The least time a chip needs, in seconds.

    ``memory_seconds`` is the memory traffic of the launches over the memory's bandwidth, ``least_seconds``
    the least possible bytes over it, ``arithmetic_seconds`` the FLOPs over the peak rate of their dtype.
    """

    memory_seconds: float
    least_seconds: float
    arithmetic_seconds: float

    @property
    def floor_seconds(self) -> float:
        """The roofline floor of these launches: the longer of memory and arithmetic."""
        return max(self.memory_seconds, self.arithmetic_seconds)

    @property
    def bound(self) -> Literal["memory", "arithmetic"]:
        """Which side sets the floor."""
        return "memory" if self.memory_seconds >= self.arithmetic_seconds else "arithmetic"


def roofline(traffic: Traffic, chip: Chip) -> Floor:
    """The floor of ``traffic`` on ``chip``: max(bytes / bandwidth, FLOPs / rate) (Williams et al. 2009)."""
    return Floor(
        memory_seconds=traffic.memory_bytes(chip.l2_bytes) / chip.memory_bytes_per_second,
        least_seconds=traffic.least_bytes / chip.memory_bytes_per_second,
        arithmetic_seconds=traffic.flops / chip.matrix_flops[traffic.rate],
    )
