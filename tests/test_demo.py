"""The demo: what is trained, kept, averaged and shown."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastproj.demo.encoding import Encoded
from fastproj.demo.figures import smooth
from fastproj.demo.injection import TEST_INJECTION, choose_carriers
from fastproj.demo.methods import METHODS, Method, describe, parse_method
from fastproj.demo.report import render_report
from fastproj.demo.study import Job, run_study, write_atomically
from fastproj.demo.tables import mean_interval, run_intervals, tabulate, to_markdown
from fastproj.demo.timing import step_costs
from fastproj.demo.training import GroupCounts, RunResult, TrainingConfig, evaluate, run_key, train
from fastproj.demo.verdicts import verdicts
from fastproj.paired import Timing


def result(method: str, seed: int, conflicting: int, *, steps: int = 4) -> RunResult:
    """A hand-made run: 100 test samples a group, of which ``conflicting`` right in the third."""
    counts = GroupCounts((100, 100, 100, 100), (90, 80, conflicting, 95))
    known = [0.5] * steps
    return RunResult(
        method=method,
        settings={},
        seed=seed,
        config={},
        trace={
            "loss": [0.75, 0.5, 0.25, 0.125][:steps],
            "cosine": [None] * steps if method == "erm" else [0.9, 0.8, 0.7, 0.6][:steps],
            "bias_share": [None] * steps if method == "erm" else known,
            "weight_aligned": known,
            "weight_conflicting": [None, *known[1:]],
            "weight_plain": known,
        },
        curve=((2, counts), (4, counts)),
        validation=counts,
        test=counts,
        seconds=1.5,
    )


# Methods and training, on a model of two thousand parameters


def test_methods_are_read_as_written() -> None:
    assert parse_method("edge:alpha=2,q=0.5,segments=tensor") == Method(alpha=2.0, q=0.5, segments="tensor")
    assert parse_method("subtract").alpha == METHODS["subtract"].alpha
    assert describe("edge:alpha=2,q=0.5") == "EDGE α = 2, q = 0.5"
    assert describe("erm") == "ERM"
    with pytest.raises(ValueError, match="expected one of erm"):
        parse_method("magic")
    with pytest.raises(ValueError, match="got 'beta'"):
        parse_method("edge:beta=1")


CONFIG = TrainingConfig(steps=6, batch_size=8, eval_every=3, curve_samples=8)


def tiny_model(seed: int = 0) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    base = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.3,
        )
    )
    return peft.get_peft_model(
        base, peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"])
    )


def tiny_samples() -> Encoded:
    generator = torch.Generator().manual_seed(0)
    labels, lengths = torch.tensor([0, 1] * 32), torch.randint(4, 13, (64,), generator=generator)
    ids = torch.randint(3, 38, (64, 12), generator=generator)
    ids[:, 1] = 38 + labels
    return Encoded(ids, lengths, labels, choose_carriers(labels, TEST_INJECTION, 0))


def test_training_records_every_step_and_lowers_the_loss() -> None:
    model, samples = tiny_model(), tiny_samples()
    config = replace(CONFIG, steps=60, eval_every=30, learning_rate=2e-2)
    trace, curve, seconds = train(model, samples, samples, Method(kind="erm"), 0, config)
    assert {len(column) for column in trace.values()} == {60}
    assert sum(trace["loss"][-10:]) < 0.7 * sum(trace["loss"][:10])
    assert all(0 < value <= 1 for value in trace["weight_plain"] if value is not None)
    assert trace["cosine"] == [None] * 60
    assert [step for step, _ in curve] == [30, 60]
    assert all(sum(counts.count) == 8 for _, counts in curve)
    assert seconds > 0


def test_no_removal_is_plain_training() -> None:
    samples, weights = tiny_samples(), []
    for method in (Method(kind="erm"), Method(kind="two_backward", alpha=0.0)):
        model = tiny_model()
        train(model, samples, samples, method, 0, CONFIG)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    # (1 + 0) e − 0 g = e exactly; the mean over the batch is taken inside cross_entropy in one and after it
    # in the other, and Adam divides what that rounds by its size.
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def test_edge_in_training_is_the_two_backward_recipe() -> None:
    pytest.importorskip("fastproj.methods.edge")
    samples, traces, weights = tiny_samples(), [], []
    for method in (Method(alpha=2.0), Method(kind="two_backward", alpha=2.0)):
        model = tiny_model()
        traces.append(train(model, samples, samples, method, 0, CONFIG)[0])
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert all(-1 <= value <= 1 + 1e-6 for value in traces[0]["cosine"])
    assert all(value is not None and value >= 0 for value in traces[0]["bias_share"])
    # fp32 gradients summed in another order, put through six steps of Adam, which divides by their size.
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_evaluation_counts_by_group_and_keeps_the_mode() -> None:
    model, samples = tiny_model(), tiny_samples()
    model.train()
    counts = evaluate(model, samples, batch_size=7)
    assert model.training
    model.eval()
    inputs, labels = samples.batch(torch.arange(64))
    with torch.no_grad():
        right = model(**inputs).logits.argmax(dim=-1) == labels
    for group in range(4):
        members = samples.groups == group
        assert counts.count[group] == int(members.sum())
        assert counts.correct[group] == int(right[members].sum())


def test_step_costs_time_each_method_on_its_own_model() -> None:
    methods = {"ERM": Method(kind="erm"), "recipe": Method(kind="published")}
    costs = step_costs({n: tiny_model() for n in methods}, methods, tiny_samples(), batch_size=8, rounds=3)
    assert costs["ERM"].ratio == 1.0
    assert costs["recipe"].seconds > 0
    with pytest.raises(ValueError, match="one model per method"):
        step_costs({}, methods, tiny_samples())


# The study


def test_a_run_survives_json() -> None:
    made = result("edge", 3, 50)
    assert RunResult.from_json(made.to_json()) == made


def test_the_key_covers_method_seed_and_configuration() -> None:
    keys = {
        run_key(Method(), 0, CONFIG),
        run_key(Method(alpha=2.0), 0, CONFIG),
        run_key(Method(), 1, CONFIG),
        run_key(Method(), 0, replace(CONFIG, steps=7)),
        run_key(Method(), 0, replace(CONFIG, train_injection=TEST_INJECTION)),
    }
    assert len(keys) == 5
    assert run_key(Method(), 0, CONFIG) == run_key(Method(), 0, replace(CONFIG))


def fake_run(job: Job) -> RunResult:
    return result(job.name, job.seed, 40 + 10 * job.seed)


def test_a_study_resumes_where_it_was_cut(tmp_path: Path) -> None:
    made: list[tuple[str, int]] = []

    def dies_at_the_third(job: Job) -> RunResult:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append((job.name, job.seed))
        return fake_run(job)

    def counts(job: Job) -> RunResult:
        made.append((job.name, job.seed))
        return fake_run(job)

    methods, seeds = ["erm", "edge:alpha=2"], [0, 1]
    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path, methods, seeds, steps=4, runner=dies_at_the_third)
    assert len(list((tmp_path / "runs").iterdir())) == 2
    results = run_study(tmp_path, methods, seeds, steps=4, runner=counts)
    assert made == [("erm", 0), ("edge:alpha=2", 0), ("erm", 1), ("edge:alpha=2", 1)]
    assert [(r.method, r.seed) for r in results] == made
    assert len(run_study(tmp_path, methods, seeds, steps=4, runner=counts)) == 4
    assert len(made) == 4
    run_study(tmp_path, methods, seeds, steps=5, runner=counts)
    assert len(made) == 8
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["method"] for row in table["rows"]] == methods
    assert (tmp_path / "table.md").read_text().startswith("| method |")


def test_workers_are_processes_and_write_what_they_finish(tmp_path: Path) -> None:
    results = run_study(tmp_path, ["erm", "edge"], [0, 1], workers=2, runner=process_run)
    assert {r.seconds for r in results}.isdisjoint({float(os.getpid())})
    assert len(list((tmp_path / "runs").iterdir())) == 4


def process_run(job: Job) -> RunResult:
    return replace(fake_run(job), seconds=float(os.getpid()))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 0, 1 and 1"):
        run_study(tmp_path, [], [0])


# Arithmetic


def test_means_and_differences_are_paired_by_seed() -> None:
    results = [result("erm", 0, 40), result("erm", 1, 60), result("edge", 0, 50), result("edge", 1, 58)]
    rows = {row["method"]: row["test"] for row in tabulate(results)["rows"]}
    assert rows["erm"]["worst"]["mean"] == pytest.approx(0.5)
    assert rows["erm"]["worst"]["difference"] is None
    assert rows["edge"]["worst"]["mean"] == pytest.approx(0.54)
    assert rows["edge"]["worst"]["difference"] == pytest.approx((0.10 - 0.02) / 2)
    assert (rows["edge"]["worst"]["wins"], rows["edge"]["worst"]["pairs"]) == (1, 2)
    # (90 + 80 + 50 + 95) / 400 and (90 + 80 + 58 + 95) / 400.
    assert rows["edge"]["overall"]["mean"] == pytest.approx((0.7875 + 0.8075) / 2)
    # Two pairs: a resampled mean is −0.02, 0.04 or 0.10, each end with probability 1/4.
    assert rows["edge"]["worst"]["difference_interval"] == pytest.approx((-0.02, 0.10))
    markdown = to_markdown(tabulate(results))
    assert "| edge | 2 | 79.8 [78.8, 80.8] | 54.0 [50.0, 58.0] | +4.0 [-2.0, +10.0] | 1 of 2 |" in markdown


def test_a_seed_without_baseline_is_not_compared() -> None:
    rows = tabulate([result("erm", 0, 40), result("edge", 0, 50), result("edge", 1, 90)])["rows"]
    assert rows[1]["test"]["worst"]["pairs"] == 1
    assert rows[1]["test"]["worst"]["difference"] == pytest.approx(0.1)
    assert rows[1]["test"]["worst"]["difference_interval"] is None


def test_run_intervals_are_those_of_binomials() -> None:
    intervals = run_intervals(GroupCounts((400, 400), (200, 400)), draws=20_000)
    # Group of 400 at one half: standard error 0.025, so 1.96 of them; a tenth of one for the draws.
    assert intervals["worst"] == pytest.approx((0.451, 0.549), abs=0.003)
    assert intervals["overall"] == pytest.approx((0.7255, 0.7745), abs=0.0015)
    assert run_intervals(GroupCounts((5, 0), (5, 0)))["worst"] == (1.0, 1.0)
    state = torch.random.get_rng_state()
    run_intervals(GroupCounts((5,), (3,)))
    assert torch.equal(state, torch.random.get_rng_state())


def test_mean_interval_of_equal_values_is_a_point() -> None:
    assert mean_interval([0.25, 0.25, 0.25]) == (0.25, 0.25)


def test_smoothing_is_a_weighted_mean() -> None:
    assert smooth([1.0, 3.0], keep=0.5) == pytest.approx([1.0, (0.5 * 1 + 3) / 1.5])


# What is said and shown


def test_the_verdict_says_when_edge_did_worse() -> None:
    results = [result("erm", 0, 50), result("edge:alpha=1", 0, 45)]
    text = " ".join(verdicts(results, tabulate(results), {"ERM": Timing(0.1, 1.0), "x": Timing(0.2, 2.0)}))
    assert "did worse than plain fine-tuning in its worst group: 45.0 %, -5.0 points" in text
    assert "One run proves nothing" in text
    assert "x 2.00 times" in text
    assert "from 0.90 to" in text


def test_several_seeds_are_judged_by_their_interval() -> None:
    results = [result("erm", 0, 40), result("erm", 1, 40), result("edge", 0, 50), result("edge", 1, 55)]
    text = " ".join(verdicts(results, tabulate(results), {}))
    assert "excludes zero; it was better on 2 of them" in text
    assert "proves nothing" not in text


def test_the_page_stands_alone_and_holds_the_numbers() -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    results = [
        result(m, s, c) for m, s, c in [("erm", 0, 41), ("edge", 0, 52), ("erm", 1, 43), ("edge", 1, 51)]
    ]
    costs = {"ERM": Timing(0.2, 1.0), "EDGE, one backward pass": Timing(0.2061, 1.03)}
    page = render_report(results, tabulate(results), costs, ["Nothing < proved"], TrainingConfig())
    for number in ("41.0", "52.0", "1.03×", "206", "+9.5", "2 of 2"):
        assert number in page
    assert "Nothing &lt; proved" in page
    assert page.count("<svg") == 6
    assert page.count("</svg>") == 6
    assert "prefers-color-scheme: dark" in page
    # Offline: nothing is fetched. Names of XML namespaces are no addresses.
    fetched = re.findall(r'(?:src|href)="(?!#)([^"]+)"|url\((?!#)([^)]+)\)|@import', page)
    assert fetched == []
