"""Big-model loading: what accelerate places on devices works, what it takes away between forwards is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from peft_helpers import THIRD_PARTY, config, layers, llama, logits, same, train, weights
from slicefine import attach, movers_of
from slicefine.errors import UnsupportedError

pytestmark = [
    *THIRD_PARTY,
    pytest.mark.filterwarnings("ignore:Using `disk_offload:UserWarning"),
]
CPU = torch.device("cpu")
PLACES = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


def to_cpu(model: nn.Module, folder: Path) -> None:
    cpu_offload(model, execution_device=CPU)


def to_disk(model: nn.Module, folder: Path) -> None:
    disk_offload(model, str(folder / "weights"), execution_device=CPU)


def last_layer_to_disk(model: nn.Module, folder: Path) -> None:
    places = {**PLACES, "model.layers.0": "cpu", "model.layers.1": "disk"}
    dispatch_model(model, places, main_device="cpu", offload_dir=str(folder / "weights"), force_hooks=True)


OFFLOADS = [to_cpu, to_disk, last_layer_to_disk]
Offload = Callable[[nn.Module, Path], None]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_base_is_refused_and_left_as_it_was(tmp_path: Path, offload: Offload):
    base, expected = llama(), logits(llama())
    offload(base, tmp_path)
    with pytest.raises(UnsupportedError, match="its weight is offloaded .* Load the model without offloading"):
        get_peft_model(base, config())
    assert not list(layers(base))
    with pytest.raises(UnsupportedError, match="its weight is offloaded"):
        attach(base, r=2, interval=2)
    assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_adapter_on_an_offloaded_base_is_applied_or_refused_but_not_left_out(tmp_path: Path, offload: Offload):
    trained = get_peft_model(llama(), config())
    train(trained)
    trained.save_pretrained(tmp_path / "adapter")
    base = llama()
    offload(base, tmp_path)
    if offload is last_layer_to_disk:  # PEFT takes a device map back and, here, finds room for all of it
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), logits(trained))
    else:
        with pytest.raises(UnsupportedError, match="its weight is offloaded"):
            PeftModel.from_pretrained(base, tmp_path / "adapter")


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_model_that_is_offloaded_afterwards_is_refused_then_or_at_its_forward(tmp_path: Path, offload: Offload):
    model = get_peft_model(llama(), config())
    with pytest.raises(UnsupportedError, match=r"layers\.[01]\..*: its weight is offloaded"):
        offload(model.base_model.model, tmp_path)
        logits(model)
    with pytest.raises(UnsupportedError, match="its weight is offloaded"), model.disable_adapter():
        pytest.fail("the originals cannot be put back")


def test_layers_that_stay_on_their_device_can_be_trained_beside_offloaded_ones(tmp_path: Path):
    base = llama()
    last_layer_to_disk(base, tmp_path)
    chosen = {"layers_to_transform": [0], "layers_pattern": "layers"}
    model, plain = get_peft_model(base, config(**chosen)), get_peft_model(llama(), config(**chosen))
    train(model), train(plain)
    assert movers_of(model)[0].visits == movers_of(plain)[0].visits == 3
    torch.testing.assert_close(logits(model), logits(plain))


@pytest.mark.parametrize("wrap_first", [False, True])
def test_a_model_in_one_place_trains_under_dispatch_hooks(wrap_first: bool):
    base, plain = llama(), get_peft_model(llama(), config())
    model = get_peft_model(base, config()) if wrap_first else None
    dispatch_model(base, {"": "cpu"}, main_device="cpu", force_hooks=True)
    model = model or get_peft_model(base, config())
    train(model), train(plain)
    assert same(weights(model), weights(plain))
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("settings", [{"low_cpu_mem_usage": True}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}])
def test_loading_with_a_device_map_or_little_memory_gives_the_same_model(tmp_path: Path, settings: dict[str, Any]):
    llama().save_pretrained(tmp_path / "base")
    trained = get_peft_model(llama(), config())
    train(trained)
    trained.save_pretrained(tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", **settings)
    low = {key: value for key, value in settings.items() if key == "low_cpu_mem_usage"}
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True, **low)
    assert torch.equal(logits(model), logits(trained))
    train(model), train(trained)
    torch.testing.assert_close(logits(model), logits(trained))
    assert same(weights(model.unload()), weights(llama()))


def test_transformers_offloading_to_disk_is_refused(tmp_path: Path):
    llama().save_pretrained(tmp_path / "base")
    places = {**PLACES, "model.layers.0": "cpu", "model.layers.1": "disk"}
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "off"))
    with pytest.raises(UnsupportedError, match="its weight is offloaded"):
        get_peft_model(base, config())
