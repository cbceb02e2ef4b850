"""Random projections: every kind against what is usually done, side by side.

``traker`` stands for its BasicProjector, where it is installed: a block of P's rows is drawn, multiplied and
thrown away. ``a block at a time`` does the same with ±1 by the shortest way in torch. Seconds are those of a
whole batch; compare within a group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from fastproj.bench.bench_weighted_grad import DEVICES, timed
from fastproj.bindings.sketch import sketch
from fastproj.reference.sketch import KINDS

DIMENSION, BLOCK = 4096, 128
# samples, positions: a tenth of the length that is usually quoted, 10⁶, to keep runs short
BATCHES = {"one vector": (1, 100_000), "32 vectors": (32, 100_000)}


def block_at_a_time(v: Tensor) -> Tensor:
    generator = torch.Generator(v.device).manual_seed(0)
    pieces = []
    for first in range(0, DIMENSION, BLOCK):
        rows = min(BLOCK, DIMENSION - first)
        signs = torch.empty(v.shape[1], rows, device=v.device).bernoulli_(generator=generator)
        pieces.append(v @ signs.mul_(2).sub_(1))
    return torch.cat(pieces, dim=1) / DIMENSION**0.5


def traker(v: Tensor) -> Tensor:
    projectors = import_module("trak.projectors")
    projector = projectors.BasicProjector(
        grad_dim=v.shape[1], proj_dim=DIMENSION, seed=0, device=v.device, block_size=BLOCK, dtype=v.dtype,
        proj_type=projectors.ProjectionType.rademacher,
    )  # fmt: skip
    result: Tensor = projector.project(v, model_id=0)
    return result / DIMENSION**0.5


CONTENDERS: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"fastproj, {kind}": partial(sketch, dimension=DIMENSION, seed=0, kind=kind) for kind in KINDS},
    "a block at a time": block_at_a_time,
    **({"traker": traker} if find_spec("trak") else {}),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_sketch(benchmark: Any, contender: str, batch: str, device: str) -> None:
    samples, positions = BATCHES[batch]
    v = torch.randn(samples, positions, generator=torch.Generator().manual_seed(0)).to(device)
    function = CONTENDERS[contender]
    threads = torch.get_num_threads()
    benchmark.group = f"sketch, {batch} of {positions} to {DIMENSION}, fp32, {device}, {threads} threads"
    # A fast wrong answer is no contender: norms are kept, products of factors keep them least.
    norms, kept = (each.square().sum(1) for each in (v, function(v)))
    torch.testing.assert_close(kept, norms, rtol=0.9 if "kronecker" in contender else 0.15, atol=0)
    benchmark.pedantic(timed(function, device), args=(v,), rounds=3, warmup_rounds=0)
