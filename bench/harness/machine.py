"""The machine and the software that a measurement was taken with."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from fastproj import __version__
from fastproj.bench.harness.telemetry import Telemetry
from fastproj.doctor import physical_memory, processor_name


def describe_machine(index: int | None, telemetry: Telemetry) -> dict[str, Any]:
    """CUDA device ``index``, or the CPU where it is None, with every version that matters.

    What cannot be told is None, and its reason stands under ``missing``.
    """
    limits = telemetry.limits()
    return {
        **(describe_cpu() if index is None else describe_gpu(index)),
        **limits.values,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "python": platform.python_version(),
        "fastproj": __version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "host": processor_name(),
        "threads": torch.get_num_threads(),
        "missing": limits.missing,
    }


def describe_cpu() -> dict[str, Any]:
    """The processor, its vector extension and its memory in bytes."""
    return {
        "type": "cpu",
        "device": processor_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": physical_memory(),
        "l2_bytes": None,
        "processors": None,
    }


def describe_gpu(index: int) -> dict[str, Any]:
    """The device as torch sees it; sizes in bytes."""
    properties = torch.cuda.get_device_properties(index)
    architecture = getattr(properties, "gcnArchName", None) if torch.version.hip else None
    return {
        "type": "cuda",
        "device": properties.name,
        "capability": architecture or f"sm_{properties.major}{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "processors": properties.multi_processor_count,
    }


def installed(distribution: str) -> str | None:
    """Version of a distribution, None where it is absent."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
