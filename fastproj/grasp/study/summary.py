"""The study's tables, as Markdown, with intervals over draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from fastproj.demo.tables import mean_interval
from fastproj.grasp.study.arms import (
    ALPHA,
    ARMS,
    BATCH,
    EPOCHS,
    FIRST,
    LEARNING_RATE,
    RANK,
    STEERING,
    TARGETS,
    WEIGHT_DECAY,
)
from fastproj.grasp.study.evidence import CANDIDATES, LEVEL, TOPS
from fastproj.grasp.study.runs import FIRST_BLOCK, TOLERANCE
from fastproj.grasp.study.settings import (
    ALIGNED,
    COMMENTS,
    CONFLICTING,
    FACTUAL,
    OTHER_GROUP,
    SETTINGS,
    TRAINED_GROUP,
)
from fastproj.grasp.study.supervised import ORACLE_RANK

Record = dict[str, Any]
PLANTED = {
    "topic": (
        f"Positive or negative? Of each label, {ALIGNED} training texts come from the source that goes with "
        f"it (movie reviews positive, tweets negative) and {CONFLICTING} from the other; the test is "
        "balanced. *Planted*: movie against tweet at equal label. *Task*: positive against negative at equal "
        "source."
    ),
    "tone": (
        f"{COMMENTS} RedditBias comments ({TRAINED_GROUP}) that annotators call biased and {FACTUAL} factual "
        f"sentences to continue; the other selection's comments are about {OTHER_GROUP}. *Planted*: biased "
        "against other comments about groups that are in neither. *Task*: comments against factual sentences."
    ),
}
# What a direction writes, in standard deviations over the vocabulary.
WORDS = {"both": "writes both kinds of words, σ", "either": "one against the other, σ"}
CHANCE = ("permuted", "random")
# Measures in per cent, and what is compared with the naive arm.
PER_CENT = ("accuracy", "worst group", "aligned − conflicting")
COMPARED = {
    "topic": ("worst group", "source moves the answer", "accuracy"),
    "tone": ("tone of other groups", "stereotypes of other groups", "perplexity, mixture"),
}
# What a model has learnt of its task, and how far it drifted with that: along the naive fine-tune both grow.
PATH = {
    "topic": ("label moves the answer", "source moves the answer"),
    "tone": ("perplexity, mixture", "tone of other groups"),
}
STOPS = ("pretrained", "naive, half as long", "naive")
NOTE = (
    f"Brackets are {LEVEL:.0%} bootstrap intervals over draws; with few draws such intervals are too narrow. "
    "A draw has its own texts, order of training and initial adapter; the arms of a draw share them."
)


def summary(runs: Sequence[Record], identified: Sequence[Record]) -> str:
    """The report: what each arm does, how near the identified directions are to the planted one, and why."""
    lines = ["# GRASP on real data", "", *_wrapped(_setup()), ""]
    for setting in SETTINGS:
        own = [record for record in runs if record["setting"] == setting]
        found = [record for record in identified if record["setting"] == setting]
        if not own:
            continue
        lines += [f"## {setting.capitalize()} ({_draws(own)} draws)", "", *_wrapped(PLANTED[setting]), ""]
        lines += [*_arm_table(own), "", "Differences from the naive arm, draw by draw:", ""]
        lines += [*_difference_table(own, COMPARED[setting]), "", *_path_table(own, *PATH[setting]), ""]
        if found:
            lines += ["### What is identified", "", *_candidate_table(found, "write"), ""]
            lines += [*_candidate_table(found, "read"), "", *_found_table(found), "", *_facts(found), ""]
        lines += ["### Where the updates are", "", *_share_table(own, found), ""]
    return "\n".join([*lines, *_wrapped(NOTE), ""])


def _setup() -> str:
    return (
        f"SmolLM2-135M-Instruct, LoRA of rank {RANK} (alpha {ALPHA}) on {', '.join(TARGETS)} of blocks "
        f"{FIRST_BLOCK} and above, AdamW at {LEARNING_RATE:g}, weight decay {WEIGHT_DECAY:g}, {EPOCHS} "
        f"epochs, batches of {BATCH}. Identified: the leading directions of the residual stream in a naive "
        f"fine-tune's weights, {CANDIDATES} candidates, of which as many as cost at most {TOLERANCE:.0%} of "
        "what the fine-tune gained on validation texts of its own selection, groups unknown, when they are "
        "removed afterwards; one where none can be spared. Oracle: differences of means with the factor "
        f"known, to write the {ORACLE_RANK} leading directions of all blocks', to read each module's own. "
        f"Steered by {STEERING:.0%} of each token's norm at each block. Made by "
        "`python -m fastproj.grasp.study.command`."
    )


def _wrapped(text: str, width: int = 118) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)


def _draws(records: Sequence[Record]) -> int:
    return len({record["seed"] for record in records})


def _by_arm(records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    arms: dict[str, dict[int, Record]] = {}
    for arm in (*FIRST, *ARMS):
        own = {record["seed"]: record for record in records if record["arm"] == arm.name}
        if own:
            arms[arm.name] = own
    return arms


def _arm_table(records: Sequence[Record]) -> list[str]:
    arms = _by_arm(records)
    measures = list(next(iter(arms["pretrained"].values()))["numbers"])
    lines = _header(["arm", "draws", *measures, "validation loss"])
    for name, own in arms.items():
        cells = [_measure_cell([r["numbers"][m] for r in own.values()], m) for m in measures]
        cells.append(_cell([record["validation"] for record in own.values()], 3))
        lines.append(_row([name, str(len(own)), *cells]))
    return lines


def _difference_table(records: Sequence[Record], measures: Sequence[str]) -> list[str]:
    arms = _by_arm(records)
    naive = arms.get("naive", {})
    lines = _header(["arm", *measures, "off the constraint"])
    for arm in (*FIRST, *ARMS):
        own = {seed: record for seed, record in arms.get(arm.name, {}).items() if seed in naive}
        if not own:
            continue
        cells = ["–"] * len(measures)
        if arm.name != "naive":
            cells = [
                _measure_cell([r["numbers"][m] - naive[s]["numbers"][m] for s, r in own.items()], m, True)
                for m in measures
            ]
        violations = [r["violation"] for r in own.values() if r.get("violation") is not None]
        cells.append(f"{max(violations):.0e}" if violations else "–")
        lines.append(_row([arm.name, *cells]))
    return lines


def _path_table(records: Sequence[Record], learnt: str, drift: str) -> list[str]:
    """Drift beyond that of the naive fine-tune where it had learnt as much, draw by draw."""
    arms = _by_arm(records)
    if any(stop not in arms for stop in STOPS):
        return []
    lines = [
        *_wrapped(
            f'"{drift}" beyond that of a naive fine-tune stopped at the same "{learnt}", which is '
            f"interpolated between {', '.join(STOPS[:-1])} and {STOPS[-1]}; negative is less drift for what "
            "is learnt."
        ),
        "",
        *_header(["arm", "beyond training less", "draws with less drift"]),
    ]
    for name, own in arms.items():
        if name in (*STOPS, FIRST[-1].name):  # that one learnt from other texts
            continue
        found = []
        for seed, record in own.items():
            if any(seed not in arms[stop] for stop in STOPS):
                continue
            path = [arms[stop][seed]["numbers"] for stop in STOPS]
            expected = interpolated(
                _scale(record["numbers"][learnt], learnt),
                [_scale(numbers[learnt], learnt) for numbers in path],
                [numbers[drift] for numbers in path],
            )
            if expected is not None:
                found.append(record["numbers"][drift] - expected)
        if found:
            fewer = sum(value < 0 for value in found)
            lines.append(_row([name, _cell(found, 2, signed=True), f"{fewer} of {len(found)}"]))
    return lines


def interpolated(at: float, places: Sequence[float], values: Sequence[float]) -> float | None:
    """Linear between neighbouring places, which rise or fall; None beyond the first and the last."""
    for (x, y), (after, last) in pairwise(zip(places, values, strict=True)):
        if min(x, after) <= at <= max(x, after):
            return y if x == after else y + (last - y) * (at - x) / (after - x)
    return None


def _scale(value: float, measure: str) -> float:
    return math.log(value) if measure.startswith("perplexity") else value


def _candidate_table(found: Sequence[Record], side: str) -> list[str]:
    """Of each candidate: its share, whether that is beyond chance, its cosines and scores."""
    scores = list(found[0][side]["scores"])
    words = WORDS if all(record[side].get("words") for record in found) else {}
    names = ["share, %", "95 % of chance, %", "largest p", "cos, planted", "cos, task", *scores]
    lines = _header([f"{side}: candidate", *names, *words.values()])
    for column in range(len(found[0][side]["shares"])):

        def cell(digits: int, *keys: str, unit: float = 1, column: int = column) -> str:
            values = []
            for record in found:
                value: Any = record[side]
                for key in keys:
                    value = value[key]
                values.append(unit * abs(value[column]))
            return _cell(values, digits)

        cells = [cell(1, "shares", unit=100), cell(1, "null", unit=100)]
        cells.append(f"{max(record[side]['p_values'][column] for record in found):.2f}")
        cells += [cell(2, "cosines", name) for name in ("planted", "task")]
        cells += [cell(2, "scores", name) for name in scores]
        cells += [cell(1, "words", kind) for kind in words]
        lines.append(_row([str(column + 1), *cells]))
    return lines


def _found_table(found: Sequence[Record]) -> list[str]:
    """How often the best of the first k candidates is nearer to the planted one than chance."""
    lines = _header(
        [
            "candidates ordered by",
            *(f"best cos of {k}" for k in TOPS),
            *(f"found in {k} (of {len(found)})" for k in TOPS),
        ]
    )
    for name in found[0]["write"]["orders"]:
        best: dict[int, list[float]] = {k: [] for k in TOPS}
        for record in found:
            cosines = [record["write"]["cosines"]["planted"][at] for at in record["write"]["orders"][name]]
            for k in TOPS:
                best[k].append(max(cosines[:k]))
        hits = [
            sum(
                cosine > record["write"]["thresholds"]["permuted"][str(k)]
                for cosine, record in zip(best[k], found, strict=True)
            )
            for k in TOPS
        ]
        lines.append(_row([name, *(_cell(best[k], 2) for k in TOPS), *map(str, hits)]))
    return lines


def _facts(found: Sequence[Record]) -> list[str]:
    """What stands in no table, as a list."""

    def mean(*keys: str) -> str:
        return f"{_mean_at(found, *keys):.2f}"

    best = {kind: ", ".join(mean("write", "thresholds", kind, str(k)) for k in TOPS) for kind in CHANCE}
    ranks = {side: ", ".join(str(record[side]["rank"]) for record in found) for side in ("write", "read")}
    facts = [
        f"Found: nearer to the planted direction than {LEVEL:.0%} of what comes of dealing out the probes' "
        f"labels at random: |cos| above {best['permuted']} for the best of {', '.join(map(str, TOPS))} "
        f"candidates. Directions drawn at random reach {best['random']}.",
        f"Directions that validation texts can spare, by draw: {ranks['write']} to write, {ranks['read']} to "
        "read.",
        f"The planted directions of different blocks have a mean |cos| of {mean('planted', 'spread')}; the "
        f"{ORACLE_RANK} leading ones hold {100 * _mean_at(found, 'planted', 'shares') * ORACLE_RANK:.0f} % "
        f"of all blocks'. The planted and the task's direction: |cos| {mean('planted and task')}. A block's "
        f"planted direction in the span of all candidates: {mean('write', 'by block', 'span')}.",
    ]
    if all(record.get("decodable") for record in found):
        parts = [f"{name} {100 * _mean_at(found, 'decodable', name):.0f} %" for name in found[0]["decodable"]]
        facts.append(
            f"Of the probes' factor, a linear classifier reads in other texts, cross-validated: "
            f"{'; '.join(parts)}."
        )
    for kind, sides in found[0]["modules"].items():
        parts = [
            f"{side} {mean('modules', kind, side, 'first')} (first), {mean('modules', kind, side, 'span')} "
            f"(span of {CANDIDATES})"
            for side in sides
        ]
        facts.append(f"|cos| of {kind}'s own directions with the planted one there: {'; '.join(parts)}.")
    return [line for fact in facts for line in _listed(fact)]


def _mean_at(found: Sequence[Record], *keys: str) -> float:
    """Mean over draws of a number, or of a list of them, that lies at ``keys``."""
    values: list[float] = []
    for record in found:
        value: Any = record
        for key in keys:
            value = value[key]
        values += value if isinstance(value, list) else [value]
    return sum(values) / len(values)


def _listed(text: str) -> list[str]:
    return [("  " if row else "- ") + line for row, line in enumerate(_wrapped(text, 116))]


def _share_table(records: Sequence[Record], found: Sequence[Record]) -> list[str]:
    """Shares of the energy of ΔW, in per cent, along each kind of direction."""
    arms = _by_arm(records)
    tables = {"naive": [record["shares"] for record in found]}
    tables |= {
        name: [r["shares"] for r in own.values() if "shares" in r] for name, own in arms.items() if own
    }
    tables["naive"] = [record["shares"] for record in found]
    tables = {name: rows for name, rows in tables.items() if rows}
    if not tables:
        return ["Not measured."]
    columns = list(next(iter(tables.values()))[0])
    lines = _header(["share of ΔW's energy, %", *columns])
    for name, rows in tables.items():
        lines.append(_row([name, *(_cell([100 * row[column] for row in rows], 2) for column in columns)]))
    return lines


def _header(names: Sequence[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _measure_cell(values: Sequence[float], measure: str, signed: bool = False) -> str:
    if measure in PER_CENT:
        return _cell([100 * value for value in values], 1, signed)
    return _cell(values, 1 if measure.startswith(("perplexity", "CrowS")) else 2, signed)


def _cell(values: Sequence[float], digits: int, signed: bool = False) -> str:
    form = f"{'+' if signed else ''}.{digits}f"
    mean = format(sum(values) / len(values), form)
    if len(values) < 2:
        return mean
    low, high = mean_interval(values)
    return f"{mean} [{format(low, form)}, {format(high, form)}]"
