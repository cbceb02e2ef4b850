"""What the balance loss means: the reference against Python's numbers, step by step."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
from torch import Tensor

from fastproj.bindings.balance_loss import from_reference
from fastproj.kernels.cpu.balance_loss import balance_loss as cpu_balance_loss
from fastproj.reference.balance_loss import balance_loss as reference
from fastproj.reference.balance_loss import label_means, memberships, norm

IGNORED = -100


def length(values: list[float]) -> float:
    return sum(value * value for value in values) ** 0.5


def spread(means: dict[int, float]) -> float:
    return length([mean - fmean(means.values()) for mean in means.values()])


def plainly(logits: Tensor, members: list[list[int | None]], present_only: bool) -> tuple[float, float]:
    """The two losses as they are said in words; ``members`` are 1, 0 or None where nothing counts."""
    rows = logits.tolist()
    contain, contain_not = (
        {
            label: fmean(own)
            for label in range(logits.shape[1])
            if (own := [row[label] for row, has in zip(rows, members, strict=True) if has[label] == side])
        }
        for side in (1, 0)
    )
    both = contain.keys() & contain_not.keys()
    if present_only:
        contain_not = {label: contain_not[label] for label in both}
    gaps = [contain[label] - contain_not[label] for label in both]
    return spread(contain) + spread(contain_not), length(gaps)


@pytest.mark.parametrize("present_only", [True, False])
@pytest.mark.parametrize("each", [True, False])
def test_it_is_what_the_words_say(each: bool, present_only: bool) -> None:
    """Label 4 is of no sample, label 0 of each that counts where a sample may have several."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, 5, generator=generator, dtype=torch.float64)
    if each:
        labels = torch.randint(0, 2, (7, 5), generator=generator)
        labels[:, 0], labels[:, 4] = 1, 0
        labels[2, 1] = labels[3, 0] = IGNORED
        members = [[None if value == IGNORED else value for value in row] for row in labels.tolist()]
    else:
        labels = torch.tensor([0, 1, IGNORED, 1, 3, 2, 3])
        members = [
            [None if label == IGNORED else int(label == own) for own in range(5)] for label in labels.tolist()
        ]
    got = reference(logits, labels, present_only=present_only)
    # fp64 sums of seven numbers near ten.
    want = torch.tensor(plainly(logits, members, present_only), dtype=torch.float64)
    torch.testing.assert_close(torch.stack(got), want, rtol=1e-13, atol=1e-13)


def test_memberships_are_of_one_side_or_none() -> None:
    has, has_not = memberships(torch.tensor([1, IGNORED, 0]), 2, IGNORED)
    assert has.tolist() == [[False, True], [False, False], [True, False]]
    assert has_not.tolist() == [[True, False], [False, False], [False, True]]
    has, has_not = memberships(torch.tensor([[True, False]]), 2, IGNORED)
    assert (has.tolist(), has_not.tolist()) == ([[True, False]], [[False, True]])


def test_means_of_no_sample_are_none() -> None:
    means, counts = label_means(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([1, 1]), IGNORED)
    assert counts.tolist() == [[0, 2], [2, 0]]
    assert means.isnan().tolist() == [[True, False], [False, True]]
    assert (means[0, 1].item(), means[1, 0].item()) == (4.0, 2.0)


def test_the_derivatives_of_a_norm_of_zero_are_zero() -> None:
    values = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(norm(values), values, create_graph=True)
    assert grad.tolist() == [0.0] * 3
    assert torch.autograd.grad(grad.sum(), values)[0].tolist() == [0.0] * 3


@pytest.mark.parametrize("wrong", [6, -1])
@pytest.mark.parametrize("function", [cpu_balance_loss, from_reference])
def test_labels_out_of_range_are_named(function: object, wrong: int) -> None:
    assert callable(function)
    logits = torch.zeros(3, 6)
    with pytest.raises(ValueError, match=f"labels must be in 0 … 5 or -100, got {wrong}"):
        function(logits, torch.tensor([1, IGNORED, wrong]), None, True, IGNORED)
    members = torch.zeros(3, 6, dtype=torch.int64)
    members[0, 0], members[2, 1] = IGNORED, wrong
    with pytest.raises(ValueError, match=f"labels must be in 0 … 1 or -100, got {wrong}"):
        function(logits, members, None, True, IGNORED)
