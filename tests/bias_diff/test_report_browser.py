"""The review page in a browser: sorting, search, threshold, keys, downloads; nothing runs or leaks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("jinja2")

from chromium import Chromium, find_chromium

from fastproj.bias_diff.report import render_report
from fastproj.influence.scores import Scores

if find_chromium() is None:
    pytest.skip("there is no Chromium on this machine", allow_module_level=True)

ROWS = 200
HOSTILE = "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'><b id=injected>"
ENTER, TAB, END, RIGHT = ("Enter", 13, "\r"), ("Tab", 9), ("End", 35), ("ArrowRight", 39)


def scores() -> Scores:
    """Two probes: later samples score higher on the first, and lower on the second and in the mean."""
    ramp = torch.arange(ROWS, dtype=torch.float32)
    return Scores(
        tuple(f"row-{row}" for row in range(ROWS)), ("first", "second"), torch.stack([ramp, -2 * ramp], 1)
    )


def labels() -> list[bool]:
    """Of the 20 with the highest mean, all but the first and the last are biased."""
    return [0 < row < 19 for row in range(ROWS)]


def texts() -> list[str]:
    return [HOSTILE if row == 0 else f"text of number {row}, Größe {row % 7}" for row in range(ROWS)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(str(find_chromium()), tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser: Chromium, tmp_path: Path) -> Iterator[Chromium]:
    """The page with texts and labels; in the end nothing foreign has run and nothing was asked for."""
    file = tmp_path / "report.html"
    file.write_text(render_report(scores(), texts=texts(), labels=labels(), fraction=0.1), encoding="utf-8")
    browser.look(1000, 800, "light")
    browser.open(file)
    yield browser
    assert browser.complaints() == []
    assert [address for address in browser.addresses() if address != file.as_uri()] == []
    assert browser.evaluate("window.owned === undefined && document.getElementById('injected') === null")


def ids(browser: Chromium) -> list[str]:
    return browser.evaluate(
        "[...document.querySelectorAll('#samples tbody td:first-child')].map(c => c.textContent)"
    )


def text(browser: Chromium, selector: str) -> str:
    return browser.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")


def click(browser: Chromium, selector: str) -> None:
    browser.evaluate(f"document.querySelector({json.dumps(selector)}).click()")


def enter(browser: Chromium, name: str, value: Any, event: str) -> None:
    """Give a control a value as a reader would, and wait for the picture that follows."""
    browser.evaluate(
        f"{{ const c = document.getElementById({json.dumps(name)}); c.value = {json.dumps(value)};"
        f" c.dispatchEvent(new Event({json.dumps(event)})); }}"
    )
    settle(browser)


def settle(browser: Chromium) -> None:
    browser.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def sort_marks(browser: Chromium) -> dict[str, str]:
    return browser.evaluate(
        "Object.fromEntries([...document.querySelectorAll('#samples th[aria-sort]')]"
        ".map(h => [h.dataset.key, h.getAttribute('aria-sort')]))"
    )


def test_it_opens_on_the_highest_mean_scores(page: Chromium) -> None:
    assert ids(page) == [f"row-{row}" for row in range(50)]
    assert sort_marks(page) == {"score:0": "descending"}
    assert "20 of 200 samples are selected (10.0 %): a score of −9.500 or more" in text(page, "#verdict")
    assert "Coverage 100.0 %: 18 of 18 biased" in text(page, "#verdict")
    assert "Precision 90.0 %" in text(page, "#verdict")
    assert text(page, "#found") == "200 of 200 samples, 1 to 50 shown"


def test_sort_buttons_work_by_key_and_turn_the_order_round(page: Chromium) -> None:
    page.evaluate("document.querySelector('#samples th[data-key=id] button').focus()")
    page.press(*ENTER)
    assert sort_marks(page) == {"id": "ascending"}
    assert ids(page)[:3] == ["row-0", "row-1", "row-2"]  # by number, not row-0, row-1, row-10
    page.press(*ENTER)
    assert sort_marks(page) == {"id": "descending"}
    assert ids(page)[0] == "row-199"
    page.press(*TAB)
    assert page.evaluate("document.activeElement.closest('th').dataset.key") == "score:0"
    page.press(*ENTER)
    assert sort_marks(page) == {"score:0": "descending"}
    assert ids(page)[0] == "row-0"


def test_every_probes_score_can_be_shown_and_sorted_by(page: Chromium) -> None:
    click(page, "#every")
    headings = page.evaluate("[...document.querySelectorAll('#samples th')].map(h => h.textContent)")
    assert headings == [
        "sample",
        "mean over probes",
        "highest probe",
        "first",
        "second",
        "label",
        "selected",
        "text",
    ]
    click(page, "#samples th[data-key='score:2'] button")
    assert ids(page)[0] == "row-199"
    click(page, "#samples th[data-key=label] button")
    assert ids(page)[:2] == ["row-1", "row-2"]


def test_search_looks_into_ids_and_texts_without_showing_them(page: Chromium) -> None:
    enter(page, "query", "NUMBER 17,", "input")
    assert ids(page) == ["row-17"]
    assert text(page, "#found") == "1 of 200 samples, 1 to 1 shown"
    assert text(page, "#samples td.text") == "hidden"
    enter(page, "query", "row-19", "input")
    assert len(ids(page)) == 11
    enter(page, "query", "größe 3", "input")
    assert len(ids(page)) == 29
    enter(page, "query", "nowhere", "input")
    assert ids(page) == []
    assert text(page, "#found") == "0 of 200 samples"


def test_texts_stay_hidden_until_asked_for_and_hostile_ones_stay_text(page: Chromium) -> None:
    assert "text of number" not in page.evaluate("document.querySelector('main').innerText")
    click(page, "#reveal")
    assert page.evaluate("document.getElementById('reveal').getAttribute('aria-pressed')") == "true"
    assert text(page, "#samples td.text") == HOSTILE
    assert page.evaluate("document.querySelectorAll('#samples td.text *').length") == 0
    click(page, "#reveal")
    assert text(page, "#samples td.text") == "hidden"


def test_pages_turn_and_stop_at_the_ends(page: Chromium) -> None:
    click(page, "#next")
    assert ids(page)[0] == "row-50"
    click(page, "#last")
    assert text(page, "#found") == "200 of 200 samples, 151 to 200 shown"
    assert page.evaluate("document.getElementById('next').getAttribute('aria-disabled')") == "true"
    click(page, "#next")
    assert ids(page)[0] == "row-150"
    enter(page, "page", "99", "change")
    assert page.evaluate("document.getElementById('page').value") == "4"
    enter(page, "page", "", "change")
    assert ids(page)[0] == "row-0"
    enter(page, "size", "250", "change")
    assert len(ids(page)) == ROWS
    assert text(page, "#pages") == "of 1"


def test_the_threshold_moves_by_key_by_number_and_by_the_pointer(page: Chromium) -> None:
    page.evaluate("document.getElementById('share').focus()")
    for _ in range(5):
        page.press(*RIGHT)
    settle(page)
    assert "21 of 200 samples" in text(page, "#verdict")
    page.press(*END)
    settle(page)
    assert "200 of 200 samples are selected (100.0 %)" in text(page, "#verdict")
    enter(page, "count", "9", "change")
    assert "Coverage 44.4 %: 8 of 18" in text(page, "#verdict")
    assert page.evaluate("document.querySelectorAll('#samples tr.selected').length") == 9
    enter(page, "count", "0", "change")
    assert "0 of 200 samples are selected (0.0 %): no score is above the threshold" in text(page, "#verdict")
    page.evaluate("document.getElementById('histogram').scrollIntoView()")
    box = page.evaluate(
        "(({x, y, width}) => ({x, y, width}))(document.getElementById('histogram').getBoundingClientRect())"
    )
    middle = box["x"] + 48 + (box["width"] - 68) / 2  # of the axis, which has margins of 48 and 20
    page.drag((box["x"] + 60, box["y"] + 60), (middle, box["y"] + 60))
    settle(page)
    assert "100 of 200 samples are selected" in text(page, "#verdict")
    line = page.evaluate("document.getElementById('threshold').getBoundingClientRect().x")
    assert abs(line - middle) < 4  # a sample is 4.6 px wide here


def test_another_score_takes_its_own_order_and_curves(page: Chromium) -> None:
    enter(page, "column", "2", "change")
    assert ids(page)[0] == "row-199"
    assert sort_marks(page) == {"score:2": "descending"}
    assert "Coverage 0.0 %" in text(page, "#verdict")
    # Of the 182 other samples only row 0 scores below a biased one here, and only it above one in the mean.
    assert f"AUC {1 / 182:.3f}" in text(page, "#area")
    enter(page, "column", "0", "change")
    assert f"AUC {1 - 1 / 182:.3f}" in text(page, "#area")
    table = page.evaluate(
        "[...document.querySelectorAll('#measures tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert table[1] == ["5 %", "50.0 %", "90.0 %"]
    assert table[2] == ["15 %", "100.0 %", "60.0 %"]


def test_filters_show_what_was_missed_and_what_was_wrong(page: Chromium) -> None:
    enter(page, "count", "10", "change")
    for name, found in (("selected", 10), ("rest", 190), ("biased", 18), ("missed", 9), ("wrong", 1)):
        enter(page, "filter", name, "change")
        assert text(page, "#found").startswith(f"{found} of 200"), name


def saved(browser: Chromium, button: str) -> str:
    """What a download button would write: the page's own link is caught on its way."""
    return browser.evaluate(
        "new Promise(done => { const make = URL.createObjectURL;"
        " URL.createObjectURL = blob => { blob.text().then(done); URL.createObjectURL = make; return '#'; };"
        f" document.getElementById({json.dumps(button)}).click(); }})"
    )


def test_what_is_selected_can_be_taken_away(page: Chromium) -> None:
    enter(page, "count", "3", "change")
    assert saved(page, "save-text") == "row-0\nrow-1\nrow-2\n"
    assert json.loads(saved(page, "save-json")) == ["row-0", "row-1", "row-2"]


def open_report(browser: Chromium, folder: Path, **options: Any) -> None:
    file = folder / "report.html"
    file.write_text(render_report(options.pop("scores", None) or scores(), **options), encoding="utf-8")
    browser.open(file)


def test_a_selection_as_made_stays_until_the_threshold_moves(browser: Chromium, tmp_path: Path) -> None:
    open_report(browser, tmp_path, labels=labels(), selected=["row-199", "row-5"])
    assert "2 of 200 samples are selected (1.0 %): as the selection was made" in text(browser, "#verdict")
    assert "Precision 50.0 %" in text(browser, "#verdict")
    assert json.loads(saved(browser, "save-json")) == ["row-5", "row-199"]
    assert browser.evaluate("document.getElementById('restore').hidden")
    enter(browser, "count", "40", "change")
    assert "40 of 200" in text(browser, "#verdict")
    click(browser, "#restore")
    assert "2 of 200" in text(browser, "#verdict")
    assert browser.complaints() == []


@pytest.mark.parametrize("value", [0.0, 1e-30, -1e30])
def test_one_sample_and_equal_scores_are_drawn(browser: Chromium, tmp_path: Path, value: float) -> None:
    single = Scores(("only",), ("probe",), torch.tensor([[value]]))
    open_report(browser, tmp_path, scores=single, texts=["a"], labels=[True])
    assert browser.evaluate("document.querySelectorAll('#histogram rect').length") == 1
    assert "NaN" not in browser.evaluate("document.querySelector('main').outerHTML")
    assert "Coverage 100.0 %" in text(browser, "#verdict")
    assert browser.complaints() == []


def test_no_biased_sample_leaves_no_curve_and_no_error(browser: Chromium, tmp_path: Path) -> None:
    open_report(browser, tmp_path, labels=[False] * ROWS)
    assert "no curve" in text(browser, "#area")
    assert "NaN" not in browser.evaluate("document.querySelector('main').outerHTML")
    assert browser.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_schemes(browser: Chromium, tmp_path: Path, scheme: str) -> None:
    browser.look(360, 740, scheme)
    open_report(browser, tmp_path, texts=[f"{'long' * 40} {row}" for row in range(ROWS)], labels=labels())
    click(browser, "#reveal")
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(253, 252, 250)", "dark": "rgb(23, 25, 28)"}[scheme]


def test_fifty_thousand_samples_show_one_page(browser: Chromium, tmp_path: Path) -> None:
    rows = 50_000
    values = torch.randn(rows, 1, generator=torch.Generator().manual_seed(0))
    many = Scores(tuple(map(str, range(rows))), ("probe",), values)
    open_report(browser, tmp_path, scores=many, texts=[f"sentence {row}" for row in range(rows)])
    assert text(browser, "#found") == "50,000 of 50,000 samples, 1 to 50 shown"
    assert browser.evaluate("document.querySelectorAll('#samples tbody tr').length") == 50
    assert ids(browser) == [str(row) for row in values[:, 0].argsort(descending=True)[:50].tolist()]
    enter(browser, "query", "sentence 4999", "input")
    assert text(browser, "#found") == "11 of 50,000 samples, 1 to 11 shown"
    assert browser.complaints() == []
