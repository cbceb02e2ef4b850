"""What the machine code of a kernel says: resources, and the instructions that the audit looks at.

Code for NVIDIA's chips is read from nvdisasm, for AMD's from the assembly that LLVM leaves. Both name the
source line of every instruction and the calls that it was inlined through.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import networkx as nx

Frames = tuple[tuple[str, int], ...]

NVIDIA_LINE = re.compile(
    r'^\s*//## File "([^"]*)", line (\d+)|^(\.L_\w+):|^\s*/\*[0-9a-f]{4,}\*/\s+([^;]*?)\s*;', re.MULTILINE
)
BRANCH = re.compile(r"\bBRA\b|\bs_c?branch")
LABEL = re.compile(r"\.L\w+")
UNCONDITIONAL = re.compile(r"(?:BRA(?:\.\w+)* `?\(|EXIT\b|RET\b|s_branch\b|s_endpgm\b)")


@dataclass(frozen=True)
class Access:
    """One access to global memory inside a loop, of ``bits`` a thread; ``functions`` innermost first."""

    kind: str
    bits: int
    functions: tuple[str, ...]
    source: str
    text: str


@dataclass(frozen=True)
class Reading:
    """What the audit needs of one compiled kernel.

    ``local_bytes`` is local memory per thread, ``shared_bytes`` shared memory per program. ``spills`` are the
    instructions on local memory, ``accesses`` those on global memory inside loops; ``multiplies`` says
    whether the source multiplies matrices.
    """

    registers: int
    local_bytes: int
    shared_bytes: int
    multiplies: bool
    tensor_core_instructions: int
    accesses: tuple[Access, ...]
    spills: tuple[str, ...]

    @property
    def copies_asynchronously(self) -> bool:
        """Whether a loop moves global memory to shared memory without waiting."""
        return any(access.kind == "asynchronous copy" for access in self.accesses)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Reading:
        """The inverse of ``dataclasses.asdict``, by way of JSON."""
        accesses = tuple(
            Access(**{**own, "functions": tuple(own["functions"])}) for own in record["accesses"]
        )
        return cls(**{**record, "accesses": accesses, "spills": tuple(record["spills"])})

    def record(self) -> dict[str, Any]:
        """As plain lists and numbers."""
        return asdict(self)


@dataclass(frozen=True)
class Instruction:
    """One line of machine code and where it comes from; ``label`` marks a place to jump to instead."""

    text: str
    frames: Frames = ()
    label: str | None = None


def read_cubin(cubin: bytes, tools: Path, sources: Iterable[Path], **known: Any) -> Reading:
    """Read machine code for an NVIDIA chip with the cuobjdump and nvdisasm in ``tools``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output_of(tools / "cuobjdump", "--dump-resource-usage", file.name)
        listing = _output_of(tools / "nvdisasm", "-gi", "-c", "-ndf", file.name)
    instructions = tuple(nvidia_instructions(listing))
    return Reading(
        registers=_number(r"REG:(\d+)", usage),
        local_bytes=_number(r"LOCAL:(\d+)", usage) + _number(r"STACK:(\d+)", usage),
        tensor_core_instructions=_count(instructions, r"\b(?:[HDIQ]|HG|QG|UTC\w*)MMA\b"),
        accesses=tuple(_loop_accesses(instructions, _nvidia_access, sources)),
        spills=_matching(instructions, r"\b(?:STL|LDL)\b"),
        **known,
    )


def read_amdgcn(assembly: str, sources: Iterable[Path], **known: Any) -> Reading:
    """Read assembly for an AMD chip."""
    instructions = tuple(amd_instructions(assembly))
    return Reading(
        registers=_number(r"\.vgpr_count:\s*(\d+)", assembly),
        local_bytes=_number(r"\.private_segment_fixed_size:\s*(\d+)", assembly),
        tensor_core_instructions=_count(instructions, r"\bv_mfma_"),
        accesses=tuple(_loop_accesses(instructions, _amd_access, sources)),
        spills=_matching(instructions, r"\bscratch_(?:load|store)"),
        **known,
    )


def nvidia_instructions(listing: str) -> Iterator[Instruction]:
    """The instructions and labels of nvdisasm's listing with ``-gi``.

    An instruction comes after the lines that say where it is from, unless they are those of the one before.
    """
    frames: list[tuple[str, int]] = []
    fresh = False
    for found in NVIDIA_LINE.finditer(listing):
        file, line, label, text = found.groups()
        if file is not None:
            frames = [*frames, (file, int(line))] if fresh else [(file, int(line))]
        elif label is not None:
            yield Instruction("", label=label)
        else:
            yield Instruction(" ".join(text.split()), tuple(frames))
        fresh = file is not None


def amd_instructions(assembly: str) -> Iterator[Instruction]:
    """The instructions and labels of LLVM's assembly with line comments."""
    frames: Frames = ()
    for line in assembly.splitlines():
        if re.match(r"\s*\.loc\b", line):
            frames = tuple((name, int(number)) for name, number in re.findall(r"([\w.]+):(\d+):\d+", line))
        elif label := re.match(r"(\.LBB\w+):", line):
            yield Instruction("", label=label[1])
        elif code := re.match(r"\t([a-z]\w+(?:\s.*?)?)\s*(?:;.*)?$", line):
            yield Instruction(" ".join(code[1].split()), frames)


def in_loops(instructions: tuple[Instruction, ...]) -> Iterator[Instruction]:
    """The instructions that can be reached again from themselves."""
    blocks = _basic_blocks(instructions)
    owner = {code.label: number for number, block in enumerate(blocks) for code in block if code.label}
    flow = nx.DiGraph()
    for number, block in enumerate(blocks):
        last = block[-1].text
        if not UNCONDITIONAL.match(last):
            flow.add_edge(number, number + 1)
        if BRANCH.search(last):
            flow.add_edges_from((number, owner[name]) for name in LABEL.findall(last) if name in owner)
    rings = nx.strongly_connected_components(flow)
    inside = {number for ring in rings for number in ring if len(ring) > 1 or flow.has_edge(number, number)}
    return (code for number in sorted(inside) for code in blocks[number])


def _basic_blocks(instructions: tuple[Instruction, ...]) -> list[list[Instruction]]:
    """Runs that are entered at their first instruction alone and left after their last."""
    blocks: list[list[Instruction]] = [[]]
    for code in instructions:
        if code.label and blocks[-1]:
            blocks.append([])
        blocks[-1].append(code)
        if BRANCH.search(code.text) or UNCONDITIONAL.match(code.text):
            blocks.append([])
    return [block for block in blocks if block]


def _loop_accesses(
    instructions: tuple[Instruction, ...],
    access: Callable[[str], tuple[str, int] | None],
    sources: Iterable[Path],
) -> Iterator[Access]:
    paths = {path.name: path for path in sources}
    for code in in_loops(instructions):
        if (found := access(code.text)) is not None:
            named = [(paths.get(Path(file).name), line) for file, line in code.frames]
            functions = [function_at(path, line) for path, line in named if path is not None]
            source = next((f"{path.name}:{line}" for path, line in named if path is not None), "unknown")
            yield Access(*found, tuple(name for name in functions if name), source, code.text)


def _nvidia_access(text: str) -> tuple[str, int] | None:
    """(kind, bits) of an access to global memory, None for any other instruction."""
    found = re.search(r"\b(LDGSTS|LDG|STG)\b((?:\.\w+)*)", text)
    if found is None:
        return None
    kind = {"LDGSTS": "asynchronous copy", "LDG": "load", "STG": "store"}[found[1]]
    sizes = [part for part in found[2].split(".") if re.fullmatch(r"[US]?(?:8|16|64|128|256)", part)]
    return kind, int(sizes[-1].lstrip("US")) if sizes else 32


def _amd_access(text: str) -> tuple[str, int] | None:
    found = re.match(r"(?:global|buffer|flat)_(load|store)_(\w+)", text)
    if found is None:
        return None
    size = found[2].replace("lds_", "")
    kind = "asynchronous copy" if "lds" in found[2] or text.endswith(" lds") else found[1]
    if wide := re.match(r"dword(?:x(\d))?", size):
        return kind, 32 * int(wide[1] or 1)
    return kind, 8 if "byte" in size else 16


@cache
def function_at(path: Path, line: int) -> str | None:
    """The name of the innermost function whose body holds this line."""
    inside = [(end - start, name) for start, end, name in _functions(path) if start <= line <= end]
    return min(inside)[1] if inside else None


@cache
def _functions(path: Path) -> tuple[tuple[int, int, str], ...]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return tuple(
        (node.lineno, node.end_lineno or node.lineno, node.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    )


def _matching(instructions: tuple[Instruction, ...], pattern: str) -> tuple[str, ...]:
    return tuple(code.text for code in instructions if re.search(pattern, code.text))


def _count(instructions: tuple[Instruction, ...], pattern: str) -> int:
    return len(_matching(instructions, pattern))


def _output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern!r}")
    return int(found[1])
