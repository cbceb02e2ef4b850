"""What runs where a GPU is: every public operator compiled, EDGE on a model."""

from __future__ import annotations

import every_kernel
import pytest
import torch
from tiny_models import bert

import fastproj


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
