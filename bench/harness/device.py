"""The boundary to the GPU: all that timing asks of it, in one small class that tests replace."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

Call = Callable[[], object]


class CaptureRefusedError(RuntimeError):
    """A call cannot be captured into a graph; the message says why."""


class Moment(Protocol):
    """A point in the device's queue of work."""

    def record(self) -> None:
        """Put the point at the end of the queue."""

    def seconds_until(self, later: Moment) -> float:
        """Device time in seconds between two points that the device has passed."""


class Device(Protocol):
    """What a clock asks of a device. Sizes are in bytes, times in seconds."""

    def l2_bytes(self) -> int:
        """Size of the last cache that all multiprocessors share."""

    def free_bytes(self) -> int:
        """Memory that new tensors may take."""

    def now(self) -> float:
        """The host's clock."""

    def synchronize(self) -> None:
        """Wait until the device has done all that was queued."""

    def moment(self) -> Moment:
        """A point that is not in the queue yet."""

    def working(self) -> AbstractContextManager[None]:
        """Inside, work is queued on the stream that is timed."""

    def capture(self, call: Call) -> Call:
        """The launches of ``call`` as one graph, which uses its tensors and does not keep them alive.

        Raises CaptureRefusedError where that cannot be; work goes on in a ``working`` that is entered after.
        """

    def evict(self) -> None:
        """Queue a sweep that leaves nothing of earlier calls in the cache."""

    def sweep_seconds(self) -> float:
        """Device time of one such sweep."""


class CudaMoment:
    """A CUDA or ROCm event with timing."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)

    def record(self) -> None:
        self._event.record()

    def seconds_until(self, later: Moment) -> float:
        if not isinstance(later, CudaMoment):
            raise TypeError(f"expected another CUDA event, got {type(later).__name__}")
        return self._event.elapsed_time(later._event) / 1e3


class CudaDevice:
    """One CUDA or ROCm device, with a stream of its own on which everything is warmed up, captured and timed.

    One stream throughout, because the kernels keep their tables by stream: a table made in the warm-up is
    found again while a graph is captured, where nothing may be copied to the device.
    """

    def __init__(self, index: int, l2_bytes: int) -> None:
        self._index, self._l2_bytes = index, l2_bytes
        self._stream = torch.cuda.Stream(index)
        # Reading leaves clean lines behind; dirty ones would be written back at the next call's expense.
        elements = max(2 * l2_bytes, 2**26) // 4
        self._buffer = torch.zeros(elements, device=f"cuda:{index}")
        self._sum = torch.zeros((), device=f"cuda:{index}")
        self._sweep: float | None = None

    def l2_bytes(self) -> int:
        return self._l2_bytes

    def free_bytes(self) -> int:
        # Graphs and inputs of what was timed before may wait in cycles.
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._index)[0]

    def now(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._index)

    def moment(self) -> Moment:
        return CudaMoment()

    @contextmanager
    def working(self) -> Iterator[None]:
        self.synchronize()
        with torch.cuda.device(self._index), torch.cuda.stream(self._stream):
            yield
        self.synchronize()

    def capture(self, call: Call) -> Call:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                call()
        except RuntimeError as error:
            self.synchronize()
            # The allocator may still give the failed graph's memory to whatever runs on the stream it was on.
            self._stream = torch.cuda.Stream(self._index)
            raise CaptureRefusedError(str(error).partition("\n")[0]) from error
        return graph.replay

    def evict(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._sum)

    def sweep_seconds(self) -> float:
        if self._sweep is None:
            start, end = CudaMoment(), CudaMoment()
            with self.working():
                self.evict()
                start.record()
                for _ in range(8):
                    self.evict()
                end.record()
            self._sweep = start.seconds_until(end) / 8
        return self._sweep
