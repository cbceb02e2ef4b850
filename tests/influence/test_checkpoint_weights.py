"""Weights of checkpoints: into the adapter that is active, all of them, and given back afterwards."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from single_samples import batch_of, trained_adamw
from tiny_models import bert, gpt2, with_nonzero_b
from torch import nn

import fastproj
from fastproj.influence.checkpoints import ADAPTER, Checkpoint


def test_weights_go_to_the_active_adapter(tmp_path: Path) -> None:
    model = gpt2().model
    model.add_adapter("second", LoraConfig(r=4, target_modules="all-linear"))
    model.set_adapter("second")
    with_nonzero_b(model).save_pretrained(tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.add_(1.0 if parameter.requires_grad else 0.0)
    Checkpoint.read(tmp_path / "second", 1.0).load(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_adapter_that_lacks_a_trained_head_is_refused(tmp_path: Path) -> None:
    model = bert().model
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / ADAPTER)
    assert any("classifier" in name for name in weights)
    save_file({name: w for name, w in weights.items() if "classifier" not in name}, tmp_path / ADAPTER)
    with pytest.raises(ValueError, match=r"does not fit.*classifier"):
        Checkpoint.read(tmp_path, 1.0).load(model)


def test_an_adapter_of_another_rank_is_refused(tmp_path: Path) -> None:
    gpt2(r=8).model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit.*size mismatch"):
        Checkpoint.read(tmp_path, 1.0).load(gpt2().model)


def test_frozen_weights_and_statistics_are_given_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[:2].requires_grad_(False)
    save_file({name: value + 1 for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    before = copy.deepcopy(model.state_dict())
    scorer = fastproj.InfluenceScorer(
        model, loss="classification", params="trainable", checkpoints=[Checkpoint.read(tmp_path, 1.0)]
    )
    batch = {"input": torch.randn(4, 4), "labels": torch.tensor([0, 1, 2, 0])}

    def stop(done: int) -> None:
        assert not torch.equal(model[0].weight, before["0.weight"])
        raise KeyboardInterrupt

    references = scorer.reference([batch])
    with pytest.raises(KeyboardInterrupt):
        scorer.score([batch], references, progress=stop)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_checkpoints_with_and_without_moments_do_not_mix(tmp_path: Path) -> None:
    tiny = gpt2()
    for name in ("first", "second"):
        tiny.model.save_pretrained(tmp_path / name)
    checkpoints = [Checkpoint.read(tmp_path / name, 1.0) for name in ("first", "second")]
    scorer = fastproj.InfluenceScorer(tiny.model, checkpoints=checkpoints)
    assert len(scorer.reference([batch_of(tiny)]).gradients) == 2
    torch.save(trained_adamw(scorer).state_dict(), tmp_path / "second" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"in every checkpoint or in none, there is none in .*first"):
        fastproj.InfluenceScorer(tiny.model, checkpoints=checkpoints)
