"""No speed without correctness: the tests run first, and a red run ends the measurement."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fastproj
from fastproj.bindings import OPERATORS

# The CPU's own paths; the interpreter that stands in for the GPU says nothing about them.
CPU_SELECTION = ("-k", "not triton")
OTHER_CPU_TESTS = ("test_edge_operator.py",)
LONGEST_SECONDS = 30 * 60.0
STDERR = 2  # the file descriptor


class GateRefusedError(RuntimeError):
    """Speed must not be reported; the message says why."""


@dataclass(frozen=True)
class GateResult:
    """What ran before the measurement. ``commit`` is None outside a git checkout."""

    command: str
    passed: int
    skipped: int
    seconds: float
    commit: str | None
    uncommitted_changes: bool | None

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return asdict(self)


def find_checkout() -> Path:
    """The root of the checkout that this package is imported from.

    Raises GateRefusedError for an installed copy: the tests are no part of it.
    """
    root = Path(fastproj.__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file() and (root / "tests" / "conftest.py").is_file():
        return root
    raise GateRefusedError(
        f"no tests beside the package in {root}: a measurement needs the correctness suite. Run it from a "
        "checkout of the project (pip install -e .), or name the tests' folder with --tests"
    )


def test_command(device: str, root: Path, tests: Path | None) -> list[str]:
    """The arguments of pytest: everything marked gpu on a GPU, the operators' CPU paths on the CPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if device == "cuda":
        return [*command, "-m", "gpu", *([str(tests)] if tests else [])]
    if tests is not None:
        return [*command, "-m", "not gpu", str(tests)]
    operators = [f"test_{operator}.py" for operator in OPERATORS]
    return [
        *command,
        *CPU_SELECTION,
        *(str(root / "tests" / name) for name in (*operators, *OTHER_CPU_TESTS)),
    ]


def run_gate(device: str, tests: Path | None = None) -> GateResult:
    """Run the correctness suite in a process of its own.

    ``device`` is "cuda" or "cpu"; ``tests`` a folder or file other than the checkout's own. What pytest says
    goes to stderr as it comes. Raises GateRefusedError where tests cannot be found, none ran, one failed, or
    they take longer than LONGEST_SECONDS.
    """
    if tests is not None and not tests.exists():
        raise GateRefusedError(f"--tests: {tests} does not exist")
    root = find_checkout() if tests is None else _folder_of(tests)
    command = test_command(device, root, tests.resolve() if tests else None)
    environment = dict(os.environ)
    # Options from there could deselect what is to be proved.
    environment.pop("PYTEST_ADDOPTS", None)
    if device == "cuda":
        # What the interpreter runs is not what will be timed.
        environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        began = time.perf_counter()
        try:
            code = subprocess.run(
                [*command, f"--junitxml={report}"],
                cwd=root, env=environment, stdout=STDERR, timeout=LONGEST_SECONDS, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise GateRefusedError(
                f"{shlex.join(command[1:])}: not done after {LONGEST_SECONDS:g} s, and stopped"
            ) from error
        seconds = time.perf_counter() - began
        counts = read_counts(report)
    return _judge(code, counts, shlex.join(command[1:]), seconds)


def _folder_of(tests: Path) -> Path:
    return (tests if tests.is_dir() else tests.parent).resolve()


def read_counts(report: Path) -> dict[str, int]:
    """tests, failures, errors and skipped out of a JUnit report; zeros where pytest wrote none."""
    names = ("tests", "failures", "errors", "skipped")
    if not report.exists():
        return dict.fromkeys(names, 0)
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    return {name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}


def _judge(code: int, counts: dict[str, int], command: str, seconds: float) -> GateResult:
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    if code not in (0, 5) or counts["failures"] or counts["errors"]:
        broken = counts["failures"] + counts["errors"]
        raise GateRefusedError(f"{command}: {broken} tests failed (exit code {code}), see above")
    if passed < 1:
        raise GateRefusedError(f"{command}: no test ran ({counts['skipped']} skipped), so nothing is proved")
    return GateResult(command, passed, counts["skipped"], seconds, *commit_of(Path(fastproj.__file__).parent))


def commit_of(folder: Path) -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it) of the checkout; None where git knows of none."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()
