"""What users of PEFT methods do out of habit: snapshots, reloads, averages, closures, serving, other optimizers."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from core_helpers import batches, mlp, step
from peft_helpers import IDS, THIRD_PARTY, config, llama, logits, same, train, weights
from slicefine import SliceFineConfig, attach
from slicefine.errors import AdapterFileError, ConfigError, OptimizerError
from slicefine.mover import FOREIGN_STEPS
from slicefine.optimizers import reset_optimizer_state

pytestmark = THIRD_PARTY
ALONE = r"without slicefine_journal.default.*take get_peft_model_state_dict\(model\)"


def other_base() -> nn.Module:
    """The same layers with other weights."""
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def into_base(model: PeftModel, base: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict that brings the sliced layers of ``model`` the weights of ``base``."""
    state = base.state_dict()
    return {
        name: state[name.removeprefix("base_model.model.").replace(".base_layer", "")]
        for name, _ in model.named_parameters()
        if ".base_layer." in name
    }


# -- state dicts ------------------------------------------------------------------------------------------------------


def test_a_snapshot_of_what_requires_gradients_is_refused_after_a_move():
    model = get_peft_model(llama(), config("row", interval=2))
    train(model, steps=3)
    snapshot = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    whole = get_peft_model_state_dict(model)
    before = logits(model)
    with pytest.raises(AdapterFileError, match=ALONE):
        model.load_state_dict(snapshot, strict=False)
    assert torch.equal(logits(model), before)
    fresh = get_peft_model(llama(), config("row", interval=2))
    with pytest.warns(UserWarning, match=ALONE):
        fresh.load_state_dict(snapshot, strict=False)
    set_peft_model_state_dict(fresh, whole)
    assert torch.equal(logits(fresh), before)


def test_such_a_snapshot_is_right_where_slices_stay(recwarn: pytest.WarningsRecorder):
    model = get_peft_model(llama(), config("row", moves=0, interval=None))
    train(model, steps=2)
    snapshot = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    before = logits(model)
    train(model, steps=2)
    assert not torch.equal(logits(model), before)
    model.load_state_dict(snapshot, strict=False)
    assert torch.equal(logits(model), before)
    assert not [warning for warning in recwarn if "slicefine_journal" in str(warning.message)]
    assert same(weights(model.unload()), weights(llama()))


@pytest.mark.parametrize("mode", ["row", "alternate"])
def test_the_bases_own_weights_may_come_again_under_a_trained_adapter(mode: str):
    model = get_peft_model(llama(), config(mode, interval=2))
    train(model, steps=5)
    before = logits(model)
    model.load_state_dict(into_base(model, llama()), strict=False)
    assert torch.equal(logits(model), before)
    model.load_state_dict(into_base(model, llama()), strict=False, assign=True)
    assert torch.equal(logits(model), before)
    assert same(weights(model.unload()), weights(llama()))


def test_weights_that_come_after_the_slices_are_those_that_they_train():
    model = get_peft_model(llama(), config("row", interval=2))
    rest = other_base().state_dict()
    model.load_state_dict(into_base(model, other_base()), strict=False)
    model.get_base_model().load_state_dict(  # norms, embeddings, the output layer
        {name: p for name, p in rest.items() if name in model.get_base_model().state_dict()}, strict=False
    )
    assert torch.equal(logits(model), logits(other_base()))
    twin = get_peft_model(other_base(), config("row", interval=2))
    for each in (model, twin):
        train(each, steps=5)
    assert same(weights(model), weights(twin))
    assert same(weights(model.unload()), weights(other_base()))


@pytest.mark.parametrize("mode", ["row", "column", "alternate", "random_mask"])
@pytest.mark.parametrize("past_versions", [False, True])
def test_an_initialisation_in_place_before_the_first_step_is_what_the_slices_train(mode: str, past_versions: bool):
    model = get_peft_model(llama(), config(mode, interval=2))
    new = other_base()
    with torch.no_grad():
        for name, parameter in model.get_base_model().named_parameters():
            value = dict(new.named_parameters()).get(name.replace(".base_layer", ""))
            if value is not None:
                (parameter.data if past_versions else parameter).copy_(value)
    twin = get_peft_model(other_base(), config(mode, interval=2))
    for each in (model, twin):
        train(each, steps=5)
    assert same(weights(model), weights(twin))
    assert same(weights(model.unload()), weights(other_base()))


def test_a_parameter_that_is_written_before_the_first_step_counts():
    model = mlp()
    tuner = attach(model, mode="row", r=2, interval=10, target_modules=["0"], positions="fixed")
    (x, y) = batches(1)[0]
    (model(x) - y).square().mean().backward()
    (parameter,) = tuner.parameters()
    with torch.no_grad():
        parameter.fill_(0.25)
    gradient = parameter.grad.clone()
    torch.optim.SGD([parameter], lr=0.1).step()
    torch.testing.assert_close(model[0].base_layer.weight[:2], 0.25 - 0.1 * gradient)


# -- averages, closures, optimizers -----------------------------------------------------------------------------------


def test_an_average_made_before_training_keeps_the_base(tmp_path: Path):
    model = get_peft_model(llama(), config("row", moves=0, interval=None))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        found = logits(average.module)
    average.module.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), found)
    assert same(weights(average.module.unload()), weights(llama()))
    assert same(weights(model.unload()), weights(llama()))


@pytest.mark.filterwarnings("ignore:SliceFine. a step after step")
def test_steps_are_left_out_where_a_closure_makes_the_gradients():
    def loss_of(model: nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean() * scale
        loss.backward()
        return loss

    runs = []
    for bad in ((), (1, 3)):
        model = mlp(dtype=torch.float32)
        tuner = attach(model, r=2, mode="row", interval=2, on_nonfinite="skip")
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.01)
        good = iter(batches(5, dtype=torch.float32))
        for number in range(5 + len(bad)):
            x, y = next(good) if number not in bad else batches(1, dtype=torch.float32)[0]
            scale = float("nan") if number in bad else 1.0

            closure = partial(loss_of, model, optimizer, x, y, scale)
            loss = optimizer.step(closure) if number % 2 else optimizer.step(closure=closure)
            assert bool(torch.isfinite(loss)) == (number not in bad)
        assert (tuner.mover.step, tuner.mover.skipped, tuner.mover.visits) == (5, len(bad), 3)
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_state_that_takes_no_zeros_is_dropped_at_a_move():
    """torchao's optimizers keep quantised states, which look like floating-point tensors and are none."""
    states = pytest.importorskip("torchao.optim.subclass_8bit", reason="the extra quant is not installed")
    parameter = nn.Parameter(torch.zeros(8, 512))
    optimizer = torch.optim.AdamW([parameter])
    quantised = states.OptimState8bit.zeros(parameter.shape)
    optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": quantised}
    reset_optimizer_state(optimizer, parameter)
    assert parameter not in optimizer.state


def test_a_head_may_be_trained_first_with_an_optimizer_of_its_own():
    model = mlp(dtype=torch.float32)
    tuner = attach(model, target_modules=["0"], r=2, mode="row", interval=2, train_rest=True)
    head = torch.optim.SGD(model[4].parameters(), lr=0.1)
    slices = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for x, y in batches(2 * FOREIGN_STEPS, dtype=torch.float32):
        step(model, head, x, y)
    assert tuner.mover.step == 0
    step(model, slices, *batches(1, dtype=torch.float32)[0])
    assert tuner.mover.step == 1
    del slices
    lonely = attach(mlp(dtype=torch.float32), target_modules=["0"], r=2, mode="row", interval=2, train_rest=True)
    head = torch.optim.SGD(lonely.model[4].parameters(), lr=0.1)
    with pytest.raises(OptimizerError, match="no optimizer holds the slices' parameters"):
        for x, y in batches(FOREIGN_STEPS, dtype=torch.float32):
            step(lonely.model, head, x, y)


# -- switching, compiling, serving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["disabled", "merged"])
def test_backward_after_a_switch_is_refused(how: str):
    model = get_peft_model(llama(), config("row", interval=2))
    train(model, steps=3)
    inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
    if how == "disabled":
        with model.disable_adapter():
            loss = model(inputs_embeds=inputs, labels=IDS).loss
    else:
        model.merge_adapter()
        loss = model(inputs_embeds=inputs, labels=IDS).loss
        model.unmerge_adapter()
        with model.disable_adapter():
            model(input_ids=IDS)
            with pytest.raises(RuntimeError, match="weight"):
                loss.backward()
        return
    with pytest.raises(RuntimeError, match="weight"):
        loss.backward()


def test_what_is_written_into_parameters_reaches_a_compiled_forward():
    model = get_peft_model(llama(), config("row", interval=2)).eval()
    compiled = torch.compile(model, backend="eager")
    before = logits(compiled)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    compiled.eval()
    after = logits(compiled)
    assert not torch.equal(after, before)
    assert torch.equal(after, logits(model))


def test_an_adapter_is_loaded_under_inference_mode_and_trained_later(tmp_path: Path):
    model = get_peft_model(llama(), config("alternate", interval=2))
    train(model, steps=3)
    model.save_pretrained(tmp_path)
    base = llama()
    with torch.inference_mode():
        again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
        found = again(input_ids=IDS).logits
    assert torch.equal(found.clone(), logits(model))
    train(again, steps=3)
    assert same(weights(again.unload()), weights(llama()))


def test_a_default_device_does_not_reach_into_the_bookkeeping():
    """The meta device stands in for a GPU: what is made without a device would have no values."""
    tuners = []
    for device in ("cpu", "meta"):
        model = mlp(dtype=torch.float32)
        with torch.device(device):
            tuner = attach(model, r=2, mode="alternate", positions="random", interval=2)
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        for x, y in batches(5, dtype=torch.float32):
            loss = (model(x) - y).square().mean()
            with torch.device(device):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                history = [layer.states["default"].journal.history(layer.shape) for layer in tuner.layers.values()]
        assert all(part.device.type == "cpu" for parts in history for part in parts if part is not None)
        tuners.append(tuner)
    assert same(tuners[0].model.state_dict(), tuners[1].model.state_dict())


# -- settings ---------------------------------------------------------------------------------------------------------


def test_numpys_numbers_are_numbers(tmp_path: Path):
    names = ["model.layers.0.self_attn.q_proj"]
    order = np.argsort(np.array([3.0, 1.0, 2.0]))
    settings = {"positions": {names[0]: {"row": list(order)}}, "seed": np.int64(3), "mask_fraction": np.float32(0.1)}
    model = get_peft_model(llama(), SliceFineConfig(r=2, mode="row", interval=2, target_modules=names, **settings))
    train(model, steps=3)
    model.save_pretrained(tmp_path)
    read = SliceFineConfig.from_pretrained(tmp_path)
    assert (read.positions, read.seed) == ({names[0]: {"row": [1, 2, 0]}}, 3)
    with pytest.raises(ConfigError, match="seed=0.5 must be an integer"):
        SliceFineConfig(seed=0.5)


def test_a_configuration_that_was_saved_begins_another_training(tmp_path: Path):
    model = get_peft_model(llama(), config("alternate", interval=2))
    train(model, steps=5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    for used in (model.peft_config["default"], again.peft_config["default"]):
        used = copy.deepcopy(used)
        used.inference_mode = False
        fresh = get_peft_model(llama(), used)
        journal = next(t for name, t in fresh.state_dict().items() if "slicefine_journal" in name)
        assert journal.tolist()[0][3:5] == [1, 0]
        train(fresh, steps=3)
