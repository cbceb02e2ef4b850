"""Kernels broken on purpose are compiled for real chips; the audit names each, with code that shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

BROKEN = Path(__file__).with_name("broken_kernels.py")
Found = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=["sm_90", "gfx942"])
def arch(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def found(arch: str) -> Found:
    """In a process of its own: under TRITON_INTERPRET nothing compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(BROKEN), arch],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    loaded: Found = json.loads(run.stdout)
    return loaded


def test_scalar_loads_are_named(found: Found) -> None:
    (finding,) = found["scalar loads"]
    assert (finding["kernel"], finding["rule"]) == ("combine_kernel", "access width")
    assert "accesses of [32] bits in loops of" in finding["message"]
    assert "combine_flat" in finding["message"]
    assert all(line.startswith("_tiles.py:") for line in finding["lines"])
    assert any("LDG.E R" in line or "global_store_dword v" in line for line in finding["lines"])


def test_a_spill_is_named(found: Found) -> None:
    finding = next(one for one in found["a spill"] if one["rule"] == "local memory")
    assert finding["kernel"] == "gram_kernel"
    assert any(line.startswith(("STL", "scratch_store")) for line in finding["lines"])


def test_missing_tensor_cores_are_named(found: Found, arch: str) -> None:
    """gfx942 has matrix instructions for fp32, so that nothing is wrong there."""
    rules = [finding["rule"] for finding in found["no tensor cores"]]
    assert rules == ([] if arch == "gfx942" else ["tensor cores"])


def test_loads_that_wait_are_named(found: Found, arch: str) -> None:
    """gfx942 has no asynchronous copies to miss."""
    if arch == "gfx942":
        assert found["loads that wait"] == []
        return
    (finding,) = found["loads that wait"]
    assert finding["rule"] == "asynchronous copies"
    assert all(line.startswith("broken_kernels.py:") and "LDG" in line for line in finding["lines"])


@pytest.mark.parametrize("fault", ["scalar loads", "a spill", "no tensor cores"])
def test_mended_kernels_are_green(found: Found, fault: str) -> None:
    assert found[f"{fault}, mended"] == []
