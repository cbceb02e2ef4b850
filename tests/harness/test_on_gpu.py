"""What runs where a GPU is: every public operator compiled, EDGE on a model."""

from __future__ import annotations

import gc

import every_kernel
import pytest
import torch
from tiny_models import bert

import fastproj
from fastproj.bench.harness.clock import CudaClock, Subject
from fastproj.bench.harness.device import Call, CudaDevice


def test_the_program_is_right_without_a_gpu_too() -> None:
    every_kernel.main("cpu")


def test_the_program_tells_a_wrong_result() -> None:
    with pytest.raises(SystemExit, match="gram: wrong by"):
        every_kernel.require_close("gram", torch.zeros(3), torch.ones(3, dtype=torch.float64))


@pytest.mark.gpu
def test_every_operator_on_the_gpu() -> None:
    every_kernel.main("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("passes", ["one", "two"])
def test_edge_projects_the_gradients_of_a_model_on_the_gpu(passes: str) -> None:
    """The same model, in fp64, on both devices."""
    gradients = []
    for device in ("cpu", "cuda"):
        tiny = bert()
        tiny.model.to(device)
        inputs = {name: value.to(device) for name, value in tiny.inputs.items()}
        with fastproj.EDGE(tiny.model, passes=passes) as engine:
            engine.loss(tiny.model(**inputs).logits, tiny.labels.to(device)).backward()
            engine.project_()
        gradients.append([p.grad.cpu() for p in tiny.model.parameters() if p.grad is not None])
    for here, there in zip(*gradients, strict=True):
        # fp64 on both sides; matrix products add up in another order.
        torch.testing.assert_close(there, here, rtol=1e-8, atol=1e-12)


@pytest.mark.gpu
def test_replays_work_on_the_tensors_of_their_calls() -> None:
    """Graphs of small calls, timed after whatever nobody else holds was freed and its memory taken."""
    outputs: list[torch.Tensor] = []

    def build(seed: int) -> Call:
        source = torch.full((2**16,), float(seed), device="cuda")
        outputs.append(torch.zeros_like(source))
        return lambda out=outputs[-1]: out.add_(source)

    size = 2 * 2**18
    device = CudaDevice(torch.cuda.current_device(), 2**20)
    prepared = CudaClock(device).prepare(Subject(build, size, size, 1))
    gc.collect()
    with device.working():  # the stream whose freed memory the tensors of the calls would be
        taken = [torch.full((2**16,), torch.nan, device="cuda") for _ in range(2 * len(outputs))]
    before = [out.clone() for out in outputs]
    assert prepared.measure(3).copies == len(outputs)
    for seed, (out, start) in enumerate(zip(outputs, before, strict=True)):
        torch.testing.assert_close(out, start + 3 * seed, rtol=0, atol=0)
    assert all(bool(value.isnan().all()) for value in taken)
