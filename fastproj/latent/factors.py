"""Latent factors as they are kept: directions, what they explain, and how unlikely that is by chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from fastproj.architectures import stream_role
from fastproj.reference.basis import Basis

Side = Literal["read", "write"]
Pool = Literal["module", "stream"]
STREAM = "stream"


@dataclass(frozen=True, eq=False)
class LatentFactors:
    """Candidate latent factors: orthonormal directions d, most suspect first.

    On the ``"write"`` side directions lie in the modules' output space, where ``dᵀΔW`` is what a fine-tune
    wrote along them; on the ``"read"`` side in their input space, where ``ΔW d`` is what it reads of them. A
    module reads the residual stream behind its block's norm and gain, so there read directions lie.

    Attributes:
        side: which of the two.
        pool: ``"module"``: each module has directions of its own; ``"stream"``: all share the stream's.
        bases: by a module's name, or ``{"stream": …}``; as many directions in each.
        spectra: by the name of every module of the fine-tune, singular values of ``ΔW``, descending.
        shares: by the keys of ``bases``, (rank,): the share of the energy ``Σσ²`` along each direction, of
            that module's ΔW, or of all pooled as they were weighted.
        agreement: by the same keys, (rank, modules): the share of each module's own energy along each
            direction, ``‖dᵀΔW‖²/‖ΔW‖²_F`` or ``‖ΔW d‖²/‖ΔW‖²_F``. Under pool="module" NaN where that module's
            width or role in the stream is another; in a module's own column, its own share.
        p_values: by the same keys, (rank,): of a permutation test, see :mod:`fastproj.latent.null`; NaN where
            none was made.
        null_shares: by the same keys, (rank, 3): 5 %, 50 % and 95 % quantiles of the share under the null.
        modules: names of the columns of ``agreement``: the modules pooled, whose ΔW is not zero.

    Numbers other than bases are fp64 on the CPU, wherever the bases are.
    """

    side: Side
    pool: Pool
    bases: Mapping[str, Basis]
    spectra: Mapping[str, Tensor]
    shares: Mapping[str, Tensor]
    agreement: Mapping[str, Tensor]
    p_values: Mapping[str, Tensor]
    null_shares: Mapping[str, Tensor]
    modules: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.side not in get_args(Side):
            raise ValueError(f"side: expected 'read' or 'write', got {self.side!r}")
        if self.pool not in get_args(Pool):
            raise ValueError(f"pool: expected 'module' or 'stream', got {self.pool!r}")
        if not self.bases or (self.pool == "stream" and set(self.bases) != {STREAM}):
            raise ValueError(f"bases: expected one a module, or that of 'stream', got {sorted(self.bases)}")
        ranks = {basis.rank for basis in self.bases.values()}
        if len(ranks) > 1:
            raise ValueError(f"bases: expected as many directions in each, got {sorted(ranks)}")

    @property
    def rank(self) -> int:
        """How many directions there are, in each basis."""
        return next(iter(self.bases.values())).rank

    @property
    def unchanged(self) -> tuple[str, ...]:
        """Modules that have an adapter and learnt nothing, ``ΔW = 0``: no direction counts them."""
        return tuple(name for name, spectrum in self.spectra.items() if not bool(spectrum.any()))

    def basis_of(self, name: str, width: int) -> Basis | None:
        """Directions for a module or block: its own, or the stream's; None where there are none for it.

        ``width`` is the length of the vectors on this side of the module. The stream's directions are for
        no module of another width, nor for one known to do the other thing to the stream: what a query
        layer writes is no stream, whatever its width.
        """
        basis = self.bases.get(STREAM if self.pool == "stream" else name)
        if basis is None or basis.dimension != width:
            return None
        if self.pool == "stream" and stream_role(name) not in (self.side, None):
            return None
        return basis

    def first(self, rank: int) -> LatentFactors:
        """The first ``rank`` directions alone. ValueError where there are fewer."""
        if not 0 <= rank <= self.rank:
            raise ValueError(f"expected a rank from 0 to {self.rank}, got {rank}")
        return self.select(range(rank))

    def select(self, columns: Sequence[int]) -> LatentFactors:
        """The directions at ``columns``, in that order, in each basis. ValueError for one twice or absent."""
        return self.reordered({key: list(columns) for key in self.bases})

    def reordered(self, columns: Mapping[str, Sequence[int]]) -> LatentFactors:
        """:meth:`select` with other columns in each basis, as many in each. ValueError as there."""
        for chosen in columns.values():
            if len(set(chosen)) < len(chosen) or not all(0 <= column < self.rank for column in chosen):
                raise ValueError(f"expected different columns from 0 to {self.rank - 1}, got {list(chosen)}")

        def picked(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {key: value[list(columns[key])] for key, value in table.items()}

        return replace(
            self,
            bases={key: Basis(basis.matrix[:, list(columns[key])]) for key, basis in self.bases.items()},
            shares=picked(self.shares),
            agreement=picked(self.agreement),
            p_values=picked(self.p_values),
            null_shares=picked(self.null_shares),
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LatentFactors:
        """The same factors with their bases elsewhere, or in fp32 or fp64."""
        return replace(self, bases={key: basis.to(device, dtype) for key, basis in self.bases.items()})

    def save(self, path: str | Path) -> None:
        """Write all of it to one safetensors file, whole or not at all.

        Raises OSError where that fails, ValueError for factors that :meth:`load` would refuse.
        """
        from fastproj.latent.factors_file import write

        write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> LatentFactors:
        """Read what :meth:`save` wrote, onto the CPU; nothing is unpickled.

        Raises FileNotFoundError where there is no file, ValueError, with the path, for one that is damaged,
        is of another version, lacks a tensor, or whose tensors do not fit, or are not finite or orthonormal.
        """
        from fastproj.latent.factors_file import read

        return read(Path(path))
