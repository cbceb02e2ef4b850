"""The manifest: what must be the same, what it says where it is not, and that damage shows."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored_rows import SCORES, SKETCHES

from fastproj.influence.manifest import Manifest, Part

WORDS = st.text(max_size=5)
PARTS = st.lists(
    st.builds(Part, WORDS, st.integers(0), st.integers(0), st.integers(0), WORDS), max_size=3
).map(tuple)


@given(
    model=WORDS,
    seed=st.none() | st.integers(0, 2**64 - 1),
    names=st.lists(WORDS).map(tuple),
    options=st.dictionaries(WORDS, WORDS),
    rows=st.none() | st.integers(0),
    parts=PARTS,
)
def test_what_is_written_is_read(model: str, seed: int | None, names: Any, **others: Any) -> None:
    manifest = Manifest("scores", model, "a", "d", seed=seed, names=names, **others)
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    assert Manifest.from_json(text).to_json() == text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "m1", "model is 'm0' there and 'm1' here"),
        ("adapter", "a1", "adapter is 'a0' there and 'a1' here"),
        ("data", "d1", "data is 'd0' there and 'd1' here"),
        ("seed", 4, "seed is 3 there and 4 here"),
        ("kind", "srht", "kind is 'rademacher' there and 'srht' here"),
        ("dimension", 16, "dimension is 8 there and 16 here"),
        ("names", ("x",), r"names is \(\) there and \('x',\) here"),
        ("content", "scores", "content is 'sketches' there and 'scores' here"),
        ("options", {"loss": "x"}, r"options\[loss\] is None there and 'x' here"),
    ],
)
def test_another_origin_is_refused_by_name_with_both_values(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^the store was made from something else: {message}. Remove it"):
        SKETCHES.require_origin(replace(SKETCHES, **{field: value}), "the store")


def test_every_difference_is_named() -> None:
    other = replace(SKETCHES, model="m1", data="d1", seed=5)
    assert SKETCHES.differences(other) == [
        "model is 'm0' there and 'm1' here",
        "data is 'd0' there and 'd1' here",
        "seed is 3 there and 5 here",
    ]


def test_progress_is_no_difference() -> None:
    further = replace(SCORES, rows_per_part=8, rows=1, parts=(Part("p", 0, 1, 2, "c"),))
    further.require_origin(SCORES, "it")
    assert further.without_progress() == SCORES


def test_options_are_strings() -> None:
    with pytest.raises(TypeError, match=r"options as strings, got \{'normalize': True\}"):
        replace(SCORES, options={"normalize": True})  # type: ignore[dict-item]


def test_damage_shows() -> None:
    text = SCORES.to_json()
    for damaged in (text[:-5], text.replace('"m0"', '"m1"'), "[]", "", '{"manifest": 3}', "\ufffd"):
        with pytest.raises(
            ValueError, match=r"it\.json (is damaged|does not match its checksum).*make it again"
        ):
            Manifest.from_json(damaged, "it.json")


def test_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected schema 1 in it\.json, got 2"):
        Manifest.from_json(replace(SCORES, schema=2).to_json(), "it.json")


def test_a_person_can_read_it() -> None:
    record = json.loads(SKETCHES.to_json())["manifest"]
    assert (record["model"], record["seed"], record["kind"], record["dimension"]) == (
        "m0",
        3,
        "rademacher",
        8,
    )
