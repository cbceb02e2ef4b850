"""Scores and sketches that survive being interrupted, and that refuse to be mixed with others'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from single_samples import batch_of, trained_adamw
from tiny_models import gpt2

import fastproj
from fastproj.influence.batches import TokenBatches
from fastproj.influence.scores import Scores

SAMPLES = 700  # three parts of 256 rows


@pytest.fixture(scope="module")
def scorer() -> fastproj.InfluenceScorer:
    return fastproj.InfluenceScorer(gpt2().model.float())


@pytest.fixture(scope="module")
def loader() -> TokenBatches:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 8, (SAMPLES,), generator=generator).tolist()
    samples = [
        {"id": f"row {i}", "input_ids": torch.randint(1, 50, (n,), generator=generator).tolist()}
        for i, n in enumerate(lengths)
    ]
    return TokenBatches(samples, pad_token_id=0, max_samples=32)


class InterruptedRunError(Exception):
    """Stands in for the moment at which a run is stopped."""


def stop_after(rows: int) -> Any:
    def progress(done: int) -> None:
        if done >= rows:
            raise InterruptedRunError

    return progress


def test_an_interrupted_run_goes_on(
    scorer: fastproj.InfluenceScorer, loader: TokenBatches, tmp_path: Path
) -> None:
    references = scorer.reference([batch_of(gpt2())])
    whole = scorer.score(loader, references, out=tmp_path / "whole.parquet")
    in_memory = scorer.score(loader, references)
    assert whole.ids == in_memory.ids
    assert torch.equal(whole.values, in_memory.values)
    path = tmp_path / "scores.parquet"
    for rows in (100, 400):
        with pytest.raises(InterruptedRunError):
            scorer.score(loader, references, out=path, progress=stop_after(rows))
        assert not path.exists()
    computed: list[int] = []
    scorer.score(loader, references, out=path, progress=computed.append)
    assert computed[0] > 256, "rows that were on disk were computed again"
    assert path.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    again: list[int] = []
    scorer.score(loader, references, out=path, progress=again.append)
    assert again == []


def test_what_was_made_otherwise_is_refused(
    scorer: fastproj.InfluenceScorer, loader: TokenBatches, tmp_path: Path
) -> None:
    references = scorer.reference([batch_of(gpt2())])
    path = tmp_path / "scores.parquet"
    with pytest.raises(InterruptedRunError):
        scorer.score(loader, references, out=path, progress=stop_after(300))
    with pytest.raises(ValueError, match=r"options\[normalize\] is 'True' there and 'False' here"):
        scorer.score(loader, references, normalize=False, out=path)
    with pytest.raises(ValueError, match="data is"):
        scorer.score([batch_of(gpt2())], references, out=path)
    with pytest.raises(ValueError, match=r"options\[references\]"):
        scorer.score(loader, scorer.reference([batch_of(gpt2().rows(0, 1))]), out=path)
    tiny = gpt2()
    tiny.model.float()
    other = fastproj.InfluenceScorer(tiny.model, trained_adamw(fastproj.InfluenceScorer(tiny.model)))
    with pytest.raises(ValueError, match=r"adapter is .*options\[optimizer\] is 'none'"):
        other.score(loader, references, out=path)
    assert len(scorer.score(loader, references, out=path)) == SAMPLES


def test_what_no_weight_tells_is_refused_too(loader: TokenBatches, tmp_path: Path) -> None:
    tiny = gpt2()
    scorer = fastproj.InfluenceScorer(tiny.model.float())
    references = scorer.reference([batch_of(tiny)])
    path = tmp_path / "scores.parquet"
    with pytest.raises(InterruptedRunError):
        scorer.score(loader, references, out=path, progress=stop_after(1))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"options\[autocast\] is 'none' there and 'torch.bfloat16' here"),
    ):
        scorer.score(loader, references, out=path)
    for module in tiny.model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    with pytest.raises(ValueError, match=r"options\[scaling\]"):
        scorer.score(loader, references, out=path)


def test_several_checkpoints_are_summed_on_disk(tmp_path: Path, loader: TokenBatches) -> None:
    tiny = gpt2()
    tiny.model.float()
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        for name, parameter in tiny.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.2)
        folders.append(tmp_path / str(seed))
        tiny.model.save_pretrained(folders[-1])
    from fastproj.influence.checkpoints import Checkpoint

    checkpoints = [Checkpoint.read(folder, rate) for folder, rate in zip(folders, (0.25, 0.5), strict=True)]
    both = fastproj.InfluenceScorer(tiny.model, checkpoints=checkpoints)
    references = both.reference([batch_of(gpt2())])
    expected = both.score(loader, references)
    got = both.score(loader, references, out=tmp_path / "scores.parquet")
    # Each checkpoint's scores are rounded to fp32 on their way through the disk.
    torch.testing.assert_close(got.values, expected.values, rtol=1e-6, atol=1e-7)
    assert torch.equal(Scores.load(tmp_path / "scores.parquet").values, got.values)


def test_sketches_on_disk_answer_queries(
    scorer: fastproj.InfluenceScorer, loader: TokenBatches, tmp_path: Path
) -> None:
    references = scorer.reference([batch_of(gpt2())])
    options: dict[str, Any] = {"kind": "rademacher", "seed": 3}
    with pytest.raises(InterruptedRunError):
        scorer.sketch(loader, 128, out=tmp_path / "store", progress=stop_after(300), **options)
    store = scorer.sketch(loader, 128, out=tmp_path / "store", **options)
    fresh = scorer.sketch(loader, 128, out=tmp_path / "fresh", **options)
    assert len(store) == SAMPLES
    assert torch.equal(store.rows(0, SAMPLES), fresh.rows(0, SAMPLES))
    queries = scorer.sketch_references(references, 128, **options)
    scores = store.scores(queries, names=references.names)
    exact = scorer.score(loader, references)
    assert scores.ids == exact.ids
    # A cosine's standard error is at most 1/√128; the mean square over 700 samples is near its variance.
    assert (scores.values - exact.values).square().mean() < 2 / 128
    with pytest.raises(ValueError, match="seed is 3 there and 4 here"):
        scorer.sketch(loader, 128, out=tmp_path / "store", kind="rademacher", seed=4)


def test_sketches_of_checkpoints_are_refused(tmp_path: Path, loader: TokenBatches) -> None:
    tiny = gpt2()
    tiny.model.save_pretrained(tmp_path / "adapter")
    from fastproj.influence.checkpoints import Checkpoint

    scorer = fastproj.InfluenceScorer(tiny.model, checkpoints=[Checkpoint.read(tmp_path / "adapter", 1.0)])
    with pytest.raises(ValueError, match="of one state of the model"):
        scorer.sketch(loader, 128, out=tmp_path / "store")
