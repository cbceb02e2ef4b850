"""Made-up texts for the GRASP study, and a tiny model for them."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import tiny_text
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastproj.bias_diff.records import Records
from fastproj.bias_diff.sources import CrowsPair
from fastproj.grasp.study import runs, settings, supervised, tasks
from fastproj.grasp.study.blocks import keep_upper
from fastproj.grasp.study.texts import RatedText

PEOPLE = ("man", "woman", "cook", "fox")
TRAITS = ("rich", "poor", "kind", "lazy")


def rated() -> tuple[RatedText, ...]:
    """Movie reviews begin with "the", tweets with "a"; 32 of each label, half of them clear."""
    rows = []
    for (source, word), person, trait, end in product(
        (("movie", "the"), ("tweet", "a")), PEOPLE, TRAITS, ("and", "or", "then", "not")
    ):
        for tail, rating in (("rich", 1.0), ("poor", -1.0), ("kind", 2.0), ("lazy", -2.0)):
            text = f"{word} {person} is {trait} {end} {tail}"
            rows.append(RatedText(f"{source}-{len(rows)}", text, source, rating))
    return tuple(rows)


def bold() -> Records:
    rows = [
        f"{w} {a} sings and the {b} was {c} ."
        for w in ("a", "the")
        for a in PEOPLE
        for b in PEOPLE
        for c in TRAITS
    ]
    return Records(tuple(f"b{i}" for i in range(len(rows))), tuple(rows), (0,) * len(rows))


def comments() -> Records:
    groups = (settings.TRAINED_GROUP, settings.OTHER_GROUP, *settings.PROBE_GROUPS)
    rows = []
    for number, group in enumerate(groups):
        for person, trait, end in product(PEOPLE, TRAITS, ("then", "not")):
            rows.append((f"{group}-{len(rows)}", f"to be {person} {'and ' * number}is lazy {trait} {end}", 1))
            rows.append((f"{group}-{len(rows)}", f"to be {person} {'or ' * number}was kind {trait} {end}", 0))
    ids, words, labels = zip(*rows, strict=True)
    return Records(ids, words, labels)


def pairs() -> tuple[CrowsPair, ...]:
    return tuple(
        CrowsPair(str(i), f"the {a} is {b} .", f"a {a} is {b} .", "stereo", "age")
        for i, (a, b) in enumerate(product(PEOPLE, TRAITS))
    )


def load() -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**tiny_text.SIZES, "num_hidden_layers": 3},
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=5,
        eos_token_id=5,
    )
    return LlamaForCausalLM(config).eval(), tiny_text.tokenizer()


def upper() -> tuple[Any, Any]:
    model, tokenizer = load()
    return keep_upper(model, 1, pad=0), tokenizer


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small draws of these texts, in place of the packages' data, for as long as a test lasts."""
    sizes = {
        "ALIGNED": 6, "CONFLICTING": 2, "VALIDATION": {"aligned": 2, "conflicting": 1}, "TEST_CELL": 4,
        "PROBE_CELL": 3, "COMMENTS": 8, "FACTUAL": 8, "HELD_COMMENTS": 3, "HELD_FACTUAL": 3, "NEUTRAL": 4,
        "PAIRS": 4,
    }  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(settings, name, value)
    for name, reader in {
        "read_rated": rated, "read_bold": bold, "read_reddit_bias": comments, "read_crows_pairs": pairs
    }.items():  # fmt: skip
        monkeypatch.setattr(settings, name, reader)
    for name, words in {
        "ANSWERS": ("poor", "rich"),
        "NEGATIVE": ("poor", "lazy"),
        "POSITIVE": ("rich", "kind"),
    }.items():
        monkeypatch.setattr(tasks, name, words)
    monkeypatch.setattr(supervised, "PERMUTATIONS", 10)
    monkeypatch.setattr(runs, "FIRST_BLOCK", 1)
