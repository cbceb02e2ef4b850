"""Time of one call: on a GPU by events with cold caches, on the CPU by the wall."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles
from typing import Protocol

from fastproj.bench.harness.device import Call, CaptureRefusedError, Device

# The kernels keep the address tables of 64 calls; a graph that outlives its table reads freed memory.
MOST_COPIES = 48
# Host time that one launch may cost before the device waits for the host.
SLOW_LAUNCH = 50e-6
WARM_PASSES = 5  # medians over them forget the first, which compiles
WALL_ROUND = 0.02  # seconds


class DoesNotFitError(ValueError):
    """The device's memory does not hold the inputs of a call."""


@dataclass(frozen=True)
class Rotation:
    """How many copies of the inputs take turns, and whether these turns alone leave the cache cold."""

    copies: int
    cold: bool
    reason: str


@dataclass(frozen=True)
class Subject:
    """Something to time. ``build(seed)`` allocates a copy of the inputs and returns the call on them.

    ``footprint`` is what one call reads and writes, ``resident`` what one copy keeps allocated, in bytes;
    ``launches`` how many kernels a call launches.
    """

    build: Callable[[int], Call]
    footprint: int
    resident: int
    launches: int


@dataclass(frozen=True)
class Timing:
    """Median seconds of a call over rounds, and the quartiles.

    ``route`` is "graph", "eager" or "wall", and ``reason`` why. ``host_seconds`` is what the host needs to
    issue a call eagerly, None on the CPU.
    """

    seconds: float
    low: float
    high: float
    rounds: int
    copies: int
    cold: bool
    route: str
    reason: str
    host_seconds: float | None


class Prepared(Protocol):
    """A subject with its inputs in place, warm."""

    def measure(self, rounds: int) -> Timing:
        """Time ``rounds`` rounds."""

    def sustain(self, seconds: float) -> tuple[int, float]:
        """Call again and again for about so long; returns the calls made and the seconds they took."""


class Clock(Protocol):
    """Something that times subjects."""

    def prepare(self, subject: Subject) -> Prepared:
        """Allocate, warm up and decide how to time."""


def copies_for(footprint: int, resident: int, l2: int, free: int, most: int = MOST_COPIES) -> Rotation:
    """The least number of copies that together exceed twice the L2, within half of the free memory.

    All in bytes. One is enough where one alone exceeds it. Raises ValueError for sizes that are not positive,
    DoesNotFitError where not even one copy fits.
    """
    if footprint < 1 or resident < 1:
        raise ValueError(f"footprint and resident bytes must be positive, got {footprint} and {resident}")
    fitting = free // 2 // resident
    if fitting < 1:
        needed, half = resident / 2**30, free / 2**31
        raise DoesNotFitError(
            f"the inputs take {needed:.2f} GiB, and half of the free memory is {half:.2f} GiB"
        )
    wanted = 2 * l2 // footprint + 1
    if wanted <= min(fitting, most):
        return Rotation(wanted, True, f"{wanted} copies exceed twice the L2")
    copies = min(fitting, most)
    bound = "memory" if fitting < most else "the kernels' tables"
    reason = f"{bound} allow {copies} copies of {wanted}: a sweep evicts before each call"
    return Rotation(copies, False, reason)


def wants_graph(eager_seconds: float, launches: int) -> bool:
    """Whether a call is so short that the host's launches, and not the device, would be timed."""
    return eager_seconds < SLOW_LAUNCH * launches


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile). Raises ValueError for no samples."""
    if not samples:
        raise ValueError("expected at least one sample, got none")
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return low, median(samples), high


class CudaClock:
    """Events around each call, inputs that the L2 does not hold, graphs where launches would be timed."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def prepare(self, subject: Subject) -> CudaPrepared:
        rotation = copies_for(
            subject.footprint, subject.resident, self._device.l2_bytes(), self._device.free_bytes()
        )
        return CudaPrepared(self._device, subject, rotation)


class CudaPrepared:
    """A subject on the device: as many copies as the rotation says, each warmed up, and captured if short."""

    def __init__(self, device: Device, subject: Subject, rotation: Rotation) -> None:
        self._device, self._rotation = device, rotation
        with device.working():
            eager = [subject.build(seed) for seed in range(rotation.copies)]
            self._host_seconds, eager_seconds = self._warm_up(eager)
            self._calls, self._route, self._reason = self._choose(eager, eager_seconds, subject.launches)
            self._issue_seconds, self._call_seconds = self._warm_up(self._calls)

    def _warm_up(self, calls: Sequence[Call]) -> tuple[float, float]:
        """(host seconds to issue a call, seconds until it is done), medians over WARM_PASSES."""
        issued, done = [], []
        for _ in range(WARM_PASSES):
            began = self._device.now()
            for call in calls:
                call()
            queued = self._device.now()
            self._device.synchronize()
            issued.append((queued - began) / len(calls))
            done.append((self._device.now() - began) / len(calls))
        return median(issued), median(done)

    def _choose(self, eager: list[Call], seconds: float, launches: int) -> tuple[list[Call], str, str]:
        """The calls to time: graphs of short ones, where capture is possible."""
        described = f"{seconds * 1e6:.0f} µs a call of {launches} launches"
        if not wants_graph(seconds, launches):
            return eager, "eager", f"{described}: the device is the slower side"
        captured = []
        for call in eager:
            # Directly before the capture, so that the kernels find this copy's tables.
            call()
            self._device.synchronize()
            try:
                captured.append(self._device.capture(call))
            except CaptureRefusedError as error:
                return eager, "eager", f"{described}, but capture failed: {error}"
        return captured, "graph", f"{described}: launches would be timed"

    def measure(self, rounds: int) -> Timing:
        """Raises ValueError for fewer than one round."""
        with self._device.working():
            samples = [self._round() for _ in range(rounds)]
        low, middle, high = spread(samples)
        return Timing(
            seconds=middle,
            low=low,
            high=high,
            rounds=rounds,
            copies=self._rotation.copies,
            cold=True,
            route=self._route,
            reason=f"{self._reason}; {self._rotation.reason}",
            host_seconds=self._host_seconds,
        )

    def _round(self) -> float:
        """Mean seconds of a call over one turn through the copies."""
        moments = [(self._device.moment(), self._device.moment()) for _ in self._calls]
        self._queue_ahead()
        for call, (start, end) in zip(self._calls, moments, strict=True):
            if not self._rotation.cold:
                self._device.evict()
            start.record()
            call()
            end.record()
        self._device.synchronize()
        return fmean(start.seconds_until(end) for start, end in moments)

    def _queue_ahead(self) -> None:
        """Keep the device busy until the turn is queued, so that no event waits for the host."""
        seconds = 2 * self._issue_seconds * len(self._calls)
        for _ in range(math.ceil(seconds / self._device.sweep_seconds())):
            self._device.evict()

    def sustain(self, seconds: float) -> tuple[int, float]:
        calls = max(len(self._calls), math.ceil(seconds / self._call_seconds))
        with self._device.working():
            began = self._device.now()
            for number in range(calls):
                self._calls[number % len(self._calls)]()
            self._device.synchronize()
            return calls, self._device.now() - began


class WallClock:
    """The host's clock around each call; inputs stay where the last call left them."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def prepare(self, subject: Subject) -> WallPrepared:
        return WallPrepared(subject.build(0), self._now)


class WallPrepared:
    """A call on the CPU, warm, repeated in each round until other work on the machine evens out."""

    def __init__(self, call: Call, now: Callable[[], float]) -> None:
        self._call, self._now = call, now
        call()
        calls, seconds = self.sustain(WALL_ROUND)
        self._repeats = max(1, round(WALL_ROUND * calls / seconds))

    def measure(self, rounds: int) -> Timing:
        """Raises ValueError for fewer than one round."""
        samples = []
        for _ in range(rounds):
            began = self._now()
            for _ in range(self._repeats):
                self._call()
            samples.append((self._now() - began) / self._repeats)
        low, middle, high = spread(samples)
        reason = f"wall clock over {self._repeats} calls a round, caches as they are"
        return Timing(middle, low, high, rounds, 1, False, "wall", reason, None)

    def sustain(self, seconds: float) -> tuple[int, float]:
        began, calls = self._now(), 0
        while not calls or self._now() - began < seconds:
            self._call()
            calls += 1
        return calls, self._now() - began
