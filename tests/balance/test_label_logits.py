"""Label logits against whole sequences, one prompt and one label at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_text
import torch
from causal_models import CAUSAL, CLOSE, LABELS, alone, causal, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fastproj
from fastproj.balance.label_logits import label_logits
from fastproj.balance.labels import LabelWords

# Labels of distinct first tokens, for form "first".
APART = LabelWords(("a", "b", "c"), tuple("abc"), ((3,), (4, 5), (6, 7)))


def first_naively(model: nn.Module, ids: Tensor, mask: Tensor, labels: LabelWords) -> Tensor:
    """Each prompt alone, every logit of it formed."""
    return torch.stack([model(input_ids=row).logits[0, -1, list(labels.first)] for row in alone(ids, mask)])


def mean_naively(model: nn.Module, ids: Tensor, mask: Tensor, labels: LabelWords) -> Tensor:
    """Each prompt with each word, the log-probability of every token of the word, their mean."""
    table = []
    for row in alone(ids, mask):
        for tokens in labels.tokens:
            whole = torch.cat([row, torch.tensor([tokens])], 1)
            log_p = model(input_ids=whole).logits[0].log_softmax(-1)
            start = row.shape[1] - 1
            table.append(sum(log_p[start + j, token] for j, token in enumerate(tokens)) / len(tokens))
    return torch.stack(table).view(len(ids), len(labels))  # type: ignore[arg-type]


NAIVELY: dict[str, tuple[Callable[..., Tensor], LabelWords]] = {
    "first": (first_naively, APART),
    "mean": (mean_naively, LABELS),
}


def check_gradients(model: nn.Module, found: Tensor, wanted: Tensor) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3), dtype=wanted.dtype)
    pairs = [
        torch.autograd.grad((values * weight).sum(), parameters, allow_unused=True)
        for values in (found, wanted)
    ]
    for one, other in zip(*pairs, strict=True):
        if other is not None:
            # Entries far below a tensor's largest hold the rounding of that.
            atol = CLOSE["atol"] * max(1.0, float(other.abs().max()))
            torch.testing.assert_close(one, other, rtol=CLOSE["rtol"], atol=atol)


@contextmanager
def shapes_of(*modules: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what the modules give."""
    shapes: list[tuple[int, ...]] = []
    handles = [
        module.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape))) for module in modules
    ]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()


def checkpointing(model: Any) -> nn.Module:
    """In training mode under gradient checkpointing, without dropout."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("form", NAIVELY)
@pytest.mark.parametrize("name", CAUSAL)
def test_whole_sequences_one_at_a_time(name: str, form: Any, side: str) -> None:
    model = causal(name)
    naively, labels = NAIVELY[form]
    ids, mask = prompts(side)
    wanted = naively(model, ids, mask, labels)
    found = label_logits(model, ids, mask, labels, form=form)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    torch.testing.assert_close(found, wanted, **CLOSE)
    check_gradients(model, found, wanted)


@pytest.mark.parametrize("form", NAIVELY)
@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2", "mistral"])
def test_under_gradient_checkpointing(name: str, form: Any) -> None:
    model = causal(name)
    naively, labels = NAIVELY[form]
    ids, mask = prompts()
    wanted = naively(model, ids, mask, labels)
    found = label_logits(checkpointing(model), ids, mask, labels, form=form)
    torch.testing.assert_close(found, wanted, **CLOSE)
    check_gradients(model, found, wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"target_modules": ["lm_head"]}], ids=["layers", "head"])
@pytest.mark.parametrize("form", NAIVELY)
def test_through_an_adapter(name: str, options: dict[str, Any], form: Any) -> None:
    model = get_peft_model(causal(name), LoraConfig(r=2, init_lora_weights=False, **options))
    naively, labels = NAIVELY[form]
    ids, mask = prompts()
    wanted = naively(model, ids, mask, labels)
    found = label_logits(model, ids, mask, labels, form=form)
    torch.testing.assert_close(found, wanted, **CLOSE)
    check_gradients(model, found, wanted)
    with model.disable_adapter():
        other = label_logits(model, ids, mask, labels, form=form)
        torch.testing.assert_close(other, naively(model, ids, mask, labels), **CLOSE)
    assert not torch.allclose(other, found)


WORD = st.lists(st.integers(0, 29), min_size=1, max_size=4).map(tuple)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(WORD, min_size=1, max_size=5, unique=True),
    st.lists(st.integers(1, 8), min_size=1, max_size=3),
    st.integers(0, 2),
    st.sampled_from(["right", "left"]),
    st.sampled_from(["gpt2", "mistral"]),
)
def test_any_labels_and_any_padding(
    tokens: list[tuple[int, ...]], lengths: list[int], more: int, side: str, name: str
) -> None:
    names = tuple(map(str, range(len(tokens))))
    labels = LabelWords(names, names, tuple(tokens))
    width = max(lengths) + more
    ids = torch.randint(0, 30, (len(lengths), width), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(width - length, None)] = 1
    model = causal(name)
    with torch.no_grad():
        found = label_logits(model, ids, mask, labels, form="mean")
        torch.testing.assert_close(found, mean_naively(model, ids, mask, labels), **CLOSE)


def test_the_vocabulary_is_formed_only_where_labels_are() -> None:
    model = causal("gpt2")
    ids, mask = prompts()
    further = sum(len(row) - 1 for row in LABELS.tokens)
    with shapes_of(model.lm_head) as shapes:
        label_logits(model, ids, mask, LABELS, form="mean")
        assert shapes == [(4, 30), (4 * further, 30)]
        shapes.clear()
        label_logits(model, ids, mask, LabelWords(("a", "b"), ("a", "b"), ((3,), (4,))), form="mean")
        assert shapes == [(4, 30)]
    # Form "first" takes rows of the head without running it, which no hook sees: all other rows are spoilt.
    others = [token for token in range(30) if token not in APART.first]
    weight = model.lm_head.weight.detach().clone()
    weight[others] = torch.nan
    model.lm_head.weight = nn.Parameter(weight)
    assert bool(label_logits(model, ids, mask, APART).isfinite().all())


def test_prompts_are_run_once() -> None:
    model = causal("llama")
    several = [row for row in LABELS.tokens if len(row) > 1]
    with shapes_of(model.model.embed_tokens) as shapes:
        label_logits(model, *prompts(), LABELS, form="mean")
    assert shapes == [(4, 9, 16), (4 * len(several), 3, 16)]
    with shapes_of(checkpointing(model).model.embed_tokens) as shapes:
        label_logits(model, *prompts(), LABELS, form="mean")
    assert shapes == [(4 * len(several), 12, 16)]


def test_words_of_one_token_are_log_probabilities() -> None:
    model = causal("llama")
    ids, mask = prompts()
    labels = LabelWords(
        tuple(map(str, range(30))), tuple(map(str, range(30))), tuple((t,) for t in range(30))
    )
    # The whole vocabulary: e^z sums to 1, and both forms differ by a constant of each prompt.
    mean = label_logits(model, ids, mask, labels, form="mean")
    torch.testing.assert_close(mean.exp().sum(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(mean, label_logits(model, ids, mask, labels).log_softmax(1))


@pytest.mark.parametrize("form", NAIVELY)
def test_masks_of_other_types_and_ids_laid_out_otherwise(form: Any) -> None:
    model, labels = causal("llama"), NAIVELY[form][1]
    ids, mask = prompts()
    wanted = label_logits(model, ids, mask, labels, form=form)
    for other in (mask.bool(), mask.to(torch.int32), mask.float()):
        assert torch.equal(label_logits(model, ids, other, labels, form=form), wanted)
    turned = ids.t().contiguous().t()
    assert torch.equal(label_logits(model, turned, mask, labels, form=form), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = causal("llama").to(dtype)
    first = label_logits(model, *prompts(), APART)
    mean = label_logits(model, *prompts(), LABELS, form="mean")
    assert (first.dtype, mean.dtype) == (dtype, torch.float32)
    wanted = mean_naively(causal("llama"), *prompts(), LABELS).float()
    # bf16 keeps 8 bits through two blocks whose logits are of a few units.
    tolerance = 0.3 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(mean, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", NAIVELY)
def test_the_model_is_left_in_its_mode(form: Any) -> None:
    model = causal("gpt2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found = label_logits(model, *prompts(), NAIVELY[form][1], form=form)
    assert model.training
    assert found.requires_grad


def test_a_probability_of_zero_stays_with_its_label() -> None:
    model = causal("llama")
    bias = torch.zeros(30, dtype=torch.float64)
    bias[5] = -torch.inf
    model.lm_head.bias = nn.Parameter(bias)
    with torch.no_grad():
        found = label_logits(model, *prompts(), LABELS, form="mean")
    assert found[:, 1].tolist() == [-torch.inf] * 4
    assert bool(found[:, [0, 2, 3, 4, 5]].isfinite().all())


@pytest.mark.parametrize("form", NAIVELY)
def test_nan_in_the_model_comes_through(form: Any) -> None:
    model = causal("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    found = label_logits(model, *prompts(), NAIVELY[form][1], form=form)
    assert bool(found.isnan().all())


def test_bad_input_is_refused() -> None:
    model = causal("llama")
    ids, mask = prompts()
    with pytest.raises(ValueError, match="form: expected one of first, mean, got 'last'"):
        label_logits(model, ids, mask, LABELS, form="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'c' and 'd' begin with the same token, 6"):
        label_logits(model, ids, mask, LABELS)
    with pytest.raises(ValueError, match=r"ids and mask \(B, T\), got \(4, 9\) and \(4, 8\)"):
        label_logits(model, ids, mask[:, :8], APART)
    with pytest.raises(ValueError, match=r"ids and mask \(B, T\), got \(9,\) and \(9,\)"):
        label_logits(model, ids[0], mask[0], APART)
    for form in NAIVELY:
        with pytest.raises(ValueError, match="a row of padding alone"):
            label_logits(model, ids, mask * 0, APART, form=form)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="got a BertForMaskedLM"):
            label_logits(tiny_text.masked_bert(), ids, mask, APART, form=form)  # type: ignore[arg-type]


def test_the_package_exports_it() -> None:
    assert fastproj.label_logits is label_logits
