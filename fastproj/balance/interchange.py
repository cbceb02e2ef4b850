"""Where a bias begins: each block's attention output exchanged for that of a run led to the wrong label."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.architectures import architecture_of, blocks
from fastproj.balance.head import causal_model, final_hidden, token_logits
from fastproj.balance.labels import LabelWords, label_words
from fastproj.balance.predict import predict
from fastproj.balance.prompts import Example, Prompt
from fastproj.bias_diff.likelihood import context_length, evaluating


@dataclass(frozen=True)
class InterchangePair:
    """Token ids of a run led to the right label and of one led to a wrong one, both asking at their end.

    The m positions that are exchanged are the last of each, aligned at the end:
    ``m = max(1, min(|gold|, |biased|) − P)``, P the length of their longest common prefix.

    Raises ValueError where a run is empty.
    """

    gold: tuple[int, ...]
    biased: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.gold or not self.biased:
            raise ValueError(
                f"expected runs of at least one token, got {len(self.gold)} and {len(self.biased)}"
            )

    @property
    def shared(self) -> int:
        """Tokens in front that both runs have and that no exchange reaches: ``min(|gold|, |biased|) − m``."""
        alike = takewhile(lambda two: two[0] == two[1], zip(self.gold, self.biased, strict=False))
        return min(sum(1 for _ in alike), len(self.gold) - 1, len(self.biased) - 1)

    @property
    def exchanged(self) -> int:
        """m, the number of positions exchanged."""
        return min(len(self.gold), len(self.biased)) - self.shared


@dataclass(frozen=True, eq=False)
class LayerScores:
    """``KL(p_gold ‖ p_patched)`` in nats by sample and block, see :func:`interchange_ablation`.

    Attributes:
        per_sample: (N, L) fp64 on the CPU.
        modules: names of the L modules whose output was exchanged, in the order of the blocks.
    """

    per_sample: Tensor
    modules: tuple[str, ...]

    @property
    def mean(self) -> Tensor:
        """(L,) means over samples."""
        return self.per_sample.mean(0)

    @property
    def standard_error(self) -> Tensor:
        """(L,) ``s/√N``, s with N − 1 in its denominator; NaN for a single sample."""
        if len(self.per_sample) < 2:
            return torch.full_like(self.mean, math.nan)
        return self.per_sample.std(0) / math.sqrt(len(self.per_sample))

    @property
    def best(self) -> int:
        """Number of the block with the largest mean, the first of several."""
        return int(self.mean.argmax())

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the standard errors of a single sample are None."""
        errors = [None if math.isnan(value) else value for value in self.standard_error.tolist()]
        return {
            "modules": list(self.modules),
            "best": self.best,
            "mean": self.mean.tolist(),
            "standard_error": errors,
            "per_sample": self.per_sample.tolist(),
        }


def interchange_pairs(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    labels: LabelWords,
    prompt: Prompt,
    *,
    batch_size: int = 16,
) -> list[InterchangePair]:
    """A pair for each example: its prompt with the right label given, and with the likeliest wrong one.

    Behind the prompt stand the label's word, a line's end and the prompt's cue again, which asks once more
    after the answer was given: ``"Text: …\\nLabel: joy\\nLabel:"``. Word and cue are split into tokens
    together, as :func:`fastproj.balance.labels.label_words` does. The wrong label is the likeliest that the
    example has not, by the first tokens' logits behind the prompt; of several that it has, the right one is
    the likeliest.

    Raises ValueError where the prompt has no cue behind its text or an example has none or all of the labels,
    and as :func:`fastproj.balance.predict.predict` for the first tokens of labels.

    The wording is ours: the paper's prompts were not to be had.
    """
    cue = prompt.cue.strip()
    if not cue:
        raise ValueError(f"expected a template with a cue behind its text, got {prompt.template!r}")
    answers = label_words(tokenizer, labels.names, [f"{word}\n{cue}" for word in labels.words]).tokens
    members = [_members(example, len(labels)) for example in examples]
    scores = predict(model, tokenizer, examples, labels, batch_size=batch_size)
    pairs = []
    for example, own, row in zip(examples, members, scores, strict=True):
        gold, biased = (int(row.masked_fill(~kind, -math.inf).argmax()) for kind in (own, ~own))
        runs = [(*example.prompt, *answers[label]) for label in (gold, biased)]
        pairs.append(InterchangePair(*runs))
    return pairs


def interchange_ablation(
    model: nn.Module,
    samples: Sequence[InterchangePair],
    labels: LabelWords,
    *,
    rows_per_forward: int | None = None,
    on_sample: Callable[[int, int], None] | None = None,
) -> LayerScores:
    """``KL(p_gold ‖ p_patched(l))`` of each sample and each block l.

    p is the softmax over the labels' first tokens at the last position of the gold run. For p_patched(l)
    the attention's output projection of block l (o_proj, c_proj or out_proj) gives at the exchanged positions
    what it gives there in the biased run; see :class:`InterchangePair`. Blocks in front of l are then those
    of the gold run, and what follows sees the exchange. The block with the largest mean is the one to train.

    The tokens that both runs share go through the model once, into a KV cache; then the biased, the gold and
    one patched run for each block are rows of one batch, padded at the right. The same in the plainest way is
    :func:`fastproj.balance.naive_interchange.naive_interchange`. Both agree to the rounding of the model's
    precision: identical runs give 0 up to it, of either sign.

    Args:
        model: a causal language model of the table in ``fastproj/architectures.py``, with or without adapters
            around its layers; run in evaluation mode, its own given back.
        samples: the pairs, see :func:`interchange_pairs`.
        labels: at least two, with distinct first tokens.
        rows_per_forward: the most rows in a batch; by default all ``L + 2``. Fewer need less memory, and each
            batch its own copy of the cache.
        on_sample: called as ``on_sample(finished, samples)`` after each.

    Returns:
        Scores in nats, fp64 of logits in the model's precision.

    Raises:
        ValueError: no sample, a model of another kind, a run longer than the model's context,
            rows_per_forward below 1, labels that their first token does not tell apart, or NaN or Inf in
            the model.

    Source: target layer of Zhao, Yang and Chen, ACL 2025, "Debiasing the Fine-Grained Classification Task in
    LLMs with Bias-Aware PEFT". Sharing the prefix and a batch over blocks are ours.
    """
    writers = attention_writers(model)
    check_ablation(model, samples, labels)
    rows = len(writers) + 2 if rows_per_forward is None else rows_per_forward
    if rows < 1:
        raise ValueError(f"rows_per_forward: expected at least 1, got {rows}")
    scores = []
    with evaluating(model) as device:
        for number, pair in enumerate(samples):
            logits = _answers(model, list(writers.values()), pair, labels, rows, device)
            scores.append(divergences(logits, number))
            if on_sample is not None:
                on_sample(number + 1, len(samples))
    return LayerScores(torch.stack(scores), tuple(writers))


def attention_writers(model: nn.Module) -> dict[str, nn.Module]:
    """Each block's attention output projection by its name, an adapter around it included.

    Raises ValueError as :func:`fastproj.balance.head.causal_model`.
    """
    causal_model(model)
    name = architecture_of(model).writers[0]
    return {f"{place}.{name}": block.get_submodule(name) for place, block in blocks(model).items()}


def check_ablation(model: nn.Module, samples: Sequence[InterchangePair], labels: LabelWords) -> None:
    """Raises ValueError as :func:`interchange_ablation` for samples and labels."""
    if not samples:
        raise ValueError("expected at least one pair of runs, got none")
    if len(labels) < 2:
        raise ValueError(f"expected two labels or more, got {', '.join(labels.names)}")
    labels.require_distinct_first()
    limit = context_length(model)
    for number, pair in enumerate(samples):
        longest = max(len(pair.gold), len(pair.biased))
        if limit is not None and longest > limit:
            raise ValueError(f"expected at most {limit} tokens in a run, got {longest} in pair {number}")


def divergences(logits: Tensor, sample: int) -> Tensor:
    """``KL(softmax(z_0) ‖ softmax(z_l))``, l = 1 … L, of logits z (L + 1, C): (L,) fp64 on the CPU.

    Raises ValueError, with the sample's number, for NaN or Inf.
    """
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"the model gives NaN or Inf for pair {sample}")
    gold, *patched = logits.double().cpu().log_softmax(-1)
    return torch.stack([(gold.exp() * (gold - other)).sum() for other in patched])


def _members(example: Example, labels: int) -> Tensor:
    """Which labels an example has, (C,) bool. ValueError for none or all of them."""
    own = torch.tensor([label in example.labels for label in range(labels)])
    count = int(own.sum())
    if not 0 < count < labels:
        raise ValueError(f"expected an example with some of {labels} labels, {example.id!r} has {count}")
    return own


def _answers(
    model: nn.Module,
    writers: Sequence[nn.Module],
    pair: InterchangePair,
    labels: LabelWords,
    rows: int,
    device: torch.device,
) -> Tensor:
    """Label logits at the end of the gold run and of the patched ones, (L + 1, C)."""
    runs = [pair.biased, *[pair.gold] * (len(writers) + 1)]
    cache = _cache(model, pair.gold[: pair.shared], device)
    given: dict[int, Tensor] = {}
    found = []
    for start in range(0, len(runs), rows):
        tails = [run[pair.shared :] for run in runs[start : start + rows]]
        with _exchanging(writers, pair, start, len(tails), given):
            hidden = _run(model, tails, pair.shared, cache, device)
        # The biased run's own answer is of no account.
        patched = hidden[1:] if start == 0 else hidden
        if len(patched):
            answers = patched[:, len(pair.gold) - pair.shared - 1]
            found.append(token_logits(model, answers, labels.first))
    return torch.cat(found)


def _cache(model: nn.Module, prefix: Sequence[int], device: torch.device) -> Any:
    """Keys and values of the tokens that all runs share; None without one."""
    if not prefix:
        return None
    from transformers import DynamicCache

    cache = DynamicCache(config=causal_model(model).config)
    ids = torch.tensor([list(prefix)], device=device)
    final_hidden(model, ids, torch.ones_like(ids), past_key_values=cache, use_cache=True)
    return cache


def _run(
    model: nn.Module, tails: Sequence[Sequence[int]], shared: int, cache: Any, device: torch.device
) -> Tensor:
    """Last hidden states (rows, T, d) of tails behind the cache's tokens, T the longest's length.

    Rows are filled up at the right. Nothing is masked: no position sees one behind it.
    """
    width = max(map(len, tails))
    ids = torch.tensor([[*tail, *[tail[-1]] * (width - len(tail))] for tail in tails], device=device)
    mask = torch.ones(len(tails), shared + width, dtype=torch.int64, device=device)
    if cache is None:
        return final_hidden(model, ids, mask, use_cache=False)
    # A run adds to its cache, and the next batch needs it as it was.
    own = deepcopy(cache)
    own.batch_repeat_interleave(len(tails))
    return final_hidden(model, ids, mask, past_key_values=own, use_cache=True)


@contextmanager
def _exchanging(
    writers: Sequence[nn.Module], pair: InterchangePair, start: int, rows: int, given: dict[int, Tensor]
) -> Iterator[None]:
    """While it holds, a batch of rows numbered from ``start`` is patched.

    Row 0 is the biased run, whose outputs are kept in ``given`` by block; row ``l + 2`` takes them at l.
    """
    behind = [len(run) - pair.shared for run in (pair.gold, pair.biased)]
    into, taken = (slice(length - pair.exchanged, length) for length in behind)

    def hook(layer: int) -> Callable[..., Tensor | None]:
        def exchange(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if start == 0:
                given[layer] = output[0, taken].clone()
            row = layer + 2 - start
            if not 0 <= row < rows:
                return None
            patched = output.clone()
            patched[row, into] = given[layer]
            return patched

        return exchange

    handles = [writer.register_forward_hook(hook(layer)) for layer, writer in enumerate(writers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
