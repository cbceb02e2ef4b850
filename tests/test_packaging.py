"""The house is as it is described: packages, file lengths, twins, arrows, and what a wheel carries."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastproj
from fastproj.bindings import OPERATORS, backend_for

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ROOMS = {"fastproj": "fastproj", "fastproj.kernels": "kernels"}
ROOMS |= {"fastproj.bindings": "bindings", "fastproj.bench": "bench"}
FILES = sorted(path for room in (*ROOMS.values(), "tests") for path in (ROOT / room).rglob("*.py"))
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py"))


def modules_imported(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of its code; relative imports are refused."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)} imports relatively"
            found.add(str(node.module))
            if node.module == "fastproj":
                found |= {f"fastproj.{alias.name}" for alias in node.names}
    return found


def within(module: str, *packages: str) -> bool:
    """Whether a module is one of the packages or lies inside one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_packages_listed_are_the_packages_on_disk() -> None:
    on_disk = set()
    for package, room in ROOMS.items():
        for init in (ROOT / room).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / room).parts
            on_disk.add(".".join((package, *inner)))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in FILES if not path.is_relative_to(ROOT / "tests")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_versions_agree() -> None:
    assert PROJECT["project"]["version"] == fastproj.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{fastproj.__version__}]" in changelog


def test_files_are_small_rooms() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length >= 400} == {}


def test_every_operator_has_a_kernel_and_every_kernel_an_operator() -> None:
    assert sorted(OPERATORS) == KERNELS


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_has_its_name_in_every_room(operator: str) -> None:
    twins = (
        f"kernels/{operator}.py",
        f"bindings/{operator}.py",
        f"fastproj/reference/{operator}.py",
        f"tests/test_{operator}.py",
        f"bench/bench_{operator}.py",
    )
    assert [twin for twin in twins if not (ROOT / twin).exists()] == []
    files = [ROOT / "kernels" / f"{operator}.py", *(ROOT / "kernels").glob(f"_{operator}_*.py")]
    assert any("@triton.jit" in path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_backend_of_an_operator_exists(operator: str, device: str) -> None:
    assert importlib.util.find_spec(backend_for(operator, device).module) is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_between_rooms_run_one_way(path: Path) -> None:
    inner = path.relative_to(ROOT).as_posix()
    modules = modules_imported(path)
    ours = {module for module in modules if within(module, "fastproj")}
    wrong: set[str] = set()
    if inner.startswith("kernels/"):
        outside = {module.partition(".")[0] for module in modules - ours}
        allowed = {"torch", "numpy"} if inner.startswith("kernels/cpu/") else {"torch", "triton"}
        wrong = outside - allowed - sys.stdlib_module_names
        wrong |= {module for module in ours if not within(module, "fastproj.kernels")}
    elif inner.startswith("fastproj/reference/"):
        wrong = {module for module in ours if not within(module, "fastproj.reference")}
    elif inner.startswith("bindings/"):
        rooms = ("fastproj.bindings", "fastproj.kernels", "fastproj.reference")
        wrong = {module for module in ours if not within(module, *rooms)}
    elif inner.startswith("fastproj/"):
        wrong = {module for module in ours if within(module, "fastproj.kernels")}
        if inner != "fastproj/cli.py":
            wrong |= {module for module in ours if within(module, "fastproj.bench")}
    if inner.startswith(("fastproj/", "bindings/")):
        wrong |= {module for module in modules if within(module, "triton")}
    assert wrong == set()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names inside a wheel built from a copy of the sources, without the network."""
    source = tmp_path_factory.mktemp("source")
    for room in ROOMS.values():
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = (source / "dist").glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_a_wheel_holds_every_module_under_one_package(wheel: set[str]) -> None:
    modules = {name for name in wheel if name.endswith(".py")}
    expected = set()
    for package, room in ROOMS.items():
        for path in (ROOT / room).rglob("*.py"):
            expected.add(f"{package.replace('.', '/')}/{path.relative_to(ROOT / room).as_posix()}")
    assert modules == expected


def test_a_wheel_holds_the_page_templates_and_the_typing_marker(wheel: set[str]) -> None:
    assert "fastproj/py.typed" in wheel
    for package, folder in {
        "fastproj/balance": ROOT / "fastproj" / "balance",
        "fastproj/demo": ROOT / "fastproj" / "demo",
        "fastproj/latent": ROOT / "fastproj" / "latent",
        "fastproj/templates": ROOT / "fastproj" / "templates",
        "fastproj/bench/audit": ROOT / "bench" / "audit",
    }.items():
        templates = {f"{package}/{path.name}" for path in folder.glob("*.html")}
        assert templates, folder
        assert templates <= wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_constraints_meet_the_project_file() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0] for line in lines if line and not line.startswith("#")}
    extras = PROJECT["project"]["optional-dependencies"]
    declared = {
        need.partition(">=")[0]
        for need in (*PROJECT["project"]["dependencies"], *extras["demo"], *extras["dev"])
    }
    assert declared - {"fastproj-torch[demo]"} <= pinned
