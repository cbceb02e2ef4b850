"""Directions found with labels, by differences of means: what the unsupervised ones are held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.architectures import blocks
from fastproj.bias_diff.encoding import by_length, padded
from fastproj.bias_diff.likelihood import evaluating
from fastproj.grasp.study.settings import Contrast
from fastproj.grasp.study.tasks import EVALUATED, Task, base_of
from fastproj.latent.factors import STREAM, LatentFactors, Side
from fastproj.latent.lora import LoraLayer, lora_layers
from fastproj.reference.basis import Basis, orthonormalize

ORACLE_RANK = 3
PERMUTATIONS = 200
Cells = list[tuple[list[int], list[int]]]


@dataclass(frozen=True, eq=False)
class Supervised:
    """What tells a contrast's texts apart in a model.

    Attributes:
        by_block: (blocks, d) fp64: of each block's output, mean with the factor minus mean without, at unit
            length.
        basis: (d, ORACLE_RANK): leading right singular vectors of ``by_block``, the first of them "the"
            direction.
        shares: of the energy of ``by_block`` along each.
        by_module: what each adapted module reads, with minus without: a basis of one direction each.
        permuted: (PERMUTATIONS, d): the first direction where labels are dealt out at random within a cell.
    """

    by_block: Tensor
    basis: Basis
    shares: tuple[float, ...]
    by_module: dict[str, Basis]
    permuted: Tensor


def supervised(model: nn.Module, task: Task, contrast: Contrast, seed: int) -> Supervised:
    """Differences of means over a contrast's cells, in the model as it is, adapter included."""
    texts: list[str] = []
    cells: Cells = []
    for side in contrast.cells:
        ends = [len(texts), len(texts) + len(side[0]), len(texts) + len(side[0]) + len(side[1])]
        cells.append((list(range(ends[0], ends[1])), list(range(ends[1], ends[2]))))
        texts += [*side[0], *side[1]]
    streams, inputs = activations(model, task, texts)
    by_block = _units(torch.stack([_difference(stream, cells) for stream in streams.values()]))
    vectors, energies = _leading(by_block)
    generator = torch.Generator().manual_seed(seed)
    stacked = torch.stack(list(streams.values()))
    permuted = []
    for _ in range(PERMUTATIONS):
        dealt = [_dealt(cell, generator) for cell in cells]
        shuffled = torch.stack([_difference(stream, dealt) for stream in stacked])
        permuted.append(_leading(_units(shuffled))[0][0])
    rank = min(ORACLE_RANK, len(by_block))
    return Supervised(
        by_block=by_block,
        basis=orthonormalize(vectors[:rank].mT.float()),
        shares=tuple((energies[:rank] / energies.sum()).tolist()),
        by_module={
            name: orthonormalize(_difference(read, cells)[:, None].float()) for name, read in inputs.items()
        },
        permuted=torch.stack(permuted),
    )


def activations(
    model: nn.Module, task: Task, texts: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Block outputs and what adapted modules read, by name, (N, d) fp64.

    At each text's last token, or the mean over all but its first, as the task pools.
    """
    rows = task.tokenizer(list(texts))["input_ids"]
    names = [layer.name for layer in lora_layers(model)]
    base = base_of(model)
    places: dict[str, tuple[nn.Module, bool]] = {
        name: (block, False) for name, block in blocks(model).items()
    }
    streams = list(places)
    places |= {name: (base.get_submodule(name), True) for name in names}
    found: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(rows) for name in places}
    with evaluating(model):
        for chosen in by_length([len(row) for row in rows], EVALUATED):
            ids, mask = padded([rows[row] for row in chosen], task.pad)
            with _captured(places) as taken:
                base.model(input_ids=ids, attention_mask=mask)
            for name, values in taken.items():
                for row, own, length in zip(chosen, values, mask.sum(1).tolist(), strict=True):
                    # The first token's stream is about a hundred times as long as others': it is left out.
                    kept = own[length - 1] if task.pooling == "last" else own[1:length].mean(0)
                    found[name][row] = kept.double()
    stacked = {name: torch.stack(values) for name, values in found.items()}
    return {name: stacked[name] for name in streams}, {name: stacked[name] for name in names}


def oracle(found: Supervised, side: Side) -> LatentFactors:
    """The supervised directions as factors: the stream's to write, each module's own input's to read."""
    if side == "write":
        return made_factors({STREAM: found.basis}, "write")
    return made_factors(found.by_module, "read")


def random_directions(width: int, rank: int, seed: int) -> LatentFactors:
    """Directions of the stream drawn at random."""
    drawn = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed))
    return made_factors({STREAM: orthonormalize(drawn)}, "write")


def made_factors(bases: Mapping[str, Basis], side: Side) -> LatentFactors:
    """Factors that come from no adapter: of their spectra and shares nothing is known."""
    rank = next(iter(bases.values())).rank
    unknown = {key: torch.full((rank,), torch.nan, dtype=torch.float64) for key in bases}
    return LatentFactors(
        side=side,
        pool="stream" if set(bases) == {STREAM} else "module",
        bases=dict(bases),
        spectra={},
        shares=unknown,
        agreement={key: torch.empty(rank, 0, dtype=torch.float64) for key in bases},
        p_values=unknown,
        null_shares={key: torch.full((rank, 3), torch.nan, dtype=torch.float64) for key in bases},
        modules=() if set(bases) == {STREAM} else tuple(bases),
    )


def energy_share(model: nn.Module, factors: LatentFactors) -> float:
    """``Σ‖ΔW V‖² / Σ‖ΔW‖²`` (or of ``Uᵀ ΔW``) over the modules that have directions; 0 where ΔW = 0."""
    along = total = 0.0
    for layer in lora_layers(model):
        width = layer.a.shape[1] if factors.side == "read" else layer.b.shape[0]
        basis = factors.basis_of(layer.name, width)
        if basis is not None:
            along, total = along + _energy(layer, basis, factors.side), total + _energy(layer, None, "write")
    return along / total if total else 0.0


def _energy(layer: LoraLayer, basis: Basis | None, side: str) -> float:
    a, b = layer.a.detach().double(), layer.b.detach().double()
    if basis is not None and side == "read":
        a = a @ basis.matrix.double()
    elif basis is not None:
        b = basis.matrix.double().mT @ b
    return float(((b.mT @ b) * (a @ a.mT)).sum()) * layer.scale**2


def _difference(values: Tensor, cells: Cells) -> Tensor:
    return torch.stack([values[first].mean(0) - values[second].mean(0) for first, second in cells]).mean(0)


def _dealt(cell: tuple[list[int], list[int]], generator: torch.Generator) -> tuple[list[int], list[int]]:
    rows = [*cell[0], *cell[1]]
    order = [rows[at] for at in torch.randperm(len(rows), generator=generator).tolist()]
    return order[: len(cell[0])], order[len(cell[0]) :]


def _units(rows: Tensor) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-30)


def _leading(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Right singular vectors of ``rows`` (as rows) and their energies, through the small Gram matrix."""
    energies, left = torch.linalg.eigh(rows @ rows.mT)
    return _units(left.flip(1).mT @ rows), energies.flip(0)


@contextmanager
def _captured(places: Mapping[str, tuple[nn.Module, bool]]) -> Iterator[dict[str, Tensor]]:
    taken: dict[str, Tensor] = {}

    def hook_of(name: str, reads: bool) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            value = inputs[0] if reads else output
            taken[name] = value[0] if isinstance(value, tuple) else value

        return hook

    hooks = [module.register_forward_hook(hook_of(name, reads)) for name, (module, reads) in places.items()]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()
