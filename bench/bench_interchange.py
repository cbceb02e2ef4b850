"""The interchange ablation of every block in one batch against a run for each block.

Every figure comes from runs that lie side by side in one process, on one thread::

    pytest bench/bench_interchange.py --benchmark-only -s
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastproj import InterchangePair, LabelWords, interchange_ablation
from fastproj.balance.naive_interchange import naive_interchange
from fastproj.bench.report import publish
from fastproj.paired import paired_rounds

COMMAND = "pytest bench/bench_interchange.py --benchmark-only -s"
PROMPT, LABELS, SAMPLES, ROUNDS = 40, 6, 2, 7
VOCABULARY = 49152


def smollm2_s_shape() -> nn.Module:
    """SmolLM2-135M with random weights, in fp32, large enough for every block to count."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=VOCABULARY, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def last_position_alone(model: nn.Module) -> nn.Module:
    """The same model, its logits those of the last position, as a careful loop asks for them."""
    other: Any = copy(model)
    other.forward = partial(other.forward, logits_to_keep=1)
    return other


def workload() -> tuple[list[InterchangePair], LabelWords]:
    """Prompts of random tokens, behind them a label of one token and a cue of three."""
    names = [f"label {label}" for label in range(LABELS)]
    tokens = tuple((1000 + label,) for label in range(LABELS))
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2000, VOCABULARY, (count,), generator=generator).tolist())

    cue = drawn(3)
    pairs = []
    for sample in range(SAMPLES):
        prompt, right = drawn(PROMPT), sample % LABELS
        gold, biased = ((*prompt, *tokens[label], *cue) for label in (right, (right + 1) % LABELS))
        pairs.append(InterchangePair(gold, biased))
    return pairs, LabelWords(tuple(names), tuple(f" {name}" for name in names), tokens)


def test_interchange_ablation(benchmark: Any) -> None:
    """Per sample, all blocks of it."""
    torch.set_num_threads(1)
    model = smollm2_s_shape()
    pairs, labels = workload()
    contenders: dict[str, Callable[[], Any]] = {
        "fastproj.interchange_ablation": partial(interchange_ablation, model, pairs, labels),
        "a run for each block": partial(naive_interchange, model, pairs, labels),
        "a run for each block, logits of the last position": partial(
            naive_interchange, last_position_alone(model), pairs, labels
        ),
    }
    check_agreement([contender().per_sample for contender in contenders.values()])
    timings = paired_rounds(contenders, rounds=ROUNDS, warmup=1)
    rows = [
        {
            "contender": label,
            "ms per sample": f"{timing.seconds / SAMPLES * 1e3:.0f}",
            "× fastproj": f"{timing.ratio:.2f}",
        }
        for label, timing in timings.items()
    ]
    title = f"Interchange ablation, shape of SmolLM2-135M, prompts of {PROMPT} tokens, 1 thread"
    publish(benchmark, title, rows, COMMAND)
    benchmark.pedantic(contenders["fastproj.interchange_ablation"], rounds=3)


def check_agreement(scores: list[Tensor]) -> None:
    """A fast wrong answer is no contender: each against the loop, and no block without an effect."""
    _, expected, _ = scores
    # fp32 logits of order one through 30 blocks, sums in another order.
    tolerance = 1e-5
    if float(expected.min()) < 10 * tolerance:
        raise ValueError(f"a block's exchange changes too little to be seen, {float(expected.min()):.1e}")
    for got in scores:
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
