"""EDGE's gradient projection as one operator: two launches, in place or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastproj.bindings._library import define, implementation
from fastproj.bindings._sets import GradientSets, gradient_sets, requires_grad, split_sets
from fastproj.bindings.combine import check_aliases
from fastproj.reference.edge import VARIANTS, edge_coefficients
from fastproj.reference.segments import Segments, row_shape

ON_NONFINITE = ("propagate", "skip")


@dataclass(frozen=True)
class EdgeStats:
    """What one projection saw, segment by segment; everything stays on the device until it is read.

    ``gram`` is (S, 2, 2) of (e, g), ``coefficients`` (S, 2) with ``G_EDGE = c_e e + c_g g``; both fp64.
    """

    gram: Tensor
    coefficients: Tensor

    @property
    def cosine(self) -> Tensor:
        """``⟨e,g⟩ / (|e||g|)``, (S,); 0 where either gradient is 0."""
        norms = self.erm_norm * self.gce_norm
        return torch.where(norms == 0, 0.0, self.gram[:, 0, 1] / norms)

    @property
    def bias_share(self) -> Tensor:
        """``|bias| / |e|`` for the paper's bias ``½|g|(ĝ − ê)``, (S,); 0 where either gradient is 0.

        ``|ĝ − ê| = √(2 − 2 cos)``.
        """
        chord = torch.sqrt((2 - 2 * self.cosine).clamp_min(0))
        usable = (self.erm_norm > 0) & (self.gce_norm > 0)
        return torch.where(usable, 0.5 * chord * self.gce_norm / self.erm_norm, 0.0 * self.erm_norm)

    @property
    def erm_norm(self) -> Tensor:
        """``|e|``, (S,)."""
        return torch.sqrt(self.gram[:, 0, 0])

    @property
    def gce_norm(self) -> Tensor:
        """``|g|``, (S,)."""
        return torch.sqrt(self.gram[:, 1, 1])

    @property
    def nonfinite(self) -> Tensor:
        """Whether NaN or Inf was met in a segment, (S,) bool."""
        return ~torch.isfinite(self.gram).all(-1).all(-1)


def edge(
    erm: Sequence[Tensor | None],
    gce: Sequence[Tensor | None],
    *,
    alpha: float = 1.0,
    segments: Segments = "global",
    variant: str = "paper",
    on_nonfinite: str = "propagate",
) -> list[Tensor | None]:
    """``G_EDGE = e − α·bias``: the gradient without the part that the bias-amplified loss adds.

    With ``e = erm``, ``g = gce`` and norms over a segment:

    - ``"paper"``: bias is the component of g orthogonal to the bisector of e and g, which comes to
      ``G_EDGE = (1 + α|g| / (2|e|)) e − (α/2) g``; e is left as it is where |e| = 0 or |g| = 0
    - ``"released"``: what the authors' code does: per tensor ``c = e/‖e‖ + g/‖g‖``, and row by row
      ``G = e − α (g_i − (g_i·c_i) c_i)``; it fixes its own segments
    - ``"naive"``: ``e − α (⟨e,g⟩/⟨g,g⟩) g``
    - ``"subtract"``: ``e − α g``

    Args:
        erm, gce: n shards each (see :func:`fastproj.gram`), a position may be None in both.
        alpha: strength of the projection, finite.
        segments: as in :func:`fastproj.gram`; must stay at its default for ``variant="released"``.
        variant: one of the four above.
        on_nonfinite: for a segment whose Gram is not finite (it holds NaN or Inf, or fp64 values whose
            squares overflow), ``"propagate"`` makes all of it NaN and ``"skip"`` leaves e there; other
            segments are never touched.

    Returns:
        n tensors of e's shapes and dtypes, None where both sets have None.

    Raises:
        TypeError, ValueError: as in :func:`fastproj.gram`; an unknown variant or on_nonfinite; an alpha
            that is not a finite number; segments given for ``"released"``.

    Differentiable in both sets. Source: Li et al., CCL 2025, eq. 5-12 (``"naive"``: eq. 7).
    Meaning: ``fastproj.reference.edge``.
    """
    checked, skip = _check(erm, gce, alpha, segments, variant, on_nonfinite)
    if not checked.shards:
        return checked.restore([])
    e, g = split_sets(checked.shards, 2)
    if requires_grad(checked.shards):
        return checked.restore(_differentiable(checked, alpha, variant, on_nonfinite))
    projected, _, _ = torch.ops.fastproj.edge(
        e, g, checked.first, checked.rows, checked.count, float(alpha), variant, skip
    )
    return checked.restore(projected)


@torch.no_grad()
def edge_(
    erm: Sequence[Tensor | None],
    gce: Sequence[Tensor | None],
    *,
    alpha: float = 1.0,
    segments: Segments = "global",
    variant: str = "paper",
    on_nonfinite: str = "propagate",
) -> EdgeStats:
    """``erm ← erm − α·bias`` in place: :func:`edge` without a second gradient set in memory.

    Arguments, formulas and errors are those of :func:`edge`; a tensor may not stand at two positions of erm.
    Returns :class:`EdgeStats`, which stays on
    the device: the host does not wait. Not differentiable: runs under no_grad.
    """
    checked, skip = _check(erm, gce, alpha, segments, variant, on_nonfinite)
    if not checked.shards:
        return EdgeStats(torch.zeros(checked.count, 2, 2, dtype=torch.float64), _untouched(checked.count))
    e, g = split_sets(checked.shards, 2)
    check_aliases(e, g, "erm")
    return EdgeStats(
        *torch.ops.fastproj.edge_(
            e, g, checked.first, checked.rows, checked.count, float(alpha), variant, skip
        )
    )


def _untouched(count: int) -> Tensor:
    """The coefficients (1, 0) for every segment."""
    return torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(count, 1)


def _check(
    erm: Sequence[Tensor | None],
    gce: Sequence[Tensor | None],
    alpha: float,
    segments: Segments,
    variant: str,
    on_nonfinite: str,
) -> tuple[GradientSets, bool]:
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    if on_nonfinite not in ON_NONFINITE:
        raise ValueError(f"on_nonfinite must be one of {ON_NONFINITE}, got {on_nonfinite!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha must be a number, got {type(alpha).__name__}")
    if not abs(alpha) < float("inf"):
        raise ValueError(f"alpha must be finite, got {alpha}")
    if variant == "released":
        if not isinstance(segments, str) or segments != "global":
            raise ValueError(
                f'variant="released" fixes its own segments; leave segments alone, got {segments!r}'
            )
        segments = "row"
    return gradient_sets([erm, gce], segments, names=["erm", "gce"]), on_nonfinite == "skip"


def row_owners(shards: Sequence[Tensor], device: torch.device) -> Tensor:
    """The shard that each row lies in, (S,)."""
    counts = torch.tensor([row_shape(shard)[0] for shard in shards], dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(shards)), counts).to(device)


def closed_form(gram: Tensor, erm: Sequence[Tensor], alpha: float, variant: str, on_nonfinite: str) -> Tensor:
    """The closed form on the Gram of (e, g), knowing which tensor each row lies in where that matters."""
    owners = row_owners(erm, gram.device) if variant == "released" else None
    if owners is not None and len(owners) != len(gram):
        raise ValueError(
            f"variant='released' takes rows for segments: expected {len(owners)}, got {len(gram)} segments"
        )
    return edge_coefficients(
        gram,
        alpha=alpha,
        variant=variant,
        on_nonfinite=on_nonfinite,
        tensor_of_segment=owners,
        tensors=len(erm),
    )


def _differentiable(checked: GradientSets, alpha: float, variant: str, on_nonfinite: str) -> list[Tensor]:
    """Gram, closed-form coefficients and combination as three steps that autograd follows."""
    e, _ = split_sets(checked.shards, 2)
    gram = torch.ops.fastproj.gram(checked.shards, 2, checked.first, checked.rows, checked.count)
    coefficients = closed_form(gram, e, alpha, variant, on_nonfinite)
    combined = torch.ops.fastproj.combine(checked.shards, coefficients, checked.first, checked.rows)
    return [value.to(shard.dtype) for value, shard in zip(combined, e, strict=True)]


def from_parts(
    erm: list[Tensor],
    gce: list[Tensor],
    out: list[Tensor],
    first: Sequence[int],
    rows: bool,
    count: int,
    alpha: float,
    variant: str,
    skip_nonfinite: bool,
) -> tuple[Tensor, Tensor]:
    """Where no fused kernel is: the device's gram, the closed form, the device's combine."""
    device = erm[0].device.type
    gram = implementation("gram", device)([*erm, *gce], 2, first, rows, count)
    coefficients = closed_form(gram, erm, alpha, variant, "skip" if skip_nonfinite else "propagate")
    implementation("combine", device)([*erm, *gce], coefficients, first, rows, out)
    return gram, coefficients


def _dispatch_in_place(erm: list[Tensor], gce: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor]:
    function = implementation("edge", erm[0].device.type)
    stats: tuple[Tensor, Tensor] = function(erm, gce, erm, *arguments)
    return stats


def _dispatch(erm: list[Tensor], gce: list[Tensor], *arguments: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    out = _empty_like(erm)
    gram, coefficients = implementation("edge", erm[0].device.type)(erm, gce, out, *arguments)
    return out, gram, coefficients


def _empty_like(shards: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(shard, memory_format=torch.contiguous_format) for shard in shards]


def _fake_in_place(
    erm: list[Tensor], gce: list[Tensor], first: list[int], rows: bool, count: int, *_: Any
) -> tuple[Tensor, Tensor]:
    empty = erm[0].new_empty
    return empty(count, 2, 2, dtype=torch.float64), empty(count, 2, dtype=torch.float64)


def _fake(erm: list[Tensor], gce: list[Tensor], *arguments: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    return (_empty_like(erm), *_fake_in_place(erm, gce, *arguments))


_PLAN = "int[] first, bool rows, int count, float alpha, str variant, bool skip_nonfinite"
define(f"edge(Tensor[] erm, Tensor[] gce, {_PLAN}) -> (Tensor[], Tensor, Tensor)", _dispatch, _fake)
define(
    f"edge_(Tensor(a!)[] erm, Tensor[] gce, {_PLAN}) -> (Tensor, Tensor)", _dispatch_in_place, _fake_in_place
)
