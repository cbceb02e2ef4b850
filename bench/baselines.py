"""How EDGE's projection is written without this package: every one leaves it in the first set."""

from __future__ import annotations

import torch
from torch import Tensor


def foreach(erm: list[Tensor], gce: list[Tensor], alpha: float = 1.0) -> None:
    """Norms and one combination by torch's multi-tensor functions."""
    e_norm = torch.stack(torch._foreach_norm(erm)).norm()
    g_norm = torch.stack(torch._foreach_norm(gce)).norm()
    # The cosine is what users watch; no multi-tensor function has it.
    torch.stack([torch.dot(e.view(-1), g.view(-1)) for e, g in zip(erm, gce, strict=True)]).sum()
    torch._foreach_mul_(erm, (1 + alpha * g_norm / (2 * e_norm)).item())
    torch._foreach_add_(erm, gce, alpha=-alpha / 2)


def flatten_and_concatenate(erm: list[Tensor], gce: list[Tensor], alpha: float = 1.0) -> None:
    """One long vector a set, the paper's steps on them, and copies back."""
    e = torch.cat([shard.view(-1) for shard in erm])
    g = torch.cat([shard.view(-1) for shard in gce])
    bisector = e / e.norm() + g / g.norm()
    bias = g - torch.dot(g, bisector) / torch.dot(bisector, bisector) * bisector
    projected = e - alpha * bias
    for shard, piece in zip(erm, projected.split([shard.numel() for shard in erm]), strict=True):
        shard.copy_(piece.view_as(shard))


def clone_and_unflatten(erm: list[Tensor], gce: list[Tensor], alpha: float = 1.0) -> None:
    """As gradient-surgery packages go about it: clone every shard, flatten, stack, project, unflatten."""
    shapes = [shard.shape for shard in erm]
    flat = [torch.cat([shard.clone().flatten() for shard in group]) for group in (erm, gce)]
    masks = [torch.cat([torch.ones_like(shard).flatten() for shard in group]) for group in (erm, gce)]
    stacked = torch.stack(flat) * torch.stack(masks)
    e, g = stacked[0].clone(), stacked[1].clone()
    bisector = e / e.norm() + g / g.norm()
    projected = e - alpha * (g - (g @ bisector) / (bisector @ bisector) * bisector)
    start = 0
    for shard, shape in zip(erm, shapes, strict=True):
        stop = start + shape.numel()
        shard.copy_(projected[start:stop].view(shape).clone())
        start = stop


class Triad:
    """``a = b + s·c`` on vectors as long as a gradient set: what the memory gives, as STREAM asks it."""

    def __init__(self, elements: int, device: str = "cpu") -> None:
        self._b = torch.ones(elements, device=device)
        self._c = torch.ones(elements, device=device)
        self._a = torch.empty(elements, device=device)
        self.bytes = 3 * 4 * elements

    def __call__(self) -> None:
        torch.add(self._b, self._c, alpha=0.5, out=self._a)
