"""The two settings: biased and factual sentences to train on, a probe, and what is held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from fastproj.bias_diff.records import Records
from fastproj.bias_diff.sources import CrowsPair, read_bold, read_crows_pairs, read_reddit_bias

SETTINGS = ("matched", "shifted")
# Biased to factual sentences is 3 : 7, as published.
BIASED, FACTUAL, PROBES, HELD_OUT, PAIRS = 75, 175, 60, 80, 200
FACTUAL_PROBES = 60
FEWEST_WORDS = 4  # shorter comments and lists of names are no sentences


@dataclass(frozen=True)
class Data:
    """One draw of a setting; no sentence is in two of its parts.

    Attributes:
        train: biased sentences, labelled 1, and factual ones, labelled 0.
        probe: biased sentences of CrowS-Pairs.
        bias_types: what each probe's groups differ in.
        counterparts: the probes' less stereotyping sentences.
        factual: factual sentences to hold against the probe.
        held_out: factual sentences, for perplexity.
        pairs: pairs of CrowS-Pairs, for its score.
    """

    train: Records
    probe: Records
    bias_types: tuple[str, ...]
    counterparts: Records
    factual: Records
    held_out: Records
    pairs: tuple[CrowsPair, ...]


def draw(setting: str, seed: int) -> Data:
    """A draw of "matched", where biased sentences and probe are CrowS-Pairs stereotypes, or of "shifted",
    where the biased sentences are RedditBias comments that annotators call biased.

    Raises ValueError for another setting, FileNotFoundError where the data's packages are missing.
    """
    if setting not in SETTINGS:
        raise ValueError(f"setting: expected one of {', '.join(SETTINGS)}, got {setting!r}")
    chance = random.Random(seed)
    pairs = _distinct(read_crows_pairs())
    chance.shuffle(pairs)
    stereotypes = [pair for pair in pairs if pair.direction == "stereo"]
    probes, rest = stereotypes[:PROBES], stereotypes[PROBES:]
    if setting == "matched":
        chosen, rest = rest[:BIASED], rest[BIASED:]
        biased = [(f"crows-{pair.id}", pair.more) for pair in chosen]
    else:
        comments = _sentences(read_reddit_bias(), 1)
        biased = chance.sample(comments, BIASED)
    factual = chance.sample(_sentences(read_bold(), 0), FACTUAL + HELD_OUT + FACTUAL_PROBES)
    rows = [(*row, 1) for row in biased] + [(*row, 0) for row in factual[:FACTUAL]]
    chance.shuffle(rows)
    ids, texts, labels = zip(*rows, strict=True)
    return Data(
        train=Records(ids, texts, labels),
        probe=Records(tuple(f"crows-{p.id}" for p in probes), tuple(p.more for p in probes)),
        bias_types=tuple(pair.bias_type for pair in probes),
        counterparts=_records([(f"crows-{pair.id}-less", pair.less) for pair in probes]),
        factual=_records(factual[FACTUAL + HELD_OUT :]),
        held_out=_records(factual[FACTUAL : FACTUAL + HELD_OUT]),
        pairs=tuple(rest[:PAIRS]),
    )


def _distinct(pairs: Sequence[CrowsPair]) -> list[CrowsPair]:
    """Pairs none of whose sentences came before: some sentences serve in several pairs."""
    seen: set[str] = set()
    kept = []
    for pair in pairs:
        own = {pair.more.casefold(), pair.less.casefold()}
        if not own & seen:
            kept.append(pair)
        seen |= own
    return kept


def _sentences(records: Records, label: int) -> list[tuple[str, str]]:
    labels = records.labels or ()
    return [
        (name, text)
        for name, text, own in zip(records.ids, records.texts, labels, strict=True)
        if own == label and len(text.split()) >= FEWEST_WORDS
    ]


def _records(rows: Sequence[tuple[str, str]]) -> Records:
    ids, texts = zip(*rows, strict=True)
    return Records(ids, texts)
