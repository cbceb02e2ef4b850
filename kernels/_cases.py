"""What there is to compile, as data: configurations that a launcher may choose, and what each keeps to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration, with what its machine code must keep to on every target.

    ``signature`` names the types of the run-time arguments, ``constexprs`` every ``tl.constexpr``;
    ``divisible_by_16`` are the arguments that the launcher's specialisation would find so; ``threads`` are
    those of a program, whatever the width of a warp.

    A kernel keeps no local memory, reads and writes global memory 128 bits at a time in its loops, multiplies
    on tensor cores where it ``multiplies`` matrices, and then loads asynchronously. What cannot is declared
    with its reason: ``narrow_accesses`` by the device function whose loop it is, ``without_tensor_cores`` by
    how the names of the targets begin.
    ``bytes_a_turn`` is what a program asks of memory in one turn of its loop: as many programs must fit a
    processor as keep its memory busy. None asks for nothing, of loads that are narrow anyway.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible_by_16: tuple[str, ...] = ()
    threads: int = 128
    num_stages: int = 3
    bytes_a_turn: int | None = None
    multiplies: bool = False
    narrow_accesses: Mapping[str, str] = field(default_factory=dict)
    without_tensor_cores: Mapping[str, str] = field(default_factory=dict)
    without_asynchronous_copies: str | None = None


def every_pair(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Configurations in which any two values of two choices meet, and every value appears.

    The product of all choices would take hours to compile; what a compiler does to one choice hardly ever
    takes three of them at once. The first value of each choice makes the first configuration.
    """
    names = sorted(choices, key=lambda name: -len(choices[name]))
    sizes = {name: range(len(choices[name])) for name in names}
    missing = {
        frozenset({(a, i), (b, j)}) for a, b in combinations(names, 2) for i in sizes[a] for j in sizes[b]
    }
    if len(names) == 1:
        missing = {frozenset({(names[0], i)}) for i in sizes[names[0]]}
    found: list[dict[str, Any]] = []
    while missing:
        picked = dict(min(missing, key=sorted))
        for name in names:
            if name not in picked:
                picked[name] = max(sizes[name], key=lambda i: _newly_met(picked, name, i, missing))
        missing = {pair for pair in missing if not all(picked[name] == i for name, i in pair)}
        found.append({name: choices[name][picked[name]] for name in choices})
    return found


def _newly_met(picked: Mapping[str, int], name: str, index: int, missing: set[frozenset[Any]]) -> int:
    """How many of the missing pairs one more value would make."""
    return sum(frozenset({(name, index), other}) in missing for other in picked.items())
