"""Losses and their gradients, as they are timed: each with one launch of its own either way."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import fastproj
from fastproj.bench.harness.case import CHECKED_SAMPLES, SUMMED, Case, gradients, require_close
from fastproj.bench.harness.clock import Subject
from fastproj.bench.traffic.balance_loss import LABELS, balance_loss_call
from fastproj.bench.traffic.cross_entropy import cross_entropy_call, vocabulary
from fastproj.bench.traffic.workloads import Workload
from fastproj.reference.balance_loss import balance_loss as reference_balance_loss
from fastproj.reference.cross_entropy import cross_entropy as reference_cross_entropy

MOST_ROWS = 512  # of logits in a call: a vocabulary's rows of a whole batch would fill some memories


def cross_entropy_case(workload: Workload, device: str) -> Case:
    """Losses of one sample's tokens over the model's vocabulary, and the gradient of their logits."""
    tokens, classes, dtype = min(workload.tokens, MOST_ROWS), vocabulary(workload), workload.activation_dtype
    traffic = cross_entropy_call(tokens, classes, dtype, workload.name)

    def prepare(rows: int, seed: int) -> tuple[Tensor, Tensor]:
        (logits,) = gradients([(rows, classes)], dtype, seed, device)
        return logits[None].requires_grad_(), torch.arange(rows, device=device)[None]

    def losses_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = fastproj.cross_entropy(logits, labels, reduction="sum").losses
        return losses.detach(), torch.autograd.grad(losses, logits, torch.ones_like(losses))[0]

    def check() -> None:
        logits, labels = prepare(CHECKED_SAMPLES, 0)
        losses, gradient = losses_and_gradient(logits, labels)
        exact = logits.detach().double().cpu().requires_grad_()
        want, *_ = reference_cross_entropy(exact, labels.cpu(), reduction="sum")
        (wanted,) = torch.autograd.grad(want, exact, torch.ones_like(want))
        # A probability rounded, and the sum of a vocabulary's exponentials in fp32.
        rounding = torch.finfo(gradient.dtype).eps * wanted.abs() + SUMMED * wanted.abs().max()
        require_close("cross_entropy", [losses], [want.detach()], SUMMED * want.max().item())
        require_close("cross_entropy", [gradient], [wanted], rounding)

    part = f"{tokens} tokens, {classes} classes"
    subject = Subject(
        lambda seed: partial(losses_and_gradient, *prepare(tokens, seed)),
        traffic.least_bytes, traffic.least_bytes, traffic.launches,
    )  # fmt: skip
    return Case("cross_entropy", workload.name, part, dtype, traffic, subject, check)


def balance_loss_case(workload: Workload, device: str) -> Case:
    """Propensity and discrimination of a batch's label logits, and their gradient."""
    samples, dtype = workload.samples, workload.activation_dtype
    traffic = balance_loss_call(samples, LABELS, dtype, workload.name)

    def prepare(seed: int) -> tuple[Tensor, Tensor]:
        (logits,) = gradients([(samples, LABELS)], dtype, seed, device)
        return logits.requires_grad_(), torch.arange(samples, device=device) % LABELS

    def losses_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = fastproj.balance_loss(logits, labels)
        ones = torch.ones_like(loss.propensity)
        (gradient,) = torch.autograd.grad(loss, logits, (ones, ones))
        return loss.propensity.detach(), loss.discrimination.detach(), gradient

    def check() -> None:
        logits, labels = prepare(0)
        *losses, gradient = losses_and_gradient(logits, labels)
        exact = logits.detach().double().cpu().requires_grad_()
        wants = reference_balance_loss(exact, labels.cpu())
        (wanted,) = torch.autograd.grad(torch.stack(wants).sum(), exact)
        largest = max(want.item() for want in wants)
        require_close("balance_loss", losses, [want.detach() for want in wants], SUMMED * largest)
        # Sums in fp64 are far closer than that; the gradient is rounded to its dtype.
        rounding = torch.finfo(gradient.dtype).eps * wanted.abs() + SUMMED * wanted.abs().max()
        require_close("balance_loss", [gradient], [wanted], rounding)

    part = f"{samples} samples, {LABELS} labels"
    subject = Subject(
        lambda seed: partial(losses_and_gradient, *prepare(seed)),
        traffic.least_bytes, traffic.least_bytes, traffic.launches,
    )  # fmt: skip
    return Case("balance_loss", workload.name, part, dtype, traffic, subject, check)
