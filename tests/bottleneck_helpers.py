"""Small models, recorded results of other implementations, and the properties that tests of adapters share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from slicefine.methods import Base, find, options_of
from slicefine.methods.files import load_tensors, save_tensors
from slicefine.methods.prefix import Prefix

FIXTURES = Path(__file__).parent / "fixtures"
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.randint(1, 40, (8, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :2], MASK[2, 4:] = 0, 0


def bert_config(**changes: Any) -> BertConfig:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **{**dropout, **SHAPE, **changes})


def llama_config(**changes: Any) -> LlamaConfig:
    settings = {"num_key_value_heads": 2, "num_labels": 3, "pad_token_id": 0, **SHAPE, **changes}
    return LlamaConfig(vocab_size=40, max_position_embeddings=16, **settings)


def bert() -> Base:
    torch.manual_seed(0)
    return Base(_louder(BertForSequenceClassification(bert_config()).eval()), ("classifier",))


def llama() -> Base:
    torch.manual_seed(0)
    return Base(_louder(LlamaForCausalLM(llama_config()).eval()))


def _louder(model: nn.Module) -> nn.Module:
    """Weights large enough for inputs to matter, as in a trained model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model


def recorded(file: str, part: str) -> dict[str, Tensor]:
    """The tensors of a fixture under a prefix, which is cut off."""
    found = safetensors.torch.load_file(FIXTURES / f"{file}.safetensors")
    return {name.removeprefix(f"{part}."): tensor for name, tensor in found.items() if name.startswith(f"{part}.")}


def recorded_base(family: str) -> Base:
    """The model on which the package `adapters` was run."""
    made = {"bert": BertForSequenceClassification, "llama": LlamaForSequenceClassification}[family]
    config = {"bert": bert_config, "llama": llama_config}[family]()
    model = made(config).eval()
    model.load_state_dict(recorded(f"adapters_{family}", "base"))
    return Base(model, ("classifier" if family == "bert" else "score",))


def build(name: str, base: Base, **given: Any) -> nn.Module:
    method = find(name)
    return method.build(base, options_of(method, given))


def logits(model: nn.Module, mask: Tensor = MASK) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, attention_mask=mask).logits
    return found


def check_trains(name: str, base: Base, folder: Path, **given: Any) -> list[float]:
    """Count, frozen rest, falling loss, and a file that brings the same outputs back, for options of a method."""
    method, fresh = find(name), copy.deepcopy(base)
    options = options_of(method, given)
    expected, head = method.count(base, options), {f"{name}." for name in base.head}
    model = method.build(base, options)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for n, p in trained.items() if not n.startswith(tuple(head) or "\0")) == expected
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in trained}
    losses = steps(model, base, method.groups, options)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert losses[-1] < losses[0]
    save_tensors(model, method, options, folder)
    assert torch.equal(logits(model), logits(load_tensors(fresh, method, folder)))
    return losses


def steps(model: nn.Module, base: Base, factor: Any, options: dict[str, Any], count: int = 20) -> list[float]:
    """Losses of a plain loop."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(factor(name, options) if factor else 1.0, []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": own, "lr": 1e-2 * rate} for rate, own in groups.items()])
    labels = torch.arange(len(IDS)) % 3 if base.head else IDS
    losses = []
    for _ in range(count):
        loss = model(input_ids=IDS, attention_mask=MASK, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def prefixes(model: nn.Module) -> list[Prefix]:
    """All prefixes of a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, Prefix)]


def fill_prefix(model: nn.Module, given: dict[str, Tensor]) -> None:
    """Put the weights of `adapters` into ours: theirs has all layers' keys and values in one matrix."""
    tensors = {name.rpartition("self_prefix.")[2]: name for name in list(given) if "self_prefix." in name}
    own: list[Any] = prefixes(model)
    with torch.no_grad():
        if "control_trans" in tensors:
            whole = given.pop(tensors["control_trans"]).view(own[0].values.values.shape[0], len(own), -1)
            for index, prefix in enumerate(own):
                prefix.values.values.copy_(whole[:, index])
            return
        parts = {name: given.pop(path) for name, path in tensors.items()}
        prompt = own[0].values.prompt
        prompt.states.copy_(parts["wte.weight"])
        prompt.down.weight.copy_(parts["control_trans.0.weight"])
        prompt.down.bias.copy_(parts["control_trans.0.bias"])
        weights, biases = parts["control_trans.2.weight"].chunk(len(own)), parts["control_trans.2.bias"].chunk(len(own))
        for prefix, weight, bias in zip(own, weights, biases, strict=True):
            prefix.values.up.weight.copy_(weight)
            prefix.values.up.bias.copy_(bias)
