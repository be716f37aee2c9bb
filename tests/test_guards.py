"""NaN is found and can be taken back; a write by somebody else is found before a wrong delta is saved."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from core_helpers import batches, mlp, step
from peft_helpers import THIRD_PARTY, config, layers, llama, train, weights
from slicefine import (
    ContentError,
    NumericalError,
    SliceFineCallback,
    UnsupportedError,
    accept_weights,
    attach,
    movers_of,
)
from slicefine.errors import ConfigError
from slicefine.fingerprint import fingerprint
from slicefine.mover import SKIPS_IN_A_ROW
from slicefine.pace import MoveSettings

pytestmark = THIRD_PARTY

OPTIMIZERS = {
    "SGD": lambda p, **kind: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, **kind),
    "AdamW": lambda p, **kind: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, **kind),
}
WAYS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def make(**settings):
    model = mlp()
    return model, attach(model, **{"mode": "alternate", "r": 2, "interval": 3, **settings})


def run(model, optimizer, count, seed=1):
    for x, y in batches(count, seed):
        step(model, optimizer, x, y)


def spoil(tuner, number=1, value=math.nan):
    """What a bad step leaves: a parameter that is not finite, and in the weight, too."""
    with torch.no_grad():
        tuner.parameters()[number][0, 0] = value
    list(tuner.layers.values())[number].settle("default")


def dense(tuner):
    return {name: layer.dense().clone() for name, layer in tuner.layers.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- NaN --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["row", "alternate", "random_mask"])
def test_the_visit_can_begin_again_after_nan(mode, tmp_path):
    model, tuner = make(mode=mode)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.01)
    run(model, optimizer, 3)
    good, places = dense(tuner), tuner.mover.slices()
    run(model, optimizer, 2, seed=2)
    spoil(tuner)
    with pytest.raises(NumericalError, match=r"'default', steps 4 to 6: the active slice of \d .*restart\(\)"):
        run(model, optimizer, 1, seed=3)
    assert tuner.mover.visits == 2
    tuner.restart()
    assert same(dense(tuner), good)
    assert tuner.mover.slices() == places
    assert (tuner.mover.step, tuner.mover.visits) == (3, 2)
    assert all(bool((v == 0).all()) for p in tuner.parameters() for v in optimizer.state[p].values())
    tuner.save(tmp_path / "good.safetensors")
    run(model, optimizer, 3, seed=4)
    assert (tuner.mover.step, tuner.mover.visits) == (6, 3)
    with tuner.disabled():
        assert same(dense(tuner), {name: mlp().get_submodule(name).weight.detach() for name in tuner.layers})


def test_a_restart_keeps_start_values_and_forgets_a_ramp():
    model, tuner = make(start_values="zero", state_policy="rewarm", rewarm_steps=9)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.05)
    run(model, optimizer, 5)
    tuner.restart()
    assert all(not layer.block("default").any() for layer in tuner.layers.values())
    assert all(layer.states["default"].previous is None for layer in tuner.layers.values())


def test_a_restart_after_a_file_was_loaded(tmp_path):
    model, tuner = make(mode="alternate")
    run(model, torch.optim.SGD(tuner.parameters(), lr=0.05), 6)
    good = dense(tuner)
    run(model, torch.optim.SGD(tuner.parameters(), lr=0.05), 1, seed=2)
    tuner.save(tmp_path / "slices.safetensors")
    _, other = make(mode="alternate")
    other.load(tmp_path / "slices.safetensors")
    assert not same(dense(other), good)
    other.restart()
    assert same(dense(other), good)


def test_a_restart_without_history_is_refused():
    _, tuner = make(history=0)
    with pytest.raises(UnsupportedError, match="restart: the history does not hold.*Raise `history`"):
        tuner.restart()
    _, tuner = make()
    with tuner.disabled(), pytest.raises(ConfigError, match="the active adapters are"):
        tuner.restart()


def test_nan_is_found_at_logging_after_an_undo():
    model, tuner = make()
    run(model, torch.optim.SGD(tuner.parameters(), lr=0.05), 5)
    tuner.mover.note(loss=0.5)
    tuner.undo()
    spoil(tuner)
    with pytest.raises(NumericalError, match="steps 3 to 3: the active slice of 2"):
        tuner.mover.note(loss=0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_is_found_at_logging(value):
    model, tuner = make(interval=100)
    run(model, torch.optim.SGD(tuner.parameters(), lr=0.05), 2)
    tuner.mover.note(loss=0.5)
    run(model, torch.optim.SGD(tuner.parameters(), lr=0.05), 2)
    spoil(tuner, 2, value)
    with pytest.raises(NumericalError, match=r"steps 3 to 4: the active slice of 4 is NaN or infinite \(1 of 3"):
        tuner.mover.note(loss=0.5)


def test_a_value_that_the_weights_precision_cannot_hold_is_infinite():
    model = mlp(dtype=torch.float16)
    tuner = attach(model, mode="row", r=1, interval=100)
    spoil(tuner, 0, 1e6)
    assert tuner.parameters()[0].isfinite().all()
    with pytest.raises(NumericalError, match="the active slice of 0 is NaN or infinite"):
        tuner.move()


def test_nothing_is_saved_or_merged_with_nan(tmp_path):
    model, tuner = make()
    run(model, torch.optim.SGD(tuner.parameters(), lr=0.05), 4)
    path = tmp_path / "slices.safetensors"
    tuner.save(path)
    before = path.read_bytes()
    spoil(tuner)
    with pytest.raises(NumericalError, match=r"save .*slices.safetensors: 2\.slicefine_\w+ .*nothing is written"):
        tuner.save(path)
    with pytest.raises(NumericalError, match="unload: 2 "):
        tuner.unload(merge=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["slices.safetensors"]
    tuner.restart()
    tuner.save(path)


def test_peft_and_trainers_callback_find_nan(tmp_path):
    model = get_peft_model(llama(), config("row", interval=100))
    train(model, 2)
    callback = SliceFineCallback()
    state = SimpleNamespace(global_step=2, max_steps=10, log_history=[])
    callback.on_log(None, state, None, {"loss": 1.0}, model)
    layer = dict(layers(model))["base_model.model.model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        layer.slicefine_active["default"][1, 1] = math.nan
    train(model, 1)
    with pytest.raises(NumericalError, match=r"step 3|steps 3 to 3"):
        callback.on_log(None, state, None, {"loss": 1.0}, model)
    with pytest.raises(NumericalError, match=r"save adapter 'default': .*slicefine_active.* nothing is written"):
        model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*.safetensors"))
    movers_of(model)[0].restart()
    model.save_pretrained(tmp_path / "adapter")


# -- steps that are left out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_with_nan_gradients_is_left_out(name, way):
    """The run equals one that never saw the bad batches, bit for bit, and so does a head in the same optimizer."""
    runs = []
    for bad in ([], [1, 4]):
        model = mlp(dtype=torch.float32)
        model.append(nn.Linear(5, 5))
        tuner = attach(model, target_modules=["0", "2", "4"], r=2, interval=2, train_rest=True, on_nonfinite="skip")
        for parameter in model[:5].parameters():
            parameter.requires_grad_(False)
        own = [*tuner.parameters(), *model[5].parameters()]
        for parameter in own:
            parameter.requires_grad_(True)
        optimizer = OPTIMIZERS[name](own, **WAYS[way])
        good = iter(batches(6, dtype=torch.float32))
        for number in range(6 + len(bad)):
            if number in bad:
                with pytest.warns(UserWarning, match=r"after step \d had NaN or infinite gradients and was left out"):
                    step(model, optimizer, *(t * math.nan for t in batches(1, dtype=torch.float32)[0]))
            else:
                step(model, optimizer, *next(good))
        assert (tuner.mover.skipped, tuner.mover.step, tuner.mover.visits) == (len(bad), 6, 4)
        runs.append([*dense(tuner).values(), *model[5].state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.filterwarnings("ignore:SliceFine. a step after step")
def test_leaving_steps_out_ends_somewhere():
    model, tuner = make(on_nonfinite="skip")
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    before = dense(tuner)
    bad = [tuple(t * math.inf for t in batches(1)[0])] * SKIPS_IN_A_ROW
    with pytest.raises(NumericalError, match=f"after step 0: {SKIPS_IN_A_ROW} steps in a row"):
        for x, y in bad:
            step(model, optimizer, x, y)
    assert tuner.mover.skipped == SKIPS_IN_A_ROW
    assert same(dense(tuner), before)
    with pytest.raises(ConfigError, match="on_nonfinite='stop' is unknown; expected raise or skip"):
        MoveSettings(on_nonfinite="stop")


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled before"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_that_grad_scaler_skips_do_not_count(name, way, unscale):
    """With the scaler the run equals the one without the skipped batches."""
    runs = []
    for bad in ([], [0, 3, 4]):
        model = mlp(dtype=torch.float32)
        tuner = attach(model, r=2, interval=2)
        optimizer = OPTIMIZERS[name](tuner.parameters(), **WAYS[way])
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, backoff_factor=0.5, growth_interval=1000)
        good = iter(batches(6, dtype=torch.float32))
        for number in range(6 + len(bad)):
            x, y = batches(1, dtype=torch.float32)[0] if number in bad else next(good)
            optimizer.zero_grad()
            scaler.scale((model(x) - y).square().mean()).backward()
            if number in bad:
                tuner.parameters()[1].grad[0, 0] = math.inf
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert (tuner.mover.step, tuner.mover.visits) == (6, 4)
        runs.append(list(dense(tuner).values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# -- writes by somebody else ------------------------------------------------------------------------------------------


def past_the_counter(weight):
    weight.data[0, -1] += 1e-12


def in_place(weight):
    with torch.no_grad():
        weight[0, -1].mul_(1.5)


def an_optimizer_of_all(weight):
    weight.requires_grad_(True)
    weight.grad = torch.zeros_like(weight)
    torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1).step()
    weight.grad = None
    weight.requires_grad_(False)


@pytest.mark.parametrize("write", [past_the_counter, in_place, an_optimizer_of_all])
def test_a_write_by_somebody_else_is_found_before_anything_leaves(write, tmp_path):
    model, tuner = make(mode="column", positions=[0, 1])
    run(model, torch.optim.SGD(tuner.parameters(), lr=0.05), 4)
    path, now, weight = tmp_path / "slices.safetensors", dense(tuner), tuner.layers["2"].base_weight
    write(weight)
    found = dense(tuner)
    for action in (lambda: tuner.save(path), tuner.unload, lambda: tuner.unload(merge=True)):
        with pytest.raises(ContentError, match=r"changed entries of the weight of 2 \(1 layers.*accept_weights"):
            action()
    assert not list(tmp_path.iterdir())
    assert same(dense(tuner), found)
    weight.data.copy_(now["2"])
    tuner.save(path)
    write(weight)
    accept_weights(model)
    tuner.save(path)
    run(model, torch.optim.SGD(tuner.parameters(), lr=0.05), 1)
    tuner.save(path)
    past_the_counter(weight)
    with pytest.raises(ContentError, match="save"):
        tuner.save(path)


def test_a_move_finds_a_counted_write_and_moves_no_layer():
    model, tuner = make(mode="column", positions=[0, 1])
    run(model, torch.optim.SGD(tuner.parameters(), lr=0.05), 2)
    in_place(tuner.layers["4"].base_weight)
    with pytest.raises(ContentError, match="move: since training began, .* of 4 "):
        tuner.move()
    assert tuner.mover.visits == 1


def test_peft_finds_another_method_that_merges_into_the_weight(tmp_path):
    model = get_peft_model(llama(), config("column", target_modules=["up_proj"]))
    train(model, 3)
    base = dict(layers(model))["base_model.model.model.layers.0.mlp.up_proj"].base_layer
    holder = nn.ModuleDict({"up": base})
    lora = inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"], init_lora_weights=False), holder)
    lora["up"].merge()
    before = weights(model)
    for action in (lambda: model.save_pretrained(tmp_path), model.merge_and_unload, model.unload):
        with pytest.raises(ContentError, match="something else changed entries of the weight of model.layers.0"):
            action()
    assert not list(tmp_path.glob("*.safetensors"))
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    accept_weights(model)
    model.merge_and_unload()


def test_what_is_allowed_raises_no_alarm(tmp_path):
    model, tuner = make(mode="alternate")
    path = tmp_path / "slices.safetensors"
    past_the_counter(tuner.layers["0"].base_weight)  # before the first step a weight may come from anywhere
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.05)
    run(model, optimizer, 7)
    tuner.save(path)
    with tuner.disabled():
        tuner.save(path)
    tuner.undo()
    tuner.load(path)
    copied = copy.deepcopy(model)
    (mover,) = movers_of(copied)
    run(copied, torch.optim.SGD([layer.parameter("default") for layer in mover.layers.values()], lr=0.05), 3)
    mover.move()
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    tuner.save(path)
    model.to(torch.float32)
    tuner.save(path)
    model.to("cpu")
    tuner.save(path)
    plain = tuner.unload(merge=True)
    assert type(plain[0]) is nn.Linear


@pytest.mark.parametrize("event", ["another base", "cast"])
def test_a_base_that_comes_later_is_watched_anew(event, tmp_path):
    model, tuner = make(mode="column", positions=[0, 1], interval=100)
    run(model, torch.optim.SGD(tuner.parameters(), lr=0.05), 1)
    if event == "cast":
        model.float()
    else:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        state["2.base_layer.weight"][0, -1] += 1
        model.load_state_dict(state)
    tuner.save(tmp_path / "slices.safetensors")
    dtype = tuner.parameters()[0].dtype
    step(model, torch.optim.SGD(tuner.parameters(), lr=0.05), *batches(1, dtype=dtype)[0])
    tuner.save(tmp_path / "slices.safetensors")
    in_place(tuner.layers["2"].base_weight)
    with pytest.raises(ContentError, match="of the weight of 2 "):
        tuner.save(tmp_path / "slices.safetensors")


def test_beside_a_weight_nothing_is_watched(tmp_path):
    model, tuner = make(mode="row", additive=True)
    run(model, torch.optim.SGD(tuner.parameters(), lr=0.05), 2)
    past_the_counter(tuner.layers["0"].base_weight)
    tuner.save(tmp_path / "slices.safetensors")


# -- the fingerprint --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("count", [1, 3, 8, 4096 * 8, 4096 * 8 + 5])
def test_every_entry_counts(dtype, count):
    values = (torch.randn(count) * 50).to(dtype)
    first = fingerprint(values)
    assert torch.equal(first, fingerprint(values.clone()))
    for place in {0, count // 2, count - 1}:
        other = values.clone()
        other[place] += 1
        assert not torch.equal(first, fingerprint(other))
    if count > 8:
        assert not torch.equal(first, fingerprint(values.flip(0)))


def test_strides_do_not_count_and_many_lines_do(monkeypatch):
    values = torch.randn(70, 9)
    assert torch.equal(fingerprint(values.t().contiguous().t()), fingerprint(values))
    assert torch.equal(fingerprint(values.reshape(-1)[1:]), fingerprint(values.reshape(-1)[1:].clone()))
    whole = torch.randn(3 * 8192)
    expected = fingerprint(whole)
    monkeypatch.setattr("slicefine.fingerprint._CHUNK", 1)
    assert torch.equal(fingerprint(whole), expected)


# -- weights that are read without a call -----------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "additive"), [("linear1", False), ("self_attn", False), ("linear1", True)])
def test_fused_layers_see_values_that_were_written_past_the_optimizer(target, additive):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 3, 8)
    tuner = attach(model, target_modules=[target], r=2, mode="row", interval=9, additive=additive)
    with torch.no_grad():
        before = model(x)
        tuner.parameters()[0].add_(1.0)
        assert not torch.equal(model(x), before)
        torch.testing.assert_close(model(x), tuner.unload(merge=True)(x))
