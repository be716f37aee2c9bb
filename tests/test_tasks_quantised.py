"""`model.quantize`: what a recipe may ask for, what is loaded, and what is refused."""

from __future__ import annotations

import importlib.util
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cli_helpers import save_bert
from peft_helpers import THIRD_PARTY, config, llama
from slicefine.errors import ConfigError
from slicefine.quantised import format_of
from slicefine.tasks.models import load_model
from slicefine.tasks.settings import ModelSettings
from slicefine.training.settings import BackboneSettings, MethodSettings, TrainSettings

pytestmark = THIRD_PARTY
PACKAGES = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "int8": "torchao"}
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed"))
    for kind, package in PACKAGES.items()
]


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_the_head_is_quantised_and_trains(kind: str, tmp_path: Path):
    from peft import get_peft_model

    llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "llama")
    model = load_model(AutoModelForCausalLM, ModelSettings(path=str(tmp_path / "llama"), quantize=kind)).model
    found = {name for name, module in model.named_modules() if format_of(module) is not None}
    assert len(found) == 14
    assert not any("lm_head" in name for name in found)
    ids = torch.arange(16).reshape(2, 8)
    layer = model.model.layers[0].mlp.up_proj
    values = format_of(layer).dense(layer)
    with torch.no_grad():
        model.eval()(input_ids=ids)  # a run evaluates before it trains
    assert kind != "4bit" or not layer.support_avx512bf16_for_cpu
    assert torch.equal(format_of(layer).dense(layer), values)
    sliced = get_peft_model(model, config("row")).train()
    sliced(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in sliced.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_is_left_as_it_is(kind: str, tmp_path: Path):
    folder = save_bert(tmp_path / "bert")
    settings = ModelSettings(path=str(folder), quantize=kind)
    loaded = load_model(AutoModelForSequenceClassification, settings, num_labels=3)
    assert loaded.new_modules == ["classifier"]
    assert format_of(loaded.model.classifier) is None
    assert format_of(loaded.model.bert.encoder.layer[0].attention.self.query) is not None


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_missing_package_is_named(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    llama().save_pretrained(tmp_path)
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in PACKAGES.values() else known(name)
    )
    with pytest.raises(ConfigError, match=rf"{kind} needs {PACKAGES[kind]}.*pip install \"slicefine\[quant\]\""):
        load_model(AutoModelForCausalLM, ModelSettings(path=str(tmp_path), quantize=kind))


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match="model.quantize='2bit' is unknown; expected one of 4bit, 8bit, int8"):
        ModelSettings(quantize="2bit")
    with pytest.raises(ConfigError, match="starts from random weights; there is nothing to quantise"):
        ModelSettings(quantize="4bit", config={"model_type": "llama"})
    with pytest.raises(ConfigError, match=r"method.name=full changes quantised weights; use slicefine, lora"):
        TrainSettings(model=ModelSettings(quantize="8bit"), method=MethodSettings(name="full"))
    with pytest.raises(ConfigError, match="a quantised model's weights are not changed"):
        TrainSettings(model=ModelSettings(quantize="8bit"), backbone=BackboneSettings(prune=0.5))
