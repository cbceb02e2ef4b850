"""Labels that a language model gives to examples, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.balance.calibration import calibrated
from fastproj.balance.label_logits import Form, label_logits
from fastproj.balance.labels import LabelWords
from fastproj.balance.prompts import Example, batch
from fastproj.bias_diff.encoding import by_length, pad_token
from fastproj.bias_diff.likelihood import context_length, evaluating


def predict(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    labels: LabelWords,
    *,
    form: Form = "first",
    batch_size: int = 16,
    prior: Tensor | None = None,
) -> Tensor:
    """``log p(c | prompt)``, p the softmax of :func:`label_logits` over the C labels, (N, C) fp64 on the CPU.

    With a ``prior`` (C,), as :mod:`fastproj.balance.calibration` finds it, ``log p(c | prompt) − log p̄_c``.
    Rows are in the order of the examples, whatever the batches. The model is left in the mode it was in.

    Raises ValueError for no examples, a batch_size below 1, a prompt that with a label passes the model's
    context, NaN in the model, and as :func:`label_logits`.
    """
    if not examples or batch_size < 1:
        raise ValueError(
            f"expected examples and a batch_size of 1 or more, got {len(examples)}, {batch_size}"
        )
    _check_lengths(model, examples, labels)
    pad = pad_token(tokenizer)
    logits = torch.empty(len(examples), len(labels), dtype=torch.float64)
    with evaluating(model) as device:
        for rows in by_length([len(example.prompt) for example in examples], batch_size):
            ids, mask = batch([examples[row] for row in rows], pad, device)
            logits[rows] = label_logits(model, ids, mask, labels, form=form).cpu().double()
    scores = logits.log_softmax(1) if prior is None else calibrated(logits, prior)
    unknown = int(scores.isnan().any(1).sum())
    if unknown:
        raise ValueError(f"the model gives NaN for {unknown} of {len(examples)} examples")
    return scores


def decided(scores: Tensor, *, multi_label: bool = False, threshold: float | None = None) -> Tensor:
    """The labels that scores (N, C), as :func:`predict` gives them, speak for.

    The largest score's, (N,) int64. With ``multi_label`` (N, C) bool: every label whose share
    ``softmax(scores)_c`` passes ``threshold``, by default the even share 1/C, and in any case the largest.
    A model that is asked for one word spreads its probability over the labels that would do, so a fixed ½
    could say no two; the rule is ours. Of equal scores the first label is the largest.

    Raises ValueError for scores that are not (N, C) or hold NaN, and a threshold outside [0, 1).
    """
    if scores.dim() != 2 or not scores.shape[1] or bool(scores.isnan().any()):
        raise ValueError(f"expected scores (N, C) without NaN, got shape {tuple(scores.shape)}")
    if threshold is not None and not 0 <= threshold < 1:
        raise ValueError(f"threshold: expected a share from 0 to less than 1, got {threshold}")
    largest = scores.argmax(1)
    if not multi_label:
        return largest
    said = scores.softmax(1) > (1 / scores.shape[1] if threshold is None else threshold)
    return said.scatter(1, largest[:, None], True)


def _check_lengths(model: nn.Module, examples: Sequence[Example], labels: LabelWords) -> None:
    limit = context_length(model)
    longest = max(len(row) for row in labels.tokens)
    for example in examples:
        length = len(example.prompt)
        # The last token of a label is asked for and not read.
        if not length or (limit is not None and length + longest - 1 > limit):
            raise ValueError(
                f"expected a prompt of 1 to {limit} tokens, {longest} of a label counted, got {length} in "
                f"{example.id!r}"
            )
