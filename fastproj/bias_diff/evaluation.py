"""What ``fastproj evaluate`` measures, as plain values under plain names."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastproj.bias_diff.commands import Loaded, in_order_of, one_line, progress, read_selection
from fastproj.bias_diff.crows_pairs import crows_pairs
from fastproj.bias_diff.likelihood import model_kind
from fastproj.bias_diff.measures import auc, coverage, curves, precision
from fastproj.bias_diff.perplexity import perplexity
from fastproj.bias_diff.records import Records, read_records
from fastproj.bias_diff.seat import SeatTest, read_seat_test, seat
from fastproj.bias_diff.sources import CrowsPair, read_crows_pairs
from fastproj.bias_diff.stereoset import StereoExample, read_stereoset, stereoset
from fastproj.influence.scores import Aggregate, Scores

T = TypeVar("T")


def finding(
    train: Path,
    columns: Mapping[str, Any],
    biased: str,
    scores: Path | None,
    selection: Path | None,
    aggregate: Aggregate,
) -> dict[str, Any]:
    """Coverage and precision of a selection, and by share of the highest scores with their AUC.

    Raises ValueError where ids or labels do not fit together.
    """
    records = read_records(train, **columns)
    marked = records.ids_labelled(biased)
    results: dict[str, Any] = {"samples": len(records), "biased": len(marked)}
    if selection is not None:
        chosen = read_selection(selection)
        in_order_of(chosen, records, train)
        results |= {
            "selected": len(set(chosen)),
            "coverage": coverage(chosen, marked),
            "precision": precision(chosen, marked),
        }
    if scores is not None:
        table = Scores.load(scores)
        in_order_of(table.ids, records, train)
        values, flags = table.aggregate(aggregate), [name in marked for name in table.ids]
        drawn = curves(values, flags)
        results |= {
            "auc": auc(values, flags),
            "by_share": {
                f"{100 * share:.0f} %": {"coverage": covered, "precision": precise}
                for share, covered, precise in zip(
                    drawn.fractions, drawn.coverage, drawn.precision, strict=True
                )
            },
        }
    return results


def _read(reader: Callable[[Path], T], path: Path | None) -> T:
    """What a reader makes of a file, by default its own one. Raises ValueError, naming it."""
    try:
        return reader(path)  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        told = one_line(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path or reader.__name__}: not laid out as expected: {told}") from error


@dataclass
class Evaluation:
    """Measures of one model. Everything is read before the model is, so that a wrong path is met at once."""

    batch_size: int
    seed: int
    crows_pairs_file: Path | None
    stereoset_file: Path | None
    pairs: tuple[CrowsPair, ...] = ()
    examples: tuple[StereoExample, ...] = ()
    tests: dict[str, SeatTest] = field(default_factory=dict)
    texts: Records | None = None

    def read(
        self, wanted: Mapping[str, bool], tests: Sequence[Path], texts: Path | None, text_column: str
    ) -> None:
        """Read what the measures need. Raises ValueError or FileNotFoundError where that cannot be."""
        if wanted["crows_pairs"]:
            self.pairs = _read(read_crows_pairs, self.crows_pairs_file)
        if wanted["stereoset"]:
            self.examples = _read(read_stereoset, self.stereoset_file)
        self.tests = {path.stem: _read(read_seat_test, path) for path in tests}
        if texts is not None:
            self.texts = read_records(texts, text_column=text_column)

    def run(self, loaded: Loaded, pooling: Literal["mean", "first"]) -> dict[str, Any]:
        """What was read for, measured. Raises ValueError where a measure needs another kind of model."""
        measures = {
            "crows_pairs": self._crows_pairs if self.pairs else None,
            "stereoset": self._stereoset if self.examples else None,
            "seat": (lambda own: self._seat(own, pooling)) if self.tests else None,
            "perplexity": self._perplexity if self.texts is not None else None,
        }
        asked = {name: measure for name, measure in measures.items() if measure is not None}
        results = {}
        with progress("measuring", len(asked)) as show:
            for done, (name, measure) in enumerate(asked.items(), start=1):
                results[name] = measure(loaded)
                show(done, None)
        return results

    def _crows_pairs(self, loaded: Loaded) -> dict[str, Any]:
        found = crows_pairs(loaded.model, loaded.tokenizer, self.pairs, batch_size=self.batch_size)
        return {
            "score": found.score,
            "pairs": len(found.pairs),
            "neutral": found.neutral,
            "by_type": found.by_type,
            "by_direction": found.by_direction,
        }

    def _stereoset(self, loaded: Loaded) -> dict[str, Any]:
        """A masked model is measured on the examples of one sentence, as published."""
        masked = model_kind(loaded.model) == "masked"
        examples = [e for e in self.examples if not masked or e.part == "intrasentence"]
        found = stereoset(loaded.model, loaded.tokenizer, examples, batch_size=self.batch_size)
        groups = {"overall": found.overall, **found.by_type}
        return {name: {**asdict(scores), "icat": scores.icat} for name, scores in groups.items()}

    def _seat(self, loaded: Loaded, pooling: Literal["mean", "first"]) -> dict[str, Any]:
        options = {"pooling": pooling, "batch_size": self.batch_size, "seed": self.seed}
        return {
            name: asdict(seat(loaded.model, loaded.tokenizer, test, **options))  # type: ignore[arg-type]
            for name, test in self.tests.items()
        }

    def _perplexity(self, loaded: Loaded) -> dict[str, Any]:
        texts = self.texts.texts if self.texts is not None else ()
        found = perplexity(loaded.model, loaded.tokenizer, texts, batch_size=self.batch_size)
        # Infinities are no JSON.
        value, total = (v if math.isfinite(v) else None for v in (found.value, found.log_likelihood))
        return {"value": value, "log_likelihood": total, "tokens": found.tokens}
