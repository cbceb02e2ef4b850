"""What a prompt says of its labels before it has a text, and predictions with that taken away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.balance.label_logits import Form, label_logits
from fastproj.balance.labels import LabelWords
from fastproj.balance.prompts import Prompt, prompt_tokens
from fastproj.bias_diff.encoding import by_length, pad_token, padded
from fastproj.bias_diff.likelihood import evaluating

# Texts that say nothing, after Zhao et al. 2021.
CONTENT_FREE = ("N/A", "[MASK]", "")
_BATCH = 16


def contextual_prior(
    model: nn.Module,
    tokenizer: Any,
    labels: LabelWords,
    prompt: Prompt,
    *,
    contents: Sequence[str] = CONTENT_FREE,
    form: Form = "first",
) -> Tensor:
    """``p̄_c = mean over contents of p(c | prompt with that content)``, (C,) fp64 on the CPU, of sum 1.

    p is the softmax of :func:`label_logits` over the labels. Contextual calibration, Zhao et al. 2021
    (arXiv:2102.09690), section 5, with their three contents.

    Raises ValueError for no contents, NaN in the model, and as :func:`label_logits`.
    """
    if not contents:
        raise ValueError("expected at least one content, got none")
    return _mean_probabilities(model, tokenizer, labels, prompt, contents, form)


def domain_prior(
    model: nn.Module,
    tokenizer: Any,
    labels: LabelWords,
    prompt: Prompt,
    texts: Sequence[str],
    *,
    draws: int = 20,
    seed: int = 0,
    form: Form = "first",
) -> Tensor:
    """As :func:`contextual_prior`, its contents words drawn at random from the task's own texts.

    A content has as many words as a text on average, rounded, each drawn from the words of all texts, those
    between spaces, as often as they occur there. Domain-context calibration, Fei et al. 2023
    (arXiv:2305.19148), section 4, with their 20 draws.

    Raises ValueError where texts hold no word, draws are less than 1, and as :func:`contextual_prior`.
    """
    words = [word for text in texts for word in text.split()]
    if not words or draws < 1:
        raise ValueError(
            f"expected texts with words and 1 draw or more, got {len(words)} words and {draws} draws"
        )
    length = max(1, round(len(words) / len(texts)))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(words), (draws, length), generator=generator).tolist()
    contents = [" ".join(words[place] for place in row) for row in chosen]
    return _mean_probabilities(model, tokenizer, labels, prompt, contents, form)


def calibrated(logits: Tensor, prior: Tensor) -> Tensor:
    """``log p_c − log p̄_c`` with ``p = softmax(logits)``, (B, C) fp64: its largest is that of p/p̄.

    logits (B, C) of any floating dtype, or scores that differ from them by a constant a row; prior (C,),
    such as :func:`contextual_prior`. Not normalised again: a softmax does.

    Raises ValueError where shapes do not fit, or a prior is not positive and finite.
    """
    if prior.dim() != 1 or logits.dim() != 2 or logits.shape[1] != len(prior):
        raise ValueError(
            f"expected logits (B, C) and a prior (C,), got {tuple(logits.shape)} and {tuple(prior.shape)}"
        )
    if not bool(((prior > 0) & prior.isfinite()).all()):
        raise ValueError(f"expected a prior of positive numbers, got {prior.tolist()}")
    return logits.double().log_softmax(1) - prior.to(logits.device).double().log()


def _mean_probabilities(
    model: nn.Module,
    tokenizer: Any,
    labels: LabelWords,
    prompt: Prompt,
    contents: Sequence[str],
    form: Form,
) -> Tensor:
    rows, pad = prompt_tokens(contents, tokenizer, prompt), pad_token(tokenizer)
    total = torch.zeros(len(labels), dtype=torch.float64)
    with evaluating(model) as device:
        for chosen in by_length([len(row) for row in rows], _BATCH):
            ids, mask = (part.to(device) for part in padded([rows[row] for row in chosen], pad))
            total += label_logits(model, ids, mask, labels, form=form).cpu().double().softmax(1).sum(0)
    if bool(total.isnan().any()):
        raise ValueError("the model gives NaN for texts without content")
    return total / len(contents)
