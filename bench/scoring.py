"""One batch to score on real architectures with LoRA, and the plain ways of going about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.bench.steps import minilm
from fastproj.reference.adam import AdamState, adam_update

SAMPLES, TOKENS, RANK = 16, 64, 16


@dataclass(frozen=True, eq=False)
class Workload:
    """A model, a batch of its samples, and what both are called.

    ``loss`` is the scorer's name for ``losses(logits, batch)``, the mean over each sample's tokens, (B,).
    """

    model: nn.Module
    batch: dict[str, Tensor]
    loss: str
    losses: Callable[[Tensor, Mapping[str, Tensor]], Tensor]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: the adapters."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The losses of a batch's samples."""
        return self.losses(self.model(input_ids=batch["input_ids"]).logits, batch)

    def step(self) -> None:
        """A training step up to its optimiser: forward, mean loss, backward."""
        self.model.zero_grad()
        self.forward(self.batch).mean().backward()

    def sample_gradients(self) -> Tensor:
        """(B, n), one backward pass after the other, parameters end to end."""
        rows = []
        for sample in range(SAMPLES):
            self.model.zero_grad()
            self.forward({k: v[sample : sample + 1] for k, v in self.batch.items()}).sum().backward()
            rows.append(flattened(self.gradients().values()))
        return torch.stack(rows)

    def gradients(self) -> dict[str, Tensor]:
        """What the last backward pass left behind."""
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.parameters.items()}


def flattened(tensors: Any) -> Tensor:
    """Tensors end to end."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def classifier() -> Workload:
    """MiniLM-L6, a label for each text."""
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(1000, 20000, (SAMPLES, TOKENS), generator=generator),
        "labels": torch.randint(0, 2, (SAMPLES,), generator=generator),
    }

    def losses(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits, batch["labels"], reduction="none")

    layers = ("query", "key", "value", "intermediate.dense", "output.dense")
    return Workload(with_lora(minilm, layers), batch, "classification", losses)


def language_model() -> Workload:
    """GPT-2's width and vocabulary with four blocks, every next token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(1000, 20000, (SAMPLES, TOKENS), generator=generator)}

    def losses(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        labels = batch["input_ids"][:, 1:]
        terms = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none")
        return terms.view(labels.shape).mean(1)

    def build() -> nn.Module:
        return GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=768, n_head=12))

    return Workload(with_lora(build, ("c_attn", "c_proj", "c_fc")), batch, "causal-lm", losses)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "MiniLM-L6": classifier,
    "GPT-2 with 4 layers": language_model,
}


def with_lora(build: Callable[[], nn.Module], layers: Sequence[str]) -> nn.Module:
    """LoRA on the linear layers of every block, away from its start, where B and half of the gradients are 0.

    In evaluation mode, so that no contender draws dropout masks that another does not.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: nn.Module = get_peft_model(build(), LoraConfig(r=RANK, lora_alpha=16, target_modules=list(layers)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def adamw_after_a_step(workload: Workload) -> torch.optim.AdamW:
    """An optimiser with moments; the weights have moved by its step."""
    optimizer = torch.optim.AdamW(workload.parameters.values(), lr=1e-4)
    workload.step()
    optimizer.step()
    return optimizer


def cosines(updates: Tensor, reference: Tensor) -> Tensor:
    """(B,) cosines of the rows with a vector, in fp64."""
    return F.cosine_similarity(updates.double(), reference.double().unsqueeze(0))


def adam_updates(workload: Workload, optimizer: torch.optim.AdamW, gradients: Tensor) -> Tensor:
    """Adam's update for each row of gradients, (B, n), in fp64, as the reference defines it."""
    group = optimizer.param_groups[0]
    states = [optimizer.state[parameter] for parameter in workload.parameters.values()]
    moments = AdamState(
        flattened(state["exp_avg"] for state in states),
        flattened(state["exp_avg_sq"] for state in states),
        step=int(states[0]["step"]),
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
    )
    return adam_update(gradients.double(), moments)
