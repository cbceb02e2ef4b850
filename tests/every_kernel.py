"""A program that launches every operator once on small odd shapes: what a memory checker is run over.

    compute-sanitizer --tool memcheck python tests/every_kernel.py [cuda | cpu]

Ends with 1 where a result is wrong.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import fastproj
from fastproj.reference.adam import AdamState
from fastproj.reference.balance_loss import balance_loss
from fastproj.reference.combine import combine
from fastproj.reference.edge import edge
from fastproj.reference.gram import gram
from fastproj.reference.per_sample_grad import per_sample_grad
from fastproj.reference.per_sample_influence import per_sample_influence
from fastproj.reference.project_out import project_out
from fastproj.reference.projected_adamw import projected_adamw
from fastproj.reference.segments import segmentation
from fastproj.reference.weighted_grad import weighted_grad

# Shards off any block size, rows that share a program, one of several blocks, an empty one.
SHAPES = ((7, 33), (3, 511), (9001,), (1,), (0, 4), (70, 130))
# samples, tokens, d_out, d_in: either side the narrow one, tokens that leave a rest
LAYERS = ((2, 5, 3, 130), (2, 5, 130, 3), (3, 1, 2, 37), (2, 600, 16, 70))
# vectors, length, rank: on chip and in chunks, with and without wide loads
SUBSPACES = ((7, 33, 2), (16, 256, 3), (130, 65, 1), (8, 304, 60), (3, 1030, 2), (17, 41, 33))
# samples, labels: less than a tile, several turns of samples, more labels than a tile takes
LABELLED = ((16, 28), (37, 33), (5, 1030))
SEGMENTS = ("global", "tensor", "row")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def require_close(what: str, got: Tensor, want: Tensor) -> None:
    """Far from what rounding does, and near enough to show an element that was never written."""
    precision = torch.finfo(got.dtype if got.dtype != torch.float64 else torch.float32).eps
    # Sums of up to ten thousand products of order one, which some processors' BLAS adds up in a few lanes;
    # one side of a contraction and the result are rounded.
    allowed = 16 * precision * max(1.0, want.abs().max().item() if want.numel() else 0.0)
    if not bool(((got.double().cpu() - want).abs() <= allowed).all()):
        sys.exit(f"{what}: wrong by {(got.double().cpu() - want).abs().max().item()}")


def span_projections(dtype: torch.dtype, segments: str, device: str) -> None:
    sets = [[random(*shape, seed=seed).to(dtype) for shape in SHAPES] for seed in (0, 1)]
    here = [[shard.to(device) for shard in shards] for shards in sets]
    plan = segmentation(sets[0], segments)
    require_close("gram", fastproj.gram(here, segments=segments), gram(sets, plan))
    coefficients = random(plan.count, 2, seed=2)
    results = {
        "combine": (
            fastproj.combine(here, coefficients.to(device), segments=segments),
            combine(sets, coefficients, plan),
        ),
        "edge": (fastproj.edge(*here, segments=segments), edge(*sets, plan)),
    }
    for name, (got, want) in results.items():
        for value, expected in zip(got, want, strict=True):
            require_close(f"{name}, {dtype}, {segments}", value, expected)


def projected_steps(dtype: torch.dtype, segments: str, device: str) -> None:
    lists = [[random(*shape, seed=seed).to(dtype) for shape in SHAPES] for seed in range(5)]
    *sets, params, exp_avgs, squares = lists
    exp_avg_sqs = [1 + square.abs() for square in squares]
    plan = segmentation(params, segments)
    coefficients, counts = random(plan.count, 2, seed=2), [3.0] * len(SHAPES)
    want = projected_adamw(sets, coefficients, plan, params, exp_avgs, exp_avg_sqs, counts, lr=0.1)
    here = [[shard.to(device, copy=True) for shard in own] for own in (params, exp_avgs, exp_avg_sqs)]
    steps = [torch.tensor(count, device=device) for count in counts]
    given = [[shard.to(device) for shard in shards] for shards in sets]
    fastproj.projected_adamw_(given, coefficients.to(device), *here, steps, lr=0.1, segments=segments)
    for own, wanted in zip(here, want, strict=True):
        for value, expected in zip(own, wanted, strict=True):
            require_close(f"projected_adamw, {dtype}, {segments}", value, expected)


def subspace_projections(dtype: torch.dtype, left: bool, device: str) -> None:
    shapes = [(length, vectors) if left else (vectors, length) for vectors, length, _ in SUBSPACES]
    shards = [random(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
    spans = [fastproj.orthonormalize(random(*size, seed=7)) for _, *size in SUBSPACES]
    want = project_out(shards, [span.matrix for span in spans], range(len(spans)), left)
    got = fastproj.project_out(
        [shard.to(device) for shard in shards],
        [span.to(device) for span in spans],
        side="left" if left else "right",
    )
    for value, expected in zip(got, want, strict=True):
        require_close(f"project_out, {dtype}, {left}", value, expected)


def contractions(dtype: torch.dtype, layer: tuple[int, int, int, int], device: str) -> None:
    samples, tokens, d_out, d_in = layer
    x, delta = (
        random(samples, tokens, d_in, seed=3).to(dtype),
        random(samples, tokens, d_out, seed=4).to(dtype),
    )
    weights = random(2, samples, seed=5)
    here = x.to(device), delta.to(device)
    got = fastproj.weighted_grad(*here, weights.to(device))
    require_close(f"weighted_grad, {dtype}, {layer}", got, weighted_grad(x, delta, weights))
    require_close(
        f"per_sample_grad, {dtype}, {layer}", fastproj.per_sample_grad(*here), per_sample_grad(x, delta)
    )


def influence(dtype: torch.dtype, layer: tuple[int, int, int, int], device: str) -> None:
    samples, tokens, d_out, d_in = layer
    x, delta = random(samples, tokens, d_in, seed=3), random(samples, tokens, d_out, seed=4)
    x, delta = x.to(dtype), delta.to(dtype)
    references = random(2, d_out, d_in, seed=5)
    # Second moments of about a gradient's square: near 0 the step would magnify its rounding.
    moments = tokens * (1 + random(2, d_out, d_in, seed=6).square())
    for adam in (None, AdamState(*moments.unbind(), 3)):
        got = fastproj.per_sample_influence(
            x.to(device),
            delta.to(device),
            references.to(device),
            adam=adam and AdamState(*moments.to(device).unbind(), 3),
        )
        want = per_sample_influence(x, delta, references, adam)
        # Side by side: products cancel, and the square norms say what of.
        value, expected = (torch.cat([dots, sqnorms[:, None]], 1) for dots, sqnorms in (got, want))
        require_close(f"per_sample_influence, {dtype}, {layer}", value, expected)


def balance(dtype: torch.dtype, size: tuple[int, int], device: str) -> None:
    samples, number = size
    logits = random(*size, seed=3).to(dtype)
    known = random(2, number, seed=4)
    running = fastproj.RunningMeans(number)
    for labels in (torch.arange(samples) % number, random(*size, seed=5) > 0):
        running.means = known.to(device)
        here = logits.to(device).requires_grad_()
        exact = logits.double().requires_grad_()
        got = fastproj.balance_loss(here, labels.to(device), running=running)
        want = balance_loss(exact, labels, known=known)
        require_close(f"balance_loss, {dtype}, {size}", torch.stack(got), torch.stack(want).detach())
        (grad,) = torch.autograd.grad(sum(got), here)
        require_close(f"its gradient, {dtype}, {size}", grad, torch.autograd.grad(sum(want), exact)[0])


def main(device: str) -> None:
    """Every dtype of every operator on ``device``."""
    for dtype in DTYPES:
        for segments in SEGMENTS:
            span_projections(dtype, segments, device)
            projected_steps(dtype, segments, device)
        for left in (False, True):
            subspace_projections(dtype, left, device)
        for layer in LAYERS:
            contractions(dtype, layer, device)
            influence(dtype, layer, device)
        for size in LABELLED:
            balance(dtype, size, device)
    print(f"every operator ran on {device}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")
