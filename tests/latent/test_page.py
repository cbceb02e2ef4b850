"""The page of latent factors: what it shows, that nothing in it becomes markup, how a browser takes it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_text
import torch
from chromium import CONTRASTS, Chromium
from page_reader import HOSTILE, Reader
from planted_direction import planted

pytest.importorskip("jinja2")

import fastproj
from fastproj.latent.describe import Description, Direction, Sentence, Token
from fastproj.latent.findings import Findings, grid, in_order, places, shown, verdict
from fastproj.latent.page import BAR, OPEN, bars, panels, render_page

WIDTH = 32


def found(text: str = "plain", *, pool: str = "stream", rank: int = 2, draws: int = 5) -> Findings:
    """Of a tiny model whose o_proj all write one direction; every token and sentence is ``text``."""
    tuned = planted(tiny_text.llama(), ["o_proj", "q_proj"], torch.ones(WIDTH), "write")
    factors = fastproj.identify(tuned, rank=rank, pool=pool, draws=draws)
    directions = [
        Direction(
            key,
            number,
            positive_tokens=(Token(1, text, 4.25), Token(2, " the", 3.0)),
            negative_tokens=(Token(3, text, -2.5),),
            no_tokens="",
            positive_sentences=(Sentence(0, text, 1.5),),
            negative_sentences=(Sentence(1, text, -0.5),),
        )
        for key in factors.bases
        for number in range(rank)
    ]
    return Findings(factors, Description(factors.side, tuple(directions), (text,)), notes=(text,))


def test_the_page_shows_shares_against_chance_layers_and_words() -> None:
    findings = found()
    text = " ".join(Reader(render_page(findings, command="fastproj identify x")).text.split())
    first = findings.rows[0]
    assert f"{100 * first.share:.1f} %" in text
    assert f"{100 * first.null[2]:.1f} %" in text
    assert "Direction 2" in text
    assert "self_attn.o_proj" in text
    assert "+4.25" in text
    assert "−2.50" in text
    assert "␣the" in text
    assert "may be offensive" in text
    assert "Made by fastproj identify x" in text
    assert "recurs" not in text


def test_evidence_is_shown_where_there_is_some() -> None:
    table = {"stream": torch.tensor([0.75, 0.125], dtype=torch.float64)}
    findings = replace(found(), recurrence=table, difference={"stream": torch.tensor([-1.5, torch.inf])})
    text = Reader(render_page(findings)).text
    assert "recurs" in text
    assert "0.75" in text
    assert "−1.50" in text
    assert "+inf" in text


def test_without_a_model_or_draws_the_page_says_so_and_shows_no_words() -> None:
    findings = Findings(found(draws=0).factors, notes=("Give --model to see tokens.",))
    page = render_page(findings)
    text = Reader(page).text
    assert "Give --model to see tokens." in text
    assert "Tokens that it writes" not in text
    assert "offensive" not in text
    assert "nan" not in text.lower()
    assert 'fill="var(--series-1)"' not in page.partition("Singular values")[0]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_untrusted_text_becomes_no_markup(hostile: str) -> None:
    page = render_page(found(hostile), title=hostile, command=hostile)
    plain = render_page(found(), command="plain")
    assert Reader(page).tags == Reader(plain).tags
    assert shown(hostile) in Reader(page).text
    assert "script" not in Reader(page).tags
    page.encode()  # what a browser is given holds no lone surrogates
    assert "\x1b" not in page
    assert "\u202e" not in page


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_of_modules_are_untrusted_too(hostile: str) -> None:
    findings = found(pool="module")
    name = f"model.layers.0.{hostile}"
    old = next(iter(findings.factors.bases))

    def renamed(table: dict) -> dict:
        return {name if key == old else key: value for key, value in table.items()}

    factors = findings.factors
    fields = ("bases", "spectra", "shares", "agreement", "p_values", "null_shares")
    factors = replace(
        factors,
        modules=tuple(name if module == old else module for module in factors.modules),
        **{field: renamed(getattr(factors, field)) for field in fields},
    )
    page = render_page(Findings(factors))
    tags = Reader(page).tags
    assert "script" not in tags
    assert "img" not in tags
    assert shown(hostile) in Reader(page).text
    page.encode()


def test_the_page_stands_alone_and_lets_no_script_run() -> None:
    page = render_page(found(HOSTILE[0]))
    reader = Reader(page)
    assert [a for a in reader.attributes if {"src", "href"} & a.keys()] == []
    assert not re.search(r"url\(|@import", page)
    policy = next(a["content"] for a in reader.attributes if a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_beyond_the_first_directions_the_page_is_folded() -> None:
    findings = found(pool="module")
    assert len(findings.keys) == 4
    assert "more direction" not in render_page(findings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastproj.latent.page.OPEN", 1)
        assert "6 more directions" in render_page(findings)
    assert OPEN > 1


def test_bars_share_one_scale() -> None:
    rows = found().rows
    drawn = bars(rows)
    end = max(value for row in rows for value in (row.share, *row.null))
    assert drawn[0].at == pytest.approx(BAR * rows[0].share / end, abs=0.06)
    assert drawn[0].null is not None
    assert drawn[0].null[0] <= drawn[0].null[1] <= drawn[0].null[2] <= BAR
    assert bars(found(draws=0).rows)[0].null is None


def test_panels_hold_every_singular_value_within_their_frame() -> None:
    factors = found().factors
    drawn = panels(factors)
    assert [panel.kind for panel in drawn] == ["self_attn.q_proj", "self_attn.o_proj"]
    assert sum(len(panel.points) for panel in drawn) == sum(v.numel() for v in factors.spectra.values())
    assert sum(largest for panel in drawn for *_, largest in panel.points) == len(factors.spectra)
    heights = [y for panel in drawn for _, y, _ in panel.points]
    assert min(heights) == 12  # the largest of all stands at the top
    assert max(heights) <= 154


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_panels_are_drawn_at_any_scale(scale: float) -> None:
    factors = found().factors
    scaled = replace(factors, spectra={name: values * scale for name, values in factors.spectra.items()})
    for before, after in zip(panels(factors), panels(scaled), strict=True):
        assert [point[2] for point in before.points] == [point[2] for point in after.points]
        for one, other in zip(before.points, after.points, strict=True):
            assert one[:2] == pytest.approx(other[:2], abs=0.11)  # rounded to a tenth


def test_modules_are_laid_out_by_kind_and_block() -> None:
    names = ("m.layers.10.o", "m.layers.2.o", "m.layers.2.q.x", "head")
    assert places(names) == {
        "m.layers.10.o": ("o", 10),
        "m.layers.2.o": ("o", 2),
        "m.layers.2.q.x": ("q.x", 2),
        "head": ("head", None),
    }
    cells = grid(dict.fromkeys(names, 0.5))
    assert list(cells) == ["o", "q.x", "head"]
    assert list(cells["o"]) == [2, 10]
    assert in_order(number for row in cells.values() for number in row) == [2, 10, None]
    assert places(["encoder.0.o", "decoder.0.o"])["encoder.0.o"] == ("encoder.*.o", 0)
    assert places([f"m.{'9' * 5000}.o"]) == {f"m.{'9' * 5000}.o": (f"m.{'9' * 5000}.o", None)}


def test_the_verdict_says_no_more_than_the_numbers() -> None:
    assert verdict(found()).startswith("The first direction holds ")
    assert "p =" in verdict(found())
    assert "chance" not in verdict(found(draws=0))
    assert re.match(r"In \d of 4 modules", verdict(found(pool="module")))
    assert verdict(found(pool="module", draws=0)) == "Each of 4 modules has directions of its own."


def test_what_does_not_print_is_made_visible() -> None:
    assert shown(" a b ") == "␣a b␣"
    assert shown("  ") == "␣␣"
    assert shown("\x1b[1m\n\u202e\ud800é漢") == "\\x1b[1m\\n\\u202e\\ud800é漢"
    assert shown("") == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 390])
def test_a_browser_shows_it_whole_and_quietly(
    browser: Chromium, tmp_path: Path, scheme: str, width: int
) -> None:
    file = tmp_path / "factors.html"
    file.write_text(render_page(found(HOSTILE[0] + "long" * 50)), encoding="utf-8")
    browser.look(width, 800, scheme)
    browser.open(file)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not browser.evaluate("document.querySelector('.sentences').checkVisibility()")
    browser.evaluate("document.querySelector('summary').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.evaluate("document.querySelector('.sentences').checkVisibility()")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    contrasts = browser.evaluate(CONTRASTS)
    assert len(contrasts) > 40
    assert [pair for pair in contrasts if pair[0] < 4.5] == []
    assert browser.evaluate("window.owned === undefined")
    assert browser.complaints() == []
    assert [address for address in browser.addresses() if address != file.as_uri()] == []
