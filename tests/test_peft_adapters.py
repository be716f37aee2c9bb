"""Several adapters on one base: switching, disabling, deleting, merging, combining, copying."""

from __future__ import annotations

import copy
import io
import pickle
import random

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

from peft_helpers import IDS, MODES, THIRD_PARTY, config, layers, llama, logits, same, train, weights
from slicefine import movers_of
from slicefine.errors import ConfigError, UnsupportedError

pytestmark = THIRD_PARTY


def two_adapters(mode: str = "alternate", dtype: torch.dtype = torch.float32) -> PeftModel:
    """A model with a trained adapter "first" and another trained adapter "second", which is active."""
    model = get_peft_model(llama(dtype), config(mode), adapter_name="first")
    train(model)
    model.add_adapter("second", config(mode, positions="random", seed=3))
    model.set_adapter("second")
    train(model, ids=IDS.flip(0) + 1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_unload_restores_everybase_weight_bit_for_bit(mode: str, dtype: torch.dtype):
    before = weights(llama(dtype))
    model = get_peft_model(llama(dtype), config(mode))
    train(model)
    assert not same(weights(model), before)
    base = model.unload()
    assert same(weights(base), before)
    assert not list(layers(base))


@pytest.mark.parametrize("mode", MODES)
def testbase_weights_are_the_originals_wherever_peft_promises_it(mode: str):
    before = weights(llama())
    model = two_adapters(mode)
    second = weights(model)
    with model.disable_adapter():
        assert same(weights(model), before)
    assert same(weights(model), second)
    model.disable_adapter_layers()
    assert same(weights(model), before)
    model.enable_adapter_layers()
    assert same(weights(model), second)


@pytest.mark.parametrize("mode", MODES)
def test_switching_adapters_restores_each_one_exactly(mode: str):
    model = two_adapters(mode)
    second = weights(model), logits(model)
    model.set_adapter("first")
    first = weights(model), logits(model)
    model.set_adapter("second")
    assert same(weights(model), second[0])
    assert torch.equal(logits(model), second[1])
    model.set_adapter("first")
    assert same(weights(model), first[0])
    assert torch.equal(logits(model), first[1])


def test_training_one_adapter_leaves_the_other_alone():
    model = two_adapters()
    model.set_adapter("first")
    expected = logits(model)
    model.set_adapter("second")
    train(model, steps=3)
    model.set_adapter("first")
    assert torch.equal(logits(model), expected)


def test_deleting_the_active_adapter_activates_the_next_and_the_last_one_leaves_the_base():
    before = weights(llama())
    model = two_adapters()
    model.set_adapter("first")
    expected = logits(model)
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="Setting active adapter to first"):
        model.delete_adapter("second")
    assert model.active_adapters == ["first"]
    assert torch.equal(logits(model), expected)
    model.delete_adapter("first")
    assert same(weights(model), before)
    assert movers_of(model) == []


@pytest.mark.parametrize("mode", MODES)
def test_merge_changes_no_output_and_unmerge_restores_the_base(mode: str):
    model = two_adapters(mode)
    expected = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert same(weights(model), weights(llama()))


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload_keeps_the_trained_weights(safe: bool):
    model = two_adapters()
    expected = weights(model), logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    assert same(weights(merged), expected[0])
    assert torch.equal(logits(merged), expected[1])
    assert not any("slicefine" in name for name in merged.state_dict())


def test_merge_and_unload_of_an_inactive_adapter_leaves_the_active_one_out():
    model = two_adapters()
    model.set_adapter("first")
    expected = weights(model)
    model.set_adapter("second")
    assert same(weights(model.merge_and_unload(adapter_names=["first"])), expected)


def test_merging_one_of_two_adapters_on_different_layers_leaves_the_other_out():
    model = get_peft_model(llama(), config(target_modules=["q_proj"]), adapter_name="first")
    train(model)
    model.add_adapter("second", config(target_modules=["down_proj"]))
    model.set_adapter("second")
    train(model)
    expected = weights(model)
    model.set_adapter("first")
    assert same(weights(model.merge_and_unload(adapter_names=["second"])), expected)


def test_safe_merge_refuses_nan_and_changes_nothing():
    model = get_peft_model(llama(), config())
    name, layer = next(layers(model))
    before = weights(llama())
    with torch.no_grad():
        layer.slicefine_active["default"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
        model.merge_and_unload(safe_merge=True)
    with model.disable_adapter():
        assert same(weights(model), before), name


def test_two_active_adapters_add_up_and_cannot_be_trained_together():
    model = two_adapters()
    base = weights(llama())
    model.set_adapter("first")
    first = weights(model)
    model.set_adapter("second")
    second = weights(model)
    model.base_model.set_adapter(["first", "second"])
    both = weights(model)
    for name in base:
        torch.testing.assert_close(both[name] - base[name], (first[name] - base[name]) + (second[name] - base[name]))
    with pytest.raises(UnsupportedError, match="several SliceFine adapters are active"):
        model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_a_weighted_adapter_has_the_weighted_sum_of_the_deltas(mode: str):
    model = get_peft_model(llama(), config(mode), adapter_name="first")
    train(model)
    model.add_adapter("second", config(mode))
    model.set_adapter("second")
    train(model, ids=IDS.flip(0))
    deltas = {name: {a: layer.get_delta_weight(a) for a in layer.states} for name, layer in layers(model)}
    model.add_weighted_adapter(["first", "second"], [0.5, -2.0], "mix")
    assert model.active_adapters == ["second"]
    model.set_adapter("mix")
    for name, layer in layers(model):
        expected = 0.5 * deltas[name]["first"] - 2.0 * deltas[name]["second"]
        torch.testing.assert_close(layer.get_delta_weight("mix"), expected, atol=1e-6, rtol=1e-5)
    train(model, steps=3)  # it can be trained further
    model.set_adapter("second")
    for name, layer in layers(model):
        assert torch.equal(layer.get_delta_weight("second"), deltas[name]["second"])


def test_a_weighted_adapter_takes_over_modules_to_save_and_refuses_a_conflict():
    model = get_peft_model(
        llama(), config(target_modules=["q_proj"], modules_to_save=["lm_head"]), adapter_name="first"
    )
    train(model)
    model.add_adapter("second", config(target_modules=["v_proj"]))
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "mix")
    head = model.base_model.model.lm_head.modules_to_save
    assert torch.equal(head["mix"].weight, head["first"].weight)
    assert model.peft_config["mix"].target_modules == {"q_proj", "v_proj"}
    assert model.peft_config["mix"].modules_to_save == ["lm_head"]
    model.add_adapter("third", config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ConfigError, match="same module with modules_to_save"):
        model.add_weighted_adapter(["first", "third"], [1.0, 1.0], "bad")
    assert "bad" not in model.peft_config


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"combination_type": "svd"}, UnsupportedError, "'linear' is the only combination"),
        ({"adapters": ["first", "nobody"]}, ConfigError, r"unknown: \['nobody'\]"),
        ({"weights": [1.0]}, ConfigError, "got 2 adapters and 1 weights"),
        ({"adapter_name": "first"}, ConfigError, "exists already"),
    ],
)
def test_a_wrong_combination_is_refused(change: dict, error: type[Exception], message: str):
    model = get_peft_model(llama(), config(target_modules=["q_proj"]), adapter_name="first")
    model.add_adapter("second", config(target_modules=["q_proj"]))
    settings = {"adapters": ["first", "second"], "weights": [1.0, 1.0], "adapter_name": "mix"} | change
    with pytest.raises(error, match=message):
        model.add_weighted_adapter(**settings)


@pytest.mark.filterwarnings("ignore:Adapter name '' should not:UserWarning")  # PEFT's
@pytest.mark.parametrize("name", ["half", "keys", "a.b", ""])
def test_names_that_torch_cannot_give_are_refused(name: str):
    with pytest.raises(ConfigError, match=f"adapter '{name}': torch cannot name a parameter so"):
        get_peft_model(llama(), config(target_modules=["q_proj"]), adapter_name=name)
    model = get_peft_model(llama(), config(target_modules=["q_proj"]))
    before = weights(model)
    with pytest.raises(ConfigError, match="torch cannot name a parameter so"):
        model.add_adapter(name, config(target_modules=["q_proj"]))
    assert same(weights(model), before)
    assert list(model.peft_config) == ["default"]


def test_adapters_of_different_rank_cannot_be_combined():
    model = get_peft_model(llama(), config(target_modules=["q_proj"]), adapter_name="first")
    model.add_adapter("second", config(target_modules=["q_proj"], r=3))
    with pytest.raises(ConfigError, match="differ in mode or rank"):
        model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "mix")


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copied_model_moves_by_itself_and_leaves_the_original_alone(how: str):
    model = get_peft_model(llama(), config(interval=2))
    train(model, steps=2)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    before = weights(model), movers_of(model)[0].step
    assert torch.equal(logits(twin), logits(model))
    twin.train()
    train(twin, steps=4)
    assert (movers_of(twin)[0].step, movers_of(twin)[0].visits) == (6, 4)
    assert movers_of(model)[0].step == before[1]
    assert same(weights(model), before[0])
    assert same(weights(twin.unload()), weights(llama()))


def test_an_injected_adapter_trains_and_moves_without_a_peft_model():
    model = inject_adapter_in_model(config("row", interval=2), llama())
    before = weights(llama())
    first = movers_of(model)[0].slices()
    train(model, steps=4)
    assert movers_of(model)[0].visits == 3
    for name, slice_ in movers_of(model)[0].slices().items():
        assert slice_.start == first[name].start + 4
        delta = weights(model)[f"{name}.weight"] - before[f"{name}.weight"]
        assert delta[:4].any(dim=1).all()
        assert not delta[4:].any()


def test_injecting_an_adapter_twice_under_one_name_is_refused_and_harmless():
    model = inject_adapter_in_model(config(), llama())
    train(model)
    before = weights(model)
    with (
        pytest.warns(UserWarning, match="Already found a `peft_config` attribute"),
        pytest.raises(ConfigError, match="adapter 'default' exists already"),
    ):
        inject_adapter_in_model(config(), model)
    assert same(weights(model), before)
    assert movers_of(model)[0].step == 5


def test_a_policy_pass_a_reference_pass_and_backward_give_the_policy_gradients():
    model = get_peft_model(llama(), config())
    train(model, steps=3)
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    policy = model(input_ids=IDS, labels=IDS).loss
    with torch.no_grad(), model.disable_adapter():
        reference = model(input_ids=IDS, labels=IDS).loss
    assert not torch.equal(policy, reference)
    (policy - reference).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in found)


def test_a_thousand_switches_over_five_adapters_leave_every_bit_as_it_was():
    """Random switches, disabling, merging, saving and moves undone and made again, beside dense copies."""
    before = weights(llama())
    model, wanted = None, {}
    for number, mode in enumerate(("row", "column", "alternate", "random_mask", "alternate")):
        name = f"a{number}"
        settings = config(mode, positions="random", seed=number, target_modules=["q_proj", "down_proj"])
        model = get_peft_model(llama(), settings, adapter_name=name) if model is None else model
        if number:
            model.add_adapter(name, settings)
        model.set_adapter(name)
        train(model, 5 + number, ids=(IDS + number) % 29)
        wanted[name] = weights(model)
    assert len({tuple(w.sum().item() for w in state.values()) for state in wanted.values()}) == 5
    chooser, active = random.Random(0), "a4"
    for _ in range(1000):
        action = chooser.choice(["switch", "switch", "switch", "disable", "merge", "undo", "save"])
        if action == "switch":
            active = chooser.choice(list(wanted))
            model.set_adapter(active)
        elif action == "disable":
            with model.disable_adapter():
                assert same(weights(model), before)
        elif action == "merge":
            model.merge_adapter()
            model.unmerge_adapter()
        elif action == "undo":  # the move after the last step, taken back and made again
            (mover,) = (m for m in movers_of(model) if m.name == active)
            mover.move()
            mover.undo()
        else:
            saved = get_peft_model_state_dict(model, adapter_name=active)
            set_peft_model_state_dict(model, saved, adapter_name=active)
        assert same(weights(model), wanted[active])
    assert same(weights(model.unload()), before)
