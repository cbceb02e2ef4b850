"""What `fastproj doctor` finds, says and returns."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fastproj import doctor
from fastproj.bindings import OPERATORS, backend_for
from fastproj.cli import app

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TORCH = next(requirement for requirement in doctor.REQUIREMENTS if requirement.distribution == "torch")
ABSENT = doctor.Requirement("no-such-distribution", "no_such_module", "1.0", "nothing", True)


@pytest.fixture(scope="module")
def diagnosis() -> doctor.Diagnosis:
    return doctor.diagnose()


def test_every_operator_has_a_backend_and_a_reason_on_every_device(diagnosis: doctor.Diagnosis) -> None:
    types = {device.type for device in diagnosis.devices}
    assert "cpu" in types
    found = {
        (choice.operator, choice.device): (choice.backend, choice.reason) for choice in diagnosis.operators
    }
    want = {(name, kind): backend_for(name, kind) for name in OPERATORS for kind in types}
    assert found == {key: (backend.name, backend.reason) for key, backend in want.items()}
    assert all(reason for _, reason in found.values())


def test_devices_are_those_that_torch_sees(diagnosis: doctor.Diagnosis) -> None:
    assert sum(device.type == "cuda" for device in diagnosis.devices) == torch.cuda.device_count()
    processor = diagnosis.devices[0]
    assert processor.type == "cpu"
    assert f"threads: {torch.get_num_threads()}" in processor.detail
    assert processor.name


def test_a_complete_environment_is_healthy_with_nothing_to_say(diagnosis: doctor.Diagnosis) -> None:
    assert diagnosis.healthy
    versions = {package.name: package.version for package in diagnosis.packages}
    assert versions["torch"] == metadata.version("torch")
    assert versions["peft"] == metadata.version("peft")
    hard = [package for package in diagnosis.packages if package.hard]
    assert [package.problem for package in hard] == [None] * len(hard)


def test_requirements_are_those_of_the_project_file() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["demo"]]
    stated = {requirement.partition(";")[0].strip() for requirement in declared}
    assert stated == {f"{need.distribution}>={need.minimum}" for need in doctor.REQUIREMENTS}


def test_an_absent_package_is_named_with_the_command_that_installs_it() -> None:
    package = doctor.examine(ABSENT)
    assert (package.version, package.problem) == (None, "not installed")
    assert package.command == "pip install 'no-such-distribution>=1.0'"
    (advice,) = doctor.package_advice((package,))
    assert "no-such-distribution" in advice.what
    assert advice.command == package.command


def test_a_package_that_is_too_old_is_said_to_be() -> None:
    package = doctor.examine(doctor.Requirement("torch", "torch", "99.0", "everything", True))
    assert package.problem == "older than 99.0"
    assert package.command == "pip install --upgrade 'torch>=99.0'"


def test_a_package_that_fails_while_it_is_imported_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text(
        "raise OSError('libmissing.so: cannot open')\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    package = doctor.examine(doctor.Requirement("torch", "broken_module", "2.6", "everything", True))
    assert package.problem == "does not import: OSError: libmissing.so: cannot open"
    assert package.command == f"pip install --force-reinstall --no-deps torch=={metadata.version('torch')}"


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("2.13.0+cpu", (2, 13, 0)),
        ("5.0rc1", (5, 0)),
        ("2.7.0a0+git", (2, 7, 0)),
        ("2026.1", (2026, 1)),
        ("x", ()),
    ],
)
def test_release_reads_the_leading_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert doctor.release(version) == numbers


def test_a_gpu_that_torch_cannot_use_is_pointed_out(diagnosis: doctor.Diagnosis) -> None:
    processor = diagnosis.devices[0]
    (advice,) = doctor.idle_gpu_advice((processor,), ("NVIDIA H200",))
    assert "NVIDIA H200" in advice.what
    assert doctor.idle_gpu_advice((processor,), ()) == ()
    gpu = doctor.Device("cuda", 0, "NVIDIA H200", "sm_90", 1, "")
    assert doctor.idle_gpu_advice((processor, gpu), ("NVIDIA H200",)) == ()


@pytest.mark.parametrize(
    ("hip", "capability", "runtime"), [(None, "sm_90", "CUDA 13.0"), ("7.1", "gfx942", "ROCm 7.1")]
)
def test_gpus_are_named_by_capability_and_memory(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, capability: str, runtime: str
) -> None:
    properties = SimpleNamespace(
        name="Accelerator",
        major=9,
        minor=0,
        gcnArchName="gfx942",
        total_memory=2**34,
        multi_processor_count=132,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
    devices = doctor.gpu_devices()
    assert [device.index for device in devices] == [0, 1]
    assert devices[1].capability == capability
    assert devices[1].memory_bytes == 2**34
    assert devices[1].detail == f"132 multiprocessors, {runtime}"


def nvml(error: Exception | None) -> SimpleNamespace:
    """A stand-in for the driver's library: one GPU, or an error at the first call."""

    def initialise() -> None:
        if error is not None:
            raise error

    return SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=initialise,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: f"GPU {handle}",
        nvmlSystemGetDriverVersion=lambda: "580.65",
    )


def test_the_driver_is_asked_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(None))
    assert doctor.nvidia_driver() == ("580.65", ("GPU 0",))
    monkeypatch.setitem(sys.modules, "pynvml", nvml(RuntimeError("Driver Not Loaded")))
    assert doctor.nvidia_driver() == ("none (Driver Not Loaded)", ())
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert doctor.nvidia_driver() == ("unknown: nvidia-ml-py is not installed", ())


def test_a_broken_torch_still_gets_a_diagnosis(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = doctor.Requirement("torch", "no_such_module", TORCH.minimum, TORCH.serves, True)
    monkeypatch.setattr(doctor, "REQUIREMENTS", (broken,))
    diagnosis = doctor.diagnose()
    assert not diagnosis.healthy
    assert diagnosis.operators == ()
    assert [device.type for device in diagnosis.devices] == ["cpu"]
    assert any(advice.what.startswith("torch does not import") for advice in diagnosis.advice)


def test_the_command_prints_tables_and_exits_with_zero() -> None:
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for word in ("Devices", "Operators", "Versions", "torch", *OPERATORS):
        assert word in result.output


def test_the_command_prints_json(diagnosis: doctor.Diagnosis) -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["healthy"] is True
    assert found == json.loads(diagnosis.to_json())


def test_the_command_exits_with_one_where_a_hard_dependency_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "REQUIREMENTS", (ABSENT,))
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "pip install 'no-such-distribution>=1.0'" in result.output


def test_a_missing_soft_dependency_leaves_the_machine_healthy(
    monkeypatch: pytest.MonkeyPatch, diagnosis: doctor.Diagnosis
) -> None:
    soft = doctor.Requirement(ABSENT.distribution, ABSENT.module, ABSENT.minimum, ABSENT.serves, False)
    monkeypatch.setattr(doctor, "REQUIREMENTS", (soft,))
    lacking = doctor.diagnose()
    assert lacking.healthy
    assert len(lacking.advice) == len(diagnosis.advice) + 1
    console = Console(width=200, record=True, quiet=True)
    doctor.show(lacking, console)
