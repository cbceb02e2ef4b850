"""Fingerprints: short strings that differ where the weights or the data behind a store differ."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DIGEST_BYTES, CHUNK_BYTES, THREADS = 16, 1 << 24, 4


def model_fingerprint(model: nn.Module, *, without: Collection[str] = ()) -> str:
    """A digest of what the model computes with: every parameter and saved buffer but those in ``without``.

    Of each its name in ``state_dict``, shape, dtype and content count, wherever it lies; 32 hexadecimal
    digits. With an adapter's parameters in ``without`` it is the base model's. Raises ValueError for a name
    in ``without`` that the model has not, or a tensor that has no content (on the meta device).
    """
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    unknown = set(without) - tensors.keys()
    if unknown:
        raise ValueError(f"expected names of the model's parameters in without, got {sorted(unknown)}")
    return tensors_fingerprint({name: value for name, value in tensors.items() if name not in without})


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A digest of named tensors: names, shapes, dtypes and content, in whatever order they come.

    Strides and devices do not count. A tensor under two names is read once. Raises ValueError for one that
    has no content.
    """
    hollow = [name for name, tensor in tensors.items() if tensor.is_meta]
    if hollow:
        raise ValueError(f"expected tensors with content, got {hollow} on the meta device")
    distinct = {_place(tensor): tensor.detach() for tensor in tensors.values()}
    with ThreadPoolExecutor(THREADS) as pool:  # hashlib lets other threads run
        contents = dict(zip(distinct, pool.map(_content, distinct.values()), strict=True))
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(tensors):
        tensor = tensors[name]
        about = (name, str(tensor.dtype), list(tensor.shape))
        digest.update(_encoded(about) + contents[_place(tensor)])
    return digest.hexdigest()


def rows_fingerprint(rows: Iterable[object]) -> str:
    """A digest of data, row by row, in their order; see :class:`RowsDigest` for what a row may be."""
    digest = RowsDigest()
    for row in rows:
        digest.update(row)
    return digest.hexdigest()


class RowsDigest:
    """The digest of rows as they come by: the same for the same rows, however they are grouped in time.

    A row is None, a bool, int, float, str, bytes, tensor or NumPy value, or a list, tuple or mapping of
    these; the order within a mapping does not count. :meth:`update` raises TypeError for anything else.
    """

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def update(self, row: object) -> None:
        """Take one more row in."""
        self._digest.update(_encoded(row))

    def hexdigest(self) -> str:
        """The digest of the rows so far, 32 hexadecimal digits."""
        return self._digest.hexdigest()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors share exactly where they are one."""
    return (tensor.device, tensor.data_ptr() or id(tensor), tensor.dtype, tensor.shape, tensor.stride())


def _content(tensor: Tensor) -> bytes:
    """The digest of a tensor's elements in order, brought to the CPU a piece at a time."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    flat = tensor.contiguous().reshape(-1)
    for piece in flat.split(max(1, CHUNK_BYTES // max(1, tensor.element_size()))):
        digest.update(piece.cpu().view(torch.uint8).numpy().data)
    return digest.digest()


def _encoded(value: object) -> bytes:
    """A value as bytes that no other value has: a letter for its kind, its length, its content."""
    value = _without_numpy(value)
    for kind, letter, content_of in _KINDS:
        if isinstance(value, kind):
            content = content_of(value)
            return letter + struct.pack("<Q", len(content)) + content
    raise TypeError(
        f"expected a row of numbers, text, tensors, lists and mappings, got {type(value).__name__}"
    )


def _without_numpy(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.ascontiguousarray(value))
    return value


def _tensor(value: Tensor) -> bytes:
    return _encoded((str(value.dtype), list(value.shape))) + _content(value.detach())


def _list(value: Iterable[object]) -> bytes:
    return b"".join(map(_encoded, value))


def _mapping(value: Mapping[object, object]) -> bytes:
    return b"".join(sorted(map(_encoded, value.items())))


# A bool is an int in Python, so it comes first.
_KINDS: tuple[tuple[Any, bytes, Callable[[Any], bytes]], ...] = (
    (type(None), b"n", lambda _: b""),
    (bool, b"b", lambda value: bytes([value])),
    (int, b"i", lambda value: str(value).encode()),
    (float, b"f", lambda value: struct.pack("<d", value)),
    (str, b"s", lambda value: value.encode("utf-8", "surrogatepass")),
    (bytes, b"y", bytes),
    (Tensor, b"t", _tensor),
    ((list, tuple), b"l", _list),
    (Mapping, b"m", _mapping),
)
