"""Compiling the kernels for chips that are not here, in parallel, once per version of the source."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastproj.kernels
from fastproj.bench.audit import machine_code
from fastproj.bench.audit.machine_code import Reading, read_amdgcn, read_cubin
from fastproj.files import write_atomically
from fastproj.kernels._blocks import launch_options
from fastproj.kernels._cases import CompileCase

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KERNELS = Path(fastproj.kernels.__file__).parent


@dataclass(frozen=True)
class Job:
    """A case, as the place of its entry in a module's COMPILE_CASES, and a target."""

    module: str
    index: int
    arch: str


def operators() -> tuple[str, ...]:
    """The modules of ``kernels/`` that hold an operator each."""
    found = pkgutil.iter_modules(fastproj.kernels.__path__)
    return tuple(m.name for m in found if not m.ispkg and not m.name.startswith("_"))


def jobs(names: Sequence[str], archs: Sequence[str]) -> tuple[Job, ...]:
    """Every case of these operators for every target.

    Raises ValueError for an operator or a target that there is not.
    """
    for given, known in ((names, operators()), (archs, tuple(TARGETS))):
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"expected some of {known}, got {unknown}")
    modules = [f"fastproj.kernels.{name}" for name in names]
    return tuple(
        Job(module, index, arch)
        for module in modules
        for index in range(len(import_module(module).COMPILE_CASES))
        for arch in archs
    )


def case_of(job: Job) -> CompileCase:
    """The entry that a job points to."""
    case: CompileCase = import_module(job.module).COMPILE_CASES[job.index]
    return case


def compile_all(
    todo: Sequence[Job],
    *,
    cache_dir: Path,
    workers: int,
    progress: Callable[[Job], None] = lambda job: None,
) -> dict[Job, Reading]:
    """Compile and read every job, in processes of their own where triton compiles rather than interprets.

    What is in ``cache_dir`` already is not compiled again: entries are named after the kernel's source, its
    configuration, the target, triton's version and this reader. Raises RuntimeError with the compiler's words
    where a kernel does not compile.
    """
    found: dict[Job, Reading] = {}
    with _compiling(), ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(compile_job, job, cache_dir): job for job in todo}
        for done in as_completed(waiting):
            job = waiting[done]
            try:
                found[job] = done.result()
            except Exception as error:
                pool.shutdown(cancel_futures=True)
                raise RuntimeError(f"{job.module}, {case_of(job).name}, {job.arch}: {error}") from error
            progress(job)
    return {job: found[job] for job in todo}


def compile_job(job: Job, cache_dir: Path) -> Reading:
    """One job, from the cache where it is there."""
    case = case_of(job)
    entry = cache_dir / f"{_key(case, job.arch)}.json"
    try:
        return Reading.from_record(json.loads(entry.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        reading = compile_case(case, job.arch)
    write_atomically(entry, json.dumps(reading.record()))
    return reading


def compile_case(case: CompileCase, arch: str) -> Reading:
    """Compile ``case`` for one of ``TARGETS`` and read the machine code.

    Raises ValueError for an unknown ``arch`` and RuntimeError where triton interprets its kernels.
    """
    if arch not in TARGETS:
        raise ValueError(f"arch must be one of {tuple(TARGETS)}, got {arch!r}")
    if not isinstance(case.kernel, triton.JITFunction):
        raise RuntimeError(f"{case.name} is interpreted here: TRITON_INTERPRET was set when it was imported")
    if os.environ.get("TRITON_DISABLE_LINE_INFO", "0") not in ("", "0"):
        raise RuntimeError("TRITON_DISABLE_LINE_INFO is set: machine code would not say where it is from")
    target = TARGETS[arch]
    options = launch_options(case.threads, case.num_stages, amd=target.backend == "hip")
    compiled = triton.compile(_source(case), target=target, options=options)
    sources = [*KERNELS.glob("*.py"), Path(case.kernel.fn.__code__.co_filename)]
    known = {"multiplies": "tt.dot" in compiled.asm["ttir"], "shared_bytes": compiled.metadata.shared}
    if target.backend == "hip":
        return read_amdgcn(compiled.asm["amdgcn"], sources, **known)
    return read_cubin(compiled.asm["cubin"], TOOLS, sources, **known)


def _source(case: CompileCase) -> ASTSource:
    signature = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    ordered = {name: signature[name] for name in case.kernel.arg_names}
    position = {name: (index,) for index, name in enumerate(ordered)}
    attributes = {position[name]: [["tt.divisibility", 16]] for name in case.divisible_by_16}
    return ASTSource(case.kernel, ordered, dict(case.constexprs), attributes)


def _key(case: CompileCase, arch: str) -> str:
    parts: tuple[Any, ...] = (
        *(triton.__version__, _reader(), _environment(), arch, case.kernel.cache_key),
        launch_options(case.threads, case.num_stages, amd=TARGETS[arch].backend == "hip"),
        *(sorted(case.signature.items()), sorted(case.divisible_by_16)),
        sorted((name, str(value)) for name, value in case.constexprs.items()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _environment() -> list[tuple[str, str]]:
    """Triton's own variables, which change what it compiles and with what tools, but for its folders."""
    return sorted(
        (name, value)
        for name, value in os.environ.items()
        if name.startswith("TRITON_") and not name.endswith(("_DIR", "_INTERPRET"))
    )


@cache
def _reader() -> str:
    """The versions of the code that reads: a change of it must not find old readings."""
    paths = (Path(__file__), Path(machine_code.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


@contextmanager
def _compiling() -> Iterator[None]:
    """Processes that start here compile their kernels, whatever this one does."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
