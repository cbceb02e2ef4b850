"""EDGE's gradient the long way round: the baselines that one backward pass is measured against.

Both functions run a whole training step up to the optimiser in plain PyTorch and leave the projected
gradient in ``.grad``. They are slow on purpose: one is what the authors' published code does, the other is
what a careful reader of the paper would write first.

Source: Li et al., "EDGE" (CCL 2025), eq. 5–12; Zhang & Sabuncu (NeurIPS 2018) for generalised cross entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parameters = Literal["lora", "trainable"]


def published_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    labels: Tensor,
    *,
    alpha: float = 1.0,
    q: float = 0.7,
    params: Parameters = "lora",
) -> Tensor:
    """Leave ``e − α r`` in ``.grad``, as the published code computes it: two forwards, two backwards.

    For every projected tensor separately, with ``e`` the gradient of the mean cross entropy and ``g`` that of
    the amplified loss ``mean(q · p_y^q · CE)``, in which ``p_y`` is detached:

        ê = e / ‖e‖_F,  ĝ = g / ‖g‖_F  (0 where the norm is 0),  c = ê + ĝ  (not normalised),
        r_i = g_i − (g_i · c_i) c_i  for each row i,  taken by a Python loop.

    A one-dimensional tensor counts as a single row. Trainable parameters that are not projected keep ``e``.
    The second forward draws its own dropout masks.

    Args:
        model: called as ``model(**batch)``; returns logits (B, C) or an object that has ``.logits``.
        batch: inputs without labels.
        labels: (B,) int64 class ids.
        alpha: strength of the removal, α ≥ 0.
        q: exponent of the amplified loss, 0 < q ≤ 1.
        params: ``"lora"`` projects parameters with ``lora_`` in their name, ``"trainable"`` all that train.

    Returns:
        The mean cross entropy of the first forward, a detached scalar.

    Raises:
        ValueError: ``alpha`` or ``q`` out of range, unknown ``params``, or nothing to project.
    """
    _check(alpha, q)
    chosen, others = _parameters(model, params)
    everything = chosen + others

    _clear(everything)
    loss = F.cross_entropy(_logits(model, batch), labels)
    loss.backward()
    plain = [parameter.grad for parameter in everything]

    _clear(everything)
    logits = _logits(model, batch)
    p_y = torch.softmax(logits.detach(), dim=-1).gather(1, labels[:, None]).squeeze(1)
    amplified = q * p_y**q * F.cross_entropy(logits, labels, reduction="none")
    amplified.mean().backward()

    for parameter, e in zip(chosen, plain[: len(chosen)], strict=True):
        g = parameter.grad
        parameter.grad = e if e is None or g is None else row_by_row(e, g, alpha)
    for parameter, e in zip(others, plain[len(chosen) :], strict=True):
        parameter.grad = e
    return loss.detach()


def shared_forward_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    labels: Tensor,
    *,
    alpha: float = 1.0,
    q: float = 0.7,
    params: Parameters = "lora",
) -> Tensor:
    """Leave ``(1 + α|g| / (2|e|)) e − (α/2) g`` in ``.grad``: one forward, two backward passes over it.

    ``e`` is the gradient of the mean cross entropy, ``g`` that of ``mean((1 − p_y^q) / q)``; norms are taken
    over all projected parameters together (one global segment). ``e`` is left as it is where ``|e| = 0``
    or ``|g| = 0``. Trainable parameters that are not projected keep ``e``.

    Args:
        model: called as ``model(**batch)``; returns logits (B, C) or an object that has ``.logits``.
        batch: inputs without labels.
        labels: (B,) int64 class ids.
        alpha: strength of the removal, α ≥ 0.
        q: exponent of generalised cross entropy, 0 < q ≤ 1.
        params: ``"lora"`` projects parameters with ``lora_`` in their name, ``"trainable"`` all that train.

    Returns:
        The mean cross entropy, a detached scalar.

    Raises:
        ValueError: ``alpha`` or ``q`` out of range, unknown ``params``, or nothing to project.
    """
    _check(alpha, q)
    chosen, others = _parameters(model, params)
    everything = chosen + others

    _clear(everything)
    logits = _logits(model, batch)
    loss = F.cross_entropy(logits, labels)
    loss.backward(retain_graph=True)
    plain = [parameter.grad for parameter in everything]

    _clear(everything)
    log_p = torch.log_softmax(logits, dim=-1).gather(1, labels[:, None]).squeeze(1)
    ((1 - torch.exp(q * log_p)) / q).mean().backward()
    amplified = [parameter.grad for parameter in chosen]

    for parameter, e in zip(everything, plain, strict=True):
        parameter.grad = e
    _closed_form_(plain[: len(chosen)], amplified, alpha)
    return loss.detach()


def row_by_row(e: Tensor, g: Tensor, alpha: float) -> Tensor:
    direction = _unit(e) + _unit(g)
    remainder = g.clone(memory_format=torch.contiguous_format)
    shape = (1, -1) if g.ndim < 2 else (g.shape[0], -1)
    rows, axes = remainder.view(shape), direction.reshape(shape)
    for i in range(rows.shape[0]):
        rows[i] = rows[i] - torch.dot(rows[i], axes[i]) * axes[i]
    return e - alpha * remainder


def _unit(tensor: Tensor) -> Tensor:
    norm = tensor.norm()
    return tensor / norm if norm > 0 else torch.zeros_like(tensor)


def _closed_form_(plain: list[Tensor | None], amplified: list[Tensor | None], alpha: float) -> None:
    pairs = [(e, g) for e, g in zip(plain, amplified, strict=True) if e is not None and g is not None]
    e_norm = torch.stack([e.square().sum() for e, _ in pairs]).sum().sqrt()
    g_norm = torch.stack([g.square().sum() for _, g in pairs]).sum().sqrt()
    if e_norm == 0 or g_norm == 0:
        return
    keep = 1 + alpha * g_norm / (2 * e_norm)
    for e, g in pairs:
        e.mul_(keep).add_(g, alpha=-alpha / 2)


def _parameters(model: nn.Module, params: Parameters) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    if params not in ("lora", "trainable"):
        raise ValueError(f"params: expected 'lora' or 'trainable', got {params!r}")
    chosen: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (chosen if params == "trainable" or "lora_" in name else others).append(parameter)
    if not chosen:
        raise ValueError(f"the model has no parameter to project under params={params!r}")
    return chosen, others


def _check(alpha: float, q: float) -> None:
    if alpha < 0:
        raise ValueError(f"alpha: expected a number >= 0, got {alpha}")
    if not 0 < q <= 1:
        raise ValueError(f"q: expected 0 < q <= 1, got {q}")


def _clear(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    output = model(**batch)
    return output if isinstance(output, Tensor) else output.logits
