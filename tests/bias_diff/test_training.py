"""The plain fine-tune against the same steps by hand, and what it leaves on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from safetensors.torch import load_file
from tiny_text import BigramForCausalLM, index, tokenizer
from torch import nn

from fastproj.bias_diff.encoding import by_length, encode, padded, shuffled
from fastproj.bias_diff.records import Records
from fastproj.bias_diff.training import (
    FineTuneConfig,
    add_adapter,
    fine_tune,
    learning_rate_factor,
    make_optimizer,
    mask_tokens,
)

TEXTS = (
    "the man is kind", "a poor woman sings .", "fox and fox", "the cook was lazy , then rich", "to be or not",
    "the fox", "a man and a woman",
)  # fmt: skip
RECORDS = Records(tuple(f"t{i}" for i in range(len(TEXTS))), TEXTS, (0, 1, 0, 1, 1, 0, 1))


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("make", [tiny_text.gpt2, tiny_text.llama], ids=["gpt2", "llama"])
def test_a_step_by_hand(make: Any) -> None:
    config = FineTuneConfig(
        batch_size=len(TEXTS), learning_rate=0.01, weight_decay=0.1, max_norm=0.5, epochs=2
    )
    model, other = (add_adapter(make(), rank=4, seed=3) for _ in range(2))
    # GPT-2's dropout would draw masks; the comparison is of the steps.
    for module in [*model.modules(), *other.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    done = fine_tune(model, tokenizer(), RECORDS, config)
    chosen = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=0.01, weight_decay=0.1)
    losses = []
    other.train()
    for _ in range(2):
        sums, count = torch.zeros(()), 0
        for text in TEXTS:
            ids = torch.tensor([tokenizer()(text)["input_ids"]])
            sums = sums + other(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        (sums / count).backward()
        losses.append((sums / count).item())
        nn.utils.clip_grad_norm_(chosen, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    # fp32 sums in another order; Adam's first steps turn a rounding of tiny gradients into part of a step.
    assert done.losses == pytest.approx(losses, rel=1e-5)
    for (name, found), expected in zip(adapters(model).items(), adapters(other).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)


def test_the_seed_decides_everything() -> None:
    def trained(seed: int) -> tuple[tuple[float, ...], dict[str, torch.Tensor]]:
        base = tiny_text.gpt2()
        torch.manual_seed(11)
        before = torch.random.get_rng_state()
        model = add_adapter(base, dropout=0.2, seed=seed)
        done = fine_tune(model, tokenizer(), RECORDS, FineTuneConfig(batch_size=2, seed=seed))
        assert torch.equal(before, torch.random.get_rng_state())
        return done.losses, adapters(model)

    (losses, weights), (again, same), (others, _) = trained(1), trained(1), trained(2)
    assert losses == again
    assert losses != others
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_only_the_adapter_learns_and_the_loss_falls() -> None:
    model = add_adapter(tiny_text.llama(), targets=["q_proj", "v_proj", "down_proj"])
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert all(torch.count_nonzero(p) == 0 for name, p in adapters(model).items() if "lora_B" in name)
    model.eval()
    done = fine_tune(model, tokenizer(), RECORDS, FineTuneConfig(epochs=20, batch_size=4, learning_rate=0.02))
    assert not model.training
    assert sum(done.losses[-4:]) < 0.7 * sum(done.losses[:4])
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in frozen.items())


@pytest.mark.parametrize("task", ["classification", "masked-lm"])
def test_encoders_learn(task: str) -> None:
    base = tiny_text.classifying_bert() if task == "classification" else tiny_text.masked_bert()
    model = add_adapter(base, task=task)  # type: ignore[arg-type]
    # Few samples, so masks drawn anew make the loss of masked-lm jump: its mean over many steps falls.
    config = FineTuneConfig(task=task, epochs=40, batch_size=4, learning_rate=0.02)  # type: ignore[arg-type]
    done = fine_tune(model, tokenizer("bert"), RECORDS, config)
    assert sum(done.losses[-20:]) < 0.8 * sum(done.losses[:20])


def test_a_checkpoint_loads_without_unpickling(tmp_path: Path) -> None:
    model = add_adapter(tiny_text.llama(), rank=2)
    config = FineTuneConfig(epochs=2, batch_size=3, schedule="linear", warmup=0.5)
    done = fine_tune(model, tokenizer(), RECORDS, config, folder=tmp_path)
    assert done.checkpoints == (tmp_path / "checkpoint-3", tmp_path / "checkpoint-6")
    last = done.checkpoints[-1]
    saved = torch.load(last / "optimizer.pt", weights_only=True)
    (group,) = saved["param_groups"]
    names = list(adapters(model))
    assert group["param_names"] == names
    for number, parameter in zip(
        group["params"], [dict(model.named_parameters())[n] for n in names], strict=True
    ):
        live = done.optimizer.state[parameter]
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(saved["state"][number][key], live[key])
    weights = load_file(last / "adapter_model.safetensors")
    assert len(weights) == len(names)
    first = load_file(done.checkpoints[0] / "adapter_model.safetensors")
    assert any(not torch.equal(first[name], weights[name]) for name in weights)
    log = json.loads((last / "trainer_state.json").read_text())
    assert (log["global_step"], log["epoch"]) == (6, 2.0)
    assert [entry["learning_rate"] for entry in log["log_history"]] == list(done.learning_rates)
    # 5e-4 times 1/3, 2/3, 3/3 while it warms up, then 3/3, 2/3, 1/3.
    assert done.learning_rates == pytest.approx([5e-4 * t / 3 for t in (1, 2, 3, 3, 2, 1)])


def test_learning_rates() -> None:
    constant, linear = FineTuneConfig(warmup=0.25), FineTuneConfig(schedule="linear")
    assert [learning_rate_factor(s, 8, constant) for s in range(8)] == [0.5, 1, 1, 1, 1, 1, 1, 1]
    assert [learning_rate_factor(s, 4, linear) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [learning_rate_factor(s, 2, FineTuneConfig(warmup=1.0)) for s in range(2)] == [0.5, 1]


def test_steps_are_reported() -> None:
    seen: list[tuple[int, int, float]] = []
    config = FineTuneConfig(batch_size=4)
    done = fine_tune(
        BigramForCausalLM(), tokenizer(), RECORDS, config, on_step=lambda *step: seen.append(step)
    )
    assert seen == [(1, 2, done.losses[0]), (2, 2, done.losses[1])]
    # Before the first step every word is as likely as any other.
    assert done.losses[0] == pytest.approx(math.log(tiny_text.VOCABULARY))


def test_masks() -> None:
    words = tokenizer("bert")
    ids, mask = padded([words(text)["input_ids"] for text in TEXTS] * 200, 0)
    changed, labels = mask_tokens(ids, mask, words, torch.Generator().manual_seed(0))
    ordinary = ids >= len(tiny_text.SPECIAL)
    asked = labels != -100
    assert bool((asked.sum(1) >= 1).all())
    assert not bool((asked & ~ordinary).any())
    assert torch.equal(labels[asked], ids[asked])
    assert torch.equal(changed[~asked], ids[~asked])
    # At least one of n tokens: 15 % of them, and one more where the draw leaves none: (1 − 0.15)^n of rows.
    lengths = ordinary.sum(1)
    expected = (0.15 * lengths + 0.85**lengths).sum() / lengths.sum()
    # Five standard errors of shares of about 6,000 tokens and 2,000 asked ones.
    assert (asked.sum() / ordinary.sum()).item() == pytest.approx(expected.item(), abs=5 * 0.45 / 75)
    masked = (changed[asked] == index("[MASK]")).double().mean().item()
    # A random token is the mask once in the vocabulary.
    assert masked == pytest.approx(0.8 + 0.1 / tiny_text.VOCABULARY, abs=5 * 0.4 / 45)


def test_batches_hold_every_row_once() -> None:
    lengths = [(7 * i) % 13 + 1 for i in range(101)]
    batches = shuffled(lengths, 4, torch.Generator().manual_seed(0))
    assert sorted(row for batch in batches for row in batch) == list(range(101))
    assert max(map(len, batches)) == 4
    assert batches != shuffled(lengths, 4, torch.Generator().manual_seed(1))
    # Sorted by length within 16 batches, all of a batch but at the ends of a pool are about as long.
    padding = sum(max(lengths[r] for r in b) * len(b) for b in batches) - sum(lengths)
    assert padding < 0.1 * sum(lengths)
    ordered = list(by_length(lengths, 4))
    assert sorted(row for batch in ordered for row in batch) == list(range(101))
    assert lengths[ordered[0][0]] == max(lengths)


def test_samples() -> None:
    found = encode(RECORDS, tokenizer("bert"), task="classification", max_length=4)
    assert found[0] == {"id": "t0", "input_ids": [2, index("the"), index("man"), 3], "labels": 0}
    assert "labels" not in encode(RECORDS, tokenizer())[0]


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        (
            Records(("a", "b"), ("the man", "fox")),
            {"task": "causal-lm"},
            "'b' has too few tokens for causal-lm: 1",
        ),
        (Records(("a",), ("fox",)), {"task": "masked-lm", "max_length": 2}, "'a' has too few tokens"),
        (Records(("a",), ("fox",)), {"task": "classification"}, "got None for 'a'"),
        (Records(("a",), ("fox",), ("yes",)), {"task": "classification"}, "got 'yes' for 'a'"),
        (Records(("a",), ("fox",), (-1,)), {"task": "classification"}, "got -1 for 'a'"),
        (Records(("a",), ("fox",)), {"task": "regression"}, "task: expected one of causal-lm"),
    ],
)
def test_samples_that_do_not_suit_the_task(records: Records, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(records, tokenizer("bert" if options["task"] == "masked-lm" else "causal"), **options)


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer(tiny_text.gpt2().requires_grad_(False), 0.1)
    with pytest.raises(ValueError, match="must have a mask token"):
        mask_tokens(torch.ones(1, 2), torch.ones(1, 2), tokenizer(), torch.Generator())
    for options, message in (
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"warmup": 1.5}, "warmup"),
        ({"schedule": "cosine"}, "schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            FineTuneConfig(**options)  # type: ignore[arg-type]
