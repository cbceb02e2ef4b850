"""What a causal language model knows at a position, and the logits of a few tokens there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.architectures import architecture_of
from fastproj.bias_diff.likelihood import model_kind


def causal_model(model: nn.Module) -> Any:
    """The language model of :mod:`fastproj.architectures` that lies under any adapter.

    Raises ValueError for a model of another type, an encoder, a model without an unembedding, and an adapter
    that puts tokens of its own in front of the text, which the model under it would not see.
    """
    wrapper: Any = model
    base: Any = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    if not architecture_of(base).causal or model_kind(base) != "causal":
        raise ValueError(f"expected a causal language model, got a {type(base).__name__}")
    config: Any = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(f"expected an adapter inside the model's layers, got {config.peft_type.value}")
    return base


def decoder(model: nn.Module) -> nn.Module:
    """The model without its unembedding, whose last hidden state is behind the final norm.

    Raises ValueError as :func:`causal_model`.
    """
    base: nn.Module = causal_model(model)
    inner, _, _ = architecture_of(base).blocks.partition(".")
    return base.get_submodule(inner)


def final_hidden(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
    """What the unembedding reads: the last block's output behind the final norm, (B, T, d).

    ids and mask (B, T); ``options`` go to the model without its unembedding. In OPT, d is the width of the
    embeddings where that differs from the blocks'. Differentiable, in the model's dtype. Raises ValueError as
    :func:`causal_model`.
    """
    found: Any = decoder(model)(input_ids=input_ids, attention_mask=attention_mask, **options)
    hidden: Tensor = found.last_hidden_state
    return hidden


def token_logits(model: nn.Module, hidden: Tensor, token_ids: Sequence[int] | Tensor | None) -> Tensor:
    """``softcap(W[tokens] h + b[tokens])``: the logits of n tokens, (…, n), or of the whole vocabulary.

    hidden (…, d) as :func:`final_hidden` gives it; token_ids n integers, None for every token. Only the rows
    asked for are multiplied where the unembedding is a plain linear layer; one with an adapter, hooks or
    quantised weights is run as it is, and columns taken. ``softcap(z) = c tanh(z/c)`` where the configuration
    has such a c, as Gemma 2's. Differentiable, in the model's dtype. Raises ValueError as
    :func:`causal_model`.
    """
    base = causal_model(model)
    head = base.get_output_embeddings()
    if token_ids is None:
        return _softcapped(head(hidden), base)
    tokens = torch.as_tensor(token_ids, dtype=torch.int64, device=hidden.device)
    if _is_plain(head):
        bias = None if head.bias is None else head.bias[tokens]
        return _softcapped(F.linear(hidden, head.weight[tokens], bias), base)
    return _softcapped(head(hidden)[..., tokens], base)


def answer_positions(attention_mask: Tensor) -> Tensor:
    """The last token of each row, whose logits are the answer's, (B,) int64.

    mask (B, T), 0 at padding on either side. On the CPU, ValueError for a row of padding alone.
    """
    kept = attention_mask != 0
    if kept.device.type == "cpu" and not bool(kept.any(1).all()):
        raise ValueError("expected a token in every row of the mask, got a row of padding alone")
    places = torch.arange(kept.shape[1], device=kept.device)
    return (places * kept).amax(1)


def _is_plain(head: nn.Module) -> bool:
    """Whether a layer is a linear one that nothing is attached to, so that its rows say all it does."""
    hooked = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    return type(head) is nn.Linear and not hooked


def _softcapped(logits: Tensor, base: Any) -> Tensor:
    cap = getattr(base.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
