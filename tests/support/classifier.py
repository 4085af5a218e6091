"""A tiny sequence classifier, whose loss is a mean over its batch, and its collator."""

import torch
from torch import nn
from transformers import DataCollatorWithPadding, LlamaConfig, LlamaForSequenceClassification

from tests.support.tiny import tiny_tokenizer

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3, pad_token_id=0))


def padding() -> DataCollatorWithPadding:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token_id = 0
    return DataCollatorWithPadding(tokenizer)
