"""The architectures of the matrix, one line each, at a size that a test can afford.

A base is saved twice: bare, by its base model class, so that the head (and what else the line
calls `head`) is missing as in any pretrained checkpoint; and trained, with a head of three labels.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

VOCAB = 64
NUM_TRAINED_LABELS = 3
# Ids under this one mean something to some architecture (pad, cls, eos); rows have none of them.
FIRST_PLAIN_ID = 5

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 48,
    # Ten times the usual: else the head's bias is most of the answer.
    "initializer_range": 0.2,
}
_DECODER = _SIZES | {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
_DISTILBERT = {
    "vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
    "max_position_embeddings": 48, "initializer_range": 0.2,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCAB, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 48,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DEBERTA = _SIZES | {
    "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
    "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
    "type_vocab_size": 0, "pad_token_id": 0, "pooler_hidden_size": 32,
}  # fmt: skip
_MODERNBERT = _SIZES | {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    "local_attention": 8, "global_attn_every_n_layers": 2, "classifier_pooling": "mean",
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Base:
    """One architecture, and the names that its modules go by.

    Attributes:
        model_type: transformers' name of it.
        config: What its tiny config says.
        attention: The linears that LoRA is commonly put on.
        key_value: Those that IA3 is commonly put on, besides `ffn_out`.
        ffn: First linear of the feed-forward block.
        ffn_out: Last linear of it.
        embedding: The token embeddings.
        layers: Module list that holds the layers.
        logits: Path of the linear whose outputs are the logits.
        head: What an adapter of the bare base must bring besides `classifier` or `score`, which
            PEFT saves by itself.
        pooler: Path of a pooler inside the base, if it has one that the head reads.
        bare: Arguments of the base model class, for the bare form.
        segments: Whether it reads token type ids.
        conv1d: Whether its linears are transformers' Conv1D, whose weight is [in, out].
    """

    name: str
    model_type: str
    config: dict[str, Any] = field(hash=False)
    attention: tuple[str, ...]
    key_value: tuple[str, ...]
    ffn: str
    ffn_out: str
    embedding: str
    layers: str
    logits: str
    head: tuple[str, ...] = ()
    pooler: str | None = None
    bare: dict[str, Any] = field(default_factory=dict, hash=False)
    segments: bool = False
    conv1d: bool = False

    def __repr__(self) -> str:
        return self.name

    def make_config(self, **more: Any) -> PretrainedConfig:
        return AutoConfig.for_model(self.model_type, **self.config | more)

    def save(self, form: str, folder: Path) -> str:
        """Save the random base of a form, the same at every call."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        if form == "bare":
            model = AutoModel.from_config(self.make_config(), **self.bare)
        else:
            config = self.make_config(num_labels=NUM_TRAINED_LABELS)
            model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # as trained; transformers starts with ones and zeros
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(str(folder))
        return str(folder)


_QKV = {"attention": ("query", "value"), "key_value": ("key", "value")}
_BERT = _QKV | {
    "ffn": "intermediate.dense", "ffn_out": "output.dense", "embedding": "word_embeddings",
    "layers": "layer",
}  # fmt: skip
_LLAMA = {
    "attention": ("q_proj", "v_proj"), "key_value": ("k_proj", "v_proj"), "ffn": "up_proj",
    "ffn_out": "down_proj", "embedding": "embed_tokens", "layers": "layers", "logits": "score",
}  # fmt: skip

BASES = (
    Base("bert", "bert", _SIZES, **_BERT, logits="classifier", pooler="pooler", segments=True),
    Base("roberta", "roberta", _SIZES | {"pad_token_id": 1}, **_BERT, logits="classifier.out_proj"),
    Base("xlm-roberta", "xlm-roberta", _SIZES | {"pad_token_id": 1}, **_BERT,
         logits="classifier.out_proj"),
    Base("distilbert", "distilbert", _DISTILBERT, ("q_lin", "v_lin"), ("k_lin", "v_lin"), "lin1",
         "lin2", "word_embeddings", "layer", "classifier", head=("pre_classifier",)),
    Base("electra", "electra", _SIZES | {"embedding_size": 16}, **_BERT,
         logits="classifier.out_proj", segments=True),
    Base("albert", "albert", _SIZES | {"embedding_size": 16}, **_QKV, ffn="ffn",
         ffn_out="ffn_output", embedding="word_embeddings", layers="albert_layers",
         logits="classifier", head=("pooler",), pooler="pooler",
         bare={"add_pooling_layer": False}, segments=True),
    Base("deberta-v3", "deberta-v2", _DEBERTA, ("query_proj", "value_proj"),
         ("key_proj", "value_proj"), "intermediate.dense", "output.dense", "word_embeddings",
         "layer", "classifier", head=("pooler",)),
    Base("deberta-v2-conv", "deberta-v2",
         _DEBERTA | {"conv_kernel_size": 3, "conv_act": "gelu", "type_vocab_size": 2},
         ("query_proj", "value_proj"), ("key_proj", "value_proj"), "intermediate.dense",
         "output.dense", "word_embeddings", "layer", "classifier", head=("pooler",), segments=True),
    Base("deberta-v2-own-keys", "deberta-v2", _DEBERTA | {"share_att_key": False},
         ("query_proj", "value_proj"), ("key_proj", "value_proj"), "intermediate.dense",
         "output.dense", "word_embeddings", "layer", "classifier", head=("pooler",)),
    Base("modernbert", "modernbert", _MODERNBERT, ("Wqkv",), ("Wqkv",), "mlp.Wi", "mlp.Wo",
         "tok_embeddings", "layers", "classifier", head=("head",)),
    Base("mpnet", "mpnet", _SIZES | {"pad_token_id": 1}, ("attn.q", "attn.v"), ("attn.k", "attn.v"),
         "intermediate.dense", "output.dense", "word_embeddings", "layer", "classifier.out_proj"),
    Base("llama", "llama", _DECODER | {"pad_token_id": 0}, **_LLAMA),
    Base("llama-no-pad", "llama", _DECODER, **_LLAMA),
    Base("qwen2", "qwen2", _DECODER | {"pad_token_id": 0}, **_LLAMA),
    Base("qwen3", "qwen3", _DECODER | {"pad_token_id": 0}, **_LLAMA),
    Base("mistral", "mistral", _DECODER | {"pad_token_id": 0, "sliding_window": 8}, **_LLAMA),
    Base("gemma", "gemma", _DECODER | {"pad_token_id": 0}, **_LLAMA),
    Base("gpt2", "gpt2", _GPT2 | {"pad_token_id": 0}, ("c_attn",), ("c_attn",), "c_fc",
         "mlp.c_proj", "wte", "h", "score", conv1d=True),
    Base("gpt2-no-pad", "gpt2", _GPT2, ("c_attn",), ("c_attn",), "c_fc", "mlp.c_proj", "wte", "h",
         "score", conv1d=True),
)  # fmt: skip
BY_NAME = {base.name: base for base in BASES}
