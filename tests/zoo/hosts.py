"""Models of the library transformers, from configuration."""

import torch

from zoo.attention import INTEGERS
from zoo.entry import Entry, registry

MODELS, model = registry()


@model
def bert() -> Entry:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    inputs = {"input_ids": torch.randint(50, (2, 7)), "labels": torch.tensor([0, 2])}
    rows = ("bert.encoder.layer.1.attention.self.query", "bert.pooler.dense", "classifier")
    return Entry(BertForSequenceClassification(config), inputs, absent=INTEGERS, rows=rows)


@model
def gpt2() -> Entry:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    tokens = torch.randint(50, (2, 7))
    rows = ("transformer.h.1.attn.c_attn", "lm_head")
    return Entry(GPT2LMHeadModel(config), tokens, {"labels": tokens}, absent=INTEGERS, rows=rows)
