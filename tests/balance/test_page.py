"""The page of label findings: what it shows, that nothing in it becomes markup, how a browser takes it."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import page_reader
import pytest
import torch
from chromium import CONTRASTS, Chromium
from page_reader import Reader
from rich.console import Console

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from fastproj.balance.console import show_layers, show_methods
from fastproj.balance.early_exit import EarlyExit
from fastproj.balance.findings import (
    METHODS,
    ZERO_SHOT,
    Findings,
    Row,
    finite,
    layer_rows,
    layer_verdict,
    row_verdicts,
)
from fastproj.balance.interchange import LayerScores
from fastproj.balance.labels import LabelWords
from fastproj.balance.metrics import classification
from fastproj.balance.page import BAR, exit_pictures, label_rows, number, render_page
from fastproj.latent.findings import shown

HOSTILE = (*page_reader.HOSTILE, r"$\frac{1}{$ and $x^2$ [bold]")
LAYERS, SAMPLES = 5, 6


def read(page: str) -> str:
    return " ".join(Reader(page).text.split())


def names_of(text: str, count: int = 3) -> tuple[str, ...]:
    return (text, *(f"label {number}" for number in range(1, count)))


def scores(means: torch.Tensor | None = None) -> LayerScores:
    table = torch.rand(SAMPLES, LAYERS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = table + 5 * (torch.arange(LAYERS) == 3) if means is None else means
    return LayerScores(table, tuple(f"model.layers.{block}.self_attn.o_proj" for block in range(LAYERS)))


def exit_of(names: tuple[str, ...], seed: int = 0) -> EarlyExit:
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randn(2, LAYERS + 1, len(names), dtype=torch.float64, generator=generator)
    return EarlyExit(tables[0], tables[1], names)


def row(method: str, names: tuple[str, ...], **more: Any) -> Row:
    gold = [index % len(names) for index in range(3 * len(names))]
    said = [0 if method == ZERO_SHOT else label for label in gold]
    shares = {name: said.count(index) / len(said) for index, name in enumerate(names)}
    return Row(method, classification(said, gold, names), shares, 20.125, **more)


def findings(text: str = "plain", *, methods: tuple[str, ...] = (), count: int = 3) -> Findings:
    """Of the model alone; with methods, of them too, all its labels being right after any of them."""
    names = names_of(text, count)
    found = Findings(
        model=f"model {text}",
        labels=LabelWords(names, names, tuple((number,) for number in range(count))),
        template=f"{{text}} {text}",
        multi_label=False,
        adapter=text,
        scores=scores(),
        ablated=tuple(map(str, range(SAMPLES))),
        exit=exit_of(names),
        exited=SAMPLES,
    )
    if not methods:
        return found
    trained = [method for method in methods if method in ("balance", "layer", "lora")]
    rows = [row(ZERO_SHOT, names), *(row(m, names, trained=12_345, share=0.0123) for m in methods)]
    return replace(
        found,
        exits={method: exit_of(names, 1) for method in trained},
        layer=3,
        training={"samples": 9, "epochs": 1, "batch_size": 16, "rank": None, "lora_rank": 16, "seed": 0}
        | {"alpha": 1.0, "beta": 0.1, "gamma": 0.1},
        rows=tuple(rows),
        samples=3 * count,
        gold=dict.fromkeys(names, 1 / count),
    )


EVERY = tuple(name for name in METHODS if name != ZERO_SHOT)


def test_the_page_of_layers_shows_kl_and_logits_of_each() -> None:
    found = findings()
    text = read(render_page(found, command="fastproj layers x"))
    assert "Where labels part" in text
    assert "Exchanging block 3 moves the labels most" in text
    assert "Made by fastproj layers x" in text
    assert "Methods" not in text
    assert number(float(found.scores.mean[3])) in text
    for value in found.exit.propensity.tolist():
        assert number(value) in text
    assert render_page(found).count("<svg") == 2


def test_the_page_of_methods_shows_them_beside_the_model_as_it_is() -> None:
    page = render_page(findings(methods=EVERY))
    text = read(page)
    assert "Labels before and after" in text
    # Everything was called the first label: its F1 is 2·3/(9 + 3), weighted by a third.
    assert "balance: weighted F1 0.167 → 1.000, the worst label’s 0.000 (label 1 and 1 more)" in text
    assert "perplexity 20.12 → 20.12" in text
    assert "12,345" in text
    assert "1.23 %" in text
    assert "33.3 %" in text
    assert "block 3" in text
    assert "β = 0.1" in text
    assert [told for told in METHODS.values() if told not in text] == []
    # The exchange, logits after three trainings, two pictures a label, and the legends.
    assert page.count('role="img"') == 4
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["balance", "layer", "lora"]


def test_what_was_not_found_is_not_shown() -> None:
    bare = replace(findings(methods=("cc",)), scores=None, ablated=(), layer=None)
    bare = replace(bare, rows=tuple(replace(one, perplexity=None) for one in bare.rows))
    text = read(render_page(bare))
    assert "Exchange of attention" not in text
    assert "KL" not in text
    assert "→ 1.000 (plain and 2 more)." in text  # no perplexity behind it
    assert "Label logits by layer" in text
    assert "Dashed" not in text
    only = replace(findings(methods=("cc",)), rows=findings(methods=("cc",)).rows[:1])
    assert "one run a method" not in read(render_page(only))


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("methods", [(), EVERY], ids=["layers", "balance"])
def test_untrusted_text_becomes_no_markup(hostile: str, methods: tuple[str, ...]) -> None:
    page = render_page(findings(hostile, methods=methods), title=hostile, command=hostile)
    plain = render_page(findings("x" * len(hostile), methods=methods), command="plain")
    assert Reader(page).tags == Reader(plain).tags
    assert shown(hostile) in Reader(page).text
    assert "script" not in Reader(page).tags
    page.encode()  # what a browser is given holds no lone surrogates
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_the_page_stands_alone_and_lets_no_script_run() -> None:
    page = render_page(findings(HOSTILE[0], methods=EVERY))
    reader = Reader(page)
    assert [a for a in reader.attributes if {"src", "href"} & a.keys()] == []
    assert not re.search(r"url\([^#]|@import", page)
    policy = next(a["content"] for a in reader.attributes if a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_one_sample_no_difference_and_absent_labels_are_shown() -> None:
    found = replace(findings(), scores=scores(torch.zeros(1, LAYERS, dtype=torch.float64)), ablated=("1",))
    exit = exit_of(names_of("plain"))
    exit.contain[:, 1] = math.nan
    text = read(render_page(replace(found, exit=exit)))
    assert "nan" not in text.lower()
    assert "KL 0 nats" in text
    exit.contain[:] = math.nan
    assert exit_pictures(replace(found, exit=exit)) == []
    render_page(replace(found, exit=exit))


def test_many_and_long_labels_are_drawn() -> None:
    render_page(findings("漢" * 200, methods=EVERY, count=20))
    long = exit_of(names_of("long" * 50 + "$"))
    (picture,) = exit_pictures(replace(findings(), exit=long))
    assert f"{('long' * 6)[:23]}…" in picture.svg
    assert "longlong" * 4 not in picture.svg


def test_bars_lie_on_one_scale() -> None:
    found = findings(methods=("balance",))
    first, second, _ = label_rows(found.rows, "f1", found.gold)
    assert first.bars == (round(BAR * 0.5, 1), float(BAR))
    assert second.bars == (0.0, float(BAR))
    assert first.mark is None
    first, second, _ = label_rows(found.rows, "predicted", found.gold)
    assert first.bars == (float(BAR), round(BAR / 3, 1))
    assert first.mark == second.mark == round(BAR / 3, 1)
    assert label_rows((), "f1", {}) == []


def test_verdicts_say_no_more_than_the_numbers() -> None:
    assert layer_verdict(scores()).endswith("on the same samples.")
    table = torch.tensor([[0.0, 1.0, 0.9], [0.0, 2.0, 2.2], [0.0, 3.0, 2.8]], dtype=torch.float64)
    close = LayerScores(table, ("a", "b", "c"))
    assert layer_verdict(close) == (
        "Exchanging block 1 moves the labels most: KL 2 ± 0.58 nats; block 2 comes next, 0.0333 ± 0.12 below "
        "it on the same samples: too close to tell the two apart."
    )
    assert layer_verdict(LayerScores(table[:1, :1], ("a",))).endswith("KL 0 nats.")
    assert row_verdicts(findings(methods=("cc",)).rows[:1]) == []


def test_layers_are_counted_from_in_front_of_the_first_block() -> None:
    found = findings()
    rows = list(layer_rows(found))
    assert [one.block for one in rows] == [None, *range(LAYERS)]
    assert rows[0].mean is None
    assert [one.best for one in rows] == [False] * 4 + [True, False]
    assert [one.mean for one in rows[1:]] == found.scores.mean.tolist()
    assert [one.propensity for one in rows] == found.exit.propensity.tolist()
    assert [one.mean for one in layer_rows(replace(found, exit=None))][1:] == found.scores.mean.tolist()
    assert list(layer_rows(replace(found, exit=None, scores=None))) == []


def test_the_report_is_strict_json() -> None:
    found = findings(methods=EVERY)
    found = replace(found, rows=(replace(found.rows[0], perplexity=math.inf), *found.rows[1:]))
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["rows"][0]["perplexity"] == "inf"
    assert told["rows"][1]["measures"]["per_label_f1"]["plain"] == 1.0
    assert [finite(value) for value in (None, math.nan, 1.5)] == [None, None, 1.5]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_terminal_gets_text_without_control_characters(hostile: str) -> None:
    console = Console(file=io.StringIO(), width=200)
    show_layers(findings(hostile), console)
    show_methods(findings(hostile, methods=EVERY), console)
    told = console.file.getvalue()
    assert shown(hostile) in told
    assert not set(told) & set("\x1b\x00\u202e")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 390])
@pytest.mark.parametrize("methods", [(), EVERY], ids=["layers", "balance"])
def test_a_browser_shows_it_whole_and_quietly(
    browser: Chromium, tmp_path: Path, scheme: str, width: int, methods: tuple[str, ...]
) -> None:
    file = tmp_path / "report.html"
    file.write_text(render_page(findings(HOSTILE[0] + "long" * 50, methods=methods)), encoding="utf-8")
    browser.look(width, 800, scheme)
    browser.open(file)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if methods:
        assert not browser.evaluate("document.querySelector('details table').checkVisibility()")
        browser.evaluate("document.querySelector('summary').focus()")
        browser.press("Enter", 13, "\r")
        assert browser.evaluate("document.querySelector('details table').checkVisibility()")
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # Figures take the page's colours, and a reader that does not see them their words.
    ink = browser.evaluate("getComputedStyle(document.body).color")
    drawn = browser.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert drawn == ink
    named = browser.evaluate("[...document.querySelectorAll('[role=img]')].map((e) => e.ariaLabel.length)")
    assert len(named) == (4 if methods else 2)
    assert min(named) > 40
    contrasts = browser.evaluate(CONTRASTS)
    assert len(contrasts) > 30
    assert [pair for pair in contrasts if pair[0] < 4.5] == []
    assert browser.evaluate("window.owned === undefined")
    assert browser.complaints() == []
    assert [address for address in browser.addresses() if address != file.as_uri()] == []
