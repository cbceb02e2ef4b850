"""A projection inside the span of gradient sets and AdamW's step along it, as one operator in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastproj.bindings._library import KERNEL_DTYPES, define, implementation
from fastproj.bindings._sets import gradient_sets, plan_of, split_sets
from fastproj.bindings.combine import check_coefficients
from fastproj.reference.projected_adamw import projected_adamw as reference_projected_adamw
from fastproj.reference.segments import Segments

WRITTEN = ("params", "exp_avgs", "exp_avg_sqs")


@torch.no_grad()
def projected_adamw_(
    sets: Sequence[Sequence[Tensor | None]],
    coefficients: Tensor,
    params: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor | None],
    exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    *,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    segments: Segments = "global",
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """AdamW's step along ``G = Σ_k C[s,k] G_k`` in one sweep over memory, where G is never a whole tensor.

    ``p ← p − lr·λ·p``, ``m ← β1 m + (1 − β1) G``, ``v ← β2 v + (1 − β2) G²``, then with t from ``steps``
    ``p ← p − lr·(m/(1 − β1ᵗ)) / (√(v/(1 − β2ᵗ)) + ε)``: :func:`fastproj.combine` and ``torch.optim.AdamW``,
    one after the other. Products and the step are taken in fp32, in fp64 where any tensor at the position is
    fp64, and p, m and v are rounded once; on the CPU G is rounded to their dtype if that is one. On a GPU up
    to 16 sets (6 where segments are rows); more pass by way of a sum of the first of them in memory.

    Args:
        sets: K lists of n shards each, as in :func:`fastproj.gram`.
        coefficients: (S, K), floating point, on the shards' device. A coefficient of exactly zero leaves its
            set out, non-finite values included.
        params, exp_avgs, exp_avg_sqs: p, m and v, n tensors each of the shards' shapes, written in place;
            fp32, bf16, fp16 or fp64, whatever the others are. Where the sets have None, theirs is ignored.
        steps: t of each parameter, 1 at the first step: one fp32 number each on their device, not changed.
        lr: learning rate, a number or a tensor of one element, on the host or on the device.
        beta1, beta2, eps, weight_decay: β1, β2, ε and λ.
        maximize: step up along G.
        segments: as in :func:`fastproj.gram`.
        grad_scale: what all sets are to be divided by, one element, as ``torch.amp.GradScaler`` has it.
        found_inf: where it is not 0, nothing is written; one element.

    Raises:
        TypeError: as in :func:`fastproj.combine`; an option or a tensor of another type than said above.
        ValueError: as in :func:`fastproj.combine`; an option outside its range; a tensor of p, m, v or the
            steps that does not fit its shard; one that is written and stands at two places.

    Not differentiable: runs under no_grad. Meaning: ``fastproj.reference.projected_adamw``.
    """
    checked = gradient_sets(sets, segments)
    check_coefficients(coefficients, checked)
    rate = _checked_options(lr, beta1, beta2, eps, weight_decay)
    for name, number in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if number is not None:
            _check_one_number(name, number)
    shards = split_sets(checked.shards, checked.num_sets)[0]
    lists = [
        _beside(own, name, checked.present, checked.length, shards)
        for name, own in zip(WRITTEN, (params, exp_avgs, exp_avg_sqs), strict=True)
    ]
    counted = _checked_steps(steps, checked.present, checked.length, shards)
    _check_written_once(lists, checked.shards)
    if checked.shards:
        torch.ops.fastproj.projected_adamw_(
            checked.shards, coefficients, checked.first, checked.rows, *lists, counted,
            rate, beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf,
        )  # fmt: skip


def _checked_options(
    lr: float | Tensor, beta1: float, beta2: float, eps: float, weight_decay: float
) -> Tensor:
    """The learning rate as a tensor: its value is looked at only where it is a number."""
    numbers = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    if isinstance(lr, Tensor):
        _check_one_number("lr", lr)
    else:
        numbers["lr"] = lr
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        most = 1.0 if name.startswith("beta") else float("inf")
        if not 0 <= value < most:
            raise ValueError(f"{name} must be in [0, {most:g}), got {value}")
    return lr if isinstance(lr, Tensor) else learning_rate(lr)


def learning_rate(lr: float | Tensor) -> Tensor:
    """As the operator takes it: a number becomes a tensor on the host, which nothing waits for."""
    return lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)


def _check_one_number(name: str, number: Tensor) -> None:
    if not isinstance(number, Tensor) or not number.dtype.is_floating_point:
        came = number.dtype if isinstance(number, Tensor) else type(number).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {came}")
    if number.numel() != 1:
        raise ValueError(f"{name} must have one element, got the shape {tuple(number.shape)}")


def _listed(own: Sequence[Tensor | None], name: str, present: tuple[int, ...], length: int) -> list[Any]:
    """The tensors beside the shards that are there."""
    if isinstance(own, Tensor) or not isinstance(own, Sequence):
        raise TypeError(f"{name} must be a list of tensors, got {type(own).__name__}")
    if len(own) != length:
        raise ValueError(f"{name} must have one tensor per shard: expected {length}, got {len(own)}")
    for i in present:
        if not isinstance(own[i], Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, as its shard is, got {type(own[i]).__name__}")
    return [own[i] for i in present]


def _beside(
    own: Sequence[Tensor | None],
    name: str,
    present: tuple[int, ...],
    length: int,
    shards: Sequence[Tensor],
) -> list[Tensor]:
    tensors: list[Tensor] = _listed(own, name, present, length)
    for i, tensor, shard in zip(present, tensors, shards, strict=True):
        if tensor.dtype not in KERNEL_DTYPES or tensor.layout != torch.strided:
            raise TypeError(
                f"{name}[{i}] must be dense fp32, bf16, fp16 or fp64, got {tensor.layout}, {tensor.dtype}"
            )
        if hasattr(tensor, "device_mesh"):
            raise TypeError(f"{name}[{i}] must be a plain tensor, got a DTensor: pass to_local()")
        if tensor.shape != shard.shape or tensor.device != shard.device:
            raise ValueError(
                f"{name}[{i}] must be {tuple(shard.shape)} on {shard.device} as its shard is, got "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )
    return tensors


def _checked_steps(
    steps: Sequence[Tensor | None], present: tuple[int, ...], length: int, shards: Sequence[Tensor]
) -> list[Tensor]:
    counted: list[Tensor] = _listed(steps, "steps", present, length)
    for i, step, shard in zip(present, counted, shards, strict=True):
        if step.dtype != torch.float32:
            raise TypeError(f"steps[{i}] must be fp32, got {step.dtype}")
        if step.numel() != 1 or step.device != shard.device:
            raise ValueError(
                f"steps[{i}] must be one number on {shard.device}, got {tuple(step.shape)} on {step.device}"
            )
    return counted


def _check_written_once(lists: Sequence[Sequence[Tensor]], shards: Sequence[Tensor]) -> None:
    """Compares where tensors begin; ones that overlap in part are not looked for."""
    seen: dict[int, str] = {}
    for name, own in zip(WRITTEN, lists, strict=True):
        for i, tensor in enumerate(own):
            if tensor.numel() and seen.setdefault(tensor.data_ptr(), f"{name}[{i}]") != f"{name}[{i}]":
                raise ValueError(
                    f"{name}[{i}] shares memory with {seen[tensor.data_ptr()]}; both are written"
                )
    for i, shard in enumerate(shards):
        if shard.numel() and shard.data_ptr() in seen:
            raise ValueError(
                f"shard {i % len(lists[0])} of set {i // len(lists[0])} shares memory with "
                f"{seen[shard.data_ptr()]}, which is written"
            )


def from_reference(
    shards: list[Tensor],
    coefficients: Tensor,
    first: Sequence[int],
    rows: bool,
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    found_inf: Tensor | None,
) -> None:
    """The reference under the operator's plain arguments."""
    if found_inf is not None and found_inf.item() != 0:
        return
    stepped = reference_projected_adamw(
        split_sets(shards, coefficients.shape[1]),
        coefficients,
        plan_of(first, rows, coefficients.shape[0]),
        params,
        exp_avgs,
        exp_avg_sqs,
        [step.item() for step in steps],
        lr=lr.item(),
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
    )
    for own, values in zip((params, exp_avgs, exp_avg_sqs), stepped, strict=True):
        for target, value in zip(own, values, strict=True):
            target.copy_(value)


def _dispatch(
    shards: list[Tensor],
    coefficients: Tensor,
    first: list[int],
    rows: bool,
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    coefficients = coefficients.to(torch.float64)
    if grad_scale is not None:
        coefficients = coefficients / grad_scale.to(coefficients).reshape(())
    if maximize:
        coefficients = -coefficients
    implementation("projected_adamw", shards[0].device.type)(
        shards, coefficients, first, rows, params, exp_avgs, exp_avg_sqs, steps,
        lr, beta1, beta2, eps, weight_decay, found_inf,
    )  # fmt: skip


def _fake(*_: Any) -> None:
    return None


define(
    "projected_adamw_(Tensor[] shards, Tensor coefficients, int[] first, bool rows, Tensor(a!)[] params, "
    "Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor[] steps, Tensor lr, float beta1, float beta2, "
    "float eps, float weight_decay, bool maximize, Tensor? grad_scale, Tensor? found_inf) -> ()",
    _dispatch,
    _fake,
)
