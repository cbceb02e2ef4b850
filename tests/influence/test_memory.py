"""What scoring allocates: no more than a training step, however many samples and parameters there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import fastproj

LAYERS, WIDTH = 3, 256
MOST = 1.15
# Rank, samples, tokens: adapters far smaller than the activations, comparable, and twice their frozen layers;
# many samples of few tokens among them.
SHAPES = [(4, 16, 32), (64, 32, 8), (256, 4, 64)]


def classifier(rank: int) -> nn.Module:
    config = BertConfig(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=4, intermediate_size=4 * WIDTH,
        vocab_size=500, max_position_embeddings=64,
    )  # fmt: skip
    return with_lora(BertForSequenceClassification(config), rank, ["query", "key", "value", "dense"])


def language_model(rank: int) -> nn.Module:
    config = GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=4, vocab_size=500, n_positions=64)
    return with_lora(GPT2LMHeadModel(config), rank, ["c_attn", "c_proj", "c_fc"])


MODELS: dict[str, Callable[[int], nn.Module]] = {"classification": classifier, "causal-lm": language_model}


def with_lora(model: nn.Module, rank: int, layers: list[str]) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=rank, target_modules=layers, lora_dropout=0.0)).eval()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def random_batch(samples: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 500, (samples, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": torch.arange(samples) % 2}


def for_loss(batch: dict[str, Tensor], loss: str) -> dict[str, Tensor]:
    return batch if loss == "classification" else {"input_ids": batch["input_ids"]}


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that was allocated at once during a run, by the allocator's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    live = highest = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest


def training_peak(model: nn.Module, loss: str, batch: dict[str, Tensor]) -> int:
    """Of forward, mean loss and backward, the gradients among it."""
    ids, labels = batch["input_ids"], batch["labels"]

    def step() -> None:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        if loss == "classification":
            nn.functional.cross_entropy(logits, labels).backward()
        else:
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        model.zero_grad()

    step()
    return peak_bytes(step)


def scorer_after_a_step(model: nn.Module, loss: str) -> fastproj.InfluenceScorer:
    """One with Adam's moments, which are there in training too."""
    optimizer = torch.optim.AdamW(trained(model))
    sum(p.sum() for p in trained(model)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return fastproj.InfluenceScorer(model, optimizer, loss=loss)


def scoring_peak(model: nn.Module, loss: str, batch: dict[str, Tensor], batches: int = 1) -> tuple[int, int]:
    """Of the first batch that a scorer sees, which it verifies, and of those that follow."""
    scorer = scorer_after_a_step(model, loss)
    own = batch if loss == "classification" else {"input_ids": batch["input_ids"]}
    references = scorer.reference([own])
    first = peak_bytes(lambda: scorer.score([own], references))
    return first, peak_bytes(lambda: scorer.score([own] * batches, references))


@cache
def peaks(loss: str, rank: int, samples: int, tokens: int) -> tuple[int, int, int]:
    """Of a training step, of a later and of the first batch of scores: what is allocated while they run."""
    model, batch = MODELS[loss](rank), random_batch(samples, tokens)
    first, later = scoring_peak(model, loss, batch)
    return training_peak(model, loss, batch), later, first


@pytest.mark.parametrize("loss", MODELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scoring_allocates_no_more_than_training(loss: str, shape: tuple[int, int, int]) -> None:
    training, scoring, _ = peaks(loss, *shape)
    assert scoring <= MOST * training, f"{scoring / training:.3f} of a training step's peak"


# One set of references is as large as the adapters; with adapters larger than the model it would show.
@pytest.mark.parametrize("loss", MODELS)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_so_it_is_with_all_that_is_held_before(loss: str, shape: tuple[int, int, int]) -> None:
    training, scoring, _ = peaks(loss, *shape)
    model = MODELS[loss](shape[0])
    moments, references = 2 * size(trained(model)), size(trained(model))
    held = size(model.parameters()) + moments
    assert scoring + references + held <= MOST * (training + held)


@pytest.mark.parametrize("loss", MODELS)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_so_does_the_first_batch(loss: str, shape: tuple[int, int, int]) -> None:
    training, _, first = peaks(loss, *shape)
    assert first <= MOST * training, f"{first / training:.3f} of a training step's peak"


@pytest.mark.parametrize("loss", MODELS)
def test_the_first_batch_compares_two_gradients(loss: str) -> None:
    """Of two samples, and of adapters larger than the model: half of a batch of four, and what they hold."""
    training, _, first = peaks(loss, *SHAPES[2])
    assert first <= training + 3 * size(trained(MODELS[loss](SHAPES[2][0])))


@pytest.mark.parametrize("loss", MODELS)
def test_the_peak_does_not_grow_with_batches(loss: str) -> None:
    model, batch = MODELS[loss](4), random_batch(4, 8)
    one, six = (scoring_peak(model, loss, batch, batches)[1] for batches in (1, 6))
    # Kept of each batch done: four scores in fp64, whose tensor takes at least 64 bytes; and their sum.
    assert six - one <= 6 * 128


def test_the_bound_would_show_sample_gradients_that_are_kept() -> None:
    training, _, _ = peaks("classification", 64, 32, 8)
    weights = trained(MODELS["classification"](64))
    kept = peak_bytes(lambda: [weight.new_empty(32, *weight.shape) for weight in weights])
    assert kept == 32 * size(weights)
    assert kept > MOST * training
