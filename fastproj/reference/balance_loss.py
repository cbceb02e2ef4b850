"""How unevenly the logits of labels are set, and how far labels tell samples apart, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def check_labels(labels: Tensor, num_labels: int, ignore_index: int) -> None:
    """Raise ValueError for an entry that is no label and not ``ignore_index``."""
    highest = num_labels - 1 if labels.dim() == 1 else 1
    for label in labels.flatten().to(torch.int64).tolist():
        if label != ignore_index and not 0 <= label <= highest:
            raise ValueError(f"labels must be in 0 … {highest} or {ignore_index}, got {label}")


def memberships(labels: Tensor, num_labels: int, ignore_index: int) -> Tensor:
    """(2, B, C) bool: whether sample i has label c, and whether it has not.

    labels (B,) integers, or (B, C) bool or 0-1 integers. Where one is ``ignore_index``, both are False: for a
    whole sample of (B,), for one entry of (B, C).
    """
    labels = labels.to(torch.int64)
    counts = labels != ignore_index
    if labels.dim() == 1:
        has = labels[:, None] == torch.arange(num_labels, device=labels.device)
        counts = counts[:, None]
    else:
        has = labels == 1
    return torch.stack([counts & has, counts & ~has])


def label_means(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """H^C and H^N as (2, C) fp64, and how many samples each is a mean over, (2, C) int64.

    ``H^C_c`` is the mean logit of c over the samples that have label c, ``H^N_c`` over those that have not;
    NaN where there are none. Differentiable. Raises ValueError for a label out of range.
    """
    check_labels(labels, logits.shape[1], ignore_index)
    sides = memberships(labels, logits.shape[1], ignore_index)
    means = [
        torch.stack([values[own].mean() for values, own in zip(logits.double().mT, side.mT, strict=True)])
        for side in sides
    ]
    return torch.stack(means), sides.sum(1)


def norm(values: Tensor) -> Tensor:
    """``‖v‖₂``, whose derivatives are 0 where it is 0."""
    square = values.square().sum()
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def spread(values: Tensor, members: Tensor) -> Tensor:
    """``‖v − mean(v)‖₂`` of the values that are members; 0 of none."""
    mean = torch.where(members, values, 0.0).sum() / members.sum()
    return norm(torch.where(members, values - mean, 0.0))


def propensity_and_discrimination(
    means: Tensor, counted: Tensor, present_only: bool = True
) -> tuple[Tensor, Tensor]:
    """Both losses of means (2, C) fp64, of which those count that ``counted`` (2, C) bool says.

    With S_C the labels that have an H^C, and S_N those that have an H^N and, if ``present_only``, an H^C too:

        propensity     = ‖H^C − mean(H^C)‖₂ over S_C  +  ‖H^N − mean(H^N)‖₂ over S_N
        discrimination = ‖H^C − H^N‖₂ over S_C ∩ S_N

    Differentiable, any number of times.
    """
    contain, contain_not = means
    present, absent = counted
    both = present & absent
    propensity = spread(contain, present) + spread(contain_not, both if present_only else absent)
    return propensity, norm(torch.where(both, contain - contain_not, 0.0))


def remembered(means: Tensor, counts: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
    """The means, with the known ones where no sample counts, and where there is one at all, both (2, C)."""
    counted = counts > 0
    if known is None:
        return means, counted
    return torch.where(counted, means, known), counted | ~known.isnan()


def balance_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    present_only: bool = True,
    known: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """(propensity, discrimination) as ``fastproj.balance_loss`` defines them, in fp64.

    logits (B, C) with labels (B,) or (B, C). ``known`` (2, C) fp64 are means for where the batch has none,
    NaN where nothing is known.
    """
    means, counted = remembered(*label_means(logits, labels, ignore_index), known)
    return propensity_and_discrimination(means, counted, present_only)
