"""Tokens along a direction of the residual stream: those that it writes, or those that it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.architectures import blocks, stream_role
from fastproj.bias_diff.likelihood import evaluating
from fastproj.latent.factors import STREAM, LatentFactors

# Rows of the vocabulary that are in fp32 at a time.
_ROWS = 8192
# A spread this small beside the values themselves is the rounding of fp32.
_ROUNDING = 1e-6
# Tokens of the run that shows which norm stands where.
_TOKENS = 4


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of the vocabulary along directions.

    Attributes:
        scores: by key of the bases, (tokens, rank) fp32 on the CPU, each column of mean 0 and variance 1.
        missing: by key, why there are none.
        notes: what was left out or stood in for another thing.
    """

    scores: dict[str, Tensor]
    missing: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Norm:
    """``g ∘ (x − x̄)/σ(x)``, or without x̄; its bias, equal for all tokens, is of no account."""

    gain: Tensor
    centred: bool


@dataclass(eq=False)
class _Flow:
    """What went through norms and other modules in one run: (input, output) by name."""

    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    others: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def token_scores(model: nn.Module, factors: LatentFactors, tokens: int) -> TokenScores:
    """Scores of the first ``tokens`` of the vocabulary; see :func:`fastproj.latent.describe.describe`."""
    wrapper: Any = model
    base: Any = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    embedding: Tensor = base.get_input_embeddings().weight
    missing = {key: why for key in factors.bases if (why := _unlike_the_stream(key, factors, embedding))}
    keys = [key for key in factors.bases if key not in missing]
    notes: list[str] = []
    with evaluating(base) as device:
        if factors.side == "read":
            norms = _norms_before(base, _names(base, factors, keys), device, notes)
            lenses = {key: _read_lens(key, factors, norms) for key in keys}
            rows = _at_length_one(embedding[:tokens], any(norm.centred for norm in norms.values()))
        else:
            norm = _norm_behind(base, _names(base, factors, keys), device, notes)
            lenses = {key: _write_lens(factors.bases[key].matrix, norm) for key in keys}
            head = base.get_output_embeddings()
            if head is None:
                notes.append("The model has no unembedding: its input embeddings stand in for it.")
            rows = _in_fp32((embedding if head is None else head.weight)[:tokens])
        parts: dict[str, list[Tensor]] = {key: [] for key in keys}
        for part in rows:
            for key in keys:
                parts[key].append((part @ lenses[key].to(device)).cpu())
    scores = {key: standardised(torch.cat(found)) for key, found in parts.items()}
    return TokenScores(scores, missing, tuple(notes))


def _names(base: nn.Module, factors: LatentFactors, keys: Sequence[str]) -> list[str]:
    """Names of the modules that directions with tokens are of; ValueError where the model lacks one."""
    names = list(factors.modules if factors.pool == "stream" else keys)
    modules = dict(base.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(f"expected a model with a module {name!r}, {type(base).__name__} has none")
    return names


def _unlike_the_stream(key: str, factors: LatentFactors, embedding: Tensor) -> str:
    """Why directions have no tokens; "" where they have."""
    width = factors.bases[key].dimension
    if width != embedding.shape[1]:
        return f"They have width {width}, tokens {embedding.shape[1]}."
    if key != STREAM and stream_role(key) not in (factors.side, None):
        return f"What this module {factors.side}s is not the residual stream."
    return ""


def _norms_before(
    base: nn.Module, names: Sequence[str], device: torch.device, notes: list[str]
) -> dict[str, _Norm]:
    """The norm that gives each module what it reads."""
    modules = dict(base.named_modules())
    flow = _run(base, modules, names, device)
    found = {}
    for name in names:
        for norm, (_, output) in flow.norms.items():
            if name in flow.others and _same(output, flow.others[name][0]):
                found[name] = _as_norm(modules[norm], output.shape[-1])
    if len(found) < len(names):
        notes.append(f"In front of {len(names) - len(found)} of {len(names)} modules no norm was found.")
    return found


def _norm_behind(
    base: nn.Module, writers: Sequence[str], device: torch.device, notes: list[str]
) -> _Norm | None:
    """The norm that reads what the last block gives; None where there is none, as in BERT."""
    modules = dict(base.named_modules())
    last, head = list(blocks(base))[-1], base.get_output_embeddings()  # type: ignore[operator]
    unembedding = next((name for name, module in modules.items() if module is head), None)
    watched = [*writers, last] if unembedding is None else [*writers, last, unembedding]
    flow = _run(base, modules, watched, device)
    stream = flow.others[last][1]
    behind = next((name for name, (x, _) in flow.norms.items() if _same(x, stream)), None)
    end = stream if behind is None else flow.norms[behind][1]
    if unembedding is not None and not _same(end, flow.others[unembedding][0]):
        notes.append("Layers of the head between the last block and the unembedding are left out.")
    given = [flow.others[name][1] for name in writers if name in flow.others]
    if any(_same(x, output) for x, _ in flow.norms.values() for output in given):
        notes.append("The norm between what modules write and the stream is left out.")
    return None if behind is None else _as_norm(modules[behind], stream.shape[-1])


def _run(base: nn.Module, modules: dict[str, nn.Module], names: Sequence[str], device: torch.device) -> _Flow:
    """What flows through norms and the named modules on a few tokens.

    By it norms are found, since their names differ between models and some stand behind blocks.
    """
    with _watched(modules, names) as flow:
        base(input_ids=torch.arange(_TOKENS, device=device)[None])
    return flow


@contextmanager
def _watched(modules: dict[str, nn.Module], names: Sequence[str]) -> Iterator[_Flow]:
    flow = _Flow()

    def watch(name: str, table: dict[str, tuple[Tensor, Tensor]]) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                table[name] = (inputs[0], output[0] if isinstance(output, tuple) else output)

        return modules[name].register_forward_hook(hook)

    norms = [name for name, module in modules.items() if type(module).__name__.lower().endswith("norm")]
    handles = [watch(name, flow.norms) for name in norms] + [watch(name, flow.others) for name in names]
    try:
        yield flow
    finally:
        for handle in handles:
            handle.remove()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, be it as (1, T, d) or (T, d)."""
    return one.numel() == other.numel() and bool((one.reshape(-1) == other.reshape(-1)).all())


def _as_norm(module: nn.Module, width: int) -> _Norm:
    weight: Any = module.weight
    ones = torch.ones(1, 1, width, dtype=weight.dtype, device=weight.device)
    if isinstance(module, nn.LayerNorm):
        return _Norm(weight.float(), centred=True)
    # Of an RMS norm the answer to ones is the gain, be that its weight or, in Gemma, one more.
    return _Norm(module(ones).flatten().float(), centred=False)


def _write_lens(directions: Tensor, norm: _Norm | None) -> Tensor:
    """``g ∘ (d − d̄)``, (d_model, rank)."""
    wide = directions.float()
    if norm is None:
        return wide
    wide = wide.to(norm.gain.device)
    return norm.gain[:, None] * (wide - wide.mean(0) if norm.centred else wide)


def _read_lens(key: str, factors: LatentFactors, norms: dict[str, _Norm]) -> Tensor:
    """``g ∘ d``, g the mean gain of those in front of the modules whose directions these are."""
    directions = factors.bases[key].matrix.float()
    wanted = factors.modules if key == STREAM else (key,)
    gains = [norms[name].gain for name in wanted if name in norms]
    return torch.stack(gains).mean(0)[:, None] * directions.to(gains[0].device) if gains else directions


def _in_fp32(matrix: Tensor) -> Iterator[Tensor]:
    """Some rows at a time: a whole vocabulary may be large."""
    return (rows.float() for rows in matrix.split(_ROWS))


def _at_length_one(matrix: Tensor, centred: bool) -> Iterator[Tensor]:
    """Rows as a norm without gain would take them, up to one factor for all."""
    for rows in _in_fp32(matrix):
        wide = rows - rows.mean(1, keepdim=True) if centred else rows
        length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        yield torch.where(length > 0, wide / length, 0.0)


def standardised(scores: Tensor) -> Tensor:
    """Columns at mean 0 and variance 1, those without variance at 0. ValueError for NaN or Inf."""
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("the model's embeddings or the gains of its norms hold NaN or Inf")
    spread, size = scores.std(0, correction=0), scores.abs().amax(0)
    same = spread <= _ROUNDING * size
    return torch.where(same, 0.0, (scores - scores.mean(0)) / torch.where(same, 1.0, spread))
