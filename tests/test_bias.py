"""Biases and norms that are trained whole beside the slices."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import GPT2LMHeadModel, GPT2Model, Trainer, TrainingArguments

from peft_helpers import IDS, THIRD_PARTY, config, gpt2, llama, logits, same, train, weights
from slicefine import attach, delta_since
from slicefine.cli import main
from slicefine.errors import AdapterFileError, ConfigError, NumericalError, UnsupportedError
from slicefine.files.adapter import read_adapter, seal
from slicefine.files.checkpoint import Checkpoint
from slicefine.files.compose import compose
from slicefine.files.export import export_lora
from slicefine.files.merge import merge_files

pytestmark = THIRD_PARTY

KINDS = ("all", "slicefine_only")
TARGETS = ["c_attn", "c_fc"]


def biased(bias: str = "all", mode: str = "alternate", **settings) -> PeftModel:
    return get_peft_model(gpt2(), config(mode, bias=bias, target_modules=TARGETS, **settings))


def biases(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights(model).items() if name.endswith("bias")}


def wanted(bias: str) -> set[str]:
    """Names of the biases that an adapter trains."""
    return {name for name in biases(gpt2()) if bias == "all" or any(target in name for target in TARGETS)}


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("bias", KINDS)
def test_biases_train_beside_the_slices_as_any_parameter_does(bias, additive):
    """The twin has the same slices, and its biases are plain parameters that nobody looks after."""
    twin = gpt2()
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in wanted(bias))
    tuner = attach(twin, target_modules=TARGETS, r=2, interval=2, train_rest=True, additive=additive)
    model = biased(bias, additive=additive)
    found = {n for n, p in model.named_parameters() if p.requires_grad and "slicefine_" not in n}
    assert {n.removeprefix("base_model.model.").replace(".base_layer", "") for n in found} == wanted(bias)
    for each in (twin, model):
        train(each.eval(), 7)  # without dropout
    assert tuner.mover.visits == 4
    assert same(weights(model), weights(twin))
    plain = biases(gpt2())
    assert {name for name, tensor in biases(model).items() if not torch.equal(tensor, plain[name])} == wanted(bias)


@pytest.mark.parametrize("bias", KINDS)
def test_originals_return_bit_for_bit_wherever_the_slices_do(bias):
    before, model = weights(gpt2()), biased(bias)
    train(model)
    trained = weights(model)
    with warnings.catch_warnings(), model.disable_adapter():
        assert same(weights(model), before)
        assert not any(p.requires_grad for p in model.parameters())
    assert same(weights(model), trained)
    model.merge_adapter()
    assert same(weights(model), trained)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias"))
    model.unmerge_adapter()
    assert same(weights(model), trained)
    train(model, 1)  # and they go on training
    assert set(moved(model, trained)) == wanted(bias)
    assert same(weights(copy.deepcopy(model).unload()), before)
    last = weights(model)
    assert same(weights(copy.deepcopy(model).merge_and_unload()), last)
    model.add_adapter("other", config(target_modules=["c_proj"]))
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    assert same(weights(model), before)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias"))


def moved(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in biases(model).items() if not torch.equal(tensor, before[name])]


@pytest.mark.parametrize("bias", KINDS)
def test_each_adapter_shows_its_own_biases(bias):
    before, model = weights(gpt2()), biased(bias)
    train(model)
    first = weights(model)
    model.add_adapter("plain", config(target_modules=["c_proj", "c_attn"]))
    assert same(weights(model), first)
    model.set_adapter("plain")
    assert biases(model).keys() == biases(gpt2()).keys()
    assert same(biases(model), biases(gpt2()))
    train(model)
    assert same(biases(model), biases(gpt2()))  # frozen under the other adapter
    model.set_adapter("default")
    assert same(weights(model), first)
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias"))
    model.set_requires_grad("default", True)
    assert {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    assert same(weights(model.unload()), before)


def test_a_second_adapter_with_biases_is_refused_as_in_lora():
    lora = get_peft_model(gpt2(), LoraConfig(target_modules=TARGETS, bias="all", fan_in_fan_out=True))
    model = biased()
    before = weights(model)
    for each, second in ((lora, LoraConfig(bias="all", fan_in_fan_out=True)), (model, config(bias="slicefine_only"))):
        with pytest.raises(ValueError, match=re.escape("supports only 1 adapter with bias. When using multiple")):
            each.add_adapter("second", second)
    assert same(weights(model), before)
    assert list(model.peft_config) == ["default"]
    model.add_adapter("second", config())  # one without is not
    with pytest.raises(UnsupportedError, match="'default' trains biases, which one adapter of a model alone may have"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("bias", KINDS)
def test_files_carry_them_under_lora_s_names(tmp_path: Path, bias, active):
    model = biased(bias)
    train(model)
    trained = weights(model)
    if not active:  # saved and loaded while another adapter is in the weights
        model.add_adapter("plain", config())
        model.set_adapter("plain")
    model.save_pretrained(tmp_path / "a", selected_adapters=["default"])
    lora = get_peft_model(
        gpt2(), LoraConfig(target_modules=TARGETS, bias=bias.replace("slicefine", "lora"), fan_in_fan_out=True)
    )
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {k for k in tensors if ".slicefine_" not in k} == {
        k for k in get_peft_model_state_dict(lora) if ".lora_" not in k
    }
    again = PeftModel.from_pretrained(gpt2(), tmp_path / "a")
    assert same(weights(again), trained)
    assert not any(p.requires_grad for p in again.parameters())
    assert same(weights(again.unload()), weights(gpt2()))
    both = get_peft_model(gpt2(), config(target_modules=["c_proj"]), adapter_name="plain")
    both.load_adapter(tmp_path / "a", "late", is_trainable=True)
    assert same(weights(both), weights(gpt2()))
    both.set_adapter("late")
    assert same(weights(both), trained)
    train(both, 1)
    assert set(moved(both, trained)) == wanted(bias)


def test_a_snapshot_in_memory_goes_back(tmp_path: Path):
    model = biased()
    train(model, 3)
    trained, snapshot = weights(model), copy.deepcopy(get_peft_model_state_dict(model))
    train(model, 4)
    assert not same(biases(model), {n: t for n, t in trained.items() if n.endswith("bias")})
    set_peft_model_state_dict(model, snapshot)
    assert same(weights(model), trained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key, t: None if key.endswith("ln_f.bias") else (key, t), "lacks the bias transformer.ln_f.bias"),
        (lambda key, t: (key, t[1:] if key.endswith("ln_f.bias") else t), r"ln_f.bias has shape \(15,\), expected"),
        (
            lambda key, t: (key.replace("h.1.ln_1", "h.7.ln_1"), t),
            r"lacks the bias transformer.h.1.ln_1.bias \(1 in all\)",
        ),
    ],
)
def test_a_file_of_another_model_is_refused_before_anything_changes(tmp_path: Path, change, message):
    model = biased()
    train(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    kept = [change(key, tensor) for key, tensor in load_file(file).items()]
    save_file(dict(pair for pair in kept if pair is not None), file, metadata={"format": "pt"})
    seal(tmp_path)
    fresh = gpt2()
    before = weights(fresh)
    with pytest.raises(AdapterFileError, match=message):
        PeftModel.from_pretrained(fresh, tmp_path)
    assert same(biases(fresh), {n: t for n, t in before.items() if n.endswith("bias")})


def test_a_bias_that_the_model_lacks_is_named(tmp_path: Path):
    model = get_peft_model(llama(attention_bias=True), config(bias="all"))
    train(model)
    model.save_pretrained(tmp_path)
    other = llama(attention_bias=True)
    other.model.layers[0].self_attn.q_proj.bias = None
    with pytest.raises(AdapterFileError, match=r"has the bias model.layers.0.self_attn.q_proj.bias .* here has none"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("bias", KINDS)
def test_lora_of_others_takes_them_over(tmp_path: Path, bias):
    gpt2().save_pretrained(tmp_path / "base")
    model = biased(bias)
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    with Checkpoint(tmp_path / "base") as base:
        export_lora(adapter, base, tmp_path / "lora")
        for runtime in ("vllm", "llama.cpp"):
            with pytest.raises(UnsupportedError, match=f"{runtime} loads no tensors beside the factors"):
                export_lora(adapter, base, tmp_path / runtime, to=runtime)
    written = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert written["bias"] == bias.replace("slicefine", "lora")
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "lora")
    assert same(biases(loaded), biases(model))
    assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-4)  # sums of factors, in another order


@pytest.mark.parametrize("bias", KINDS)
def test_files_of_the_base_take_them_in(tmp_path: Path, bias):
    gpt2().save_pretrained(tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(bias=bias, target_modules=TARGETS))
    train(model)
    model.save_pretrained(tmp_path / "a")
    assert main(["merge", "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "m")]) == 0
    assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(tmp_path / "m")), logits(model))


def test_a_prefix_before_the_base_s_names_is_let_pass(tmp_path: Path):
    gpt2().transformer.save_pretrained(tmp_path / "base")
    model = biased()
    train(model)
    model.save_pretrained(tmp_path / "a")
    with Checkpoint(tmp_path / "base") as base:
        merge_files(read_adapter(tmp_path / "a"), base, tmp_path / "m")
    found = GPT2Model.from_pretrained(tmp_path / "m").state_dict()
    assert same(found, model.merge_and_unload().transformer.state_dict())


def test_a_composed_adapter_has_the_biases_of_one(tmp_path: Path):
    gpt2().save_pretrained(tmp_path / "base")
    for name, bias, positions in (("a", "none", [0, 2]), ("b", "all", [4, 6])):
        model = biased(bias, "row", positions=positions)
        train(model, 3)
        model.save_pretrained(tmp_path / name)
    with Checkpoint(tmp_path / "base") as base:
        found = compose([read_adapter(tmp_path / name) for name in ("a", "b")], base)
    assert found.config["bias"] == "all"
    assert {k.rpartition(".")[2] for k in found.others} == {"bias"}


def test_what_cannot_be_done_is_a_sentence(tmp_path: Path):
    with pytest.raises(ConfigError, match="bias='lora_only' is unknown; expected one of none, all, slicefine_only"):
        config(bias="lora_only")
    with pytest.warns(UserWarning, match="bias='all' trains nothing here: LlamaForCausalLM has no such biases"):
        get_peft_model(llama(), config(bias="all"))
    with torch.device("meta"):
        empty = gpt2()
    with pytest.raises(UnsupportedError, match="bias has no values yet"):
        get_peft_model(empty, config(bias="all"))
    model = biased("slicefine_only")
    train(model)
    for trains in (True, False):
        model.set_requires_grad("default", trains)
        with pytest.raises(UnsupportedError, match=r"c_attn.base_layer.bias is trained, too, and not by slices"):
            delta_since(model, 0)
    assert all(name.endswith("weight") for name in delta_since(model, 0, slices_only=True))
    model.base_model.model.transformer.h[0].attn.c_attn.base_layer.bias.data[0] = torch.nan
    with pytest.raises(NumericalError, match="c_attn.base_layer.bias"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)


def test_a_failing_adapter_leaves_frozen_biases_frozen():
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), second=nn.Linear(4, 4))).requires_grad_(False)
    with pytest.raises(ConfigError, match="window|number"):
        get_peft_model(model, config(bias="all", target_modules=["first"], task_type=None, window=1))
    assert not any(p.requires_grad for p in model.parameters())


def test_a_backward_may_come_after_the_adapter_was_off_for_a_while():
    """As where a reference model is the same one with its adapter disabled."""
    grads = []
    for between in (False, True):
        model = biased().eval()
        train(model, 1)
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        if between:
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=IDS)
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any(name.endswith("ln_f.bias") for name in grads[0])
    assert same(*grads)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path):
    def run(folder: Path, resume: Path | None = None) -> dict[str, Tensor]:
        model = biased(total_steps=6)
        settings = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.02}
        arguments = TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **settings)
        rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume and str(resume))
        return weights(model)

    whole = run(tmp_path / "whole")
    assert same(run(tmp_path / "again", tmp_path / "whole" / "checkpoint-3"), whole)
    assert not same(biases(gpt2()), {name: tensor for name, tensor in whole.items() if name.endswith("bias")})


def test_a_new_head_s_own_bias_is_trained_once():
    model = biased(modules_to_save=["ln_f"])
    names = {n for n, p in model.named_parameters() if p.requires_grad and "ln_f" in n}
    inside = "base_model.model.transformer.ln_f.modules_to_save.default."
    assert names == {f"{inside}weight", f"{inside}bias"}
    assert sum("ln_f" in key for key in get_peft_model_state_dict(model)) == 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.attention(x, x, x, need_weights=False)[0])
        return y


@pytest.mark.parametrize("bias", KINDS)
def test_packed_attention_has_two(tmp_path: Path, bias):
    model = get_peft_model(Attention(), config(bias=bias, target_modules="all-linear", task_type=None))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randn(2, 4, 8)).square()[..., 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = {"attention.in_proj_bias", "attention.out_proj.bias"} | ({"norm.bias"} if bias == "all" else set())
    assert set(moved(model, weights(Attention()))) == expected
    model.save_pretrained(tmp_path)
    assert same(weights(PeftModel.from_pretrained(Attention(), tmp_path)), weights(model))
    assert same(weights(model.unload()), weights(Attention()))


def test_norms_train_as_modules_to_save(tmp_path: Path):
    model = get_peft_model(gpt2(), config(target_modules=TARGETS, modules_to_save=["ln_1", "ln_2", "ln_f"]))
    train(model, 3)
    plain = {n: p for n, p in gpt2().named_parameters() if ".ln_" in n}
    assert len(plain) == 10
    now = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    for name, tensor in plain.items():
        module, _, parameter = name.rpartition(".")
        assert not torch.equal(now[f"{module}.modules_to_save.default.{parameter}"], tensor), name
        assert torch.equal(now[f"{module}.original_module.{parameter}"], tensor), name
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), logits(model))


def test_norms_train_with_train_rest():
    model = gpt2()
    norms = {n for n, _ in model.named_parameters() if ".ln_" in n}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in norms)
    attach(model, target_modules=TARGETS, r=2, mode="row", positions="fixed", interval=2, train_rest=True)
    train(model, 3)
    before, after = weights(gpt2()), weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == norms | {n for n in before if any(f"{t}.weight" in n for t in TARGETS)}
