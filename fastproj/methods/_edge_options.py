"""What EDGE can be asked for, checked once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

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
# Endings of transformers' class names, after unwrapping PEFT.
NEXT_TOKEN = ("ForCausalLM",)
NEXT_TOKEN_CLASSES = ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel")
SAME_TOKEN = ("ForMaskedLM", "ForTokenClassification")


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
        if not abs(self.alpha) < float("inf"):
            raise ValueError(f"alpha must be a finite number, got {self.alpha}")
        if self.variant == "released" and self.segments != "global":
            raise ValueError(
                f"variant='released' fixes its own segments; leave segments alone, got {self.segments!r}"
            )
        if isinstance(model, nn.DataParallel):
            raise ValueError("nn.DataParallel copies layers at every step; use DistributedDataParallel")
        self._check_passes()
        self._check_lagged()
        needs_two = self.weight == "token" or self.dropout == "independent"
        shift = predicts_next_token(model) if self.shift is None else self.shift
        return replace(self, shift=shift, passes="two" if needs_two else self.passes)

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


def predicts_next_token(model: nn.Module) -> bool | None:
    """Whether logits at t belong to the label at t+1, by the model's class; None where that does not tell."""
    base: Any = model
    if hasattr(model, "get_base_model"):
        base = cast(Any, model).get_base_model()
    name = type(base).__name__
    config = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False) or name.endswith(SAME_TOKEN):
        return False
    return True if name.endswith(NEXT_TOKEN) or name in NEXT_TOKEN_CLASSES else None
