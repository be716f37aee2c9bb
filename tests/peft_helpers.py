"""Small models and loops that the tests of the PEFT plug-in share."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.integrations import peft as native

from slicefine import SliceFineConfig
from slicefine.peft import SliceFineLinear

# warnings that PEFT and transformers provoke in each other, and which are not about slices
THIRD_PARTY = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
]

# transformers 5.24 wants a version of PEFT that was not released yet for its own adapter methods
PEFT_IS_TOO_OLD = Version(version("peft")) < Version(native.MIN_PEFT_VERSION)
NATIVE_REASON = f"transformers wants peft>={native.MIN_PEFT_VERSION} for it, {version('peft')} is installed"

MODES = ("row", "column", "alternate", "random_mask")
IDS = torch.arange(24).reshape(3, 8) % 29


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """Two Llama layers of width 16; equal seeds give equal weights."""
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    config = LlamaConfig(**{**size, **heads, **tokens, **settings})
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """Two GPT-2 layers of width 16, whose weights are transposed (Conv1D)."""
    torch.manual_seed(0)
    size = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=2, pad_token_id=0)).to(dtype)


def config(mode: str = "alternate", **settings: Any) -> SliceFineConfig:
    """Rank 2 and a move after every second step, unless told otherwise."""
    return SliceFineConfig(**{"r": 2, "mode": mode, "interval": 2, "task_type": "CAUSAL_LM", **settings})


def train(model: nn.Module, steps: int = 5, lr: float = 0.05, ids: Tensor = IDS) -> torch.optim.Optimizer:
    """Plain AdamW on the parameters that want a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return optimizer


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    model.eval()
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits.clone()
    return result


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the base model's own parameters, under the names that they have without PEFT."""
    names = ((n.removeprefix("base_model.model.").replace(".base_layer", ""), p) for n, p in model.named_parameters())
    return {n: p.detach().clone() for n, p in names if "slicefine_" not in n and "modules_to_save" not in n}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of weights have the same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def layers(model: nn.Module) -> Iterator[tuple[str, SliceFineLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, SliceFineLinear):
            yield name, module
