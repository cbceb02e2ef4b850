"""Gradient surgery as it is written elsewhere; every contender is called as kindly as it allows."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastproj.bench.workloads import Shape

Sets = list[list[Tensor]]
Orders = list[list[int]]


def has_torchjd() -> bool:
    """Whether TorchJD can be imported; looks without importing it."""
    return importlib.util.find_spec("torchjd") is not None


def foreach(sets: Sets, orders: Orders) -> list[Tensor]:
    """PCGrad by hand: a dot product for each pair of shards, then torch's multi-tensor multiply and add."""
    size = len(sets)
    flat = [[shard.view(-1) for shard in own] for own in sets]
    gram = torch.zeros(size, size)
    for a in range(size):
        for b in range(a, size):
            gram[a, b] = gram[b, a] = sum(torch.dot(x, y) for x, y in zip(flat[a], flat[b], strict=True))
    weights = _pcgrad_weights(gram, orders).tolist()
    out = torch._foreach_mul(sets[0], weights[0])
    for own, weight in zip(sets[1:], weights[1:], strict=True):
        torch._foreach_add_(out, own, alpha=weight)
    return list(out)


def _pcgrad_weights(gram: Tensor, orders: Orders) -> Tensor:
    total = torch.zeros(len(gram))
    for i, visits in enumerate(orders):
        row = torch.zeros(len(gram))
        row[i] = 1.0
        for j in visits:
            row[j] -= torch.clamp(gram[j] @ row, max=0.0) / gram[j, j]
        total += row
    return total


def flatten_and_loop(sets: Sets, orders: Orders) -> list[Tensor]:
    """One long vector for each task, projected on the others in turn, as multi-task libraries go about it."""
    grads = torch.stack([torch.cat([shard.view(-1) for shard in own]) for own in sets])
    projected = grads.clone()
    for i, visits in enumerate(orders):
        for j in visits:
            inner = torch.dot(projected[i], grads[j])
            if inner < 0:
                projected[i] -= inner * grads[j] / grads[j].norm().pow(2)
    pieces = projected.sum(0).split([shard.numel() for shard in sets[0]])
    return [piece.contiguous().view_as(shard).clone() for piece, shard in zip(pieces, sets[0], strict=True)]


def by_parameter(sets: Sets, orders: Orders) -> list[Tensor]:
    """A Python loop over parameters around the same loop over tasks: one Gram for each tensor."""
    return [flatten_and_loop([[own[i]] for own in sets], orders)[0] for i in range(len(sets[0]))]


def with_jacobians(sets: Sets) -> list[Tensor]:
    """Parameters with the sets stacked shard by shard in ``.jac``, as TorchJD's ``backward`` leaves them.

    What the stacking costs those who have lists is not in TorchJD's time.
    """
    parameters: list[Tensor] = [torch.nn.Parameter(torch.empty_like(shard)) for shard in sets[0]]
    for parameter, at in zip(parameters, zip(*sets, strict=True), strict=True):
        parameter.jac = torch.stack(at)  # type: ignore[attr-defined]
    return parameters


def torchjd_jac_to_grad(
    parameters: list[Tensor], aggregator: Any, optimize: bool
) -> Callable[[], list[Tensor]]:
    """TorchJD's own call, the Jacobians left where they are."""
    land = import_module("torchjd.autojac").jac_to_grad

    def run() -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        land(parameters, aggregator, retain_jac=True, optimize_gramian_computation=optimize)
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    return run


def smollm2_shapes(rank: int = 8) -> list[Shape]:
    """LoRA on all linear layers of SmolLM2-135M: 30 blocks, 9 heads of 64 on 3 of keys and values."""
    linears = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    block = [shape for d_in, d_out in linears for shape in ((rank, d_in), (d_out, rank))]
    return block * 30


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes by which the process grew at its largest during a call; None where the kernel does not say."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(
            0
        )  # or what earlier calls have freed is taken for the call's own
        with open("/proc/self/clear_refs", "w", encoding="ascii") as reset:
            reset.write("5")
        before = _status("VmRSS")
        run()
        return max(_status("VmHWM") - before, 0)
    except OSError:
        return None


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
