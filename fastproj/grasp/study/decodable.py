"""Whether one direction is the factor: can it still be read where its supervised direction is taken out?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastproj.grasp.study.settings import Contrast
from fastproj.grasp.study.supervised import Supervised, activations
from fastproj.grasp.study.tasks import Task

FOLDS, RIDGE = 5, 0.1
Numbers = dict[str, float]


def decodable(model: nn.Module, task: Task, contrast: Contrast, planted: Supervised) -> Numbers:
    """Accuracy in [0, 1] of ridge classifiers of a factor, cross-validated, means over blocks or modules.

    From block outputs as they are, without the block's own supervised direction, and without the leading ones
    of all blocks, which the oracle arms that write are held to; from what adapted modules read, as it is and
    without the module's own direction, which the oracle arm that reads is held to.
    """
    texts = [text for cell in contrast.cells for side in cell for text in side]
    labels = torch.tensor(
        [float(k == 0) for cell in contrast.cells for k, side in enumerate(cell) for _ in side]
    )
    streams, inputs = activations(model, task, texts)
    found: dict[str, list[float]] = {}
    for values, own in zip(streams.values(), planted.by_block, strict=True):
        for name, basis in (
            ("", None),
            (", own taken out", own[:, None]),
            (", oracle's taken out", planted.basis.matrix),
        ):
            found.setdefault(f"blocks{name}", []).append(accuracy(without(values, basis), labels))
    for module, values in inputs.items():
        for name, basis in (("", None), (", own taken out", planted.by_module[module].matrix)):
            found.setdefault(f"modules{name}", []).append(accuracy(without(values, basis), labels))
    return {name: sum(values) / len(values) for name, values in found.items()}


def without(values: Tensor, basis: Tensor | None) -> Tensor:
    """Rows (N, d) without their part along orthonormal columns (d, k)."""
    if basis is None:
        return values
    wide = basis.to(values)
    return values - (values @ wide) @ wide.mT


def accuracy(values: Tensor, labels: Tensor) -> float:
    """Share of right answers of ridge regression on standardised features, each fold answered by the others.

    values (N, d), labels (N,) of 0 and 1. The penalty is ``RIDGE`` times the mean of the kernel's diagonal.
    """
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    right = 0
    for fold in range(FOLDS):
        held = torch.zeros(len(values), dtype=torch.bool)
        held[order[fold::FOLDS]] = True
        mean, spread = values[~held].mean(0), values[~held].std(0).clamp_min(1e-9)
        train, test = (values[~held] - mean) / spread, (values[held] - mean) / spread
        signs = (2 * labels[~held] - 1).to(values)
        kernel = train @ train.mT
        penalty = RIDGE * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=kernel.dtype)
        weights = torch.linalg.solve(kernel + penalty, signs - signs.mean())
        answers = test @ (train.mT @ weights) + signs.mean() > 0
        right += int((answers == (labels[held] == 1)).sum())
    return right / len(values)
