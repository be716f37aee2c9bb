"""Small randomly initialised models in local folders, in place of the hub ids in PEFT's tests.

The folders are numbered: PEFT's tests look for the names of model families in the id, to skip what other methods
cannot do with them.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers as tf

__all__ = ["folder"]

_TOKENS = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BERT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2} | _TOKENS
_LLAMA = _BERT | {"num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False}
_BART = {"d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": 2} | _TOKENS
for _side in ("encoder", "decoder"):
    _BART |= {f"{_side}_layers": 2, f"{_side}_attention_heads": 4, f"{_side}_ffn_dim": 48}

_MODELS = {
    "opt": (
        tf.OPTForCausalLM,
        tf.OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            **_TOKENS,
        ),
    ),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **_TOKENS)),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**_LLAMA)),
    "llama-classifier": (tf.LlamaForSequenceClassification, tf.LlamaConfig(num_labels=3, **_LLAMA)),
    "t5": (
        tf.T5ForConditionalGeneration,
        tf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **_TOKENS),
    ),
    "bart": (tf.BartForConditionalGeneration, tf.BartConfig(**_BART)),
    "bert": (tf.BertModel, tf.BertConfig(max_position_embeddings=64, **_BERT)),
    "roberta": (tf.RobertaModel, tf.RobertaConfig(max_position_embeddings=64, **_BERT)),
    "bert-classifier": (tf.BertForSequenceClassification, tf.BertConfig(num_labels=3, **_BERT)),
    "roberta-classifier": (
        tf.RobertaForSequenceClassification,
        tf.RobertaConfig(num_labels=3, max_position_embeddings=64, **_BERT),
    ),
}


@functools.cache
def folder(name: str) -> str:
    """Build the model ``name``, save it, and return where it lies."""
    cls, config = _MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config)
        for parameter in model.parameters():  # the usual tiny initialisation would hide an adapter's effect
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    path = _root() / str(list(_MODELS).index(name))
    model.save_pretrained(path)
    return str(path)


@functools.cache
def _root() -> Path:
    root = Path(tempfile.gettempdir(), f"slicefine-models-{os.getpid()}")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root
