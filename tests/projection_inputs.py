"""Shards and subspaces that projections onto complements are tried on, and the ways to call them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from span_inputs import (
    DTYPES,
    accumulation_eps,
    assert_as_good_as_eager,
    device_of,
    function_of,
    moved,
    poisoned,
)
from torch import Tensor

import fastproj
from fastproj.reference.basis import MOST_RANK, Basis, orthonormalize
from fastproj.reference.project_out import as_matrix
from fastproj.reference.project_out import project_out as reference

# (vectors, length): one element, off every tile, several programs, several chunks of a long vector.
SIZES = ((1, 1), (5, 3), (16, 40), (33, 64), (9, 300), (130, 65), (17, 296), (2, 1030), (0, 6))
RANKS = (0, 1, 2, 5, 16, 33, MOST_RANK)


@dataclass(frozen=True, repr=False)
class Problem:
    """Shards, the basis of each or None, and the side."""

    shards: list[Tensor]
    spans: list[Basis | None]
    left: bool

    @property
    def side(self) -> str:
        return "left" if self.left else "right"

    @property
    def bases(self) -> list[Tensor]:
        """The distinct bases, as the operator takes them."""
        return [span.matrix for span in dict.fromkeys(self.spans) if span is not None]

    @property
    def owner(self) -> list[int]:
        distinct = [span for span in dict.fromkeys(self.spans) if span is not None]
        return [-1 if span is None else distinct.index(span) for span in self.spans]

    def of(self, shards: Sequence[Tensor]) -> Problem:
        """The same projections of other shards."""
        return Problem(list(shards), self.spans, self.left)

    def __repr__(self) -> str:
        """Shapes, dtypes and ranks: a falsifying example is read, not pasted."""
        own = [
            (tuple(shard.shape), str(shard.dtype).removeprefix("torch."), span and span.rank)
            for shard, span in zip(self.shards, self.spans, strict=True)
        ]
        return f"Problem({own}, {self.side}, owner={self.owner})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


def random_basis(length: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Basis:
    """A random subspace of so many dimensions, or of all there are."""
    generator = torch.Generator().manual_seed(1000 + seed)
    vectors = torch.randn(length, min(rank, length), generator=generator, dtype=torch.float64)
    return orthonormalize(vectors).to(dtype=dtype)


def random_problem(
    sizes: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    left: bool,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    seed: int = 0,
) -> Problem:
    """Normal shards of (vectors, length), dtypes in turn, each with a basis of its own."""
    generator = torch.Generator().manual_seed(seed)
    shards, spans = [], []
    for i, ((vectors, length), rank) in enumerate(zip(sizes, ranks, strict=True)):
        dtype = dtypes[i % len(dtypes)]
        shape = (length, vectors) if left else (vectors, length)
        shards.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        spans.append(random_basis(length, rank, seed + i, wide))
    return Problem(shards, list(spans), left)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """One to four shards of any size and dtype, ranks 0 to 64, some with one basis, some with none."""
    sizes = draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=4))
    ranks = draw(st.lists(st.sampled_from(RANKS), min_size=len(sizes), max_size=len(sizes)))
    alike = st.sampled_from(DTYPES).map(lambda dtype: [dtype])
    mixed = st.lists(st.sampled_from(DTYPES), min_size=len(sizes), max_size=len(sizes))
    dtypes = draw(st.one_of(alike, mixed))
    made = random_problem(sizes, ranks, draw(st.booleans()), dtypes, draw(st.integers(0, 99)))
    spans: list[Basis | None] = list(made.spans)
    for i, (_, length) in enumerate(sizes):
        same = next(j for j, (_, other) in enumerate(sizes) if other == length)
        spans[i] = draw(st.sampled_from([spans[i], spans[same], None]))
    return Problem(made.shards, spans, made.left)


def run(path: str, problem: Problem, out: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The projection by one of PATHS, back on the CPU; into ``out`` where it is given and no public call."""
    shards = moved(problem.shards, path)
    if path == "public":
        spans = [span and span.to(device_of(path)) for span in problem.spans]
        distinct = {id(span): moved_span for span, moved_span in zip(problem.spans, spans, strict=True)}
        own = [distinct[id(span)] for span in problem.spans]
        return [value.cpu() for value in fastproj.project_out(shards, own, side=problem.side)]
    out = moved(poisoned(problem.shards) if out is None else out, path)
    bases = [basis.to(device_of(path)) for basis in problem.bases]
    function_of(path, "project_out")(shards, bases, problem.owner, problem.left, out)
    return [value.cpu() for value in out]


def run_in_place(path: str, problem: Problem) -> list[Tensor]:
    """The projection of copies of the shards in their own memory, their strides kept."""
    shards = [torch.empty_strided(s.shape, s.stride(), dtype=s.dtype).copy_(s) for s in problem.shards]
    shards = moved(shards, path)
    if path == "public":
        spans = [span and span.to(device_of(path)) for span in problem.spans]
        fastproj.project_out_(shards, spans, side=problem.side)
    else:
        bases = [basis.to(device_of(path)) for basis in problem.bases]
        function_of(path, "project_out")(shards, bases, problem.owner, problem.left, shards)
    return [value.cpu() for value in shards]


def eager_project_out(problem: Problem) -> list[Tensor]:
    """The two products and the difference, each rounded to the shard's own dtype."""
    out = []
    for shard, span in zip(problem.shards, problem.spans, strict=True):
        matrix = as_matrix(shard, problem.left)
        if span is not None:
            basis = span.matrix.to(shard.dtype)
            if problem.left:
                matrix = matrix - basis @ (basis.mT @ matrix)
            else:
                matrix = matrix - (matrix @ basis) @ basis.mT
        out.append(matrix.reshape(shard.shape))
    return out


def exact(problem: Problem) -> list[Tensor]:
    return reference(problem.shards, problem.bases, problem.owner, problem.left)


def assert_within_budget(got: Sequence[Tensor], problem: Problem) -> None:
    """Shard by shard, as their magnitudes and dtypes differ; ``magnitude`` is |G| + (|G| |V|) |V|ᵀ."""
    eager, want = eager_project_out(problem), exact(problem)
    for value, rough, right, shard, span in zip(got, eager, want, problem.shards, problem.spans, strict=True):
        assert value.dtype == shard.dtype
        size = as_matrix(shard.double().abs(), problem.left)
        if span is not None:
            basis = span.matrix.double().abs()
            taken = basis @ (basis.mT @ size) if problem.left else (size @ basis) @ basis.mT
            size = size + taken
        assert_as_good_as_eager([value], [rough], [right], [size], accumulation_eps([value]))
