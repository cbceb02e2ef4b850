"""The review page as a file: what it carries, that nothing in it can become markup, what it refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("jinja2")

from hypothesis import given
from hypothesis import strategies as st

from fastproj.bias_diff.report import render_report, to_json
from fastproj.influence.scores import Scores

HOSTILE = (
    "</script><script>window.owned = 1</script>",
    "<img src=x onerror='window.owned = 1'>",
    "<!-- <script>",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; ' \" ` ${1}",
    "\u2028\u2029\x00\ud800\u202eabc",
)


class Reader(HTMLParser):
    """Tags with their attributes, and the text of script elements, as a browser would cut them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.inside = False
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


def scores_of(values: list[list[float]], ids: tuple[str, ...] | None = None) -> Scores:
    tensor = torch.tensor(values)
    names = tuple(f"probe {column}" for column in range(tensor.shape[1]))
    return Scores(ids or tuple(f"row-{row}" for row in range(len(values))), names, tensor)


def data_of(page: str) -> dict[str, Any]:
    return json.loads(Reader(page).scripts[0])


def values_of(column: dict[str, Any]) -> list[float]:
    return np.frombuffer(base64.b64decode(column["values"]), "<f4").tolist()


THREE = scores_of([[0.1, 0.3], [-0.5, 1e-30], [1e30, 0.0]])


def test_the_page_carries_every_sample_as_it_was_scored() -> None:
    data = data_of(render_report(THREE, texts=["a", "é", "c"], labels=[True, False, True], fraction=2 / 3))
    assert data["ids"] == ["row-0", "row-1", "row-2"]
    assert data["texts"] == ["a", "é", "c"]
    assert data["labels"] == "101"
    assert data["count"] == 2
    assert data["made"] is None
    names = [column["name"] for column in data["columns"]]
    assert names == ["mean over probes", "highest probe", "probe 0", "probe 1"]
    assert values_of(data["columns"][0]) == THREE.aggregate("mean").tolist()
    assert values_of(data["columns"][1]) == THREE.aggregate("max").tolist()
    assert values_of(data["columns"][3]) == THREE.values[:, 1].tolist()


def test_one_reference_is_its_own_score() -> None:
    data = data_of(render_report(scores_of([[0.0], [0.5]]), aggregate="max"))
    assert [column["name"] for column in data["columns"]] == ["probe 0"]
    assert data["column"] == 0
    assert data["texts"] is data["labels"] is None


def test_the_page_opens_on_the_aggregate_and_selection_given() -> None:
    data = data_of(render_report(THREE, aggregate="max", selected={"row-2", "row-0"}))
    assert data["column"] == 1
    assert data["made"] == [0, 2]
    assert data["count"] == 2


def test_a_page_without_labels_has_no_curves_and_one_without_texts_no_notice() -> None:
    bare = render_report(THREE)
    assert 'id="curves"' not in bare
    assert "slurs" not in bare
    full = render_report(THREE, texts=list("abc"), labels=[True, False, False])
    assert 'id="curves"' in full
    assert "slurs" in full


@pytest.mark.parametrize("hostile", HOSTILE)
def test_untrusted_text_is_carried_as_it_is_and_becomes_no_markup(hostile: str) -> None:
    scores = Scores((hostile, "b"), (hostile.replace("\ud800", ""),), torch.tensor([[1.0], [2.0]]))
    page = render_report(scores, texts=[hostile, "plain"], selected=[hostile])
    plain = render_report(scores_of([[1.0], [2.0]]), texts=["x", "y"], selected=["row-0"])
    assert [tag for tag, _ in Reader(page).tags] == [tag for tag, _ in Reader(plain).tags]
    assert data_of(page)["texts"] == [hostile, "plain"]
    assert data_of(page)["ids"][0] == hostile


def test_title_and_command_are_escaped() -> None:
    page = render_report(THREE, title="<b>t</b>", command="fastproj report '<i>'")
    tags = [tag for tag, _ in Reader(page).tags]
    assert "b" not in tags
    assert tags.count("i") == 0


@given(st.text())
def test_json_in_a_script_holds_nothing_that_ends_it(text: str) -> None:
    written = to_json({"text": text})
    assert json.loads(written) == {"text": text}
    assert written.isascii()
    assert not set(written) & set("<>&")


def test_the_page_stands_alone_and_lets_only_its_own_script_run() -> None:
    page = render_report(THREE, texts=list("abc"), labels=[True, False, True])
    reader = Reader(page)
    assert [tag for tag, attributes in reader.tags if {"src", "href"} & attributes.keys()] == []
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML|insertAdjacentHTML|eval\(", page)
    policy = next(a["content"] for t, a in reader.tags if t == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(reader.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert len(reader.scripts) == 2


def test_every_element_that_the_script_asks_for_is_there_once() -> None:
    page = render_report(THREE, texts=list("abc"), labels=[True, False, True])
    reader = Reader(page)
    names = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(names) == len(set(names))
    script = reader.scripts[1]
    asked = set(re.findall(r'(?:byId|getElementById|on)\("([\w-]+)"', script))
    assert len(asked) > 15
    assert asked <= set(names)


def test_long_texts_are_cut_and_the_page_says_so() -> None:
    page = render_report(THREE, texts=["a" * 11, "b" * 10, ""], text_limit=10)
    assert data_of(page)["texts"] == ["a" * 10 + "…", "b" * 10, ""]
    assert "1 texts are longer than 10 characters" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": ["a"]}, "expected 3 texts, one for each sample, got 1"),
        ({"labels": [True] * 4}, "expected 3 labels, one for each sample, got 4"),
        ({"fraction": 0.0}, "expected a fraction above 0 and up to 1, got 0.0"),
        ({"fraction": float("nan")}, "expected a fraction above 0"),
        ({"aggregate": "median"}, "expected aggregate 'mean' or 'max', got 'median'"),
        ({"selected": ["row-1", "other", "x"]}, "got 2 others, first 'other'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        render_report(THREE, **arguments)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused_by_id(odd: float) -> None:
    with pytest.raises(ValueError, match="got others for 1, first 'row-1'"):
        render_report(scores_of([[0.0, 1.0], [0.0, odd]]))


def test_no_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a sample at least, got none"):
        render_report(Scores((), ("probe",), torch.zeros(0, 1)))


def test_scores_that_are_no_contiguous_columns_are_written_in_order() -> None:
    values = torch.arange(12.0).reshape(3, 4)[:, ::2]
    data = data_of(render_report(Scores(("a", "b", "c"), ("p", "q"), values)))
    assert values_of(data["columns"][2]) == [0.0, 4.0, 8.0]
    assert values_of(data["columns"][3]) == [2.0, 6.0, 10.0]
