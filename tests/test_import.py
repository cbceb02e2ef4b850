"""`import fastproj` is light, and what needs no triton and no transformers works without them."""

from __future__ import annotations

import os
import subprocess
import sys
from textwrap import dedent

import pytest

BLOCK = """
import sys
from importlib.abc import MetaPathFinder


class Blocked(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in BLOCKED:
            raise ImportError(f"{fullname} is blocked")
        return None


sys.meta_path.insert(0, Blocked())
"""

EVERY_NAME = "import fastproj\nfor name in fastproj.__all__:\n    getattr(fastproj, name)"

EDGE_ON_CPU = """
import torch
import fastproj

erm = [torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([4.0])]
gce = [torch.tensor([[0.0, 5.0], [0.0, 0.0]]), torch.tensor([12.0])]
# |e| = 5 and |g| = 13, so with alpha = 1: (1 + 13/10) e - g/2.
want = [2.3 * e - 0.5 * g for e, g in zip(erm, gce)]
got = fastproj.edge(erm, gce, alpha=1.0)
# Inputs of a few units: fp32 rounds at about 1e-6 of them.
torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
print("edge agrees")
"""


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints; fail with its traceback."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", dedent(code)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(statement: str, *names: str) -> str:
    """Which of the named modules are in ``sys.modules`` after a statement, as Python prints the list."""
    return run_python(f"{statement}\nimport sys\nprint([n for n in {names!r} if n in sys.modules])").strip()


@pytest.mark.parametrize(
    "statement", ["import fastproj", EVERY_NAME, EDGE_ON_CPU], ids=["import", "every name", "edge"]
)
def test_use_on_the_cpu_loads_neither_triton_nor_transformers_nor_peft(statement: str) -> None:
    loaded = loaded_after(statement, "triton", "transformers", "peft", "accelerate")
    assert loaded.splitlines()[-1] == "[]"


def test_plain_import_loads_not_even_torch() -> None:
    assert loaded_after("import fastproj", "torch") == "[]"


@pytest.mark.parametrize("statement", ["import fastproj", EVERY_NAME], ids=["import", "every name"])
def test_import_initialises_no_cuda(statement: str) -> None:
    assert run_python(f"{statement}\nimport torch\nprint(torch.cuda.is_initialized())").strip() == "False"


def test_the_command_line_loads_no_requirement_but_typer() -> None:
    heavy = ("torch", "triton", "transformers", "peft", "matplotlib")
    assert loaded_after("import fastproj.cli", *heavy) == "[]"


@pytest.mark.parametrize(
    "blocked", [("triton",), ("triton", "transformers"), ("triton", "transformers", "peft")], ids=" ".join
)
def test_edge_runs_on_the_cpu_with_packages_blocked(blocked: tuple[str, ...]) -> None:
    assert "edge agrees" in run_python(f"BLOCKED = {blocked!r}\n{BLOCK}\n{EVERY_NAME}\n{EDGE_ON_CPU}")


def test_blocking_blocks() -> None:
    code = f"BLOCKED = ('triton',)\n{BLOCK}\ntry:\n    import triton\nexcept ImportError as e:\n    print(e)"
    assert run_python(code).strip() == "triton is blocked"


def test_reference_is_chosen_for_a_gpu_without_triton() -> None:
    code = f"""
BLOCKED = ("triton",)
{BLOCK}
from fastproj.bindings import OPERATORS, backend_for
for operator in OPERATORS:
    backend = backend_for(operator, "cuda")
    assert backend.name == "reference", backend
    assert "triton" in backend.reason, backend
print(len(OPERATORS))
"""
    assert int(run_python(code)) > 0
