"""A memory checker for interpreted kernels: poisoned guard bands, live regions, races between programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton.runtime import interpreter

from fastproj.bench.traffic.recorder import Access, Launch, observed_accesses

GUARD_BYTES = 1 << 16  # a multiple of every alignment in use, so that a guarded tensor keeps its own
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Guards:
    """Tensors that lie inside larger buffers of NaN, which nobody may read into a result or write.

    ``poisoned=False`` gives the same places among zeros.
    """

    def __init__(self, *, poisoned: bool = True) -> None:
        self._poisoned = poisoned
        self._placed: list[tuple[Tensor, Tensor]] = []

    def place(self, tensor: Tensor, *, offset: int = 0, gap: int = 0) -> Tensor:
        """The tensor's values in a guarded buffer, ``offset`` elements off its alignment.

        With a gap, the innermost rows lie ``gap`` poisoned elements apart, and the outermost ``3·gap`` more.
        """
        strides, reach = [1], tensor.shape[-1] if tensor.dim() else 1
        for dim in range(tensor.dim() - 1, 0, -1):
            reach += gap if dim == tensor.dim() - 1 else 3 * gap
            strides.insert(0, reach)
            reach *= tensor.shape[dim - 1]
        view = self._view(tuple(tensor.shape), tuple(strides[: tensor.dim()]), reach, tensor.dtype, offset)
        return view.copy_(tensor)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory, that is NaN, as ``torch.empty`` lays it out."""
        like = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return self._view(tuple(shape), like.stride(), like.numel(), dtype, 0)

    def touched(self) -> list[str]:
        """Which tensors had a guard or a gap written, bit by bit."""
        found = []
        for number, (buffer, view) in enumerate(self._placed):
            outside = torch.ones_like(buffer, dtype=torch.bool)
            outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
            bits = BITS[buffer.element_size()]
            changed = outside & (buffer.view(bits) != _poison(buffer.dtype, number))
            if changed.any():
                at = int(changed.nonzero()[0]) - view.storage_offset()
                found.append(f"tensor {number} of shape {tuple(view.shape)}: element {at} beside it changed")
        return found

    def _view(
        self, shape: tuple[int, ...], strides: tuple[int, ...], reach: int, dtype: torch.dtype, offset: int
    ) -> Tensor:
        band = GUARD_BYTES // dtype.itemsize
        poison = _poison(dtype, len(self._placed)) if self._poisoned else torch.zeros(1, dtype=dtype)
        buffer = poison.expand(2 * band + reach + offset).clone().view(dtype)
        view = buffer.as_strided(shape, strides, band + offset)
        self._placed.append((buffer, view))
        return view


def _poison(dtype: torch.dtype, number: int) -> Tensor:
    """A NaN's bits, others for each of the tensors around, so that one's guard copied to another's shows."""
    return torch.full((1,), torch.nan, dtype=dtype).view(BITS[dtype.itemsize]) + 1 + number % 31


@dataclass(frozen=True)
class Regions:
    """Byte ranges that may be accessed, sorted and disjoint: [starts[i], ends[i])."""

    starts: np.ndarray
    ends: np.ndarray

    def holds(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        """Which items lie inside one range from their first byte to their last."""
        if not len(self.starts):
            return np.zeros(addresses.shape, bool)
        at = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        return (at >= 0) & (addresses + np.uint64(itemsize) <= self.ends[np.maximum(at, 0)])


def regions(tensors: Sequence[Tensor]) -> Regions:
    """The bytes of the tensors' elements; tensors that overlap share a range, neighbours do not."""
    runs = sorted(run for tensor in tensors for run in _runs(tensor))
    merged: list[list[int]] = []
    for start, end in runs:
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    table = np.array(merged, np.uint64).reshape(-1, 2)
    return Regions(table[:, 0].copy(), table[:, 1].copy())


def _runs(tensor: Tensor) -> list[tuple[int, int]]:
    """First byte and end of each unbroken run of the tensor's elements."""
    if not tensor.numel():
        return []
    size, base = tensor.element_size(), tensor.data_ptr()
    if tensor.is_contiguous():
        return [(base, base + tensor.numel() * size)]
    offsets = np.zeros(1, np.int64)
    for number, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(number) * stride).reshape(-1)
    offsets = np.unique(offsets)
    breaks = np.flatnonzero(np.diff(offsets) != 1)
    first, last = offsets[np.r_[0, breaks + 1]], offsets[np.r_[breaks, len(offsets) - 1]]
    return [(base + int(a) * size, base + (int(b) + 1) * size) for a, b in zip(first, last, strict=True)]


class _Allocations(TorchDispatchMode):
    """Tensors that come into being, kept alive so that no address has two owners; empty ones in guards."""

    def __init__(self, known: Sequence[Tensor], guards: Guards) -> None:
        super().__init__()
        self.guards = guards
        self.born: list[Tensor] = []
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        if func is torch.ops.aten.empty.memory_format and dtype.is_floating_point:
            result = self.guards.empty(args[0], dtype)
        else:
            result = func(*args, **kwargs)
        for value in tree_flatten(result)[0]:
            # A view of what the caller gave must not widen what the caller gave.
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self._known:
                self.born.append(value)
        return result


@dataclass
class Observation:
    """What the launches of one call did."""

    guards: Guards
    launches: list[Launch] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)
    hints: int = 0
    broken_hints: list[str] = field(default_factory=list)

    @property
    def kernels(self) -> set[str]:
        return {launch.kernel for launch in self.launches}

    def races(self) -> list[str]:
        return [
            fault for launch in self.launches for fault in races(self.accesses, launch.launch, launch.kernel)
        ]


def checked(call: Callable[[], Any], given: Sequence[Tensor], guards: Guards) -> tuple[Any, Observation]:
    """``call()`` with every access checked before it happens, and what was seen.

    A launch may access the tensors in its arguments, the ``given`` ones, and those that came into being in
    the call. Raises AssertionError (wrapped in triton's InterpreterError) at the first access elsewhere.
    Divisibility that a kernel promises the compiler is held against the values.
    """
    seen = Observation(guards)
    allocations = _Allocations(given, guards)
    allowed: dict[int, Regions] = {}

    def launched(launch: Launch) -> None:
        arguments = [value for value in launch.arguments.values() if isinstance(value, Tensor)]
        allowed[launch.launch] = regions([*given, *allocations.born, *arguments])
        seen.launches.append(launch)

    def observe(access: Access) -> None:
        inside = allowed[access.launch].holds(access.addresses, access.itemsize)
        if not inside.all():
            raise AssertionError(
                f"{access.kernel}: program {access.program} has a {access.kind} of {access.itemsize} bytes "
                f"at {int(access.addresses[~inside][0]):#x}, outside of every tensor of the launch"
            )
        seen.accesses.append(access)

    def hint(handle: Any, name: str, values: Sequence[int]) -> None:
        seen.hints += 1
        if name != "tt.divisibility" or (handle.data % np.asarray(values[-1], handle.data.dtype)).any():
            seen.broken_hints.append(f"{name} {list(values)} of {handle.data.reshape(-1)[:8]}")

    with (
        mock.patch.object(interpreter.TensorHandle, "set_attr", hint),
        observed_accesses(observe, launched),
        allocations,
    ):
        result = call()
    return result, seen


def races(accesses: Sequence[Access], launch: int, kernel: str) -> list[str]:
    """Bytes of one launch stored by two programs or lanes, or stored by one program and loaded by another."""
    own = [access for access in accesses if access.launch == launch]
    stores, loads = ([access for access in own if access.kind == kind] for kind in ("store", "load"))
    if not stores:
        return []
    grain = min(access.itemsize for access in own)
    found = []
    if any(len(np.unique(access.addresses)) < access.addresses.size for access in stores):
        found.append(f"{kernel}: two lanes of one store have the same address")
    programs = {program: number for number, program in enumerate(sorted({access.program for access in own}))}
    stored, writer = _by_program(stores, programs, grain)
    if (stored[1:] == stored[:-1]).any():
        found.append(f"{kernel}: two programs store to the same address")
    loaded, reader = _by_program(loads, programs, grain)
    at = np.minimum(np.searchsorted(stored, loaded), len(stored) - 1)
    if ((stored[at] == loaded) & (writer[at] != reader)).any():
        found.append(f"{kernel}: a program loads what another one stores")
    return found


def _by_program(
    accesses: Sequence[Access], programs: dict[tuple[int, int, int], int], grain: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each (address, program) once, sorted by address, in steps of ``grain`` bytes."""
    parts = [
        (access.addresses[:, None] + np.arange(0, access.itemsize, grain, dtype=np.uint64)).reshape(-1)
        for access in accesses
    ]
    owners = [
        np.full(len(part), programs[access.program]) for access, part in zip(accesses, parts, strict=True)
    ]
    pairs = np.empty(sum(map(len, parts)), [("address", np.uint64), ("program", np.int64)])
    pairs["address"] = np.concatenate([np.empty(0, np.uint64), *parts])
    pairs["program"] = np.concatenate([np.empty(0, np.int64), *owners])
    pairs = np.unique(pairs)
    return pairs["address"].copy(), pairs["program"].copy()
