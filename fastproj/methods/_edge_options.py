"""What EDGE can be asked for, checked once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from fastproj.bindings.edge import ON_NONFINITE
from fastproj.reference.edge import VARIANTS
from fastproj.reference.segments import Segments

CHOICES = {
    "variant": VARIANTS,
    "passes": ("one", "two", "auto"),
    "weight": ("sequence", "token"),
    "dropout": ("shared", "independent"),
    "ratio": ("exact", "lagged"),
    "on_nonfinite": ON_NONFINITE,
}


@dataclass(frozen=True)
class EdgeOptions:
    """The arguments of :class:`fastproj.EDGE`."""

    alpha: float
    q: float
    segments: Segments
    variant: str
    params: str
    passes: str
    weight: str
    dropout: str
    ratio: str
    shift: bool | None
    on_nonfinite: str

    def resolved(self, model: nn.Module) -> EdgeOptions:
        """Checked, and with what follows from the model and from the other options filled in."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if not 0 < self.q <= 1:
            raise ValueError(f"q must be in (0, 1], got {self.q}")
        if isinstance(model, nn.DataParallel):
            raise ValueError("nn.DataParallel copies layers at every step; use DistributedDataParallel")
        self._check_passes()
        self._check_lagged()
        needs_two = self.weight == "token" or self.dropout == "independent"
        shift = is_causal(model) if self.shift is None else self.shift
        return replace(self, shift=shift, passes="two" if needs_two else self.passes)

    def with_two_passes(self) -> EdgeOptions:
        """The same, with the second backward pass settled on."""
        if self.ratio == "lagged":
            raise ValueError('ratio="lagged" needs one pass; it cannot fall back to two')
        return replace(self, passes="two")

    def _check_passes(self) -> None:
        for name, value in (("weight", "token"), ("dropout", "independent")):
            if getattr(self, name) == value and self.passes == "one":
                raise ValueError(f"{name}={value!r} needs passes='two' or passes='auto', got passes='one'")

    def _check_lagged(self) -> None:
        if self.ratio != "lagged":
            return
        if self.variant != "paper":
            raise ValueError(f"ratio='lagged' is the paper's form only, got variant={self.variant!r}")
        if isinstance(self.segments, str) and self.segments == "row":
            raise ValueError("ratio='lagged' takes global, tensor or listed segments, got 'row'")
        if self.passes == "two" or self.weight == "token" or self.dropout == "independent":
            raise ValueError("ratio='lagged' works inside one backward pass; two passes were asked for")


def is_causal(model: nn.Module) -> bool:
    """Whether a model's logits at t predict the label at t+1: decoder-only language models."""
    for module in model.modules():
        name = type(module).__name__
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return True
    return False
