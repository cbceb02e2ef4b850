"""Tiny configurations of real architectures with LoRA on all linear layers, and their batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY, BATCH, TOKENS = 50, 4, 7


def norms_in_fp64(model: nn.Module) -> nn.Module:
    """The same RMS norms without their rounding to fp32, which would be all that is measured."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child).__name__
            if kind.startswith("Gemma") and kind.endswith("RMSNorm"):  # scales by 1 + weight
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.eps)
                norm.weight = nn.Parameter(1 + child.weight.detach())
                setattr(parent, name, norm)
            elif kind == "T5LayerNorm" or (kind.endswith("RMSNorm") and hasattr(child, "variance_epsilon")):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


@dataclass(frozen=True)
class Tiny:
    """A model with what calls it: ``logits()`` runs the batch, ``labels`` and ``shift`` say what is asked."""

    model: nn.Module
    inputs: dict[str, Tensor]
    labels: Tensor
    shift: bool

    def logits(self) -> Tensor:
        return self.model(**self.inputs).logits

    def rows(self, start: int, stop: int) -> Tiny:
        """A part of the batch."""
        inputs = {name: value[start:stop] for name, value in self.inputs.items()}
        return Tiny(self.model, inputs, self.labels[start:stop], self.shift)


class Rows(torch.utils.data.Dataset):
    """A tiny batch as a dataset, so many times over."""

    def __init__(self, tiny: Tiny, times: int) -> None:
        self.tiny, self.times = tiny, times

    def __len__(self) -> int:
        return len(self.tiny.labels) * self.times

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = index % len(self.tiny.labels)
        return {**{k: v[row] for k, v in self.tiny.inputs.items()}, "labels": self.tiny.labels[row]}


def with_lora(model: nn.Module, **options: Any) -> nn.Module:
    """In fp64 and training mode, with an adapter whose B is not zero."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0, **options}
    model = get_peft_model(norms_in_fp64(model), LoraConfig(**config)).double().train()
    return with_nonzero_b(model)


def with_nonzero_b(model: nn.Module) -> nn.Module:
    """Draw every LoRA B: at its initial zero A has no gradient."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def padded(side: str = "right") -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of a batch with lengths 7, 4, 6, 2."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, VOCABULARY, (BATCH, TOKENS), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate((7, 4, 6, 2)):
        mask[row, slice(0, length) if side == "right" else slice(TOKENS - length, None)] = 1
    return ids, mask


def bert(side: str = "right", dropout: float = 0.0, **options: Any) -> Tiny:
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        vocab_size=VOCABULARY, max_position_embeddings=16, num_labels=3,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    options = {"task_type": "SEQ_CLS", **options}
    ids, mask = padded(side)
    model = with_lora(BertForSequenceClassification(config), **options)
    return Tiny(model, {"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 2, 1, 0]), False)


def _language(model: nn.Module, side: str, shift: bool, **options: Any) -> Tiny:
    ids, mask = padded(side)
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if not shift:
        inputs["labels"] = labels
    return Tiny(with_lora(model, **options), inputs, labels, shift)


def gpt2(side: str = "right", dropout: float = 0.0, **options: Any) -> Tiny:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=VOCABULARY, n_positions=16, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return _language(GPT2LMHeadModel(config), side, True, **options)


def llama(side: str = "right", dropout: float = 0.0, **options: Any) -> Tiny:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        vocab_size=VOCABULARY, attention_dropout=dropout,
    )  # fmt: skip
    return _language(LlamaForCausalLM(config), side, True, **options)


def t5(side: str = "right", dropout: float = 0.0, **options: Any) -> Tiny:
    torch.manual_seed(0)
    config = T5Config(
        num_layers=2, d_model=32, d_kv=16, num_heads=2, d_ff=64, vocab_size=VOCABULARY,
        decoder_start_token_id=0, dropout_rate=dropout,
    )  # fmt: skip
    return _language(T5ForConditionalGeneration(config), side, False, **options)


ARCHITECTURES: dict[str, Callable[..., Tiny]] = {"gpt2": gpt2, "bert": bert, "llama": llama, "t5": t5}


def cross_entropy_terms(logits: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """Per-sample sums and counts of cross entropy, written independently of the package."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.reshape(len(labels), -1, logits.shape[-1]), labels.reshape(len(labels), -1)
    log_p = F.log_softmax(logits, -1)
    counted = labels != -100
    picked = log_p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return -(picked * counted).sum(1), counted.sum(1)


def two_pass_oracle(
    tiny: Tiny, parameters: dict[str, nn.Parameter], q: float = 0.7
) -> dict[str, tuple[Tensor, Tensor]]:
    """(e, g) of every parameter that has a gradient, from two plain backward passes over one forward."""
    sums, counts = cross_entropy_terms(tiny.logits(), tiny.labels, tiny.shift)
    weights = torch.exp(-q * (sums / counts.clamp_min(1))).detach() * (counts > 0)
    chosen = list(parameters.values())
    erm = torch.autograd.grad(sums.sum() / counts.sum(), chosen, retain_graph=True, allow_unused=True)
    gce = torch.autograd.grad((weights * sums).sum() / counts.sum(), chosen, allow_unused=True)
    pairs = zip(parameters, erm, gce, strict=True)
    return {name: (e, g) for name, e, g in pairs if e is not None and g is not None}
