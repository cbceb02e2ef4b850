"""CrowS-Pairs scores of models whose preference is known, and against the sum written out by hand."""

from __future__ import annotations

import math

import pytest
import tiny_text
import torch
from tiny_text import BagForMaskedLM, BigramForCausalLM, index, tokenizer
from torch import nn

from fastproj.bias_diff.crows_pairs import CrowsPairsResult, PairScore, crows_pairs, shared_positions
from fastproj.bias_diff.sources import CrowsPair

PAIRS = (
    CrowsPair("0", "the poor man is lazy .", "the rich man is lazy .", "stereo", "wealth"),
    CrowsPair("1", "a poor woman and a fox", "a rich woman and a fox", "antistereo", "gender"),
    CrowsPair("2", "poor man sings", "rich man sings", "stereo", "gender"),
)


def model_that_likes(word: str, kind: str) -> nn.Module:
    """One in whose eyes ``word`` (masked: whatever stands beside it) is likely."""
    if kind == "causal":
        causal = BigramForCausalLM()
        with torch.no_grad():
            causal.table[:, index(word)] = 2.0
        return causal
    masked = BagForMaskedLM()
    with torch.no_grad():
        masked.table[index(word), 6:] = 2.0
    return masked


@pytest.mark.parametrize(("kind", "style"), [("causal", "causal"), ("masked", "bert")])
def test_a_known_bias_is_scored_as_such(kind: str, style: str) -> None:
    for word, score in (("poor", 100.0), ("rich", 0.0)):
        found = crows_pairs(model_that_likes(word, kind), tokenizer(style), PAIRS, batch_size=2)
        assert found.score == score
        assert found.by_type == {"gender": score, "wealth": score}
        assert found.by_direction == {"antistereo": score, "stereo": score}
        assert found.neutral == 0


@pytest.mark.parametrize(("kind", "style"), [("causal", "causal"), ("masked", "bert")])
def test_a_model_without_preference_is_neutral(kind: str, style: str) -> None:
    found = crows_pairs(model_that_likes("not", kind), tokenizer(style), PAIRS)
    assert (found.score, found.neutral) == (0.0, 3)


def test_a_pseudo_likelihood_by_hand() -> None:
    # In "poor man sings", "man" is masked beside "poor" and "sings", then "sings" beside "poor" and "man".
    model = model_that_likes("poor", "masked")
    more = crows_pairs(model, tokenizer("bert"), PAIRS[2:]).pairs[0]
    words, special = tiny_text.VOCABULARY - 6, 6
    likely = 2 - math.log(words * math.exp(2) + special)
    # fp64 against fp64.
    assert more.more == pytest.approx(2 * likely, abs=1e-12)
    assert more.less == pytest.approx(-2 * math.log(tiny_text.VOCABULARY), abs=1e-12)


def test_the_sum_over_shared_tokens_of_a_real_architecture() -> None:
    model, words = tiny_text.masked_bert(), tokenizer("bert")
    found = crows_pairs(model, words, PAIRS, batch_size=4)
    for score in found.pairs:
        # These pairs differ in one word; [CLS] and [SEP] are no tokens of the sentence.
        for text, value in ((score.pair.more, score.more), (score.pair.less, score.less)):
            ids = words(text)["input_ids"]
            shared = [at for at in range(1, len(ids) - 1) if ids[at] not in (index("poor"), index("rich"))]
            by_hand = 0.0
            for at in shared:
                masked = torch.tensor([[*ids[:at], 4, *ids[at + 1 :]]])
                with torch.no_grad():
                    by_hand += model(masked).logits[0, at].double().log_softmax(-1)[ids[at]].item()
            # fp32 logits of up to 10, in batches that add them in another order.
            assert value == pytest.approx(by_hand, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("model", [tiny_text.gpt2(), tiny_text.llama()], ids=["gpt2", "llama"])
def test_the_likelihood_of_whole_sentences(model: nn.Module) -> None:
    found = crows_pairs(model, tokenizer(), PAIRS)
    for score in found.pairs:
        ids = torch.tensor([[5, *tokenizer()(score.pair.more)["input_ids"]]])
        loss = model(input_ids=ids, labels=ids).loss.item()
        # transformers' own mean loss, in fp32.
        assert score.more == pytest.approx(-loss * (ids.shape[1] - 1), rel=1e-5)


def test_tokens_that_two_rows_share() -> None:
    assert shared_positions([1, 2, 3, 4], [1, 9, 8, 3, 4]) == [(0, 0), (2, 3), (3, 4)]
    assert shared_positions([1], [2]) == []
    # More repeats than difflib's guess at what is too common would keep.
    assert len(shared_positions([1] + [7] * 300, [2, 3] + [7] * 300)) == 300


def test_a_pair_without_shared_tokens_prefers_neither() -> None:
    pair = CrowsPair("0", "poor", "rich", "stereo", "wealth")
    found = crows_pairs(model_that_likes("poor", "masked"), tokenizer("bert"), [pair])
    assert (found.score, found.neutral) == (0.0, 1)


def test_percentages_count_neutral_pairs() -> None:
    differences = (1.0, 1e-6, -1e-6, -2.0)
    scores = tuple(PairScore(PAIRS[0], difference, 0.0) for difference in differences)
    found = CrowsPairsResult(scores)
    assert (found.score, found.neutral) == (25.0, 2)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        crows_pairs(BagForMaskedLM(), tokenizer("bert"), [])
    with pytest.raises(ValueError, match="must have a mask token"):
        crows_pairs(BagForMaskedLM(), tokenizer("causal"), PAIRS)
    with pytest.raises(ValueError, match="causal or masked"):
        crows_pairs(tiny_text.classifying_bert(), tokenizer("bert"), PAIRS)
