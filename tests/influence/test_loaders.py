"""Loaders as people have them: read once, shuffled, with ids of any kind, and batches of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

import fastproj
from fastproj.influence.checkpoints import Checkpoint
from fastproj.influence.loaders import SameBatches

Batch = dict[str, Any]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch_of(samples: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (samples,), generator=generator)
    return {"input": torch.randn(samples, 4, generator=generator), "labels": labels}


def scorer_of(module: nn.Module, **options: Any) -> fastproj.InfluenceScorer:
    return fastproj.InfluenceScorer(module, loss="classification", params="trainable", **options)


class Shuffled:
    """Two batches of one size that come in another order every second time."""

    def __init__(self) -> None:
        self.times = 0

    def __iter__(self) -> Iterator[Batch]:
        self.times += 1
        yield from [batch_of(2, seed) for seed in ((1, 2) if self.times % 2 else (2, 1))]


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Checkpoint]:
    from safetensors.torch import save_file

    save_file(model().state_dict(), tmp_path / "model.safetensors")
    return [Checkpoint.read(tmp_path, rate) for rate in (0.5, 1.0)]


def test_a_loader_that_can_be_read_once_is_refused_where_it_is_read_twice(
    tmp_path: Path, checkpoints: list[Checkpoint]
) -> None:
    scorer = scorer_of(model())
    references = scorer.reference([batch_of(4)])
    path = tmp_path / "scores.parquet"
    with pytest.raises(TypeError, match=r"several times.*generator"):
        scorer.score((b for b in [batch_of(4)]), references, out=path)
    with pytest.raises(TypeError, match=r"several times.*generator"):
        scorer.sketch((b for b in [batch_of(4)]), 8, out=tmp_path / "store")
    assert not path.exists()
    assert len(scorer.score((b for b in [batch_of(4)]), references)) == 4
    several = scorer_of(model(), checkpoints=checkpoints)
    with pytest.raises(TypeError, match=r"several times.*generator"):
        several.score((b for b in [batch_of(4)]), several.reference([batch_of(4)]))


def test_a_loader_that_shuffles_is_refused_where_order_counts(
    tmp_path: Path, checkpoints: list[Checkpoint]
) -> None:
    several = scorer_of(model(), checkpoints=checkpoints)
    references = several.reference([batch_of(4)])
    with pytest.raises(ValueError, match="batch 0 of the loader is not what it was"):
        several.score(Shuffled(), references)
    with pytest.raises(ValueError, match="batch 0 of the loader is not what it was"):
        several.score(Shuffled(), references, out=tmp_path / "scores.parquet")
    single = scorer_of(model())
    assert len(single.score(Shuffled(), single.reference([batch_of(4)]))) == 4


def test_the_same_batches_are_as_many_each_time() -> None:
    batches = [batch_of(2, 1), batch_of(2, 2)]
    same = SameBatches(batches)
    digest = same.fingerprint()
    assert len(list(same)) == 2
    assert SameBatches(batches[:1]).fingerprint() != digest == SameBatches(list(batches)).fingerprint()
    last = batches.pop()
    with pytest.raises(ValueError, match="end of the loader, after 1 batches"):
        list(same)
    batches += [last, last]
    with pytest.raises(ValueError, match="batch 2 of the loader"):
        list(same)


def test_ids_of_a_tensor_are_its_numbers() -> None:
    scorer = scorer_of(model())
    references = scorer.reference([batch_of(4)])
    loader = [BatchEncoding({**batch_of(3), "id": torch.tensor([7, 5, 9])}), batch_of(2)]
    assert scorer.score(loader, references).ids == ("7", "5", "9", "3", "4")
    with pytest.raises(ValueError, match="expected 3 ids, one for each sample, got 2"):
        scorer.score([{**batch_of(3), "id": ["a", "b"]}], references)


def test_what_is_no_batch_is_named() -> None:
    scorer = scorer_of(model())
    with pytest.raises(TypeError, match="it gave a tuple"):
        scorer.reference([tuple(batch_of(4).values())])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="it gave a Tensor"):
        scorer.reference(batch_of(4))
    with pytest.raises(ValueError, match="tensor of samples"):
        scorer.reference([{"text": ["a"]}])


def test_a_loader_of_nothing_is_refused(tmp_path: Path) -> None:
    scorer = scorer_of(model())
    references = scorer.reference([batch_of(4)])
    for out in (None, tmp_path / "scores.parquet"):
        with pytest.raises(ValueError, match="the loader yielded no batch"):
            scorer.score([], references, out=out)
    assert not (tmp_path / "scores.parquet").exists()


class Meeting(nn.Module):
    """Its samples meet, but for one that is alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.layer(input)
        return out - out.mean(0) if len(input) > 1 else out


@pytest.mark.parametrize("first", ["one sample", "no label"])
def test_samples_that_meet_after_a_batch_that_tells_nothing_are_refused(first: str) -> None:
    torch.manual_seed(0)
    scorer = scorer_of(Meeting())
    references = scorer.reference([batch_of(4)])
    silent = {**batch_of(4), "labels": torch.full((4,), -100)}
    with pytest.raises(ValueError, match="samples meet"):
        scorer.score([batch_of(1) if first == "one sample" else silent, batch_of(4)], references)


def test_batches_are_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastproj.capture.attach import Capture

    verify, seen = Capture.verify, []

    def counted(self: Capture, loss: Tensor, one: Tensor, sample: int, batch: int) -> Any:
        seen.append(batch)
        return verify(self, loss, one, sample, batch)

    monkeypatch.setattr(Capture, "verify", counted)
    scorer = scorer_of(model())
    references = scorer.reference([batch_of(4)])
    scorer.score([batch_of(size) for size in (1, 1, 3, 1, 4)], references)
    scorer.score([batch_of(2)], references)
    assert seen == [1, 2]
