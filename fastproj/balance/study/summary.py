"""The study's tables, as Markdown: every draw, and intervals over draws and texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch

from fastproj.balance.calibration import calibrated
from fastproj.balance.metrics import classification
from fastproj.balance.predict import decided
from fastproj.balance.study.arms import (
    ADJUSTED,
    ALPHA,
    BALANCE,
    BATCH,
    CONTEXTUAL,
    DOMAIN,
    EPOCHS,
    LEARNING_RATES,
    LORA,
    MAIN,
    MORE,
    PLAIN,
    RANK,
    WEIGHTS,
    ZERO,
)
from fastproj.balance.study.courses import course_table, exit_tables
from fastproj.balance.study.intervals import Answers, Measure, paired_interval
from fastproj.balance.study.runs import ABLATED
from fastproj.balance.study.settings import NEUTRAL, TASKS, TEST, TRAIN, VALIDATION, Task
from fastproj.balance.study.tables import cell, header, percent, row
from fastproj.demo.tables import LEVEL
from fastproj.files import write_atomically

Record = dict[str, Any]
Arms = dict[str, dict[int, Record]]
ORDER = (
    ZERO,
    CONTEXTUAL,
    DOMAIN,
    *(f"{arm.name}{end}" for arm in (LORA, PLAIN, BALANCE) for end in ("", ADJUSTED)),
    *(arm.name for arm in MORE),
)
MEASURES: dict[str, Measure] = {
    "weighted F1": "weighted_f1",
    "worst F1": "worst_f1",
    "macro F1": "macro_f1",
    "accuracy": "accuracy",
}
COMPARED = ("weighted F1", "worst F1")


def report(folder: Path) -> None:
    """Write report.json, every run's record without its scores, and report.md, the tables."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-*/*.json"))]
    flat = [one for record in records for one in (record if isinstance(record, list) else [record])]
    runs = [record for record in flat if "arm" in record]
    runs += [adjusted(record) for record in runs if record["arm"] in {arm.name for arm in MAIN}]
    kept = [{**record, "said": said(record)} for record in runs]
    for record in kept:
        del record["scores"]
    others = [record for record in flat if "arm" not in record]
    write_atomically(
        folder / "report.json", json.dumps(_short({"runs": kept, "choices": others}), ensure_ascii=False)
    )
    write_atomically(folder / "report.md", summary(runs, others))


def _short(value: Any) -> Any:
    """The same with every number to five digits."""
    if isinstance(value, dict):
        return {name: _short(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_short(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def adjusted(record: Mapping[str, Any]) -> Record:
    """A trained arm's scores less the logarithm of each label's share of the training texts."""
    names = TASKS[record["task"]].names
    # A label that the training texts lack is taken for one that a single text had.
    shares = torch.tensor(record["training shares"], dtype=torch.float64).clamp_min(1 / TRAIN)
    scores = calibrated(torch.tensor(record["scores"], dtype=torch.float64), shares)
    measures = classification(decided(scores), record["gold"], names).to_dict()
    kept = {
        name: record[name]
        for name in ("task", "seed", "gold", "perplexity", "block", "trained", "share", "learning_rate")
    }
    return {**kept, "arm": record["arm"] + ADJUSTED, "measures": measures, "scores": scores.tolist()}


def said(record: Mapping[str, Any]) -> list[int]:
    """The labels that an arm gave to the test texts."""
    found: list[int] = decided(torch.tensor(record["scores"], dtype=torch.float64)).tolist()
    return found


def summary(runs: Sequence[Record], choices: Sequence[Record]) -> str:
    """The report's text."""
    lines = ["# Bias-aware fine-tuning on real texts", "", *_wrapped(_setup()), ""]
    for name, task in TASKS.items():
        own = by_arm([record for record in runs if record["task"] == name])
        if own:
            lines += _task(task, own, [record for record in choices if record["task"] == name])
    return "\n".join([*lines, *_wrapped(_note()), ""])


def by_arm(runs: Sequence[Record]) -> Arms:
    """Records by arm, in the report's order, and draw."""
    arms: Arms = {name: {} for name in ORDER}
    for record in sorted(runs, key=lambda record: record["seed"]):
        arms[record["arm"]][record["seed"]] = record
    return {name: own for name, own in arms.items() if own}


def _task(task: Task, arms: Arms, choices: Sequence[Record]) -> list[str]:
    lines = [f"## {task.name.capitalize()}", "", *_wrapped(_asked(task, arms)), ""]
    lines += [*_arm_table(arms), ""]
    for baseline in (PLAIN.name, LORA.name):
        if baseline in arms:
            lines += [f'Differences from "{baseline}", points:', "", *_differences(arms, baseline, task), ""]
    lines += ["Every draw, weighted F1 / worst F1 (its label):", "", *_draw_table(arms), ""]
    lines += ["F1 of each label:", "", *_label_table(arms, task), ""]
    lines += [*course_table(arms), "", *exit_tables(arms, task.names), "", *_choices(arms, choices), ""]
    return lines


def _setup() -> str:
    return (
        f"SmolLM2-135M-Instruct; {TRAIN} training texts with their labels as they come, {VALIDATION} to "
        f"validate, {TEST} to test, anew in each draw. Block: what one block writes with (o_proj, down_proj) "
        "in full, and a vector added to its input; the block is the one with the largest mean KL in an "
        f"interchange ablation of {ABLATED} training texts of the first draw. LoRA: rank {RANK} (alpha "
        f"{ALPHA}) on all linear layers. AdamW, batches of {BATCH}, {EPOCHS} epochs, constant learning rate, "
        f"one of {', '.join(f'{rate:g}' for rate in LEARNING_RATES)} by macro F1 on validation texts of the "
        "first task's first draw, for each of three arms: block, plain; block, balance; LoRA, plain. Other "
        "arms take that of the one they vary, other tasks and draws choose nothing. Plain: cross entropy of "
        "the label's word behind the prompt. Balance: β = γ added to it, one of "
        f"{', '.join(map(str, WEIGHTS))} by the same measure where an arm's name has no other. Adjusted "
        "afterwards: log p less the logarithm of the label's share of the training texts. Made by "
        "`python -m fastproj.balance.study.command`."
    )


def _note() -> str:
    return (
        f"Brackets are {LEVEL:.0%} bootstrap intervals: of means over draws, which are too narrow with few "
        "draws; of differences over draws and the texts in each. A draw has its own texts and order of "
        "training; the arms of a draw share them. Worst F1: of the label with the least, in each draw. "
        f"Perplexity: of {NEUTRAL} factual sentences. Seconds were not compared: the machine was shared."
    )


def _asked(task: Task, arms: Arms) -> str:
    trained = [record for own in arms.values() for record in own.values() if "training shares" in record]
    prompt = task.prompt.template.replace("\n", " / ")
    words = ", ".join(f'"{word.strip()}"' for word in task.words)
    text = f'"{prompt}", answers {words}.'
    if trained:
        table = [record["training shares"] for record in trained]
        means = [sum(column) / len(table) for column in zip(*table, strict=True)]
        shares = ", ".join(f"{name} {100 * value:.0f}" for name, value in zip(task.names, means, strict=True))
        text += f" Of the training texts, in per cent: {shares}."
    return text


def _arm_table(arms: Arms) -> list[str]:
    lines = header(["arm", "draws", *MEASURES, "perplexity", "rate", "block", "trained, %"])
    for name, own in arms.items():
        records = list(own.values())
        cells = [percent([record["measures"][key] for record in records]) for key in MEASURES.values()]
        cells.append(cell([record["perplexity"] for record in records], 1))
        cells.append(_each(records, "learning_rate", "g"))
        cells += [_each(records, "block", "d"), _each(records, "share", ".2f", 100)]
        lines.append(row([name, str(len(own)), *cells]))
    return lines


def _each(records: Sequence[Record], name: str, form: str, unit: float = 1) -> str:
    """The different values of a number that some arms have."""
    values = [record[name] for record in records if record.get(name) is not None]
    return ", ".join(dict.fromkeys(format(unit * value, form) for value in values)) or "–"


def _differences(arms: Arms, baseline: str, task: Task) -> list[str]:
    lines = header(["arm", *(f"{name} | draws better" for name in COMPARED), "perplexity"])
    lines[1] = "|" + "---|" * (2 + 2 * len(COMPARED))
    for name, own in arms.items():
        seeds = [seed for seed in own if seed in arms[baseline]]
        if name == baseline or not seeds:
            continue
        cells = []
        for measure in COMPARED:
            key = MEASURES[measure]
            found = [own[seed]["measures"][key] - arms[baseline][seed]["measures"][key] for seed in seeds]
            low, high = paired_interval(
                [_answers(own[seed], task) for seed in seeds],
                [_answers(arms[baseline][seed], task) for seed in seeds],
                key,
            )
            mean = 100 * sum(found) / len(found)
            cells.append(f"{mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
            cells.append(f"{sum(value > 0 for value in found)} of {len(found)}")
        drift = [own[seed]["perplexity"] - arms[baseline][seed]["perplexity"] for seed in seeds]
        lines.append(row([name, *cells, cell(drift, 1, signed=True)]))
    return lines


def _answers(record: Record, task: Task) -> Answers:
    return Answers(said(record), record["gold"], len(task.names))


def _draw_table(arms: Arms) -> list[str]:
    seeds = sorted({seed for own in arms.values() for seed in own})
    lines = header(["arm", *(f"draw {seed}" for seed in seeds)])
    for name, own in arms.items():
        cells = []
        for seed in seeds:
            found = own[seed]["measures"] if seed in own else None
            cells.append(
                f"{100 * found['weighted_f1']:.1f} / {100 * found['worst_f1']:.1f} ({found['worst_label']})"
                if found
                else "–"
            )
        lines.append(row([name, *cells]))
    return lines


def _label_table(arms: Arms, task: Task) -> list[str]:
    lines = header(["arm", *task.names])
    for name, own in arms.items():
        tables = [record["measures"]["per_label_f1"] for record in own.values()]
        lines.append(row([name, *(percent([table[label] for table in tables]) for label in task.names)]))
    return lines


def _choices(arms: Arms, choices: Sequence[Record]) -> list[str]:
    """How the block, the rates and the weights were chosen."""
    facts = []
    for record in sorted(choices, key=lambda record: record["seed"]):
        if "ablation" in record:
            found = record["ablation"]
            order = sorted(range(len(found["mean"])), key=lambda block: -found["mean"][block])[:4]
            leading = ", ".join(
                f"{block} ({found['mean'][block]:.3f} ± {found['standard_error'][block]:.3f})"
                for block in order
            )
            halves = " and ".join(map(str, found["best of halves"]))
            facts.append(
                f"Blocks by mean KL in draw {record['seed']}, nats: {leading}; the first of each half of "
                f"its texts: {halves}."
            )
        if "weights" in record:
            tried = ", ".join(_tried(weight, found) for weight, found in record["weights"].items())
            facts.append(f"Macro F1 on validation texts by β = γ: {tried}.")
    for name, own in arms.items():
        tried = own[0].get("tried", {}) if 0 in own else {}
        if len(tried) > 1:
            listed = ", ".join(_tried(rate, found) for rate, found in tried.items())
            facts.append(f'Macro F1 on validation texts of "{name}" by learning rate: {listed}.')
    return [line for fact in facts for line in _listed(fact)]


def _tried(value: str, found: Mapping[str, Any]) -> str:
    what = "diverged" if "error" in found else f"{100 * found['macro_f1']:.1f}"
    return f"{float(value):g}: {what}"


def _listed(text: str) -> list[str]:
    return [("  " if number else "- ") + line for number, line in enumerate(_wrapped(text, 116))]


def _wrapped(text: str, width: int = 118) -> list[str]:
    return wrap(text, width, break_long_words=False, break_on_hyphens=False)
