"""Sample gradients in narrow dtypes, of layers called oddly, and of adapters that are not there."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from single_samples import batch_of, trained_adamw
from tiny_models import gpt2, llama
from torch import Tensor, nn

import fastproj
from fastproj.influence.consumers import ScoreConsumer, SketchConsumer
from fastproj.influence.losses import loss_name
from fastproj.reference.adam import AdamState, adam_update

CLASSES = {"input": torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).double()}
BATCH = {**CLASSES, "labels": torch.tensor([0, 1, 2, 1, 0])}


def scorer_of(module: nn.Module, *optimizer: Any) -> fastproj.InfluenceScorer:
    return fastproj.InfluenceScorer(module, *optimizer, loss="classification", params="trainable")


def test_a_call_whose_output_is_not_used_has_no_share() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, input: Tensor) -> Tensor:
            self.aside = self.layer(2 * input)
            return self.layer(input)

    torch.manual_seed(0)
    model = Model().double()
    plain = nn.Sequential(copy.deepcopy(model.layer))
    expected, got = (
        scorer.score([BATCH], scorer.reference([BATCH])).values for scorer in map(scorer_of, (plain, model))
    )
    assert expected.abs().min() > 0.1
    torch.testing.assert_close(got, expected)


def test_a_probe_of_many_batches_is_summed_in_fp32() -> None:
    torch.manual_seed(0)
    scorer = scorer_of(nn.Sequential(nn.Linear(6, 3)).bfloat16())
    batch = {**BATCH, "input": BATCH["input"].bfloat16()}
    one = scorer.reference([batch])
    many = scorer.reference([batch] * 600)  # bf16 sums come to a halt near 256 equal terms
    for name, gradient in many.gradients[0].items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, one.gradients[0][name], rtol=1e-4, atol=0)


class Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(10, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.table(input_ids).mean(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adams_moments_are_not_rounded_to_the_models_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = Averaged().to(dtype).float()
    batch = {"input_ids": torch.randint(0, 10, (4, 5)), "labels": torch.tensor([0, 1, 2, 0])}
    references = scorer_of(wide).reference([batch])
    moments = [(1e-4 * torch.randn(p.shape), 1e-9 * torch.rand(p.shape)) for p in wide.parameters()]
    scores, sketches = [], []
    for model in (wide, copy.deepcopy(wide).to(dtype)):
        # So slow a β2 that the second moments, 0 in fp16, outweigh the square of the gradient.
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 1 - 1e-9))
        for parameter, (first, second) in zip(model.parameters(), moments, strict=True):
            optimizer.state[parameter] = {"exp_avg": first, "exp_avg_sq": second, "step": torch.tensor(5.0)}
        scorer = scorer_of(model, optimizer)
        scores.append(scorer.score([batch], references).values)
        (rows,) = scorer.sketch_batches([batch], 64, kind="rademacher")
        sketches.append(rows.values)
    # bf16's 8 bits of mantissa in activations and gradients.
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=0.01)
    assert torch.cosine_similarity(*sketches, dim=1).min() > 0.999


def test_consumers_take_the_norm_of_the_update_of_a_whole_gradient() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parameter = nn.Parameter(drawn(3, 2))
    adam = {parameter: AdamState(drawn(3, 2), drawn(3, 2).square(), 3)}
    reference, gradients = drawn(2, 3, 2), drawn(2, 3, 2)
    consumer = ScoreConsumer(2, {parameter: reference}, adam)
    sketches = SketchConsumer(2, 16, {parameter: 5}, adam, kind="rademacher", seed=1)
    for sample in (0, 1):
        consumer.gradient(parameter, sample, gradients[sample])
        sketches.gradient(parameter, sample, gradients[sample])
    updates = adam_update(gradients, adam[parameter]).flatten(1)
    torch.testing.assert_close(consumer.dots, updates @ reference.flatten(1).T)
    torch.testing.assert_close(consumer.sqnorms, updates.square().sum(1))
    expected = fastproj.sketch(updates, 16, seed=1, kind="rademacher", offset=5)
    torch.testing.assert_close(sketches.sketches, expected)


def test_sketches_do_not_depend_on_how_many_samples_are_taken_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = llama()
    scorer = fastproj.InfluenceScorer(tiny.model)
    scorer = fastproj.InfluenceScorer(tiny.model, trained_adamw(scorer))
    (together,) = scorer.sketch_batches([batch_of(tiny)], 32, kind="rademacher")
    monkeypatch.setattr("fastproj.influence.consumers.MOST_ELEMENTS", 200)
    (apart,) = scorer.sketch_batches([batch_of(tiny)], 32, kind="rademacher")
    torch.testing.assert_close(apart.values, together.values)


def test_an_adapter_that_is_not_active_is_named() -> None:
    tiny = gpt2()
    scorer = fastproj.InfluenceScorer(tiny.model)
    references = scorer.reference([batch_of(tiny)])
    with tiny.model.disable_adapter():
        with pytest.raises(ValueError, match=r"none of the 16 parameters, such as .*lora_A"):
            scorer.score([batch_of(tiny)], references)
        with pytest.raises(ValueError, match="expected their adapter to be active"):
            scorer.reference([batch_of(tiny)])
    assert all("forward" not in vars(module) for module in tiny.model.modules())


class Scaled:
    def __call__(self, outputs: Any, batch: Any) -> Tensor:
        return batch["labels"].float()


def test_a_callable_loss_has_the_same_name_in_every_process() -> None:
    assert loss_name("causal-lm", "sum") == "causal-lm, sum"
    assert loss_name(Scaled(), "mean") == f"{__name__}.Scaled"
    assert loss_name(scorer_of, "mean") == f"{__name__}.scorer_of"
    halved = partial(scorer_of, optimizer=0.5)
    assert loss_name(halved, "mean") == f"{__name__}.scorer_of with (), {{'optimizer': 0.5}}"
