"""The device itself, over a torch.cuda that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from types import SimpleNamespace

import pytest

from fastproj.bench.harness import device
from fastproj.bench.harness.device import CaptureRefusedError, CudaDevice


class FakeTorch:
    """Numbers its streams, and tells on which one work is queued now."""

    def __init__(self) -> None:
        numbers = count()
        self.current: int | None = None
        self.refusal: Exception | None = None
        self.cuda = SimpleNamespace(
            Stream=lambda index: next(numbers),
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: "replayed"),
            device=lambda index: nullcontext(),
            synchronize=lambda index: None,
            stream=self.stream,
            graph=self.graph,
        )

    def zeros(self, *size: object, device: str) -> None:
        """Nothing here reads the buffers."""

    @contextmanager
    def stream(self, number: int) -> Iterator[None]:
        self.current = number
        yield
        self.current = None

    @contextmanager
    def graph(self, graph: object, stream: int) -> Iterator[None]:
        assert stream == self.current, "captured on a stream of its own"
        yield
        if self.refusal:
            raise self.refusal


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    fake = FakeTorch()
    monkeypatch.setattr(device, "torch", fake)
    return fake


def test_what_is_warmed_up_captured_and_timed_shares_a_stream(torch: FakeTorch) -> None:
    gpu, seen = CudaDevice(0, 2**20), []
    for _ in range(2):
        with gpu.working():
            replay = gpu.capture(lambda: seen.append(torch.current))
    assert replay() == "replayed"
    assert seen == [0, 0]


def test_a_failed_capture_leaves_its_stream_behind(torch: FakeTorch) -> None:
    """The allocator may still serve that stream from the memory of the graph."""
    gpu = CudaDevice(0, 2**20)
    torch.refusal = RuntimeError("operation not permitted\nmore")
    with pytest.raises(CaptureRefusedError, match=r"^operation not permitted$"), gpu.working():
        gpu.capture(lambda: None)
    with gpu.working():
        assert torch.current == 1
