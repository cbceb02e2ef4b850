"""How well labels are found: accuracy, and F1 over all labels and of the worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Classification:
    """Measures of N predictions over C labels, each from 0 to 1.

    Attributes:
        accuracy: share of samples whose labels are all right and none missing.
        weighted_f1: mean of the labels' F1, weighted by their support.
        macro_f1: plain mean of all C labels' F1.
        worst_f1, worst_label: the least F1 of a label with support, and that label, the first of equals.
        per_label_f1: by name.
        support: by name, the samples that have the label.
    """

    accuracy: float
    weighted_f1: float
    macro_f1: float
    worst_f1: float
    worst_label: str
    per_label_f1: dict[str, float]
    support: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Its attributes, as JSON takes them."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def classification(
    predicted: Tensor | Sequence[Any], gold: Tensor | Sequence[Any], names: Sequence[str]
) -> Classification:
    """``F1_c = 2 tp / (2 tp + fp + fn)`` of every label c, 0 where that is 0/0, and their means.

    predicted and gold: (N,) label numbers from 0, or (N, C) booleans where a sample has any number of labels.
    As scikit-learn defines ``accuracy_score`` and ``f1_score(labels=range(C), zero_division=0)``: a label
    that no sample has and none is given counts 0 in ``macro_f1``. All counts are exact, sums in fp64.

    Raises ValueError where shapes differ or are neither of these, a number is no label's, there is no sample,
    or none has a label; TypeError for values that are neither integers nor booleans.
    """
    said, true = _members("predicted", predicted, len(names)), _members("gold", gold, len(names))
    if said.shape != true.shape:
        raise ValueError(f"expected as many predictions as samples, got {len(said)} and {len(true)}")
    support = true.sum(0)
    if not int(support.sum()):
        raise ValueError("expected at least one sample with a label, got none")
    both = (said & true).sum(0).double()
    sides = (said.sum(0) + support).double()
    f1 = torch.where(sides > 0, 2 * both / sides.clamp_min(1), 0.0)
    worst = int(torch.where(support > 0, f1, torch.inf).argmin())
    return Classification(
        accuracy=float((said == true).all(1).double().mean()),
        weighted_f1=float((f1 * support).sum() / support.sum()),
        macro_f1=float(f1.mean()),
        worst_f1=float(f1[worst]),
        worst_label=names[worst],
        per_label_f1=dict(zip(names, f1.tolist(), strict=True)),
        support=dict(zip(names, support.tolist(), strict=True)),
    )


def _members(what: str, values: Tensor | Sequence[Any], number: int) -> Tensor:
    """Label numbers or booleans as (N, C) booleans on the CPU."""
    if not len(values):
        raise ValueError(f"{what}: expected at least one sample, got none")
    table = torch.as_tensor(values).cpu()
    if table.dtype == torch.bool:
        if table.dim() != 2 or table.shape[1] != number:
            raise ValueError(f"{what}: expected booleans (N, {number}), got shape {tuple(table.shape)}")
        return table
    if table.is_floating_point() or table.is_complex():
        raise TypeError(f"{what}: expected label numbers or booleans, got {table.dtype}")
    if table.dim() != 1:
        raise ValueError(f"{what}: expected label numbers (N,), got shape {tuple(table.shape)}")
    wrong = table[(table < 0) | (table >= number)]
    if len(wrong):
        raise ValueError(f"{what}: expected label numbers from 0 to {number - 1}, got {int(wrong[0])}")
    return table.long()[:, None] == torch.arange(number)
