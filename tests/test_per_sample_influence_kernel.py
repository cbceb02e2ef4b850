"""The Triton launcher of per-sample influence: what it chooses, copies and refuses, and equal bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import DEVICE, on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from fastproj.bench.traffic.recorder import Launch, observed_accesses
from fastproj.kernels import per_sample_influence as kernel_module
from fastproj.kernels.per_sample_influence import COMPILE_CASES, INFLUENCE_TILES, loadable, whole_loads
from fastproj.kernels.per_sample_influence import per_sample_influence as influence

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled launches are not seen")
CHOICES = ("ROW_ALIGNMENT", "BLOCK_ROWS", "BLOCK_WIDE", "BLOCK_TOKENS", "SUM", "OPERAND", "PRECISION")


def layer(samples: int, tokens: int, d_out: int, d_in: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((samples, tokens, d_in), (samples, tokens, d_out), (2, d_out, d_in))
    x, delta, references = (torch.randn(s, generator=generator).to(DEVICE) for s in shapes)
    return x.to(dtype), delta.to(dtype), references


def adam(d_out: int, d_in: int) -> tuple[Any, ...]:
    moments = torch.rand(2, d_out, d_in, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return (*moments.unbind(), 3, 0.9, 0.999, 1e-8, "adam")


def chosen(constants: Any) -> tuple[str, ...]:
    return tuple(str(constants[name]) for name in CHOICES)


@interpreted
@settings(max_examples=10)
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 70), st.integers(1, 70)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
    with_adam=st.booleans(),
    tf32=st.booleans(),
)
def test_launches_choose_what_is_compiled(
    size: tuple[int, int, int, int], dtype: torch.dtype, with_adam: bool, tf32: bool
) -> None:
    compiled = {chosen(case.constexprs) for case in COMPILE_CASES if "ADAM" in case.constexprs}
    launches: list[Launch] = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with observed_accesses(lambda access: None, launches.append):
            influence(*layer(*size, dtype), *(adam(*size[2:]) if with_adam else ()))
    finally:
        torch.set_float32_matmul_precision(before)
    first, *rest = launches
    assert first.kernel == "influence_kernel"
    assert first.arguments["ADAM"] == with_adam
    # fp32 has tile and precision in pairs with Adam, and not all three together.
    alike = {own for own in compiled if own[:-1] == chosen(first.arguments)[:-1]}
    assert {own[-1] for own in alike} <= {"ieee", "tf32"}
    assert alike
    assert {launch.kernel for launch in rest} <= {"sum_tiles_kernel"}


def test_every_tile_and_dtype_is_compiled_with_adam_or_without() -> None:
    names = [case.name for case in COMPILE_CASES]
    for kind in ("Adam", "plain"):
        for dtype in ("float32 ieee", "float32 tf32", "float64", "bfloat16", "float16"):
            assert any(name.startswith(dtype) and name.endswith(kind) for name in names), (dtype, kind)
        for tiles in INFLUENCE_TILES.values():
            for tile in tiles:
                assert any(f"{tile.rows} rows, {kind}" in name for name in names), (tile, kind)


@on_gpu
def test_repeated_calls_give_equal_bits_whatever_the_batch() -> None:
    x, delta, references = layer(4, 70, 20, 150, torch.float32)
    whole = influence(x, delta, references, *adam(20, 150))
    assert torch.equal(influence(x, delta, references, *adam(20, 150)), whole)
    for i in range(4):
        assert torch.equal(influence(x[i : i + 1], delta[i : i + 1], references, *adam(20, 150))[0], whole[i])
    # A reference's products do not depend on the others, nor on their number.
    assert torch.equal(influence(x, delta, references[1:], *adam(20, 150)), whole[:, 1:])


@on_gpu
def test_copies_for_wide_loads_change_no_bit() -> None:
    """Rows of an odd length, rows apart and rows off their alignment are the same numbers."""
    x, delta, references = layer(2, 9, 5, 40, torch.float32)
    want = influence(x, delta, references)
    apart = torch.full((2, 9, 43), torch.nan, device=DEVICE)[:, :, :40].copy_(x)
    shifted = torch.full((x.numel() + 1,), torch.nan, device=DEVICE)[1:].view(x.shape).copy_(x)
    for other in (apart, shifted, x.mT.contiguous().mT):
        assert torch.equal(influence(other, delta, references), want)


@on_gpu
def test_narrow_side_may_be_either() -> None:
    """The gradient turned over is the same product; only the tiles' sums may round another way."""
    x, delta, references = layer(3, 9, 6, 130, torch.float64)
    want = influence(x, delta, references, *adam(6, 130))
    moments = (moment.T for moment in adam(6, 130)[:2])
    got = influence(delta, x, references.mT, *moments, *adam(6, 130)[2:])
    # fp64 sums of 780 products.
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_what_is_loadable_is_not_copied() -> None:
    side = torch.zeros(2, 5, 24, dtype=torch.bfloat16)
    assert loadable(side, 8) is side
    wide = torch.zeros(2, 5, 40, dtype=torch.bfloat16)[:, :, :24]
    assert loadable(wide, 8) is wide
    assert loadable(torch.zeros(2, 5, 21, dtype=torch.bfloat16), 8).shape == (2, 5, 24)
    table = torch.zeros(3, 4, 8)
    assert whole_loads(table, 4) is table


def test_tokens_far_apart_are_copied_together() -> None:
    """Offsets into a sample are int32: three tokens 2³⁰ elements apart are past them."""
    far = torch.empty(1, device="meta", dtype=torch.bfloat16).as_strided((2, 3, 8), (64, 2**30, 1))
    assert loadable(far, 8).stride() == (24, 8, 1)
    near = torch.empty(1, device="meta", dtype=torch.bfloat16).as_strided((3, 2, 8), (2**30, 64, 1))
    assert loadable(near, 8) is near


def test_more_than_int32_counts_is_refused() -> None:
    side = 2**15
    for tokens, d_out, d_in, what in (
        (4, side, side + 1, f"sample's gradient, got {side * (side + 1)}"),
        (side + 1, 8, side, f"sample's activations, got {side * (side + 1)}"),
    ):
        x, delta = (torch.empty(1, tokens, width, device="meta") for width in (d_in, d_out))
        with pytest.raises(ValueError, match=f"at most {kernel_module.MOST_ELEMENTS} elements in a {what}"):
            influence(x, delta, torch.empty(0, d_out, d_in, device="meta"))
