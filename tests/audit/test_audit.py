"""The command from end to end on one operator, its cache, and what makes it red."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from fastproj.bench.audit.audit import Audit, _probe_problems, code_rows, traffic_problems, traffic_row
from fastproj.bench.audit.compilation import Job, _environment, case_of, compile_case, jobs
from fastproj.bench.audit.machine_code import Access, Reading
from fastproj.bench.traffic.chips import CHIPS
from fastproj.bench.traffic.models import OPERATORS
from fastproj.bench.traffic.moves import Moves
from fastproj.bench.traffic.workloads import WORKLOADS

QWEN = next(iter(WORKLOADS.values()))
H100 = CHIPS["H100"]
SPLITS = [
    job for job in jobs(["weighted_grad"], ["sm_90"]) if case_of(job).kernel.__name__ == "sum_splits_kernel"
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``fastproj audit``, started where kernels are interpreted: it must compile them all the same."""
    command = "from fastproj.cli import app; app()"
    return subprocess.run(
        [sys.executable, "-c", command, "audit", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "110"},
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readings")


@pytest.fixture(scope="module")
def first(cache: Path) -> subprocess.CompletedProcess[str]:
    return run("--operator", "combine", "--target", "sm_90", "--json", "--cache", str(cache))


def test_a_real_audit_is_green(first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert result["green"]
    assert result["findings"] == result["problems"] == []
    (row,) = result["code"]
    assert (row["kernel"], row["arch"], row["local_bytes"]) == ("_combine_kernel", "sm_90", 0)
    assert row["cases"] == row["wide"] == len(jobs(["combine"], ["sm_90"]))
    assert 16 <= row["registers"] <= 255
    assert {own["chip"] for own in result["traffic"]} == set(CHIPS)
    assert {own["operator"] for own in result["traffic"]} == {"combine"}


def test_readings_are_kept_and_used(first: subprocess.CompletedProcess[str], cache: Path) -> None:
    kept = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(kept) == len(jobs(["combine"], ["sm_90"]))
    # A reading that was tampered with shows, one cut short is made anew.
    tampered, cut = sorted(kept)[:2]
    record = json.loads(tampered.read_text(encoding="utf-8"))
    spilled = record | {"local_bytes": 40, "spills": ["STL [R1], R2"]}
    tampered.write_text(json.dumps(spilled), encoding="utf-8")
    cut.write_text(cut.read_text(encoding="utf-8")[:30], encoding="utf-8")
    again = run("--operator", "combine", "--target", "sm_90", "--cache", str(cache))
    assert again.returncode == 1, again.stderr
    words = " ".join(again.stdout.split())
    assert "local memory: _combine_kernel" in words
    assert "40 bytes of local memory a thread" in words
    assert "STL [R1], R2" in words
    assert "1 findings" in words
    assert "H100: Qwen2.5-1.5B, LoRA r=16 on q, v" in words
    json.loads(cut.read_text(encoding="utf-8"))
    assert {path for path in kept if path.stat().st_mtime_ns != kept[path]} == {tampered, cut}
    tampered.write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--operator", "nothing"), "expected some of ('balance_loss', 'combine'"),
        (("--target", "sm_1"), "expected some of ('sm_80', 'sm_90'"),
        (("--chip", "Z80"), "expected the name of a known chip (A100, H100"),
    ],
)
def test_bad_options_are_explained(arguments: tuple[str, str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU nothing is interpreted")
def test_interpreted_kernels_are_not_compiled_by_mistake() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET was set"):
        compile_case(case_of(SPLITS[0]), "sm_90")


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="arch must be one of"):
        compile_case(case_of(SPLITS[0]), "sm_1")


def test_a_page_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("--html", str(tmp_path / "file" / "page.html"), "--cache", str(tmp_path / "readings"))
    assert done.returncode == 2
    assert "Invalid value for --html" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "readings").exists()


def test_rows_hold_the_worst_of_their_cases() -> None:
    load = Access("load", 128, ("sum_splits_kernel",), "weighted_grad.py:1", "LDG.E.128")
    narrow = replace(load, bits=32)
    good = Reading(40, 0, 0, False, 0, (load,), ())
    bad = Reading(250, 8, 4096, False, 0, (load, narrow), ("STL",))
    aligned = [job for job in SPLITS if "unaligned" not in case_of(job).name]
    readings: dict[Job, Reading] = dict.fromkeys(aligned, good) | {aligned[-1]: bad}
    (row,) = code_rows(readings)
    assert (row.operator, row.kernel) == ("weighted_grad", "sum_splits_kernel")
    assert (row.registers, row.local_bytes, row.shared_bytes, row.programs) == (250, 8, 4096, 2)
    assert (row.cases, row.wide, row.findings) == (len(aligned), len(aligned) - 1, 3)
    # Two programs of the bad case, which sums 1,024 numbers of fp64.
    assert row.flying_bytes == 2 * 1024 * 8


@pytest.mark.parametrize("operator", ["gram + combine", "edge", "weighted_grad", "per_sample_grad"])
def test_traffic_beyond_its_bound_is_named(operator: str) -> None:
    traffic = OPERATORS[operator](QWEN)
    assert traffic_problems(QWEN, traffic, list(CHIPS.values())) == []
    (stream, *_) = (s for s in traffic.moves.streams if s.operand in ("sets", "wide"))
    more = Moves(traffic.moves.launched, (*traffic.moves.streams, stream))
    problems = traffic_problems(QWEN, replace(traffic, moves=more), [H100])
    assert len(problems) == 1
    assert problems[0].startswith(f"{operator} on {QWEN.name}")
    assert "are allowed" in problems[0]


def test_a_traffic_row_by_hand() -> None:
    row = traffic_row(OPERATORS["combine"](QWEN), H100)
    assert row.least_bytes == pytest.approx(3 * QWEN.elements * 4, rel=1e-3)
    assert row.floor_microseconds == pytest.approx(row.memory_bytes / 3.35e12 * 1e6)
    assert (row.launches, row.bound, row.flops) == (1, "memory", 4 * QWEN.elements)


def test_problems_make_an_audit_red() -> None:
    assert Audit((), (), (), (), ()).green
    assert not Audit((), (), (), (), ("edge: an extra pass",)).green
    assert json.loads(Audit((), (), (), (), ("edge: an extra pass",)).to_json())["green"] is False


def test_probes_of_all_that_share_a_kernel_are_heard() -> None:
    results = [
        {"operator": name, "problem": f"{name} reads twice"}
        for name in ("gram", "combine", "gram + combine", "edge", "weighted_grad")
    ] + [{"operator": "gram", "problem": None}]

    def heard(*operators: str) -> list[str]:
        ran = SimpleNamespace(communicate=lambda: (json.dumps(results), ""), returncode=0)
        return [problem.removesuffix(" reads twice") for problem in _probe_problems(ran, operators)]

    assert heard("gram") == ["gram", "gram + combine", "edge"]
    assert heard("combine") == ["combine", "gram + combine"]
    assert heard("weighted_grad") == ["weighted_grad"]
    failed = SimpleNamespace(communicate=lambda: ("", "no such module"), returncode=1)
    with pytest.raises(RuntimeError, match="no such module"):
        _probe_problems(failed, ["gram"])


def test_triton_variables_are_part_of_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a reading made under one would be found without it; folders change nothing."""
    before = _environment()
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    assert _environment() == before
    monkeypatch.setenv("TRITON_PTXAS_PATH", "another assembler")
    assert _environment() != before
