"""What the demo plants, how its texts are split, and how they are batched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastproj.demo.data import clean, find_archive, load_splits
from fastproj.demo.encoding import encode, evaluation_batches, training_batches
from fastproj.demo.injection import TEST_INJECTION, TRAIN_INJECTION, Injection, choose_carriers, group_ids

# The planted token


@pytest.mark.parametrize(
    "injection", [TRAIN_INJECTION, TEST_INJECTION, Injection(prevalence=0.1, strength=0.0)]
)
def test_prevalence_and_strength_are_met_exactly(injection: Injection) -> None:
    labels = torch.tensor([0, 1] * 500)
    carriers = choose_carriers(labels, injection, seed=3)
    assert int(carriers.sum()) == round(injection.prevalence * 1000)
    assert int(labels[carriers].sum()) == round(injection.strength * int(carriers.sum()))


def test_the_draw_depends_on_the_seed_alone() -> None:
    labels = torch.tensor([0, 1] * 200)
    first = choose_carriers(labels, TRAIN_INJECTION, seed=0)
    assert torch.equal(first, choose_carriers(labels, TRAIN_INJECTION, seed=0))
    assert not torch.equal(first, choose_carriers(labels, TRAIN_INJECTION, seed=1))


def test_an_injection_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 60 samples with label 1, got 50"):
        choose_carriers(torch.tensor([0, 1] * 50), Injection(prevalence=0.6, strength=1.0), seed=0)
    with pytest.raises(ValueError, match="strength"):
        Injection(strength=1.2)
    with pytest.raises(ValueError, match="token"):
        Injection(token=" ")


def test_groups_are_token_by_class() -> None:
    labels, carriers = torch.tensor([0, 1, 0, 1]), torch.tensor([False, False, True, True])
    assert group_ids(labels, carriers).tolist() == [0, 1, 2, 3]


# Texts


def test_cleaning_leaves_no_token_of_its_own() -> None:
    assert clean("So good!!! ! &amp;  more") == "So good! & more"
    assert clean("Fine! No run! Here") == "Fine! No run! Here"


def test_a_missing_archive_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTPROJ_CACHE", raising=False)
    with pytest.raises(FileNotFoundError, match=re.escape("vaderSentiment==3.3.2 -d .cache")):
        find_archive()
    monkeypatch.setenv("FASTPROJ_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        find_archive()


@pytest.fixture(scope="module")
def splits() -> dict:
    try:
        find_archive()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return load_splits()


def test_no_text_is_in_two_splits(splits: dict) -> None:
    texts = {name: {" ".join(t.casefold().split()) for t in split.texts} for name, split in splits.items()}
    for name, split in splits.items():
        assert len(texts[name]) == len(split), f"{name} holds a text twice"
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]


def test_splits_are_balanced_in_each_source(splits: dict) -> None:
    for split in splits.values():
        for source in ("movie", "tweet"):
            labels = [label for label, s in zip(split.labels, split.sources, strict=True) if s == source]
            assert len(labels) > 100
            assert 2 * sum(labels) == len(labels)
    sizes = {name: len(split) for name, split in splits.items()}
    # The hash sends 70, 10 and 20 % their way; balancing and chance move it by a point or two.
    assert sizes["train"] / sum(sizes.values()) == pytest.approx(0.7, abs=0.03)
    assert sizes["test"] / sum(sizes.values()) == pytest.approx(0.2, abs=0.03)


def test_splits_never_change(splits: dict) -> None:
    assert splits["test"].texts == load_splits()["test"].texts
    assert not any("!!" in text for split in splits.values() for text in split.texts)


# Encoding and batches


class Letters:
    """A tokenizer of one id per letter."""

    pad_token_id, cls_token_id, sep_token_id = 0, 1, 2

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text.strip()] for text in texts]}


def test_a_long_text_keeps_its_token() -> None:
    samples = encode(
        Letters(),
        [[7] * 50, [7] * 50, [8]],
        torch.tensor([0, 1, 1]),
        torch.tensor([True, False, True]),
        " !!",
        10,
    )
    bang = ord("!")
    assert samples.ids[0].tolist() == [1, 7, 7, 7, 7, 7, 7, bang, bang, 2]
    assert samples.ids[1].tolist() == [1, 7, 7, 7, 7, 7, 7, 7, 7, 2]
    assert samples.ids[2].tolist() == [1, 8, bang, bang, 2, 0, 0, 0, 0, 0]
    assert samples.lengths.tolist() == [10, 10, 5]
    inputs, labels = samples.batch(torch.tensor([2]))
    assert inputs["input_ids"].shape == (1, 5)
    assert inputs["attention_mask"].all()
    assert labels.tolist() == [1]


def test_an_epoch_meets_every_sample_once() -> None:
    lengths = torch.arange(64) % 13 + 3
    batches = list(training_batches(lengths, batch_size=8, steps=8, seed=0))
    assert torch.cat(batches).sort().values.tolist() == list(range(64))
    again = list(training_batches(lengths, batch_size=8, steps=8, seed=0))
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    other = list(training_batches(lengths, batch_size=8, steps=20, seed=1))
    assert len(other) == 20
    assert not all(torch.equal(a, b) for a, b in zip(batches, other[:8], strict=True))
    assert torch.cat(list(evaluation_batches(lengths, 10))).sort().values.tolist() == list(range(64))
