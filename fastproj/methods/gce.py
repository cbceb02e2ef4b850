"""Cross entropy and the sample weights ``p_y^q`` that make generalised cross entropy of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy of a batch, term by term.

    ``terms`` is (B,) for classification and (B, T) for tokens, 0 where a label is ignored; ``counted`` has
    its shape and says which terms count.
    """

    terms: Tensor
    counted: Tensor

    def total(self, num_items: Tensor | int | None = None) -> Tensor:
        """``Σ terms / num_items``, by default the mean over the terms that count."""
        return self.terms.sum() / self._items(num_items)

    def gce(self, weights: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        """``Σ w·terms / num_items`` with w detached: it has the gradient of generalised cross entropy.

        ``d/dθ (1 − p^q)/q = p^q · d(−log p)/dθ`` (Zhang & Sabuncu 2018, eq. 6). ``weights`` broadcasts
        against the terms from the left: one weight a sample, or one a token.
        """
        weights = weights.detach().view(*weights.shape, *[1] * (self.terms.dim() - weights.dim()))
        return (weights * self.terms).sum() / self._items(num_items)

    def token_weights(self, q: float) -> Tensor:
        """``p_y^q = exp(−q·terms)`` for every term, detached; 0 where a label is ignored."""
        return torch.where(self.counted, torch.exp(-q * self.terms.detach()), 0.0)

    def sample_weights(self, q: float) -> Tensor:
        """One weight a sample, (B,), detached: ``p_y^q``, p_y the geometric mean over a sequence's tokens.

        A sample whose labels are all ignored gets 0.
        """
        counted = self.counted.view(self.counted.shape[0], -1)
        number = counted.sum(1)
        mean = self.terms.detach().view(counted.shape[0], -1).sum(1) / number.clamp_min(1)
        return torch.where(number > 0, torch.exp(-q * mean), 0.0)

    @property
    def batch(self) -> int:
        """B."""
        return self.terms.shape[0]

    def heaviest_sample(self, num_items: Tensor | int | None = None) -> tuple[int, Tensor]:
        """The sample with the largest share of the total, and that share."""
        shares = self.terms.reshape(self.batch, -1).sum(1) / self._items(num_items)
        sample = int(shares.argmax())
        return sample, shares[sample]

    def _items(self, num_items: Tensor | int | None) -> Tensor | int:
        return self.counted.sum() if num_items is None else num_items


def cross_entropy(logits: Tensor, labels: Tensor, *, shift: bool = False) -> CrossEntropy:
    """Terms ``−log softmax(logits)[label]``, in fp32 or better.

    logits (B, C) with labels (B,), or logits (B, T, V) with labels (B, T); label −100 is ignored. With
    ``shift`` logits at position t are held against the label at t+1, as causal language models need it.

    Raises ValueError where the shapes do not fit, TypeError for labels that are not integers.
    """
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers (class or token ids), got {labels.dtype}")
    if logits.dim() not in (2, 3) or logits.shape[:-1] != labels.shape:
        raise ValueError(
            "expected logits (B, C) with labels (B,) or logits (B, T, V) with labels (B, T), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if shift:
        if logits.dim() != 3:
            raise ValueError(f"shift needs logits (B, T, V), got {tuple(logits.shape)}")
        logits, labels = logits[:, :-1], labels[:, 1:]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    terms = F.cross_entropy(
        wide.reshape(-1, wide.shape[-1]), labels.reshape(-1), reduction="none", ignore_index=IGNORE_INDEX
    )
    return CrossEntropy(terms.view(labels.shape), labels != IGNORE_INDEX)
