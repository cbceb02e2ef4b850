"""What this machine offers: devices, the backend of every operator, versions, and what is missing."""

from __future__ import annotations

import importlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from fastproj import __version__

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Requirement:
    """A distribution fastproj stands on: the module it installs, the least version, what it serves."""

    distribution: str
    module: str
    minimum: str
    serves: str
    hard: bool


REQUIREMENTS = (
    Requirement("torch", "torch", "2.6", "everything", True),
    Requirement("triton", "triton", "3.2", "the GPU kernels", False),
    Requirement("transformers", "transformers", "4.56", "the Trainer callback and the demo", True),
    Requirement("peft", "peft", "0.17", "LoRA modules", True),
    Requirement("accelerate", "accelerate", "1.0", "the Trainer callback", True),
    Requirement("safetensors", "safetensors", "0.4", "saved weights", True),
    Requirement("typer", "typer", "0.12", "the command line", True),
    Requirement("rich", "rich", "13", "tables and progress displays", True),
    Requirement("networkx", "networkx", "3", "the audit of the kernels", True),
    Requirement("nvidia-ml-py", "pynvml", "12", "driver version and GPU telemetry", False),
    Requirement("numpy", "numpy", "1.26", "random numbers of sketches on the CPU", True),
    Requirement("datasets", "datasets", "3", "reading JSONL, CSV and Parquet", True),
    Requirement("pyarrow", "pyarrow", "16", "scores on disk", True),
    Requirement("jinja2", "jinja2", "3.1", "the report pages", True),
    Requirement("matplotlib", "matplotlib", "3.8", "the report's figures", False),
)


@dataclass(frozen=True)
class Package:
    """One requirement as found: ``version`` is None where absent, ``problem`` None where all is well."""

    name: str
    version: str | None
    minimum: str
    serves: str
    hard: bool
    problem: str | None
    command: str | None


@dataclass(frozen=True)
class Device:
    """One device; ``memory_bytes`` is its total memory in bytes, None where the system does not tell."""

    type: str
    index: int
    name: str
    capability: str
    memory_bytes: int | None
    detail: str


@dataclass(frozen=True)
class Choice:
    """The backend an operator uses on one type of device, and why."""

    operator: str
    device: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Advice:
    """Something that is missing, what needs it, and the command that mends it."""

    what: str
    command: str


@dataclass(frozen=True)
class Diagnosis:
    """All that ``fastproj doctor`` shows."""

    version: str
    python: str
    system: str
    driver: str
    packages: tuple[Package, ...]
    devices: tuple[Device, ...]
    operators: tuple[Choice, ...]
    advice: tuple[Advice, ...]

    @property
    def healthy(self) -> bool:
        """Whether every hard dependency is there, new enough and importable."""
        return not any(package.hard and package.problem for package in self.packages)

    def to_json(self) -> str:
        """The diagnosis as one JSON object, ``healthy`` included."""
        return json.dumps({**asdict(self), "healthy": self.healthy}, indent=2)


def diagnose() -> Diagnosis:
    """Look at this machine and this environment.

    Imports every requirement, since only that shows a broken one. Raises nothing for what is missing or
    broken: it is in ``packages`` and ``advice``.
    """
    packages = tuple(examine(requirement) for requirement in REQUIREMENTS)
    driver, listed = nvidia_driver()
    torch_works = not any(package.name == "torch" and package.problem for package in packages)
    devices = (cpu_device(torch_works), *(gpu_devices() if torch_works else ()))
    operators = backend_choices({device.type for device in devices}) if torch_works else ()
    return Diagnosis(
        version=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        driver=driver,
        packages=packages,
        devices=devices,
        operators=operators,
        advice=(*package_advice(packages), *idle_gpu_advice(devices, listed)),
    )


def examine(requirement: Requirement) -> Package:
    """Find a requirement's version, import it, and say what is wrong with it, if anything."""
    version, problem = None, None
    try:
        version = metadata.version(requirement.distribution)
        importlib.import_module(requirement.module)
    except metadata.PackageNotFoundError:
        problem = "not installed"
    except Exception as error:  # a broken package raises anything while it is imported
        problem = f"does not import: {type(error).__name__}: {error}"
    if problem is None and version is not None and release(version) < release(requirement.minimum):
        problem = f"older than {requirement.minimum}"
    return Package(
        name=requirement.distribution,
        version=version,
        minimum=requirement.minimum,
        serves=requirement.serves,
        hard=requirement.hard,
        problem=problem,
        command=install_command(requirement, version) if problem else None,
    )


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``2.13.0+cpu`` → (2, 13, 0)."""
    numbers: list[int] = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def install_command(requirement: Requirement, version: str | None) -> str:
    """The pip command that installs, upgrades or repairs a requirement."""
    wanted = f"'{requirement.distribution}>={requirement.minimum}'"
    if version is None:
        return f"pip install {wanted}"
    if release(version) < release(requirement.minimum):
        return f"pip install --upgrade {wanted}"
    return f"pip install --force-reinstall --no-deps {requirement.distribution}=={version}"


def nvidia_driver() -> tuple[str, tuple[str, ...]]:
    """The NVIDIA driver's version, or why there is none, and the names of the GPUs it lists."""
    try:
        import pynvml
    except ImportError:
        return "unknown: nvidia-ml-py is not installed", ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"none ({error})", ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return pynvml.nvmlSystemGetDriverVersion(), tuple(
            pynvml.nvmlDeviceGetName(handle) for handle in handles
        )
    except pynvml.NVMLError as error:
        return f"NVML answers with an error: {error}", ()
    finally:
        pynvml.nvmlShutdown()


def cpu_device(torch_works: bool) -> Device:
    """The processor: its name, vector extension, memory, and the threads torch will use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability, detail = "unknown", f"cores: {cores}"
    if torch_works:
        import torch

        capability = torch.backends.cpu.get_cpu_capability()
        detail = f"threads: {torch.get_num_threads()}, cores: {cores}"
    return Device("cpu", 0, processor_name(), capability, physical_memory(), detail)


def processor_name() -> str:
    """What the system calls its processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def physical_memory() -> int | None:
    """Memory of the machine in bytes, None where POSIX does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def gpu_devices() -> tuple[Device, ...]:
    """Every GPU that torch can use, CUDA or ROCm."""
    import torch

    if not torch.cuda.is_available():
        return ()
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = getattr(properties, "gcnArchName", None) if torch.version.hip else None
        found.append(
            Device(
                type="cuda",
                index=index,
                name=properties.name,
                capability=capability or f"sm_{properties.major}{properties.minor}",
                memory_bytes=properties.total_memory,
                detail=f"{properties.multi_processor_count} multiprocessors, {runtime}",
            )
        )
    return tuple(found)


def backend_choices(device_types: set[str]) -> tuple[Choice, ...]:
    """The backend of every operator on every type of device that is here."""
    from fastproj.bindings import OPERATORS, backend_for

    choices = []
    for operator in OPERATORS:
        for device_type in sorted(device_types):
            backend = backend_for(operator, device_type)
            choices.append(Choice(operator, device_type, backend.name, backend.reason))
    return tuple(choices)


def package_advice(packages: tuple[Package, ...]) -> tuple[Advice, ...]:
    """One piece of advice for each package that has a problem and can be installed here."""
    return tuple(
        Advice(f"{package.name} {package.problem}: needed for {package.serves}", package.command)
        for package in packages
        if package.command and (package.name != "triton" or platform.system() == "Linux")
    )


def idle_gpu_advice(devices: tuple[Device, ...], listed: tuple[str, ...]) -> tuple[Advice, ...]:
    """Say so where the driver lists GPUs and torch can use none of them."""
    if not listed or any(device.type == "cuda" for device in devices):
        return ()
    what = f"the driver lists {', '.join(listed)}, but torch can use no GPU: its build is for the CPU alone"
    return (Advice(what, "make clean && make install TORCH='torch --index-url URL of a CUDA build'"),)


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print the diagnosis as tables, then what is missing."""
    from rich.table import Table

    console.print(f"[bold]fastproj {diagnosis.version}[/] · Python {diagnosis.python} · {diagnosis.system}")
    console.print(f"NVIDIA driver: {diagnosis.driver}\n", markup=False, highlight=False)

    devices = Table("device", "name", "capability", "memory", "detail", title="Devices", title_justify="left")
    for device in diagnosis.devices:
        memory = "unknown" if device.memory_bytes is None else f"{device.memory_bytes / 2**30:.1f} GiB"
        label = device.type if device.type == "cpu" else f"{device.type}:{device.index}"
        devices.add_row(label, device.name, device.capability, memory, device.detail)
    console.print(devices)

    operators = Table("operator", "device", "backend", "why", title="Operators", title_justify="left")
    for choice in diagnosis.operators:
        operators.add_row(choice.operator, choice.device, choice.backend, choice.reason)
    console.print(operators)

    packages = Table("package", "version", "at least", "for", title="Versions", title_justify="left")
    for package in diagnosis.packages:
        style = None if package.problem is None else "red" if package.hard else "yellow"
        packages.add_row(package.name, package.version or "–", package.minimum, package.serves, style=style)
    console.print(packages)

    if not diagnosis.advice:
        console.print("Nothing is missing.")
    for advice in diagnosis.advice:
        console.print(f"• {advice.what}\n    {advice.command}", markup=False, highlight=False, soft_wrap=True)
