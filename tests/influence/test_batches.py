"""Batches under a budget: every sample once, padding counted, the same each time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastproj.influence.batches import TokenBatches

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def samples_of(lengths: list[int]) -> list[dict[str, object]]:
    return [{"input_ids": [row + 1] * length, "id": f"s{row}"} for row, length in enumerate(lengths)]


@given(LENGTHS, st.integers(1, 200), st.integers(1, 9))
def test_budgets_hold_and_nothing_is_lost(lengths: list[int], max_tokens: int, max_samples: int) -> None:
    batches = TokenBatches(
        samples_of(lengths), pad_token_id=0, max_tokens=max_tokens, max_samples=max_samples
    )
    seen: dict[str, list[int]] = {}
    sizes = []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape
        assert ids.shape[0] <= max_samples
        assert ids.numel() <= max_tokens or ids.shape[0] == 1
        assert torch.equal(mask.bool(), ids != 0)
        sizes.append(ids.shape[1])
        seen.update({name: row[row != 0].tolist() for name, row in zip(batch["id"], ids, strict=True)})
    assert sizes == sorted(sizes, reverse=True)
    assert len(batches) == len(sizes)
    assert seen == {s["id"]: s["input_ids"] for s in samples_of(lengths)}


def test_labels_are_padded_with_the_index_that_is_ignored() -> None:
    samples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    (batch,) = TokenBatches(samples, pad_token_id=1)
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["id"] == ["0", "1"]
    (classes,) = TokenBatches([{"input_ids": [5], "labels": 2}], pad_token_id=0)
    assert classes["labels"].tolist() == [2]


def test_equal_lengths_keep_their_order_each_time() -> None:
    batches = TokenBatches(samples_of([3] * 10), pad_token_id=0, max_samples=4)
    first, second = ([batch["id"] for batch in batches] for _ in range(2))
    assert first == second == [["s0", "s1", "s2", "s3"], ["s4", "s5", "s6", "s7"], ["s8", "s9"]]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        TokenBatches([], pad_token_id=0)
    with pytest.raises(ValueError, match="sample 1 has none"):
        TokenBatches([{"input_ids": [1]}, {"input_ids": []}], pad_token_id=0)
    with pytest.raises(ValueError, match="must be at least 1, got 0, 64"):
        TokenBatches(samples_of([1]), pad_token_id=0, max_tokens=0)


def test_masks_and_token_types_of_samples_are_kept() -> None:
    samples = [
        {"input_ids": [0, 6, 7], "attention_mask": [0, 1, 1], "token_type_ids": [0, 0, 1]},
        {"input_ids": [8], "attention_mask": [1], "token_type_ids": [1]},
    ]
    (batch,) = TokenBatches(samples, pad_token_id=0)
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("key", ["labels", "attention_mask"])
def test_a_list_of_another_length_is_refused(key: str) -> None:
    samples = [{"input_ids": [5, 6, 7], key: [1, 1, 1]}, {"input_ids": [8, 9], key: [1]}]
    with pytest.raises(ValueError, match=f"expected 2 {key} in sample 1, one for each token, got 1"):
        list(TokenBatches(samples, pad_token_id=0))


def test_samples_may_be_tensors() -> None:
    samples = [{"input_ids": torch.tensor([5, 6]), "labels": torch.tensor(n)} for n in (2, 1)]
    (batch,) = TokenBatches(samples, pad_token_id=0)
    assert batch["labels"].tolist() == [2, 1]
    assert batch["input_ids"].tolist() == [[5, 6]] * 2
    (batch,) = TokenBatches([{"input_ids": [5, 6], "labels": torch.tensor([-100, 6])}], pad_token_id=0)
    assert batch["labels"].tolist() == [[-100, 6]]
