"""Time of one call: on a GPU by events with cold caches, on the CPU by the wall."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles
from typing import Protocol

from fastproj.bench.harness.device import Call, CaptureRefusedError, Device

# The kernels cache the address tables of 64 calls; turns over more copies would find none of them again.
MOST_COPIES = 48
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

    ``route`` is "graph", "eager" or "wall", and ``reason`` why. ``cache`` is "turns" where other copies drive
    a call's data out of the cache before its next turn, "sweep" where a sweep before each call does, and
    "as left" where nothing does. ``host_seconds`` is what the host needs to issue a call eagerly, None on the
    CPU.
    """

    seconds: float
    low: float
    high: float
    rounds: int
    copies: int
    cache: str
    route: str
    reason: str
    host_seconds: float | None


@dataclass(frozen=True)
class Pace:
    """Seconds of a call, medians: of the host to issue it, of the device with work queued ahead, and from one
    call to the next when repeated; ``queued`` is the host's to issue one turn through the copies with events.
    """

    issue: float
    device: float
    repeated: float
    queued: float


class Prepared(Protocol):
    """A subject with its inputs in place, warm."""

    @property
    def idle(self) -> str | None:
        """Why the device waits while calls are sustained, None where it is busy."""

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


def wants_graph(host_seconds: float, device_seconds: float) -> bool:
    """Whether the host, to issue a call, takes more than half of what the device takes to do it."""
    return host_seconds > device_seconds / 2


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile). Raises ValueError for no samples."""
    if not samples:
        raise ValueError("expected at least one sample, got none")
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return low, median(samples), high


class CudaClock:
    """Events around each call, inputs that the L2 does not hold, graphs where the host would be too slow."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def prepare(self, subject: Subject) -> CudaPrepared:
        rotation = copies_for(
            subject.footprint, subject.resident, self._device.l2_bytes(), self._device.free_bytes()
        )
        return CudaPrepared(self._device, subject, rotation)


class CudaPrepared:
    """A subject on the device: as many copies as the rotation says, warm, captured if the host is slow."""

    def __init__(self, device: Device, subject: Subject, rotation: Rotation) -> None:
        self._device, self._rotation = device, rotation
        with device.working():
            # Kept while graphs are replayed, which read and write these calls' tensors without owning them.
            self._eager = [subject.build(seed) for seed in range(rotation.copies)]
            eager = self._take_pace(self._eager)
            self._calls, self._route, self._reason = self._choose(eager)
        self._host_seconds = eager.issue
        # Entered anew: a refused capture leaves the device on another stream.
        with device.working():
            self._pace = self._take_pace(self._calls)

    @property
    def idle(self) -> str | None:
        if self._pace.issue <= self._pace.device:
            return None
        return (
            f"repeated by route {self._route}, a call takes the host {_microseconds(self._pace.issue)} to "
            f"issue and the device {_microseconds(self._pace.device)} to do: the device idles in between"
        )

    def _take_pace(self, calls: Sequence[Call]) -> Pace:
        """Warm the calls up and take medians over WARM_PASSES."""
        issued, done = [], []
        for _ in range(WARM_PASSES):
            began = self._device.now()
            for call in calls:
                call()
            issued.append((self._device.now() - began) / len(calls))
            self._device.synchronize()
            done.append((self._device.now() - began) / len(calls))
        queued = median(self._turn(calls, 0.0)[0] for _ in range(WARM_PASSES))
        on_device = median(self._turn(calls, queued)[1] for _ in range(WARM_PASSES))
        return Pace(median(issued), on_device, median(done), queued)

    def _choose(self, pace: Pace) -> tuple[list[Call], str, str]:
        """The calls to time: graphs where the host is slow to issue them, if they can be captured."""
        described = (
            f"the host takes {_microseconds(pace.issue)} a call, the device {_microseconds(pace.device)}"
        )
        if not wants_graph(pace.issue, pace.device):
            return self._eager, "eager", f"{described}: the host is well ahead"
        captured = []
        for call in self._eager:
            # Directly before the capture, so that the kernels find this copy's tables.
            call()
            self._device.synchronize()
            try:
                captured.append(self._device.capture(call))
            except CaptureRefusedError as error:
                return self._eager, "eager", f"{described}, but capture failed: {error}"
        return captured, "graph", f"{described}: launches would be timed"

    def measure(self, rounds: int) -> Timing:
        """Raises ValueError for fewer than one round."""
        with self._device.working():
            samples = [self._turn(self._calls, self._pace.queued)[1] for _ in range(rounds)]
        low, middle, high = spread(samples)
        return Timing(
            seconds=middle,
            low=low,
            high=high,
            rounds=rounds,
            copies=self._rotation.copies,
            cache="turns" if self._rotation.cold else "sweep",
            route=self._route,
            reason=f"{self._reason}; {self._rotation.reason}",
            host_seconds=self._host_seconds,
        )

    def _turn(self, calls: Sequence[Call], queued: float) -> tuple[float, float]:
        """(host seconds to issue a turn through the copies, mean device seconds of its calls).

        ``queued`` is the former as it is known: the device is kept busy for longer before the first event, so
        that none waits for the host.
        """
        moments = [(self._device.moment(), self._device.moment()) for _ in calls]
        for _ in range(math.ceil(2 * queued / self._device.sweep_seconds())):
            self._device.evict()
        began = self._device.now()
        for call, (start, end) in zip(calls, moments, strict=True):
            if not self._rotation.cold:
                self._device.evict()
            start.record()
            call()
            end.record()
        issued = self._device.now() - began
        self._device.synchronize()
        return issued, fmean(start.seconds_until(end) for start, end in moments)

    def sustain(self, seconds: float) -> tuple[int, float]:
        """In a few batches, each as long as the pace of those before says is missing."""
        calls, passed, pace = 0, 0.0, self._pace.repeated
        with self._device.working():
            began = self._device.now()
            while not calls or passed < seconds:
                batch = max(len(self._calls), math.ceil((seconds - passed) / pace))
                for number in range(batch):
                    self._calls[number % len(self._calls)]()
                self._device.synchronize()
                calls, passed = calls + batch, self._device.now() - began
                pace = passed / calls
        return calls, passed


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs"


class WallClock:
    """The host's clock around each call; inputs stay where the last call left them."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def prepare(self, subject: Subject) -> WallPrepared:
        return WallPrepared(subject.build(0), self._now)


class WallPrepared:
    """A call on the CPU, warm, repeated in each round until other work on the machine evens out."""

    idle = None

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
        return Timing(middle, low, high, rounds, 1, "as left", "wall", reason, None)

    def sustain(self, seconds: float) -> tuple[int, float]:
        began, calls = self._now(), 0
        while not calls or self._now() - began < seconds:
            self._call()
            calls += 1
        return calls, self._now() - began
