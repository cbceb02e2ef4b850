"""Texts with human ratings of sentiment from four places, and comments with annotators' judgements of bias.

The rated texts are those of Hutto & Gilbert, "VADER" (ICWSM 2014), see :mod:`fastproj.demo.data`; the
comments RedditBias's, see :mod:`fastproj.bias_diff.sources`.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastproj.bias_diff.records import Records
from fastproj.demo.data import INNER_ARCHIVE, clean, find_archive

TABLES = {
    "movie": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "tweet": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}
FEWEST_WORDS, MOST_WORDS = 4, 16


@dataclass(frozen=True)
class RatedText:
    """A text, its source, and its mean rating from −4 (negative) to 4 (positive)."""

    id: str
    text: str
    source: str
    rating: float

    @property
    def label(self) -> int:
        """1 for a positive rating, 0 for a negative one."""
        return int(self.rating > 0)


def read_rated(path: Path | None = None) -> tuple[RatedText, ...]:
    """Movie-review snippets and tweets of 4 to 16 words; texts equal up to case and spacing count once.

    ``path`` defaults to where :func:`fastproj.demo.data.find_archive` finds the archive. Raises
    FileNotFoundError where there is none, ValueError where it lacks a table.
    """
    path = path or find_archive()
    with tarfile.open(path) as outer:
        inner = outer.extractfile(INNER_ARCHIVE)
        if inner is None:
            raise ValueError(f"{path}: expected a file {INNER_ARCHIVE}, got none")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as tables:
            rows = [row for source, name in TABLES.items() for row in _table(tables, source, name)]
    kept: dict[str, RatedText] = {}
    for row in rows:
        kept.setdefault(" ".join(row.text.casefold().split()), row)
    return tuple(row for row in kept.values() if short(row.text))


def short(text: str) -> bool:
    """Whether a text has from 4 to 16 words."""
    return FEWEST_WORDS <= len(text.split()) <= MOST_WORDS


def short_records(records: Records, label: int, groups: Iterable[str] | None = None) -> Records:
    """The short texts with this label, of all groups or of those that ids begin with (``"race-17"``)."""
    wanted = None if groups is None else set(groups)
    labels = records.labels or ()
    return records.take(
        row
        for row, (name, text) in enumerate(zip(records.ids, records.texts, strict=True))
        if labels[row] == label and short(text) and (wanted is None or name.split("-")[0] in wanted)
    )


def sampled(records: Records, size: int, chance: random.Random) -> Records:
    """``size`` records drawn without replacement. ValueError where there are fewer."""
    if size > len(records):
        raise ValueError(f"expected at least {size} texts to draw from, got {len(records)}")
    return records.take(chance.sample(range(len(records)), size))


def _table(tables: tarfile.TarFile, source: str, name: str) -> list[RatedText]:
    table = tables.extractfile(name)
    if table is None:
        raise ValueError(f"expected a table {name}, got none")
    rows = []
    for line in table.read().decode("latin-1").splitlines():
        number, rating, text = line.split("\t", 2)
        rows.append(RatedText(f"{source}-{number}", clean(text), source, float(rating)))
    return rows
