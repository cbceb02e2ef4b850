"""Erasers on the residual stream: forward, backward, and what training under them learns."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from made_factors import directions, stream_factors
from tiny_models import Tiny, bert, gpt2, llama
from torch import Tensor

from fastproj import LEACE, Eraser, StreamErasure
from fastproj.architectures import blocks
from fastproj.erasure import OrthogonalEraser
from fastproj.methods.ablation import Ablation

WIDTH = 32


def orthogonal() -> OrthogonalEraser:
    return OrthogonalEraser(stream_factors(WIDTH).bases["stream"])


@contextmanager
def block_outputs(tiny: Tiny) -> Any:
    """The residual stream behind each block, and its gradient once there was a backward pass."""
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        stream.retain_grad()
        seen.append(stream)

    handles = [block.register_forward_hook(keep) for block in blocks(tiny.model).values()]
    yield seen
    for handle in handles:
        handle.remove()


def scrubber(tiny: Tiny) -> dict[int, Eraser]:
    """LEACE of whether a token's number is even, at each block."""
    with block_outputs(tiny) as seen:
        tiny.logits()
    even = tiny.inputs["input_ids"] % 2 == 0
    erasers: dict[int, Eraser] = {}
    for position, stream in enumerate(seen):
        fit = LEACE()
        fit.update(stream, even)
        erasers[position] = fit.eraser
    return erasers


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_an_orthogonal_eraser_is_ablation(make: Any) -> None:
    tiny = make()
    plain = tiny.logits().detach()
    with Ablation(tiny.model, stream_factors(WIDTH)):
        want = tiny.logits().detach()
    with StreamErasure(tiny.model, orthogonal()):
        assert torch.equal(tiny.logits().detach(), want)
    assert not torch.allclose(want, plain)
    assert torch.equal(tiny.logits().detach(), plain)


def test_the_first_block_scrubbed_knows_nothing_linear() -> None:
    tiny = llama()
    even = (tiny.inputs["input_ids"] % 2 == 0).reshape(-1).double()
    with StreamErasure(tiny.model, {0: scrubber(tiny)[0]}), block_outputs(tiny) as seen:
        tiny.logits()
    first, second = ((stream.detach() - stream.detach().mean((0, 1))).reshape(-1, WIDTH) for stream in seen)
    # Sums of 28 products of numbers about 1, at a condition of Σ that fewer samples than features give.
    assert float(((even - even.mean()) @ first).abs().max()) < 1e-9
    assert float(((even - even.mean()) @ second).abs().max()) > 1e-3


@pytest.mark.parametrize("make", [llama, gpt2, bert])
@pytest.mark.parametrize("kind", ["orthogonal", "oblique"])
def test_backward_alone_changes_the_gradient_alone(kind: str, make: Any) -> None:
    """The last block's gradient is that of the plain model, without what lies along L."""
    tiny = make()
    erasers = scrubber(tiny) if kind == "oblique" else {0: orthogonal(), 1: orthogonal()}
    with block_outputs(tiny) as plain:
        want = tiny.logits()
        want.square().sum().backward()
    with block_outputs(tiny) as seen, StreamErasure(tiny.model, erasers, backward=True):
        got = tiny.logits()
        assert torch.equal(got, want)
        got.square().sum().backward()
    eraser = erasers[1]
    torch.testing.assert_close(seen[1].grad, eraser.gradient(plain[1].grad), rtol=1e-9, atol=1e-12)
    for position, stream in enumerate(seen):
        size = float(stream.grad.abs().max() * erasers[position].right.abs().sum())
        assert float((stream.grad @ erasers[position].left).abs().max()) < 1e-12 * max(size, 1)
    with torch.no_grad(), StreamErasure(tiny.model, erasers, backward=True):
        assert torch.equal(tiny.logits(), want)


def test_forward_trains_the_erased_model() -> None:
    """The gradient is that of finite differences, under LEACE too."""
    tiny = llama()
    parameter = next(p for name, p in tiny.model.named_parameters() if "lora_B" in name)
    with StreamErasure(tiny.model, scrubber(tiny)):
        tiny.logits().square().sum().backward()
        gradient, step, values = parameter.grad[0, 0].item(), 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[0, 0] += sign * step
                values.append(float(tiny.logits().square().sum()))
                parameter[0, 0] -= sign * step
    # Central differences are off by their step squared, and by rounding over it.
    assert gradient == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


def test_half_precision_follows_the_stream() -> None:
    tiny = llama()
    tiny.model.bfloat16()
    with StreamErasure(tiny.model, orthogonal()), block_outputs(tiny) as seen:
        assert tiny.logits().dtype == torch.bfloat16
    basis = orthogonal().left
    # The eraser is not rounded to bf16, its result is: each of 32 numbers by 2⁻⁹ of itself.
    for stream in seen:
        wide = stream.detach().double()
        assert float((wide @ basis).abs().max()) < 2**-8 * float(wide.norm(dim=-1).max())


def test_directions_rounded_to_bf16_leave_some_of_themselves() -> None:
    """As published code rounds them; ours leave what rounding the result does, or nothing in fp32."""
    basis = directions(64, 3).matrix
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)) + 4 * basis[:, 0].float()
    rounded = basis.bfloat16().float()
    theirs = x - (x @ rounded) @ rounded.mT
    ours = OrthogonalEraser(directions(64, 3))(x)
    assert float((theirs.double() @ basis).abs().max()) > 1e-3
    assert float((ours.double() @ basis).abs().max()) < 5e-6


def test_detached_it_is_gone() -> None:
    tiny = llama()
    plain = tiny.logits().detach()
    held = StreamErasure(tiny.model, {1: orthogonal()})
    assert not torch.equal(tiny.logits().detach(), plain)
    held.detach()
    held.detach()
    assert torch.equal(tiny.logits().detach(), plain)


def test_bad_input() -> None:
    tiny = llama()
    with pytest.raises(TypeError, match="expected an eraser, or erasers by position, got Basis"):
        StreamErasure(tiny.model, directions(WIDTH, 1))  # type: ignore[arg-type]
    for wrong in (2, -1, "0", True):
        with pytest.raises(ValueError, match="blocks from 0 to 1"):
            StreamErasure(tiny.model, {0: orthogonal(), wrong: orthogonal()})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="one block or more, got none"):
        StreamErasure(tiny.model, {})
    with pytest.raises(ValueError, match="width, 32, got length 7"):
        StreamErasure(tiny.model, OrthogonalEraser(directions(7, 1)))
    assert not any(block._forward_hooks for block in blocks(tiny.model).values())
