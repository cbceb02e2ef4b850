"""The parts of the GRASP study by their definitions: upper blocks, losses, directions, methods."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_text
import torch
from grasp_study_texts import install, load, upper

from fastproj.grasp.study import arms, decodable, evidence, supervised, tasks
from fastproj.grasp.study.arms import Arm, adapted, train
from fastproj.grasp.study.blocks import keep_upper
from fastproj.grasp.study.supervised import energy_share, made_factors, oracle
from fastproj.latent.factors import STREAM
from fastproj.latent.lora import lora_layers
from fastproj.methods.grasp import GRASP
from fastproj.reference.basis import orthonormalize


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def test_upper_blocks_answer_like_the_whole_model() -> None:
    whole, _ = load()
    part, _ = upper()
    ids = torch.tensor([[7, 9, 11, 6, 8], [10, 6, 7, 0, 0], [9, 0, 0, 0, 0]])
    mask = (ids != 0).long()
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=mask).logits
        for _ in range(2):  # computed, then remembered
            found = part(input_ids=ids, attention_mask=mask).logits
            # Batches of another width are summed in another order.
            torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)
    assert [name for name, _ in part.named_parameters() if ".layers.2." in name] == []


@pytest.mark.parametrize("first", [0, 3])
def test_blocks_must_be_left_on_both_sides(first: int) -> None:
    with pytest.raises(ValueError, match=f"expected a block from 1 to 2 to begin at, got {first}"):
        keep_upper(load()[0], first, pad=0)


def test_attention_that_needs_a_mask_is_refused() -> None:
    model, _ = load()
    model.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="expected attention sdpa, got 'eager'"):
        keep_upper(model, 1, pad=0)


def test_loss_is_that_of_the_labels_alone() -> None:
    model, tokenizer = load()
    task = tasks.make_task("tone", 0, tokenizer)
    batch = task.batch(task.train["planted"][:5])
    whole = model(input_ids=batch["ids"], attention_mask=batch["mask"], labels=batch["labels"]).loss
    # fp32 sums in another order.
    torch.testing.assert_close(tasks.loss(model, batch), whole, rtol=1e-5, atol=1e-6)
    topic = tasks.make_task("topic", 0, tokenizer)
    sample = topic.train["planted"][0]
    logits = model(input_ids=torch.tensor([sample.ids])).logits[0, -2].log_softmax(-1)
    found = tasks.loss(model, topic.batch([sample]))
    torch.testing.assert_close(found, -logits[sample.ids[-1]], rtol=1e-5, atol=1e-6)
    rows = [one.ids for one in task.validation]
    logits = tasks.last_logits(model, rows, [7, 9], pad=0)
    expected = model(input_ids=torch.tensor([rows[2]])).logits[0, -1, [7, 9]].double()
    torch.testing.assert_close(logits[2], expected, rtol=1e-5, atol=1e-6)


def test_groups_and_margins_by_hand() -> None:
    margins = torch.tensor([3.0, 1.0, -1.0, -2.0, 0.5, -4.0], dtype=torch.float64)
    labels = torch.tensor([1, 0, 1, 0, 1, 0])
    movies = torch.tensor([True, True, False, False, False, False])
    found = tasks.margins_by_group(margins, labels, movies)
    # Movies: positive right, negative wrong. Tweets: one of two positive right, both negative right.
    assert found == {
        "accuracy": (1 + 1 + 0 + 0.5) / 4,
        "worst group": 0.0,
        "aligned − conflicting": (1 + 1) / 2 - (0 + 0.5) / 2,
        "source moves the answer": ((3 - -0.25) + (1 - -3)) / 2,
        "label moves the answer": ((3 - 1) + (-0.25 - -3)) / 2,
    }


def test_supervised_directions_are_differences_of_means() -> None:
    model, tokenizer = upper()
    task = tasks.make_task("topic", 0, tokenizer)
    tuned = adapted(model, seed=0)
    contrast = task.contrasts["planted"]
    found = supervised.supervised(tuned, task, contrast, seed=0)
    means = []
    for cell in contrast.cells:
        sides = []
        for side in cell:
            rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in side]
            with torch.no_grad():
                hidden = [model(input_ids=row, output_hidden_states=True).hidden_states[1] for row in rows]
            sides.append(torch.stack([one[0, -1].double() for one in hidden]).mean(0))
        means.append(sides[0] - sides[1])
    first = torch.stack(means).mean(0)
    # Activations are fp32, and differences of near ones lose digits.
    torch.testing.assert_close(found.by_block[0], first / first.norm(), rtol=1e-3, atol=1e-4)
    assert found.by_block.shape == (2, 32)
    assert sum(found.shares) == pytest.approx(1.0)  # two blocks span two directions
    again = supervised.supervised(tuned, task, contrast, seed=0)
    assert torch.equal(again.permuted, found.permuted)
    assert set(found.by_module) == {layer.name for layer in lora_layers(tuned)}


@pytest.mark.parametrize(("setting", "kept"), [("topic", slice(-1, None)), ("tone", slice(1, None))])
def test_activations_are_the_last_token_or_the_mean_of_all_but_the_first(setting: str, kept: slice) -> None:
    model, tokenizer = upper()
    task = tasks.make_task(setting, 0, tokenizer)
    tuned = adapted(model, seed=0)
    sentences = ["the fox is kind and rich", "a cook sings", "to be or not to be lazy then"]
    streams, inputs = supervised.activations(tuned, task, sentences)
    for row, text in enumerate(sentences):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
            read = model.model.layers[0].input_layernorm(hidden[0])
        expected = hidden[1][0, kept].mean(0).double()
        # fp32, padded to another width.
        torch.testing.assert_close(streams["model.layers.0"][row], expected, rtol=1e-4, atol=1e-5)
        found = inputs["model.layers.0.self_attn.v_proj"][row]
        torch.testing.assert_close(found, read[0, kept].mean(0).double(), rtol=1e-4, atol=1e-5)


def test_energy_shares_are_those_of_the_product() -> None:
    model, _ = upper()
    tuned = adapted(model, seed=0)
    torch.manual_seed(1)
    for layer in lora_layers(tuned):
        layer.b.data.normal_()
    writers = [layer for layer in lora_layers(tuned) if layer.name.endswith(("o_proj", "down_proj"))]
    basis = orthonormalize(torch.randn(32, 2))
    updates = [layer.scale * (layer.b.double() @ layer.a.double()).detach() for layer in writers]
    along = sum(float((basis.matrix.double().mT @ update).square().sum()) for update in updates)
    whole = sum(float(update.square().sum()) for update in updates)
    found = energy_share(tuned, made_factors({STREAM: basis}, "write"))
    assert found == pytest.approx(along / whole, rel=1e-6)  # factors are fp32, sums fp64
    name = "model.layers.1.mlp.down_proj"
    own = made_factors({name: orthonormalize(torch.randn(64))}, "read")
    update = next(u for layer, u in zip(writers, updates, strict=True) if layer.name == name)
    read = float((update @ own.bases[name].matrix.double()).square().sum() / update.square().sum())
    assert energy_share(tuned, own) == pytest.approx(read, rel=1e-5)
    for layer in lora_layers(tuned):
        layer.b.data.zero_()
    assert energy_share(tuned, own) == 0


def test_written_words_are_logits_along_a_direction() -> None:
    model, tokenizer = upper()
    task = tasks.make_task("topic", 0, tokenizer)
    basis = orthonormalize(torch.randn(32, 2, generator=torch.Generator().manual_seed(0)))
    found = evidence.written_words(model, task, made_factors({STREAM: basis}, "write"))
    logits = model.lm_head.weight @ (model.model.norm.weight * basis.matrix[:, 1])
    scores = ((logits - logits.mean()) / logits.std()).tolist()
    poor, rich = (scores[tiny_text.index(word)] for word in ("poor", "rich"))
    assert found["both"][1] == pytest.approx(abs(poor + rich) / 2, rel=1e-4)  # fp32
    assert found["either"][1] == pytest.approx(abs(poor - rich) / 2, rel=1e-4)


def test_a_factor_that_one_direction_holds_is_gone_without_it() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    labels = (torch.arange(200) % 2).double()
    held = torch.eye(12, dtype=torch.float64)[:, :1]
    single = values.clone()
    single[:, 0] = 4 * labels
    assert decodable.accuracy(single, labels) > 0.95
    assert decodable.accuracy(decodable.without(single, held), labels) < 0.65  # chance, over 200 draws
    double = single.clone()
    double[:, 1] = 4 * labels
    assert decodable.accuracy(decodable.without(double, held), labels) > 0.95
    assert torch.equal(decodable.without(values, None), values)


@pytest.mark.parametrize("method", ["write", "read", "stream", "ablate", "plain"])
def test_methods_hold_what_they_say(method: Any) -> None:
    model, tokenizer = upper()
    task = tasks.make_task("topic", 0, tokenizer)
    tuned = adapted(model, seed=0)
    planted = supervised.supervised(tuned, task, task.contrasts["planted"], seed=0)
    arm = Arm("one", method, "none" if method == "plain" else "oracle")
    factors = oracle(planted, arm.side)
    done = train(tuned, task, arm, 0, None if method == "plain" else factors)
    assert len(done.losses) == arms.EPOCHS * math.ceil(len(task.train["planted"]) / arms.BATCH)
    share = energy_share(tuned, factors)
    if method in arms.GRASP_MODES:
        # ΔW is held to fp32's rounding, its square to the square of that.
        assert done.violation is not None
        assert done.violation < 1e-5
        assert share < 1e-10
    else:
        assert done.violation is None
        assert share > 1e-6
    assert not any(block._forward_hooks for block in model.model.layers)


def test_an_arm_without_its_directions_is_refused() -> None:
    model, tokenizer = upper()
    task = tasks.make_task("topic", 0, tokenizer)
    with pytest.raises(ValueError, match="arm 'one' needs directions, got none"):
        train(adapted(model, seed=0), task, Arm("one", "write", "oracle"), 0)


def test_constrained_training_starts_from_the_same_adapter_as_the_naive() -> None:
    model, tokenizer = upper()
    tuned = adapted(model, seed=5)
    before = arms.adapter_state(tuned)
    task = tasks.make_task("tone", 0, tokenizer)
    planted = supervised.supervised(tuned, task, task.contrasts["planted"], seed=0)
    with GRASP(tuned, oracle(planted, "write"), "write"):
        after = arms.adapter_state(tuned)  # B = 0 is on the constraint
    assert all(torch.equal(before[name], after[name]) for name in before)
    model = tuned.unload()
    again = arms.adapter_state(adapted(model, seed=5))
    assert all(torch.equal(before[name], again[name]) for name in before)
