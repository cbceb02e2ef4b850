"""Speed is refused unless tests ran and passed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

import fastproj
from fastproj.bench.harness import gate
from fastproj.bench.harness.gate import GateRefusedError, run_gate

ROOT = Path(__file__).parents[2]
MARKED = "import pytest\n@pytest.mark.gpu\ndef test_one(): assert {}\n"


def folder(path: Path, text: str) -> Path:
    (path / "test_it.py").write_text(text, encoding="utf-8")
    return path


def test_a_green_run_tells_what_ran(tmp_path: Path) -> None:
    tests = folder(tmp_path, "import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no')\n")
    result = run_gate("cpu", tests)
    assert (result.passed, result.skipped) == (1, 1)
    assert result.seconds > 0
    assert str(tests) in result.command
    assert result.to_json()["passed"] == 1


@pytest.mark.parametrize(
    ("text", "message", "streamed"),
    [
        ("def test_a(): pass\ndef test_b(): assert 1 == 2\n", "1 tests failed", "assert 1 == 2"),
        ("import no_such_module\n", "1 tests failed", "no_such_module"),
        ("def helper(): pass\n", "no test ran", "no tests ran"),
        ("import pytest\ndef test_a(): pytest.skip('no GPU')\n", r"no test ran \(1 skipped\)", "1 skipped"),
        ("import os\ndef test_a(): os._exit(3)\n", "exit code 3", ""),
    ],
)
def test_anything_else_refuses(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, message: str, streamed: str
) -> None:
    """And what pytest says is seen as it says it, on stderr."""
    with pytest.raises(GateRefusedError, match=message):
        run_gate("cpu", folder(tmp_path, text))
    said = capfd.readouterr()
    assert streamed in said.err
    assert said.out == ""


def test_tests_that_take_too_long_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "LONGEST_SECONDS", 0.5)
    with pytest.raises(GateRefusedError, match=r"not done after 0\.5 s"):
        run_gate("cpu", folder(tmp_path, "import time\ndef test_a(): time.sleep(60)\n"))


def test_options_from_the_environment_do_not_choose_what_is_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k test_a")
    with pytest.raises(GateRefusedError, match="1 tests failed"):
        run_gate("cpu", folder(tmp_path, "def test_a(): pass\ndef test_b(): assert 1 == 2\n"))


def test_a_gpu_run_counts_the_tests_marked_gpu_alone(tmp_path: Path) -> None:
    green = folder(tmp_path, MARKED.format(True) + "def test_other(): assert False\n")
    assert run_gate("cuda", green).passed == 1
    with pytest.raises(GateRefusedError, match="1 tests failed"):
        run_gate("cuda", folder(tmp_path, MARKED.format(False)))


def test_tests_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(GateRefusedError, match="nowhere does not exist"):
        run_gate("cpu", tmp_path / "nowhere")


def test_an_installed_copy_asks_for_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastproj, "__file__", str(tmp_path / "site-packages" / "fastproj" / "__init__.py"))
    with pytest.raises(GateRefusedError, match="checkout of the project"):
        run_gate("cuda")


class Started(Exception):  # noqa: N818
    """Instead of a process; carries what would have been run."""

    def __init__(self, command: list[str], options: dict[str, Any]) -> None:
        super().__init__(command)
        self.command, self.options = command, options


def start(command: list[str], **options: Any) -> None:
    raise Started(command, options)


def test_the_suite_of_a_gpu_is_what_is_marked_gpu_and_never_interpreted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(Started) as started:
        run_gate("cuda")
    assert started.value.options["cwd"] == ROOT
    assert "TRITON_INTERPRET" not in started.value.options["env"]
    assert started.value.command[-3:-1] == ["-m", "gpu"]


def test_the_suite_of_the_cpu_is_the_operators() -> None:
    files = [Path(part) for part in gate.test_command("cpu", ROOT, None) if part.endswith(".py")]
    assert {path.stem for path in files} >= {f"test_{operator}" for operator in gate.OPERATORS}
    assert all(path.exists() for path in files)


def test_the_commit_is_git_s_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gate.commit_of(tmp_path) == (None, None)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    (tmp_path / "a").write_text("1", encoding="utf-8")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    commit, changed = gate.commit_of(tmp_path)
    assert commit is not None
    assert (len(commit), changed) == (40, False)
    (tmp_path / "a").write_text("2", encoding="utf-8")
    assert gate.commit_of(tmp_path) == (commit, True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gate.commit_of(tmp_path) == (None, None)
