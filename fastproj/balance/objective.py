"""The loss that teaches a language model its labels and keeps it from favouring some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from fastproj.balance.labels import LabelWords
from fastproj.bindings.balance_loss import RunningMeans, balance_loss
from fastproj.bindings.cross_entropy import cross_entropy
from fastproj.methods.gce import IGNORE_INDEX


@dataclass(frozen=True)
class LossParts:
    """What a loss was made of, each a number on the device, detached."""

    lm: Tensor
    propensity: Tensor
    discrimination: Tensor


class BalanceObjective:
    """``L = α L_LM + β propensity − γ discrimination``.

    ``propensity = ‖H^C − mean‖₂ + ‖H^N − mean‖₂`` and ``discrimination = ‖H^C − H^N‖₂`` over the labels of a
    batch, ``H^C_c`` the mean logit of label c over the samples that have it and ``H^N_c`` over those that
    have not, see :func:`fastproj.balance_loss`. A label's logit is that of its word's first token behind the
    prompt. A term whose factor is 0 is measured and left out of the loss.

    The last term has no lower bound: a factor γ that the language model's loss does not hold in check lets
    the logits grow without end. Logits that a sample has in common to all labels are no safeguard either:
    once the labels have all of the probability, cross entropy does not see them.

    Args:
        labels: the label words, whose first tokens must differ.
        alpha, beta, gamma: factors from 0. The defaults of β and γ are ours.
        present_only: whether only labels that a sample of the batch has are held against each other.
        running: whether labels that the batch lacks count by their running means over batches before; these
            are written where gradients are taken and read everywhere.

    Attributes:
        parts: of the last call, :class:`LossParts`; None before the first.
        running: the running means, with a ``state_dict``, or None.

    Raises ValueError for labels with a first token in common, and for factors below 0 or not finite.
    Source: Zhao, Yang, Chen, ACL 2025.
    """

    def __init__(
        self,
        labels: LabelWords,
        *,
        alpha: float = 1.0,
        beta: float = 0.1,
        gamma: float = 0.1,
        present_only: bool = True,
        running: bool = False,
    ) -> None:
        for name, factor in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            if not (isfinite(factor) and factor >= 0):
                raise ValueError(f"{name}: expected a factor from 0, got {factor}")
        labels.require_distinct_first()
        self.labels = labels
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.present_only = present_only
        self.running = RunningMeans(len(labels)) if running else None
        self.parts: LossParts | None = None
        self._first = torch.tensor(labels.first)

    def __call__(
        self, label_logits: Tensor, labels: Tensor, lm_loss: Tensor, *, share: Tensor | float = 1.0
    ) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            label_logits: (B, C), fp32, bf16, fp16 or fp64.
            labels: classes (B,) or members (B, C), as :func:`fastproj.balance_loss` takes them.
            lm_loss: the language model's loss, a scalar.
            share: of the terms that are not the language model's: what part of a batch this one is, where
                gradients of several are added up.
        """
        if self.running is not None:
            self.running.train(torch.is_grad_enabled())
        terms = balance_loss(label_logits, labels, present_only=self.present_only, running=self.running)
        self.parts = LossParts(lm_loss.detach(), terms.propensity.detach(), terms.discrimination.detach())
        loss = self.alpha * lm_loss
        if self.beta:
            loss = loss + share * self.beta * terms.propensity
        if self.gamma:
            loss = loss - share * self.gamma * terms.discrimination
        return loss

    def compute_loss(
        self, outputs: Mapping[str, Any], labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """For ``Trainer(compute_loss_func=objective.compute_loss)``, one label a sample.

        ``outputs["logits"]`` is (B, T, V); labels (B, T) are the tokens themselves, not moved, and −100
        everywhere but at the answer, whose first token says the sample's label. A row without an answer
        counts nowhere. The language model's loss is the mean over the answers' tokens, over
        ``num_items_in_batch`` where the Trainer adds up the gradients of several batches; each of these then
        has its share of the other terms.

        Raises ValueError for shapes that do not fit, and, on the CPU, for an answer that begins with no
        label's first token. On a GPU the host does not wait to see one: the loss is NaN.
        """
        logits = outputs["logits"]
        if logits.dim() != 3 or labels.shape != logits.shape[:2]:
            raise ValueError(
                f"expected logits (B, T, V) and labels (B, T), got {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}"
            )
        losses = cross_entropy(logits, labels, level="token", shift=True).losses
        asked = labels[:, 1:] != IGNORE_INDEX
        own = asked.sum()
        items = own.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        share = 1.0 if num_items_in_batch is None else own / num_items_in_batch
        begin = asked.int().argmax(1)
        rows = torch.arange(len(labels), device=labels.device)
        tokens = labels[rows, begin + 1].masked_fill(~asked.any(1), IGNORE_INDEX)
        label_logits = logits[rows, begin][:, self._first.to(logits.device)]
        return self(label_logits, self.classes(tokens), losses.sum() / items, share=share)

    def classes(self, tokens: Tensor) -> Tensor:
        """The labels (B,) whose words begin with these tokens (B,), −100 where the token is −100.

        Raises ValueError, on the CPU, for any other token; on a GPU its label is one that there is not.
        """
        matches = tokens[:, None] == self._first.to(tokens.device)
        unknown = ~matches.any(1) & (tokens != IGNORE_INDEX)
        if tokens.device.type == "cpu" and bool(unknown.any()):
            raise ValueError(
                f"expected answers that begin with one of the tokens {self._first.tolist()}, got "
                f"{tokens[unknown][0].item()}"
            )
        found = matches.int().argmax(1).masked_fill(tokens == IGNORE_INDEX, IGNORE_INDEX)
        return found.masked_fill(unknown, len(self._first))
