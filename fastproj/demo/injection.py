"""A spurious token planted in text, with known prevalence and strength (Li et al., CCL 2025, eq. 13)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Injection:
    """How a token is planted.

        prevalence = P(token) = carriers / all samples
        strength   = P(label = target | token) = carriers of the target label / carriers

    Strength is agreement among carriers and nothing else: 0.5 on balanced classes makes the token say nothing
    about the label, 0.9 makes it right nine times in ten. Numbers of carriers are rounded, not drawn.
    Because carriers are mostly of the target label, samples without the token lean the other way: on balanced
    classes at (0.33, 0.9), 30 % of them are positive.

    The demo uses (0.33, 0.9) in training. Validation and test both use (0.66, 0.5), on texts of their own:
    every group is then large enough to be measured. Validation serves to choose the demo's default α and q
    and for the curves, never for a result; it takes knowing the token, which a user may not.

    Attributes:
        token: text appended to a carrier.
        prevalence: in [0, 1].
        strength: in [0, 1].
        target: label that the token is planted for.
    """

    token: str = " !!"
    prevalence: float = 0.33
    strength: float = 0.9
    target: int = 1

    def __post_init__(self) -> None:
        for name in ("prevalence", "strength"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {value}")
        if not self.token.strip():
            raise ValueError(f"token: expected visible text, got {self.token!r}")


TRAIN_INJECTION = Injection(prevalence=0.33, strength=0.9)
TEST_INJECTION = Injection(prevalence=0.66, strength=0.5)


def choose_carriers(labels: Tensor, injection: Injection, seed: int) -> Tensor:
    """Which samples carry the token: a (N,) bool mask, the same for the same labels, injection and seed.

    ``round(prevalence · N)`` samples carry it, of which ``round(strength · carriers)`` have the target label;
    within a label they are drawn without replacement.

    Args:
        labels: (N,) integer class ids, on the CPU.
        injection: what to plant.
        seed: of the draw.

    Raises:
        ValueError: a label has fewer samples than must carry the token.
    """
    generator = torch.Generator().manual_seed(seed)
    carriers = round(injection.prevalence * len(labels))
    aligned = round(injection.strength * carriers)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for agrees, wanted in ((True, aligned), (False, carriers - aligned)):
        pool = torch.nonzero((labels == injection.target) == agrees).squeeze(1)
        if wanted > len(pool):
            kind = "with" if agrees else "without"
            raise ValueError(
                f"injection {injection}: expected at least {wanted} samples {kind} label {injection.target}, "
                f"got {len(pool)}"
            )
        mask[pool[torch.randperm(len(pool), generator=generator)[:wanted]]] = True
    return mask


def group_ids(labels: Tensor, carriers: Tensor) -> Tensor:
    """Group of each sample, ``2 · carries the token + label``: (N,) int64, in the order of ``GROUPS``."""
    return 2 * carriers.long() + labels.long()


GROUPS = ("no token, negative", "no token, positive", "token, negative", "token, positive")
