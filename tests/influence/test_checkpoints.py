"""Influence over several checkpoints of transformers' Trainer, weighted by learning rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from single_samples import batch_of, expected_scores
from tiny_models import Tiny, gpt2, with_lora
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fastproj
from fastproj.influence.checkpoints import Checkpoint
from fastproj.influence.optimizer_state import adam_states

# The Trainer's states are fp32, read back into fp64 sums.
ROUNDING = 1e-9


class Rows(Dataset):  # type: ignore[type-arg]
    """The rows of a tiny batch, as a Trainer reads them."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny

    def __len__(self) -> int:
        return len(self.tiny.labels)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {key: value[row] for key, value in batch_of(self.tiny).items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs by the Trainer, a checkpoint at the end of each."""
    folder = tmp_path_factory.mktemp("trainer")
    tiny = gpt2()
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=2, save_strategy="epoch",
        logging_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(tiny.model, arguments, train_dataset=Rows(tiny)).train()
    return folder


def test_the_logged_rates_of_an_epoch_are_averaged(trained: Path) -> None:
    for folder in sorted(trained.glob("checkpoint-*")):
        state = json.loads((folder / "trainer_state.json").read_text())
        rates = [e["learning_rate"] for e in state["log_history"] if "learning_rate" in e][-2:]
        checkpoint = Checkpoint.read(folder)
        assert checkpoint.learning_rate == pytest.approx(sum(rates) / 2)
        assert checkpoint.optimizer == folder / "optimizer.pt"


def test_scores_are_weighted_sums_over_checkpoints(trained: Path) -> None:
    folders = sorted(trained.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    assert len(folders) == 2
    tiny = gpt2()
    before = {name: p.detach().clone() for name, p in tiny.model.named_parameters()}
    scorer = fastproj.InfluenceScorer(tiny.model, checkpoints=folders)
    references = scorer.reference([batch_of(tiny.rows(0, 2))])
    assert len(references.gradients) == 2
    assert references.norms.shape == (2, 1)
    scores = scorer.score([batch_of(tiny)], references)
    assert all(torch.equal(before[name], p) for name, p in tiny.model.named_parameters())
    total = torch.zeros(4, 1, dtype=torch.float64)
    for folder in folders:
        checkpoint = Checkpoint.read(folder)
        checkpoint.load(tiny.model)
        single = fastproj.InfluenceScorer(tiny.model, folder / "optimizer.pt")
        own = single.reference([batch_of(tiny.rows(0, 2))])
        adam = adam_states(folder, tiny.model, single.parameters)
        total += checkpoint.learning_rate * expected_scores(tiny, own, adam)
    torch.testing.assert_close(scores.values, total.float(), rtol=1e-5, atol=1e-7)  # fp32 on return


def test_a_checkpoint_of_another_adapter_is_refused(trained: Path) -> None:
    folder = next(trained.glob("checkpoint-*"))
    other = with_lora(
        GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=50, n_positions=16))
    )
    with pytest.raises(ValueError, match="does not fit"):
        Checkpoint.read(folder).load(other)


def test_folders_without_weights_or_rates_are_refused(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is neither"):
        Checkpoint.read(tmp_path)
    source = next(trained.glob("checkpoint-*"))
    (tmp_path / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="give learning_rate"):
        Checkpoint.read(tmp_path)
    assert Checkpoint.read(tmp_path, 0.5).learning_rate == 0.5
    assert Checkpoint.read(tmp_path, 0.5).optimizer is None


def test_an_optimizer_beside_checkpoints_is_refused(trained: Path) -> None:
    folder = next(trained.glob("checkpoint-*"))
    with pytest.raises(ValueError, match="not both"):
        fastproj.InfluenceScorer(gpt2().model, folder, checkpoints=[folder])
