"""The study end to end on a tiny model and made-up sentences: draws, rankings by their definition, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import fastproj
from fastproj.bias_diff.encoding import encode, pad_token
from fastproj.bias_diff.records import Records
from fastproj.bias_diff.sources import CrowsPair
from fastproj.bias_diff.study import command, evidence, rankings, runs, settings
from fastproj.bias_diff.training import add_adapter
from fastproj.influence.batches import TokenBatches
from fastproj.influence.references import References

PEOPLE = ("man", "woman", "cook", "fox")
ENDS = ("then lazy", "and poor", "or rich", "not kind", "to be lazy", "to be poor", "then rich", "and kind")
TYPES = ("gender", "age")


def pairs() -> tuple[CrowsPair, ...]:
    rows = [f"{person} {verb} {end}" for person in PEOPLE for verb in ("is", "was") for end in ENDS]
    return tuple(
        CrowsPair(str(i), f"the {row}", f"a {row}", "stereo", TYPES[i % 2]) for i, row in enumerate(rows)
    )


def bold() -> Records:
    texts = [f"a {a} sings and the {b} was {c} ." for a in PEOPLE for b in PEOPLE for c in ("kind", "rich")]
    return Records(tuple(f"b{i}" for i in range(len(texts))), tuple(texts), (0,) * len(texts))


def reddit() -> Records:
    texts = [f"the lazy {a} was {c} or poor" for a in PEOPLE for c in ("kind", "rich", "lazy", "not")]
    texts += ["the man", "a kind man was kind"]
    return Records(tuple(f"r{i}" for i in range(len(texts))), tuple(texts), (1,) * (len(texts) - 1) + (0,))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "BIASED": 8,
        "FACTUAL": 14,
        "PROBES": 6,
        "HELD_OUT": 5,
        "PAIRS": 4,
        "FACTUAL_PROBES": 3,
    }.items():
        monkeypatch.setattr(settings, name, value)
    monkeypatch.setattr(settings, "read_crows_pairs", pairs)
    monkeypatch.setattr(settings, "read_bold", bold)
    monkeypatch.setattr(settings, "read_reddit_bias", reddit)
    for module in (evidence, rankings):
        monkeypatch.setattr(module, "SKETCHES", (64, 256))
    monkeypatch.setattr(runs, "similarity", lambda texts, probe: torch.arange(len(texts)).double())


def load() -> tuple[Any, Any]:
    """Three layers, one for each third of the depth."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**tiny_text.SIZES, "num_hidden_layers": 3}, max_position_embeddings=32)
    return LlamaForCausalLM(config).eval(), tiny_text.tokenizer()


@pytest.mark.parametrize("setting", settings.SETTINGS)
def test_no_sentence_is_in_two_parts_of_a_draw(setting: str) -> None:
    data = settings.draw(setting, 3)
    parts = [data.train.texts, data.probe.texts, data.held_out.texts, data.factual.texts]
    parts.append(data.counterparts.texts)
    parts += [tuple(text for pair in data.pairs for text in (pair.more, pair.less))]
    everything = [text for part in parts for text in part]
    assert len(set(everything)) == len(everything)
    assert data.train.labels is not None
    assert (sum(data.train.labels), len(data.train), len(data.probe)) == (8, 22, 6)
    biased = [name for name, label in zip(data.train.ids, data.train.labels, strict=True) if label]
    assert all(name.startswith("crows" if setting == "matched" else "r") for name in biased)
    assert settings.draw(setting, 3) == data
    assert settings.draw(setting, 4).train.ids != data.train.ids


def test_another_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of matched, shifted, got 'both'"):
        settings.draw("both", 0)


def test_rankings_are_those_of_the_scorer() -> None:
    """What is put together from parts by parameter and probe is what the scorer gives for a mean probe."""
    data = settings.draw("matched", 0)
    model, tokenizer = load()
    adapted = add_adapter(model, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter) * 0.01
    optimizer.step()
    optimizer.zero_grad()
    scorer = fastproj.InfluenceScorer(adapted, optimizer)
    pad = pad_token(tokenizer)
    samples = encode(data.probe, tokenizer)
    probes = {sample["id"]: TokenBatches([sample], pad_token_id=pad) for sample in samples}
    single = dict(probes)
    for name, records in zip(evidence.CONTRASTS, (data.counterparts, data.factual), strict=True):
        probes[name] = TokenBatches(encode(records, tokenizer), pad_token_id=pad)
    loader = TokenBatches(encode(data.train, tokenizer), pad_token_id=pad, max_samples=5)
    gathered = evidence.gather(scorer, scorer.reference(probes), loader, data.train.ids)
    found = rankings.rankings(gathered, data.bias_types)

    def expected(scorer: fastproj.InfluenceScorer, chosen: list[Any], **options: Any) -> torch.Tensor:
        references = scorer.reference(TokenBatches(chosen, pad_token_id=pad))
        scores = scorer.score(loader, references, **options)
        places = {name: row for row, name in enumerate(scores.ids)}
        return scores.values[[places[name] for name in data.train.ids], 0].double()

    plain = fastproj.InfluenceScorer(adapted)
    # The model is fp32; the parts are summed in another order.
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(found["influence, Adam"], expected(scorer, samples), **close)
    torch.testing.assert_close(found["influence, plain gradient"], expected(plain, samples), **close)
    torch.testing.assert_close(found["influence, Adam, 5 probes"], expected(scorer, samples[:5]), **close)
    dots = expected(scorer, samples, normalize=False)
    torch.testing.assert_close(found["influence, Adam, dot product"], dots, **close)
    summed = fastproj.InfluenceScorer(adapted, optimizer, reduction="sum")
    references = scorer.reference(TokenBatches(samples, pad_token_id=pad))
    scores = summed.score(loader, references)
    order = [scores.ids.index(name) for name in data.train.ids]
    expected_sums = scores.values[order, 0].double()
    torch.testing.assert_close(found["influence, Adam, loss summed over tokens"], expected_sums, **close)
    nearest = scorer.score(loader, scorer.reference(single), aggregate="max").values[order, 0].double()
    torch.testing.assert_close(found["influence, Adam, nearest probe"], nearest, **close)
    both = scorer.reference(
        {"mean": TokenBatches(samples, pad_token_id=pad), "facts": probes["factual sentences"]}
    )
    contrast = {name: own[:1] - own[1:] for name, own in both.gradients[0].items()}
    against = scorer.score(loader, References(("contrast",), (contrast,))).values[order, 0].double()
    key = "influence, Adam, probes minus factual sentences"
    torch.testing.assert_close(found[key], against, **close)


def test_a_study_runs_and_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastproj.bias_diff.sources.smollm2_loader", lambda cache: load)
    import typer

    app = typer.Typer()
    app.command()(command.main)
    arguments = [
        "--seeds",
        "2",
        "--debiased",
        "1",
        "--output",
        str(tmp_path / "out"),
        "--cache",
        str(tmp_path),
    ]
    first = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert first.exit_code == 0
    report = (tmp_path / "out" / "report.md").read_text()
    for name in ("influence, Adam", "sketched, k = 256", "retrained without the selection", "## Shifted"):
        assert name in report
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(r["setting"], r["seed"]) for r in record["ranked"]] == [
        ("matched", 0), ("shifted", 0), ("matched", 1), ("shifted", 1),
    ]  # fmt: skip
    for ranked in record["ranked"]:
        assert len(ranked["selected"]) == round(0.35 * 22)
        for found in ranked["epochs"].values():
            for quality in found.values():
                assert 0 <= quality["auc"] <= 1
                assert quality["coverage"] == sorted(quality["coverage"])
    assert set(record["debiased"][0]["models"]) >= {"pretrained", "fine-tuned on all", "unlearned by NPO"}
    monkeypatch.setattr("fastproj.bias_diff.sources.smollm2_loader", lambda cache: pytest.fail)
    (tmp_path / "out" / "report.md").unlink()
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert again.exit_code == 0
    assert (tmp_path / "out" / "report.md").read_text() == report
