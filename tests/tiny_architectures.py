"""One tiny model of every architecture in the table, its bare base model, and LoRA on all linear layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

WIDTH, BLOCKS, VOCABULARY = 16, 2, 30
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
}
_BERT_LIKE: dict[str, Any] = {
    name: _LLAMA_LIKE[name]
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
}
# By config.model_type: the prefix of its classes, the class with a head, and the sizes.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "ForSequenceClassification", _BERT_LIKE),
    "gemma": ("Gemma", "ForCausalLM", _LLAMA_LIKE),
    "gemma2": ("Gemma2", "ForCausalLM", _LLAMA_LIKE),
    "gemma3_text": ("Gemma3Text", "ForCausalLM", _LLAMA_LIKE),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        {"n_layer": BLOCKS, "n_embd": WIDTH, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 16},
    ),
    "llama": ("Llama", "ForCausalLM", _LLAMA_LIKE),
    "mistral": ("Mistral", "ForCausalLM", _LLAMA_LIKE),
    "opt": (
        "OPT",
        "ForCausalLM",
        {
            "hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 24, "num_hidden_layers": BLOCKS,
            "num_attention_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 16,
        },
    ),
    "qwen2": ("Qwen2", "ForCausalLM", _LLAMA_LIKE),
    "qwen3": ("Qwen3", "ForCausalLM", _LLAMA_LIKE),
    "roberta": ("Roberta", "ForMaskedLM", _BERT_LIKE),
}  # fmt: skip


def tiny(kind: str, bare: bool = False) -> nn.Module:
    """A model of that ``config.model_type`` with random weights, with a head or bare."""
    prefix, head, sizes = MODELS[kind]
    config = getattr(transformers, f"{prefix}Config")(**sizes, pad_token_id=0)
    torch.manual_seed(0)
    # The classes of Gemma 3 for text alone are named after the whole, but for the bare model's.
    name = f"{prefix}Model" if bare else f"{prefix.removesuffix('Text')}{head}"
    model: nn.Module = getattr(transformers, name)(config)
    return model


def adapted(kind: str = "llama", *, noise: float = 1.0, seed: int = 0, **options: Any) -> nn.Module:
    """With a LoRA adapter on all linear layers, its B drawn at that size, A as PEFT draws it."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    torch.manual_seed(seed)
    model: nn.Module = get_peft_model(tiny(kind), LoraConfig(**config))
    return drawn(model, noise=noise, seed=seed)


def drawn(model: nn.Module, *, noise: float = 1.0, seed: int = 0) -> nn.Module:
    """Every A and B drawn anew, normal, B of that size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                size = noise if "lora_B" in name else 1.0
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model
