"""One run of the study: a draw of a setting, a warm-up, every ranking, and what becomes of the model."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.bias_diff.crows_pairs import crows_pairs
from fastproj.bias_diff.encoding import encode, pad_token
from fastproj.bias_diff.measures import FRACTIONS, auc, coverage, curves
from fastproj.bias_diff.npo import NPOConfig, unlearn
from fastproj.bias_diff.perplexity import perplexity
from fastproj.bias_diff.study.evidence import CONTRASTS, gather
from fastproj.bias_diff.study.rankings import rankings, similarity
from fastproj.bias_diff.study.settings import Data, draw
from fastproj.bias_diff.training import FineTuneConfig, add_adapter, fine_tune
from fastproj.influence.batches import TokenBatches
from fastproj.influence.checkpoints import Checkpoint
from fastproj.influence.scorer import InfluenceScorer
from fastproj.influence.scores import Scores
from fastproj.influence.select import select

EPOCHS, SCORED_EPOCHS = 3, (1, 3)
SELECTED = 0.35
MAX_TOKENS = 1024
RANKED_BY = "influence, Adam"
Record = dict[str, Any]
Load = Callable[[], tuple[nn.Module, Any]]


def warm_up(load: Load, data: Data, seed: int, folder: Path) -> tuple[nn.Module, Any, list[Path]]:
    """The model with an adapter fine-tuned on all of the training samples, a checkpoint an epoch."""
    model, tokenizer = load()
    adapted = add_adapter(model, seed=seed)
    done = fine_tune(adapted, tokenizer, data.train, FineTuneConfig(epochs=EPOCHS, seed=seed), folder=folder)
    return adapted, tokenizer, list(done.checkpoints)


def rank(setting: str, seed: int, load: Load, folder: Path) -> Record:
    """How well every ranking finds the biased samples after one epoch and after all of them."""
    data = draw(setting, seed)
    model, tokenizer, checkpoints = warm_up(load, data, seed, folder)
    record: Record = {"setting": setting, "seed": seed, "fractions": FRACTIONS, "epochs": {}}
    biased = torch.tensor(data.train.labels) == 1
    for epoch in SCORED_EPOCHS:
        found = _rankings(model, tokenizer, data, checkpoints[epoch - 1])
        found["similarity"] = similarity(data.train, data.probe)
        found["random"] = _random(len(data.train), seed)
        record["epochs"][str(epoch)] = {name: _quality(scores, biased) for name, scores in found.items()}
        scores = Scores(data.train.ids, ("probe",), found[RANKED_BY][:, None].float())
        record.setdefault("selected", select(scores, fraction=SELECTED).ids)  # after the first epoch
    return record


def _rankings(model: nn.Module, tokenizer: Any, data: Data, folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.read(folder)
    checkpoint.load(model)
    scorer = InfluenceScorer(model, checkpoint.optimizer, loss="causal-lm")
    pad = pad_token(tokenizer)
    probes = {
        sample["id"]: TokenBatches([sample], pad_token_id=pad) for sample in encode(data.probe, tokenizer)
    }
    for name, records in zip(CONTRASTS, (data.counterparts, data.factual), strict=True):
        probes[name] = TokenBatches(encode(records, tokenizer), pad_token_id=pad, max_tokens=MAX_TOKENS)
    references = scorer.reference(probes)
    loader = TokenBatches(encode(data.train, tokenizer), pad_token_id=pad, max_tokens=MAX_TOKENS)
    return rankings(gather(scorer, references, loader, data.train.ids), data.bias_types)


def _random(samples: int, seed: int) -> Tensor:
    return torch.rand(samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _quality(scores: Tensor, biased: Tensor) -> Record:
    found = curves(scores, biased)
    return {"auc": auc(scores, biased), "coverage": found.coverage, "precision": found.precision}


def debias(setting: str, seed: int, load: Load, folder: Path, ranked: Record) -> Record:
    """CrowS-Pairs score and perplexity of the model before, fine-tuned, unlearned and retrained."""
    data = draw(setting, seed)
    selected = set(ranked["selected"])
    biased = {name for name, label in zip(data.train.ids, data.train.labels or (), strict=True) if label}
    by_chance = set(random.Random(seed).sample(data.train.ids, len(selected)))
    model, tokenizer = load()
    found = {"pretrained": _measured(model, tokenizer, data)}
    adapted = add_adapter(model, seed=seed)
    Checkpoint.read(folder / "warm-up" / _last(folder / "warm-up")).load(adapted)
    found["fine-tuned on all"] = _measured(adapted, tokenizer, data)
    unlearn(
        adapted,
        tokenizer,
        data.train.only(selected),
        data.train.only(set(data.train.ids) - selected),
        NPOConfig(epochs=2, seed=seed),
    )
    found["unlearned by NPO"] = _measured(adapted, tokenizer, data)
    for name, removed in (
        ("retrained without the selection", selected),
        ("retrained without as many at random", by_chance),
        ("retrained without the biased", biased),
    ):
        fresh, tokenizer = load()
        again = add_adapter(fresh, seed=seed)
        kept = data.train.only(set(data.train.ids) - removed)
        fine_tune(again, tokenizer, kept, FineTuneConfig(epochs=EPOCHS, seed=seed))
        found[name] = _measured(again, tokenizer, data)
    return {"setting": setting, "seed": seed, "coverage": coverage(selected, biased), "models": found}


def _last(folder: Path) -> str:
    return max((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))


def _measured(model: nn.Module, tokenizer: Any, data: Data) -> Record:
    score = crows_pairs(model, tokenizer, data.pairs)
    return {
        "crows_pairs": score.score,
        "perplexity": perplexity(model, tokenizer, data.held_out.texts).value,
    }
