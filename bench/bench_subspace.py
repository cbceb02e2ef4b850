"""Subspace projections in training: all adapters of a large model, and GRASP's share of a training step.

Every figure comes from runs that lie side by side in one process::

    pytest bench/bench_subspace.py --benchmark-only -s
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import fastproj
from fastproj import Basis
from fastproj.architectures import Role, blocks
from fastproj.bench.report import publish
from fastproj.bench.workloads import WORKLOADS, gradient_set
from fastproj.bias_diff.sources import smollm2
from fastproj.demo.data import find_model, load_splits
from fastproj.methods.grasp import Mode
from fastproj.paired import paired_rounds

COMMAND = "pytest bench/bench_subspace.py --benchmark-only -s"
CONFIGURATION = "Llama-2-7B, r=16 on all linear layers"
RANKS = (1, 4, 16)
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, eq=False)
class Adapters:
    """Every A with directions of what its module reads, every B with those of what it writes."""

    a: list[Tensor]
    b: list[Tensor]
    read: list[Basis]
    write: list[Basis]

    def fast(self) -> None:
        """A call each side."""
        fastproj.project_out_(self.a, self.read, side="right")
        fastproj.project_out_(self.b, self.write, side="left")

    def allocating(self) -> None:
        """The formula module by module, each result in new memory."""
        for number, (a, v) in enumerate(zip(self.a, self.read, strict=True)):
            self.a[number] = a - (a @ v.matrix) @ v.matrix.T
        for number, (b, u) in enumerate(zip(self.b, self.write, strict=True)):
            self.b[number] = b - u.matrix @ (u.matrix.T @ b)

    def in_place(self) -> None:
        """The formula module by module, in the shards' memory."""
        for a, v in zip(self.a, self.read, strict=True):
            a.sub_((a @ v.matrix) @ v.matrix.T)
        for b, u in zip(self.b, self.write, strict=True):
            b.sub_(u.matrix @ (u.matrix.T @ b))


def adapters(rank: int) -> Adapters:
    """Standard normal gradients, directions drawn for each module."""
    shards = gradient_set(WORKLOADS[CONFIGURATION], seed=0)
    a, b = shards[0::2], shards[1::2]
    generator = torch.Generator().manual_seed(rank)

    def drawn(length: int) -> Basis:
        return fastproj.orthonormalize(torch.randn(length, rank, generator=generator))

    return Adapters(a, b, [drawn(each.shape[1]) for each in a], [drawn(each.shape[0]) for each in b])


@pytest.mark.parametrize("threads", [1, 2])
def test_all_adapters(benchmark: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    rows = []
    for rank in RANKS:
        own = adapters(rank)
        check_agreement(own)
        contenders: dict[str, Callable[[], object]] = {
            "fastproj.project_out_, two calls": own.fast,
            "loop over modules, in place": own.in_place,
            "loop over modules, allocating": own.allocating,
        }
        rows += [
            {
                "contender": label,
                "rank": str(rank),
                "ms": f"{timing.seconds * 1e3:.1f}",
                "× fastproj": f"{timing.ratio:.2f}",
            }
            for label, timing in paired_rounds(contenders, rounds=25).items()
        ]
    publish(benchmark, f"Subspace projection, {CONFIGURATION}, cpu, {threads} threads", rows, COMMAND)
    benchmark.pedantic(own.fast, rounds=3)


def check_agreement(own: Adapters) -> None:
    """A fast wrong answer is no contender: each against the formula in fp64, on the first block's shards."""
    first = slice(0, 7)
    a, b = own.a[first], own.b[first]
    read, write = ([basis.matrix.double() for basis in bases[first]] for bases in (own.read, own.write))
    expected = [x.double() - (x.double() @ v) @ v.T for x, v in zip(a, read, strict=True)]
    expected += [x.double() - u @ (u.T @ x.double()) for x, u in zip(b, write, strict=True)]
    for name in ("fast", "in_place", "allocating"):
        trial = Adapters([x.clone() for x in a], [x.clone() for x in b], own.read[first], own.write[first])
        getattr(trial, name)()
        for got, other in zip([*trial.a, *trial.b], expected, strict=True):
            # fp32 sums of up to 11,008 products of values of order one with unit vectors.
            torch.testing.assert_close(got.double(), other, rtol=1e-4, atol=1e-4)


class Training:
    """A model with LoRA, AdamW and one batch of real texts; a mode holds it by GRASP with one direction."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], mode: Mode | None) -> None:
        self.model, self.batch = model, batch
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.alone: list[Callable[[], object]] = []
        if mode is None:
            return
        side: Role = "read" if mode == "read" else "write"
        factors = fastproj.identify(
            model, side=side, pool="stream" if mode == "stream" else "module", draws=1
        )
        grasp = fastproj.GRASP(model, factors, mode)
        grasp.hold(self.optimizer)
        if mode == "stream":
            basis = factors.bases["stream"]
            delta = torch.ones(*batch["input_ids"].shape, basis.dimension)
            self.alone += [partial(fastproj.project_out_stream, delta, basis)] * len(blocks(model))
        self.alone.append(grasp.project_)

    def step(self) -> None:
        """Forward, backward, AdamW."""
        self.optimizer.zero_grad()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()

    def projections(self) -> None:
        """What GRASP adds to a step: the stream's gradient at each block; gradients; parameters."""
        for projection in self.alone:
            projection()


def with_lora(model: nn.Module) -> nn.Module:
    """r=8 on all linear layers, B away from its start at 0, no dropout."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted: nn.Module = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return adapted.eval()


def minilm(mode: Mode | None) -> Training:
    """MiniLM-L6 and 32 rated texts."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, split = find_model(), load_splits()["train"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = dict(tokenizer(list(split.texts[:32]), padding=True, return_tensors="pt"))
    batch["labels"] = torch.tensor(split.labels[:32])
    return Training(with_lora(AutoModelForSequenceClassification.from_pretrained(folder)), batch, mode)


def smollm2_135m(mode: Mode | None) -> Training:
    """SmolLM2-135M and 8 of the texts, every next token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, split = smollm2(), load_splits()["train"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = dict(tokenizer(list(split.texts[:8]), padding=True, return_tensors="pt"))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return Training(with_lora(AutoModelForCausalLM.from_pretrained(folder)), batch, mode)


MODELS: dict[str, Callable[[Mode | None], Training]] = {"MiniLM-L6": minilm, "SmolLM2-135M": smollm2_135m}


@pytest.mark.parametrize("name", MODELS)
def test_training_step(benchmark: Any, name: str) -> None:
    """A share of a hundredth drowns in the noise of whole steps, so that projections are timed alone too."""
    torch.set_num_threads(1)
    try:
        plain = MODELS[name](None)
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(str(error))
    held = {mode: MODELS[name](mode) for mode in MODES}
    contenders = {"AdamW": plain.step}
    contenders |= {f"AdamW, GRASP {mode}": own.step for mode, own in held.items()}
    contenders |= {f"{mode} alone": own.projections for mode, own in held.items()}
    timings = paired_rounds(contenders, rounds=15)
    rows = [
        {
            "contender": label,
            "ms": f"{timings[label].seconds * 1e3:.1f}",
            "× plain step": f"{timings[label].ratio:.3f}",
            "projections alone, ms": f"{timings[f'{mode} alone'].seconds * 1e3:.2f}" if mode else "–",
            "of a plain step": f"{timings[f'{mode} alone'].ratio:.2%}" if mode else "–",
        }
        for label, mode in (("AdamW", ""), *((f"AdamW, GRASP {mode}", mode) for mode in MODES))
    ]
    publish(benchmark, f"GRASP in a training step, {name}, LoRA r=8, 1 thread", rows, COMMAND)
    benchmark.pedantic(plain.step, rounds=3)
