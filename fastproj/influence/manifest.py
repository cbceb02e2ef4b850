"""What a store on disk was made from, and the parts it consists of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

SCHEMA = 1
Content = Literal["scores", "sketches"]
# What may differ between two runs that fill one store.
PROGRESS = ("rows_per_part", "rows", "parts")


@dataclass(frozen=True)
class Part:
    """Rows ``start`` … ``stop`` − 1 in a file of ``size`` bytes and BLAKE2b digest ``checksum``."""

    name: str
    start: int
    stop: int
    size: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """Where the rows of a store come from, which must be the same for every run that adds to it.

    ``model``, ``adapter`` and ``data`` are fingerprints; ``names`` are those of the references of scores;
    ``seed``, ``kind`` and ``dimension`` are those of sketches; ``options`` holds whatever else changes a row
    (loss, normalisation, digests of references and of the optimiser's state), by name.

    ``rows_per_part``, ``parts`` and, once all are there, ``rows`` tell how far it is; the writer keeps them.
    """

    content: Content
    model: str
    adapter: str
    data: str
    seed: int | None = None
    kind: str | None = None
    dimension: int | None = None
    names: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA
    rows_per_part: int = 0
    rows: int | None = None
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        wrong = {name: value for name, value in self.options.items() if not isinstance(value, str)}
        if wrong:
            raise TypeError(f"expected options as strings, got {wrong}")

    def without_progress(self) -> Manifest:
        """The same origin with no row yet."""
        return replace(self, rows_per_part=0, rows=None, parts=())

    def differences(self, other: Manifest) -> list[str]:
        """What differs in origin, a phrase each with the value here and in ``other``."""
        mine, others = _origin(self), _origin(other)
        names = [*mine, *(name for name in others if name not in mine)]
        return [
            f"{name} is {mine.get(name)!r} there and {others.get(name)!r} here"
            for name in names
            if mine.get(name) != others.get(name)
        ]

    def require_origin(self, other: Manifest, source: str) -> None:
        """Refuse to go on with a store made otherwise: raises ValueError with every field that differs."""
        differences = self.differences(other)
        if differences:
            raise ValueError(
                f"{source} was made from something else: {'; '.join(differences)}. "
                "Remove it, or write to another place"
            )

    def to_json(self) -> str:
        """JSON with a checksum of itself, the same text for the same manifest."""
        body = json.dumps(asdict(self), sort_keys=True)
        return json.dumps({"checksum": checksum_of(body.encode()), "manifest": json.loads(body)}, indent=1)

    @classmethod
    def from_json(cls, text: str, source: str = "the manifest") -> Manifest:
        """Read :meth:`to_json`. Raises ValueError, naming ``source``, for a damaged one or another schema."""
        try:
            record = json.loads(text)
            body, checksum = record["manifest"], record["checksum"]
            whole = checksum == checksum_of(json.dumps(body, sort_keys=True).encode())
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{source} is damaged: {error}; remove the store and make it again") from error
        if not whole:
            raise ValueError(f"{source} does not match its checksum; remove the store and make it again")
        if body["schema"] != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA} in {source}, got {body['schema']}")
        parts = tuple(Part(**part) for part in body.pop("parts"))
        return cls(**{**body, "names": tuple(body["names"]), "parts": parts})


def checksum_of(content: bytes | memoryview) -> str:
    """BLAKE2b of 16 bytes, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _origin(manifest: Manifest) -> dict[str, Any]:
    own = {f.name: getattr(manifest, f.name) for f in fields(manifest)}
    options = own.pop("options")
    origin = {name: value for name, value in own.items() if name not in PROGRESS}
    return {**origin, **{f"options[{name}]": value for name, value in options.items()}}
