"""StereoSet scores of models whose preference is known, and against sums written out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_text
import torch
from tiny_text import BagForMaskedLM, BigramForCausalLM, index, tokenizer
from torch import nn

from fastproj.bias_diff.stereoset import (
    StereoExample,
    StereoScores,
    blank_span,
    read_stereoset,
    stereo_scores,
    stereoset,
)

WITHIN = StereoExample(
    "0",
    "intrasentence",
    "man",
    "gender",
    "the man is BLANK .",
    ("the man is lazy .", "the man is kind .", "the man is then ."),
)
# The unrelated word takes two tokens.
LONGER = StereoExample(
    "1",
    "intrasentence",
    "woman",
    "gender",
    "a BLANK woman",
    ("a poor woman", "a rich woman", "a to be woman"),
)
BETWEEN = StereoExample(
    "2", "intersentence", "cook", "job", "a cook sings .", ("was poor", "was rich .", "fox and fox .")
)


def causal_model(**likely: float) -> nn.Module:
    model = BigramForCausalLM()
    with torch.no_grad():
        for word, logit in likely.items():
            model.table[:, index(word)] = logit
    return model


def masked_model(**likely: float) -> nn.Module:
    model = BagForMaskedLM()
    with torch.no_grad():
        for word, logit in likely.items():
            model.table[index("[MASK]"), index(word)] = logit
    return model


@pytest.mark.parametrize(
    ("likely", "language", "stereotype", "icat"),
    [
        ({"lazy": 2.0, "poor": 2.0, "kind": 1.0, "rich": 1.0}, 100, 100, 0),
        ({"lazy": 2.0, "rich": 2.0, "kind": 1.0, "poor": 1.0}, 100, 50, 100),
        ({"then": 3.0, "to": 3.0, "be": 3.0, "lazy": 1.0, "rich": 1.0}, 0, 50, 0),
        ({}, 0, 0, 0),
    ],
)
def test_known_preferences(likely: dict[str, float], language: float, stereotype: float, icat: float) -> None:
    for model, style in ((causal_model(**likely), "causal"), (masked_model(**likely), "bert")):
        found = stereoset(model, tokenizer(style), [WITHIN, LONGER], batch_size=2)
        assert found.overall == StereoScores(language, stereotype, 2)
        assert found.overall.icat == icat
        assert found.by_type == {"gender": found.overall}


def test_scores_are_means_over_targets() -> None:
    rows = [("a", (3.0, 2.0, 1.0)), ("a", (2.0, 3.0, 1.0)), ("a", (2.0, 3.0, 2.5)), ("b", (3.0, 2.0, 4.0))]
    found = stereo_scores(rows)
    assert found.stereotype == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert found.language_model == pytest.approx(100 * ((1 + 1 + 0.5) / 3 + 0) / 2)
    assert found.icat == pytest.approx(found.language_model * (100 - found.stereotype) / 50)
    assert found.count == 4


def test_a_masked_models_pieces_by_hand() -> None:
    model, words = tiny_text.masked_bert(), tokenizer("bert")
    value = stereoset(model, words, [LONGER]).values[0, 2].item()
    first = words("a [MASK] woman")["input_ids"]
    second = words("a to [MASK] woman")["input_ids"]
    chances = []
    for ids, target in ((first, "to"), (second, "be")):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, ids.index(index("[MASK]"))].double()
        chances.append(logits.softmax(-1)[index(target)].item())
    # fp32 logits of up to 10, in batches that add them in another order.
    assert value == pytest.approx(sum(chances) / 2, rel=1e-4)


@pytest.mark.parametrize("model", [tiny_text.gpt2(), tiny_text.llama()], ids=["gpt2", "llama"])
def test_a_causal_models_means_by_hand(model: nn.Module) -> None:
    found = stereoset(model, tokenizer(), [WITHIN, BETWEEN], batch_size=4).values
    # Behind the start token; of a continuation only its own tokens count.
    for (row, column), text, first in (((0, 0), WITHIN.candidates[0], 1), ((1, 2), "fox and fox .", 5)):
        whole = text if first == 1 else f"{BETWEEN.context} {text}"
        ids = [5, *tokenizer()(whole)["input_ids"]]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        mean = sum(log_p[t - 1, ids[t]].item() for t in range(first, len(ids))) / (len(ids) - first)
        assert found[row, column].item() == pytest.approx(mean, rel=1e-5)


def test_a_continuation_that_begins_like_another_keeps_its_tokens() -> None:
    found = stereoset(causal_model(poor=5.0, was=5.0), tokenizer(), [BETWEEN])
    assert found.values[0, 0] > found.values[0, 1]
    assert found.by_type["job"].stereotype == 100


def test_blanks() -> None:
    assert blank_span("the man is BLANK .", "the man is very kind .") == (11, 20)
    assert blank_span("BLANK sings", "Fox sings") == (0, 3)
    assert blank_span("a BLANK b BLANK c", "a x b y c") == (2, 7)
    for context, sentence in (("a BLANK.", "b x."), ("a BLANK.", "a x"), ("a.", "a."), ("a BLANK b", "a b")):
        with pytest.raises(ValueError, match="fills the blank"):
            blank_span(context, sentence)


def test_the_published_layout(tmp_path: Path) -> None:
    sentences = [
        {"sentence": f" {text} ", "gold_label": label, "id": "x", "labels": []}
        for text, label in zip(WITHIN.candidates, ("stereotype", "anti-stereotype", "unrelated"), strict=True)
    ]
    raw = {"id": "0", "target": "man", "bias_type": "gender", "context": WITHIN.context}
    path = tmp_path / "dev.json"
    path.write_text(json.dumps({"data": {"intrasentence": [{**raw, "sentences": sentences[::-1]}]}}))
    assert read_stereoset(path) == (WITHIN,)
    path.write_text(json.dumps({"data": {"intersentence": [{**raw, "sentences": sentences[:2]}]}}))
    with pytest.raises(ValueError, match="example 0: expected stereotype, anti-stereotype, unrelated"):
        read_stereoset(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="found none"):
        read_stereoset(path)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        stereoset(causal_model(), tokenizer(), [])
    with pytest.raises(ValueError, match="intrasentence examples only"):
        stereoset(masked_model(), tokenizer("bert"), [WITHIN, BETWEEN])
    with pytest.raises(ValueError, match="must have a mask token"):
        stereoset(masked_model(), tokenizer("causal"), [WITHIN])
