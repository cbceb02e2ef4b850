"""Every address that interpreted kernels read and write, and the launches that do it.

Under ``TRITON_INTERPRET=1`` a kernel runs program by program on the CPU, and each of its loads and stores
goes through two methods of triton's interpreter with the addresses and the mask in plain numpy arrays. What
passes there is what a GPU would access; bytes, races and bounds are read off it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Kind = Literal["load", "store"]


@dataclass(frozen=True)
class Launch:
    """A kernel about to run on a grid; ``arguments`` by the kernel's own names, constants among them."""

    kernel: str
    launch: int
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Access:
    """One load or store of one program: the byte addresses (uint64, flat) of the lanes that are not masked.

    ``launch`` counts launches from 0 since the observation began. Each lane moves ``itemsize`` bytes.
    """

    kernel: str
    launch: int
    program: tuple[int, int, int]
    kind: Kind
    addresses: np.ndarray
    itemsize: int


class _Recorder:
    """Stands between the interpreter and the observers; holds the launch that is running."""

    def __init__(self, observe: Callable[[Access], None], launched: Callable[[Launch], None] | None) -> None:
        self.observe = observe
        self.launched = launched
        self.kernel = ""
        self.launch = -1

    def watched_call(self, call: Callable[..., None]) -> Callable[..., None]:
        """``GridExecutor.__call__`` that says first which kernel runs."""

        def run(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.kernel, self.launch = executor.fn.__name__, self.launch + 1
            if self.launched is not None:
                arguments = dict(zip(executor.arg_names, args, strict=False)) | {
                    name: value for name, value in kwargs.items() if name in executor.arg_names
                }
                grid = executor.grid(arguments) if callable(executor.grid) else executor.grid
                x, y, z = (*grid, 1, 1)[:3]
                self.launched(Launch(self.kernel, self.launch, (x, y, z), arguments))
            call(executor, *args, **kwargs)

        return run

    def watched_access(self, method: Callable[..., Any], kind: Kind) -> Callable[..., Any]:
        """``create_masked_load(pointers, mask, …)`` or ``create_masked_store(pointers, value, mask, …)``."""

        def run(pointers: Any, *args: Any, **kwargs: Any) -> Any:
            mask = args[0 if kind == "load" else 1] if args else kwargs["mask"]
            self._report(pointers, mask, kind)
            return method(pointers, *args, **kwargs)

        return run

    def _report(self, pointers: Any, mask: Any, kind: Kind) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.uint64)
        if addresses.size:
            itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)  # a bool takes a byte
            program = interpreter.interpreter_builder.grid_idx
            self.observe(Access(self.kernel, self.launch, program, kind, addresses, itemsize))


@contextmanager
def observed_accesses(
    observe: Callable[[Access], None], launched: Callable[[Launch], None] | None = None
) -> Iterator[None]:
    """Hand every access of every kernel launched inside to ``observe``, before it happens.

    Accesses without an active lane are left out. ``launched`` hears of each launch before its first program.
    Observations may be nested.

    Raises RuntimeError where kernels are compiled and not interpreted, and NotImplementedError (which triton
    wraps in its InterpreterError) at a kernel's atomic operation, which is neither a load nor a store.
    """
    if not isinstance(tl.zeros, interpreter.InterpretedFunction):
        raise RuntimeError(
            "expected interpreted kernels, whose accesses can be seen; got compiled ones: "
            "set TRITON_INTERPRET=1 before triton is imported"
        )
    recorder = _Recorder(observe, launched)
    builder = interpreter.interpreter_builder
    with (
        mock.patch.object(
            interpreter.GridExecutor, "__call__", recorder.watched_call(interpreter.GridExecutor.__call__)
        ),
        mock.patch.multiple(
            builder,
            create_masked_load=recorder.watched_access(builder.create_masked_load, "load"),
            create_masked_store=recorder.watched_access(builder.create_masked_store, "store"),
            create_atomic_cas=_refuse_atomic,
            create_atomic_rmw=_refuse_atomic,
        ),
    ):
        yield


def _refuse_atomic(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError("expected kernels of loads and stores; got one with an atomic operation")
