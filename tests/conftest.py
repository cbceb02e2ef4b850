"""What every test stands on: no network, one thread, repeatable examples, the interpreter without a GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from chromium import Chromium, find_chromium
from hypothesis import HealthCheck, settings

# triton reads this once, when it is imported; importing torch does not import triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# One thread makes sums repeatable and leaves the other cores to parallel runs.
torch.set_num_threads(1)

# A first example may compile or import for seconds, which says nothing about the property.
settings.register_profile(
    "fastproj",
    deadline=None,
    max_examples=25,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fastproj")


def pytest_configure(config: pytest.Config) -> None:
    """Asked for gpu tests on a machine that has no GPU: an error of use, and no empty selection."""
    wanted = config.getoption("markexpr") or ""
    if re.search(r"(?<!\bnot )\bgpu\b", wanted) and not torch.cuda.is_available():
        raise pytest.UsageError(f"-m {wanted!r}: there is no CUDA or ROCm device for the tests marked gpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that can only run on a GPU are skipped elsewhere."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA or ROCm device")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """A browser for the pages of a module, where there is one."""
    binary = find_chromium()
    if binary is None:
        pytest.skip("there is no Chromium on this machine")
    with Chromium(binary, tmp_path_factory.mktemp("profile")) as browser:
        yield browser
