"""transformers' own adapter methods, which use PEFT's layers without a `PeftModel`."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from peft_helpers import NATIVE_REASON, PEFT_IS_TOO_OLD, THIRD_PARTY, config, llama, logits, same, train, weights
from slicefine import movers_of

pytestmark = [
    *THIRD_PARTY,
    pytest.mark.skipif(PEFT_IS_TOO_OLD, reason=NATIVE_REASON),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),  # transformers adds a second one
]


def native(mode: str = "alternate", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = llama(dtype)
    model.add_adapter(config(mode, target_modules=["q_proj", "down_proj"]), adapter_name="first")
    train(model)
    return model


def test_an_added_adapter_trains_and_moves():
    model = native()
    assert (movers_of(model)[0].step, movers_of(model)[0].visits) == (5, 3)
    assert not same(weights(model), weights(llama()))


def test_disabling_restores_the_base_bit_for_bit_and_enabling_the_adapter():
    model = native()
    trained = weights(model), logits(model)
    model.disable_adapters()
    assert same(weights(model), weights(llama()))
    assert torch.equal(logits(model), logits(llama()))
    model.enable_adapters()
    assert same(weights(model), trained[0])
    assert torch.equal(logits(model), trained[1])


def test_two_adapters_switch_exactly_and_the_rest_stays_after_a_deletion():
    model = native()
    first = logits(model)
    model.add_adapter(config("row", target_modules=["v_proj"]), adapter_name="second")
    model.set_adapter("second")
    train(model)
    second = logits(model)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    model.delete_adapter("first")
    assert model.active_adapters() == ["second"]
    assert torch.equal(logits(model), second)
    assert [mover.name for mover in movers_of(model)] == ["second"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_reloads_bit_for_bit(tmp_path: Path, dtype: torch.dtype):
    model = native(dtype=dtype)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert "import slicefine" in (tmp_path / "README.md").read_text()
    found = llama(dtype)
    found.load_adapter(tmp_path, adapter_name="again")
    assert torch.equal(logits(found), logits(model))
    assert movers_of(found)[0].slices() == movers_of(model)[0].slices()
    found.disable_adapters()
    assert same(weights(found), weights(llama(dtype)))


def test_a_loaded_adapter_can_be_trained_further(tmp_path: Path):
    model = native()
    model.save_pretrained(tmp_path)
    found = llama()
    found.load_adapter(tmp_path, adapter_name="first", is_trainable=True)
    for each in (model, found):
        each.train()
        train(each, steps=3)
    assert movers_of(found)[0].step == 8
    assert torch.equal(logits(found), logits(model))


def test_a_folder_with_base_and_adapter_loads_in_one_call(tmp_path: Path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    model.add_adapter(config(target_modules=["q_proj"]))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    found = type(base).from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(found), logits(model))


def test_a_loaded_adapter_misses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    native().save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        llama().load_adapter(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert "MISSING" not in caplog.text
