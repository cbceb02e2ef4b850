"""Tokenizers of a few words, and language models whose probabilities can be worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>")
WORDS = (
    "the", "a", "rich", "poor", "man", "woman", "is", "was", "kind", "lazy", "cook", "sings", "fox", "and",
    "then", ".", ",", "to", "be", "or", "not",
)  # fmt: skip
VOCABULARY = len(SPECIAL) + len(WORDS)
# Weights far from zero, so that what a model is given makes a difference.
SPREAD = 0.5
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "initializer_range": SPREAD,
}


def tokenizer(style: str = "causal", start: bool = True) -> PreTrainedTokenizerFast:
    """One id a word. ``"bert"`` adds [CLS] and [SEP]; ``"causal"`` adds nothing, but has <s> if ``start``."""
    words = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if style == "bert":
        inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    elif start:
        special |= {"bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def index(word: str) -> int:
    """A word's id."""
    return (SPECIAL + WORDS).index(word)


class BigramForCausalLM(nn.Module):
    """``p(next | this) = softmax(table[this])``: what came before does not count."""

    def __init__(self, context: int | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=context)
        self.table = nn.Parameter(torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.table[input_ids]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


class BagForMaskedLM(nn.Module):
    """Every position's logits are the sum of table rows over all tokens of its sentence, padding apart."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.table = nn.Parameter(torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        summed = (self.table[input_ids] * attention_mask[:, :, None]).sum(1, keepdim=True)
        return SimpleNamespace(logits=summed.expand(-1, input_ids.shape[1], -1))


def gpt2(context: int = 32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": context}
    return GPT2LMHeadModel(
        GPT2Config(**sizes, bos_token_id=5, eos_token_id=5, initializer_range=SPREAD)
    ).eval()


def llama(context: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=context, **SIZES)).eval()


def masked_bert() -> BertForMaskedLM:
    return BertForMaskedLM(_bert_config()).eval()


def classifying_bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(_bert_config()).eval()


def encoding_bert() -> BertModel:
    return BertModel(_bert_config()).eval()


def _bert_config() -> BertConfig:
    torch.manual_seed(0)
    return BertConfig(max_position_embeddings=32, num_labels=2, **SIZES)
