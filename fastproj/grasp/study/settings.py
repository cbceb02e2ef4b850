"""The two settings: what is trained on, what is held out, and probes for a supervised direction.

"topic": is a text positive or negative? In training nearly all positive texts are movie reviews and nearly
all negative ones tweets; the test has as many of each. The planted factor is the source.

"tone": continue a text. Comments about one group that annotators call biased are mixed with factual
sentences; the model is tested on other groups. The planted factor is the comments' tone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from fastproj.bias_diff.records import Records
from fastproj.bias_diff.sources import CrowsPair, read_bold, read_crows_pairs, read_reddit_bias
from fastproj.grasp.study.texts import RatedText, read_rated, sampled, short, short_records

SETTINGS = ("topic", "tone")
# What a model is fine-tuned on: the planted selection, another that plants the same factor, and none.
SELECTIONS = ("planted", "other", "free")

# Ratings that are worth a label; the other selection's are easier to tell, the planted one's harder.
LEAST_RATING, CLEAR_RATING = 0.5, 1.5
# Of each label, how many come from the source that goes with it, and how many do not.
ALIGNED, CONFLICTING = 76, 4
VALIDATION = {"aligned": 28, "conflicting": 2}
TEST_CELL, PROBE_CELL = 40, 20
ANSWERS = (" negative", " positive")
PROMPT = "Text: {}\nSentiment:"

TRAINED_GROUP, OTHER_GROUP = "race", "gender"
PROBE_GROUPS = ("orientation", "religion1", "religion2")
COMMENTS, FACTUAL = 80, 80
HELD_COMMENTS, HELD_FACTUAL = 25, 25
NEUTRAL, PAIRS = 30, 50
UNRELATED = ("age", "disability", "nationality", "physical-appearance", "socioeconomic")
PEOPLE = (
    "old", "young", "disabled", "deaf", "blind", "rich", "poor", "homeless", "short", "tall", "fat", "thin",
    "French", "German", "Italian", "Russian", "Polish", "Mexican",
)  # fmt: skip
OPENINGS = ("Most {} people are", "The {} people in this town are", "I think that {} people are")


@dataclass(frozen=True)
class Contrast:
    """Texts with a factor and without it, pair by pair of lists that differ in nothing else that is known."""

    cells: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]


@dataclass(frozen=True)
class Topic:
    """A draw of the first setting; no text is in two of its parts.

    Attributes:
        train: by selection, texts with a label each.
        validation: more of the planted selection, groups unknown.
        test: as many texts of each label and source.
        neutral: factual sentences, for perplexity.
        contrasts: movie against tweet at equal label ("planted"), positive against negative ("task"), and the
            first once more in the test's texts ("held out").
    """

    train: Mapping[str, tuple[RatedText, ...]]
    validation: tuple[RatedText, ...]
    test: tuple[RatedText, ...]
    neutral: Records
    contrasts: Mapping[str, Contrast]


@dataclass(frozen=True)
class Tone:
    """A draw of the second setting; no text is in two of its parts.

    Attributes:
        train: by selection: comments about the trained group, or about another, or comments about the trained
            group that are not biased, each with factual sentences.
        validation, held_out: more of the planted selection.
        neutral: factual sentences.
        pairs: CrowS-Pairs of groups that are not trained on.
        contrasts: biased against other comments about groups that are not trained on ("planted"), comments
            that are not biased against factual sentences ("task"), and the first in more texts ("held out").
    """

    train: Mapping[str, Records]
    validation: Records
    held_out: Records
    neutral: Records
    pairs: tuple[CrowsPair, ...]
    contrasts: Mapping[str, Contrast]


def draw_topic(seed: int) -> Topic:
    """A draw of "topic". Raises FileNotFoundError where the data is missing."""
    chance = random.Random(seed)
    hard: dict[tuple[str, int], list[RatedText]] = {}
    clear: dict[tuple[str, int], list[RatedText]] = {}
    for row in read_rated():
        if abs(row.rating) > LEAST_RATING:
            part = clear if abs(row.rating) > CLEAR_RATING else hard
            part.setdefault((row.source, row.label), []).append(row)
    for rows in (*hard.values(), *clear.values()):
        chance.shuffle(rows)
    cells = [(source, label) for label in (0, 1) for source in ("movie", "tweet")]
    held = {cell: _taken(hard[cell], TEST_CELL // 2) + _taken(clear[cell], TEST_CELL // 2) for cell in cells}
    probes = {cell: _taken(hard[cell], PROBE_CELL) for cell in cells}
    validation = _selection(hard, VALIDATION["aligned"], VALIDATION["conflicting"])
    planted = _selection(hard, ALIGNED, CONFLICTING)
    half = (ALIGNED + CONFLICTING) // 2
    # Where the source says nothing there are too few hard negative tweets: the planted texts serve again.
    pool: dict[tuple[str, int], list[RatedText]] = {cell: [*hard[cell]] for cell in cells}
    for row in planted:
        pool[row.source, row.label].append(row)
    train = {
        "planted": planted,
        "other": _selection(clear, ALIGNED, CONFLICTING),
        "free": [row for cell in cells for row in _taken(pool[cell], half)],
    }
    for rows in train.values():
        chance.shuffle(rows)
    texts = {cell: tuple(PROMPT.format(row.text) for row in rows) for cell, rows in probes.items()}
    tests = {cell: tuple(PROMPT.format(row.text) for row in rows) for cell, rows in held.items()}
    return Topic(
        train={name: tuple(rows) for name, rows in train.items()},
        validation=tuple(validation),
        test=tuple(row for cell in cells for row in held[cell]),
        neutral=sampled(short_records(read_bold(), 0), NEUTRAL, chance),
        contrasts={
            "planted": Contrast(tuple((texts["movie", y], texts["tweet", y]) for y in (0, 1))),
            "task": Contrast(tuple((texts[source, 1], texts[source, 0]) for source in ("movie", "tweet"))),
            "held out": Contrast(tuple((tests["movie", y], tests["tweet", y]) for y in (0, 1))),
        },
    )


def draw_tone(seed: int) -> Tone:
    """A draw of "tone". Raises FileNotFoundError where the data is missing."""
    chance = random.Random(seed)
    comments = read_reddit_bias()
    biased = {g: short_records(comments, 1, [g]) for g in (TRAINED_GROUP, OTHER_GROUP, *PROBE_GROUPS)}
    plain = {g: short_records(comments, 0, [g]) for g in (TRAINED_GROUP, *PROBE_GROUPS)}
    wanted = COMMENTS + 2 * HELD_COMMENTS
    about = _parts(sampled(biased[TRAINED_GROUP], wanted, chance), COMMENTS, HELD_COMMENTS, HELD_COMMENTS)
    facts = _parts(
        sampled(short_records(read_bold(), 0), FACTUAL + 2 * HELD_FACTUAL + NEUTRAL + 2 * PROBE_CELL, chance),
        *(FACTUAL, HELD_FACTUAL, HELD_FACTUAL, NEUTRAL, 2 * PROBE_CELL),
    )
    train = {
        "planted": about[0],
        "other": sampled(biased[OTHER_GROUP], COMMENTS, chance),
        "free": sampled(plain[TRAINED_GROUP], COMMENTS, chance),
    }
    with_tone = {group: sampled(biased[group], PROBE_CELL, chance).texts for group in PROBE_GROUPS}
    without = {group: sampled(plain[group], PROBE_CELL, chance).texts for group in PROBE_GROUPS}
    pairs = [p for p in read_crows_pairs() if p.bias_type in UNRELATED and short(p.more) and short(p.less)]
    register = (tuple(text for texts in without.values() for text in texts), facts[4].texts)
    apart = random.Random(f"{seed}, held out")
    more = [
        (_others(biased[group], with_tone[group], apart), _others(plain[group], without[group], apart))
        for group in PROBE_GROUPS
    ]
    return Tone(
        train={name: _mixed(rows, facts[0], chance) for name, rows in train.items()},
        validation=_mixed(about[1], facts[1], chance),
        held_out=_mixed(about[2], facts[2], chance),
        neutral=facts[3],
        pairs=tuple(chance.sample(pairs, PAIRS)),
        contrasts={
            "planted": Contrast(tuple((with_tone[group], without[group]) for group in PROBE_GROUPS)),
            "task": Contrast((register,)),
            "held out": Contrast(tuple(more)),
        },
    )


def _selection(
    rows: Mapping[tuple[str, int], list[RatedText]], aligned: int, conflicting: int
) -> list[RatedText]:
    """Texts whose source goes with their label, and a few whose does not, taken out of ``rows``."""
    sizes = {
        ("movie", 1): aligned,
        ("tweet", 0): aligned,
        ("movie", 0): conflicting,
        ("tweet", 1): conflicting,
    }
    return [row for cell, size in sizes.items() for row in _taken(rows[cell], size)]


def _taken(rows: list[RatedText], size: int) -> list[RatedText]:
    """The last ``size`` rows, which leave the list. ValueError where there are fewer."""
    if size > len(rows):
        raise ValueError(f"expected at least {size} texts, got {len(rows)}")
    return [rows.pop() for _ in range(size)]


def _parts(records: Records, *sizes: int) -> list[Records]:
    ends = [sum(sizes[: at + 1]) for at in range(len(sizes))]
    return [records.take(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def _others(records: Records, taken: tuple[str, ...], chance: random.Random) -> tuple[str, ...]:
    """As many texts again as a probe has, and half as many more, none of them ``taken``."""
    left = [row for row, text in enumerate(records.texts) if text not in set(taken)]
    return sampled(records.take(left), len(taken) * 3 // 2, chance).texts


def _mixed(comments: Records, factual: Records, chance: random.Random) -> Records:
    """Both, in random order, comments labelled 1."""
    rows: list[tuple[str, str, int]] = []
    for records, label in ((comments, 1), (factual, 0)):
        rows += [(name, text, label) for name, text in zip(records.ids, records.texts, strict=True)]
    chance.shuffle(rows)
    ids, texts, labels = zip(*rows, strict=True)
    return Records(ids, texts, labels)
