"""SEAT against numpy, against all partitions by brute force, and where effect and p-value are known."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_text
import torch
from numpy.typing import NDArray
from tiny_text import tokenizer
from torch import Tensor

from fastproj.bias_diff.seat import SeatTest, embed, read_seat_test, seat, seat_of_vectors

TEST = SeatTest(
    ("the rich man", "a rich man sings", "rich"),
    ("the poor woman", "a poor woman sings", "poor"),
    ("kind", "is kind ."),
    ("lazy", "was lazy", "not kind"),
)


def drawn(*sizes: int, width: int = 5, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, width, generator=generator, dtype=torch.float64) for size in sizes]


def associations(targets: Tensor, a: Tensor, b: Tensor) -> NDArray[np.float64]:
    """Written independently of the package: one cosine at a time."""

    def cosine(u: NDArray[np.float64], v: NDArray[np.float64]) -> float:
        return float(u @ v / np.sqrt((u @ u) * (v @ v)))

    rows = [[cosine(w, v) for v in a.numpy()] for w in targets.numpy()]
    others = [[cosine(w, v) for v in b.numpy()] for w in targets.numpy()]
    return np.array([np.mean(near) - np.mean(far) for near, far in zip(rows, others, strict=True)])


@pytest.mark.parametrize("sizes", [(4, 4, 3, 3), (3, 5, 2, 4), (1, 2, 1, 1)])
def test_effect_and_p_value_against_brute_force(sizes: tuple[int, int, int, int]) -> None:
    for seed in range(3):
        x, y, a, b = drawn(*sizes, seed=seed)
        s = associations(torch.cat([x, y]), a, b)
        n = len(x)
        differences = []
        for chosen in itertools.combinations(range(len(s)), n):
            inside = np.zeros(len(s), dtype=bool)
            inside[list(chosen)] = True
            differences.append(s[inside].mean() - s[~inside].mean())
        found = seat_of_vectors(x, y, a, b)
        # The first combination is the observed one. fp64 against fp64.
        assert found.effect_size == pytest.approx(differences[0] / s.std(ddof=1), rel=1e-9)
        at_least = sum(d >= differences[0] - 1e-12 for d in differences)
        assert found.p_value == pytest.approx(at_least / len(differences), abs=1e-12)
        assert (found.partitions, found.exact) == (math.comb(len(s), n), True)


@pytest.mark.parametrize(
    "other", [[], None, "text", {"targ1": []}, {"targ1": {"examples": "text"}}, {"targ1": {"examples": [1]}}]
)
def test_other_layouts_are_refused_by_name(tmp_path: Path, other: object) -> None:
    path = tmp_path / "test.json"
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"test\.json: expected targ1, .* got none for targ1"):
        read_seat_test(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"test\.json: no JSON"):
        read_seat_test(path)


def test_a_perfect_association() -> None:
    near, far = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    x, y = near.repeat(4, 1), far.repeat(4, 1)
    found = seat_of_vectors(x, y, near, far)
    # Associations 1 and −1: difference 2 over a deviation of √(8/7); one of C(8, 4) partitions reaches it.
    assert found.effect_size == pytest.approx(2 / math.sqrt(8 / 7), rel=1e-12)
    assert found.p_value == pytest.approx(1 / 70, rel=1e-12)
    opposite = seat_of_vectors(y, x, near, far)
    assert opposite.effect_size == pytest.approx(-found.effect_size, rel=1e-12)
    assert opposite.p_value == 1.0


def test_sampled_partitions_come_near_the_exact_p_value_and_follow_the_seed() -> None:
    x, y, a, b = drawn(6, 6, 4, 4, seed=3)
    exact = seat_of_vectors(x, y, a, b)
    sampled = seat_of_vectors(x, y, a, b, most_partitions=900, seed=1)
    assert exact.exact
    assert not sampled.exact
    assert sampled.partitions == 901
    # Five standard errors of a share of 900 draws, at most 0.5/√900 each.
    assert sampled.p_value == pytest.approx(exact.p_value, abs=5 * 0.5 / 30)
    assert sampled == seat_of_vectors(x, y, a, b, most_partitions=900, seed=1)
    assert sampled != seat_of_vectors(x, y, a, b, most_partitions=900, seed=2)


def test_a_sampled_p_value_is_never_zero() -> None:
    near, far = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    found = seat_of_vectors(near.repeat(20, 1), far.repeat(20, 1), near, far, most_partitions=5000)
    assert found.p_value == 1 / 5001


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lengths_and_dtypes_of_vectors_do_not_count(scale: float) -> None:
    vectors = [v.float() for v in drawn(4, 4, 3, 3)]
    found = seat_of_vectors(*[v * scale for v in vectors])
    plain = seat_of_vectors(*[torch.cat([v, v], 1)[:, : v.shape[1]] for v in vectors])
    # Scaling rounds fp32 values.
    assert found.effect_size == pytest.approx(plain.effect_size, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_may_leave_the_range_of_fp64(scale: float) -> None:
    vectors = drawn(4, 4, 3, 3)
    found, plain = seat_of_vectors(*[v * scale for v in vectors]), seat_of_vectors(*vectors)
    # fp64: scaling rounds once.
    assert found.effect_size == pytest.approx(plain.effect_size, rel=1e-9)


def test_vectors_without_an_answer_are_refused() -> None:
    x, y, a, b = drawn(2, 2, 2, 2)
    for wrong in (torch.zeros(2, 5), torch.full((2, 5), math.nan), torch.full((2, 5), math.inf)):
        with pytest.raises(ValueError, match="finite vectors that are not zero"):
            seat_of_vectors(x, wrong, a, b)
    for wrong in (torch.ones(2, 4), torch.ones(5), torch.ones(0, 5)):
        with pytest.raises(ValueError, match="expected vectors"):
            seat_of_vectors(x, y, wrong, b)
    with pytest.raises(ValueError, match="associated differently"):
        seat_of_vectors(x[:1].repeat(2, 1), x[:1].repeat(3, 1), a, b)


def test_vectors_of_an_encoder() -> None:
    model, words = tiny_text.encoding_bert(), tokenizer("bert")
    texts = ["the man", "a rich woman sings", "fox"]
    first, mean = (embed(model, words, texts, pooling=pooling, batch_size=2) for pooling in ("first", "mean"))
    for row, text in enumerate(texts):
        with torch.no_grad():
            hidden = model(**words(text, return_tensors="pt")).last_hidden_state[0].double()
        # fp32 layers, run in batches of another shape.
        torch.testing.assert_close(first[row], hidden[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean[row], hidden.mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="pooling"):
        embed(model, words, texts, pooling="last")  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [tiny_text.encoding_bert, tiny_text.classifying_bert, tiny_text.masked_bert])
def test_a_test_of_an_encoder_with_any_head(make: object) -> None:
    model, words = make(), tokenizer("bert")  # type: ignore[operator]
    x, y, a, b = (embed(model, words, texts) for texts in TEST.sets)
    s = associations(torch.cat([x, y]), a, b)
    found = seat(model, words, TEST, batch_size=4)
    # fp32 layers, run in batches of another shape.
    assert found.effect_size == pytest.approx((s[:3].mean() - s[3:].mean()) / s.std(ddof=1), rel=1e-4)
    assert found.partitions == 20


def test_sets_are_data(tmp_path: Path) -> None:
    path = tmp_path / "sent-test.json"
    names = ("targ1", "targ2", "attr1", "attr2")
    data = {name: {"category": name, "examples": list(t)} for name, t in zip(names, TEST.sets, strict=True)}
    path.write_text(json.dumps(data))
    assert read_seat_test(path) == TEST
    data["attr1"]["examples"] = []
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="got none for attr1"):
        read_seat_test(path)
    with pytest.raises(ValueError, match="four sets"):
        SeatTest(("a",), ("b",), (), ("c",))
