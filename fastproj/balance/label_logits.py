"""How strongly a language model gives each label behind a prompt."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastproj.balance.head import answer_positions, causal_model, decoder, final_hidden, token_logits
from fastproj.balance.labels import LabelWords
from fastproj.bindings.cross_entropy import cross_entropy

Form = Literal["first", "mean"]
FORMS: tuple[Form, ...] = get_args(Form)


def label_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: LabelWords,
    *,
    form: Form = "first",
) -> Tensor:
    """What a causal language model says of each of C labels behind B prompts, (B, C).

    Args:
        model: of a type in :mod:`fastproj.architectures`, no encoder, with or without an adapter.
        input_ids, attention_mask: (B, T) integers, the mask 0 at padding, on either side of a prompt.
        labels: with their words' tokens, as :func:`label_words` finds them.
        form: ``"first"``: ``z_c = logit(w_c1 | prompt)`` of each word's first token, in the model's dtype;
            these must differ. ``"mean"``: ``(1/m) Σ_j log p(w_cj | prompt, w_c<j)`` over the m tokens of the
            word, p over the whole vocabulary, in fp32 or fp64. Tokens that follow from those before them
            raise a word's mean, so that words of several tokens gain on others; a prior can make up for
            that, see :mod:`fastproj.balance.calibration`.

    Returns:
        (B, C), differentiable. A prompt has the values that it has alone, whatever it is padded with.

    Raises ValueError for an unknown form, two labels with one first token in form ``"first"``, shapes that
    are not (B, T), a row of padding alone (on the CPU), and a model as
    :func:`fastproj.balance.head.causal_model`.

    In form ``"first"`` only the unembedding's rows of the first tokens are multiplied. In form ``"mean"`` the
    vocabulary is formed at the last token of a prompt and in front of each further token of a word, never at
    all of (B, T). Prompts are run once: keys and values are repeated for the M labels of several tokens, and
    take M times the memory then; dropout in a prompt is one draw for all labels. Under gradient
    checkpointing, where a model keeps no keys and values, prompts are run whole with each of the M words.

    Source: Zhao, Yang & Chen 2025 speak of a label's logit; which of its tokens is meant is ours to say.
    """
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"expected ids and mask (B, T), got {tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
        )
    if form == "first":
        labels.require_distinct_first()
        hidden = final_hidden(
            model, input_ids, attention_mask, position_ids=_places(attention_mask), use_cache=False
        )
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return token_logits(model, hidden[rows, answer_positions(attention_mask)], labels.first)
    answer_positions(attention_mask)
    return _mean_log_probabilities(model, *_padded_left(input_ids, attention_mask), labels)


def _mean_log_probabilities(model: nn.Module, ids: Tensor, mask: Tensor, labels: LabelWords) -> Tensor:
    """Form ``"mean"`` of prompts that are padded at the left."""
    several = [row for row in labels.tokens if len(row) > 1]
    answer, further = _hidden(model, ids, mask, [row[:-1] for row in several])
    logits = _wide(token_logits(model, answer, None))
    sums = logits[:, list(labels.first)] - logits.logsumexp(1, keepdim=True)
    if several:
        at = [(word, place) for word, row in enumerate(several) for place in range(len(row) - 1)]
        words, places = (list(part) for part in zip(*at, strict=True))
        wanted = torch.tensor([token for row in several for token in row[1:]], device=ids.device)
        logits = token_logits(model, further[:, words, places].flatten(0, 1), None)
        terms = -cross_entropy(logits, wanted.repeat(len(ids))).losses.view(len(ids), -1)
        parts = iter(terms.split([len(row) - 1 for row in several], 1))
        columns = zip(sums.unbind(1), labels.tokens, strict=True)
        sums = torch.stack([z if len(row) == 1 else z + next(parts).sum(1) for z, row in columns], 1)
    return sums / torch.tensor([len(row) for row in labels.tokens], device=ids.device)


def _hidden(
    model: nn.Module, ids: Tensor, mask: Tensor, words: list[tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Last hidden states at a prompt's end (B, d), and at each token of M words behind it (B, M, S, d).

    Words of fewer than S tokens are followed by others, of no account.
    """
    if not words:
        hidden = final_hidden(model, ids, mask, position_ids=_places(mask), use_cache=False)
        return hidden[:, -1], hidden[:, :0, None]
    longest, prompt = max(map(len, words)), ids.shape[1]
    filled = torch.tensor([(*row, *row[:1] * (longest - len(row))) for row in words], device=ids.device)
    tail = filled.repeat(len(ids), 1)
    whole_mask = torch.cat([mask.repeat_interleave(len(words), 0), torch.ones_like(tail)], 1)
    places = _places(whole_mask)
    if _caches(model):
        run: Any = decoder(model)(
            input_ids=ids, attention_mask=mask, position_ids=_places(mask), use_cache=True
        )
        answer, cache = run.last_hidden_state[:, -1], run.past_key_values
        cache.batch_repeat_interleave(len(words))
        further = final_hidden(
            model, tail, whole_mask, position_ids=places[:, prompt:], past_key_values=cache, use_cache=True
        )
    else:
        whole = torch.cat([ids.repeat_interleave(len(words), 0), tail], 1)
        hidden = final_hidden(model, whole, whole_mask, position_ids=places, use_cache=False)
        answer, further = hidden[:: len(words), prompt - 1], hidden[:, prompt:]
    return answer, further.unflatten(0, (len(ids), len(words)))


def _caches(model: nn.Module) -> bool:
    """Whether the model keeps keys and values: while it trains under gradient checkpointing it does not."""
    base = causal_model(model)
    return not any(
        module.training and getattr(module, "gradient_checkpointing", False) for module in base.modules()
    )


def _padded_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's own tokens moved to its end, so that what follows stands next to them.

    A model with sliding windows counts distances in the cache by slots, padding among them.
    """
    order = (mask != 0).to(torch.int8).argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def _places(mask: Tensor) -> Tensor:
    """Places in the text, from 0 whichever side is padded."""
    return ((mask != 0).cumsum(1) - 1).clamp_min(0)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
