"""Pushing what changed since a step: a receiver equals the sender, bit for bit, whatever happened between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn

from core_helpers import batches, mlp, slice_mask, step
from peft_helpers import IDS, MODES, THIRD_PARTY, config, gpt2, llama, logits, same, weights
from slicefine import Slice, apply_slices, attach, delta_since, movers_of
from slicefine.delta import Delta
from slicefine.errors import ConfigError, UnsupportedError
from slicefine.functional import read_block, write_block
from slicefine.journal import Journal
from slicefine.since import changed_since
from slicefine.tuner import SliceTuner

pytestmark = THIRD_PARTY


def run_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def merged(tuner: SliceTuner) -> dict[str, Tensor]:
    """The whole model with the trained values, from a copy that is unloaded."""
    return copy.deepcopy(tuner).unload(merge=True).state_dict()


def entries(slices: Delta) -> int:
    return sum(values.numel() for blocks in slices.values() for _, values in blocks)


def identical(a: Delta, b: Delta) -> bool:
    """Whether two pushes name the same slices and hold the same bits."""
    if a.keys() != b.keys():
        return False
    pairs = [pair for name in a for pair in zip(a[name], b[name], strict=True)]
    return all(one == other and torch.equal(v, w) for (one, v), (other, w) in pairs)


# -- the receiver equals the sender -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_a_push_after_every_step_keeps_a_receiver_bit_identical(mode: str, dtype: torch.dtype):
    tuner = attach(mlp(dtype=dtype), r=2, mode=mode, interval=2, mask_fraction=0.2 if mode == "random_mask" else None)
    receiver = mlp(dtype=dtype)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.05)
    for number, (x, y) in enumerate(batches(9, dtype=dtype)):
        step(tuner.model, optimizer, x, y)
        apply_slices(receiver, tuner.delta_since(number))
        assert same(receiver.state_dict(), merged(tuner)), number
    assert tuner.mover.visits == 5


@pytest.mark.parametrize("start_values", ["pretrained", "zero", "lecun"])
def test_rare_pushes_carry_everything_in_between(start_values: str):
    tuner = attach(mlp(), r=2, mode="alternate", interval=2, start_values=start_values)
    receiver, late = mlp(), mlp()
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.05)
    pushed = 0
    for number, (x, y) in enumerate(batches(14), start=1):
        step(tuner.model, optimizer, x, y)
        if number in (1, 4, 5, 6, 11, 14):
            apply_slices(receiver, tuner.delta_since(pushed))
            pushed = number
            assert same(receiver.state_dict(), merged(tuner)), number
    apply_slices(late, tuner.delta_since(0))
    assert same(late.state_dict(), receiver.state_dict())


def test_only_what_changed_is_sent():
    tuner = attach(mlp(), r=2, mode="row", interval=3)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.05)
    assert tuner.mover.active_entries() == entries(tuner.delta_since(0))
    sizes = []
    for number, (x, y) in enumerate(batches(7)):
        step(tuner.model, optimizer, x, y)
        sizes.append(entries(tuner.delta_since(number)))
        assert tuner.delta_since(number + 1) == {}  # no step since: accumulation, say
    assert sizes == [2 * (6 + 11 + 5)] * 7
    assert entries(tuner.delta_since(2)) == 3 * 2 * (6 + 11 + 5)


def test_values_do_not_depend_on_which_adapter_is_active():
    model = get_peft_model(llama(), config())
    optimizer = adamw(model)
    run_on(model, optimizer, 5)
    expected = delta_since(model, 1)
    model.add_adapter("other", config("row", seed=3))
    for name in ("other", "default"):
        model.set_adapter(name)
        with model.disable_adapter():
            again = delta_since(model, 1)
        assert identical(again, expected)
        assert identical(delta_since(model, 1), expected)
    model.base_model.set_adapter(["default", "other"])
    assert identical(delta_since(model, 1), expected)


@pytest.mark.parametrize("settings", [{}, {"window": 1}, {"init_weights": False}], ids=["plain", "window", "perturbed"])
@pytest.mark.parametrize("base", [llama, gpt2])
def test_a_peft_model_pushes_under_the_names_of_its_base(base: Any, settings: dict[str, Any]):
    model, receiver = get_peft_model(base(), config(**settings)), base()
    optimizer, pushed = adamw(model), 0
    for count in (1, 1, 3, 2):
        run_on(model, optimizer, count)
        apply_slices(receiver.state_dict(), delta_since(model, pushed))
        pushed += count
        assert movers_of(model)[0].step == pushed
        now, found = weights(model), dict(receiver.named_parameters())
        assert all(torch.equal(found[name], now[name]) for name in now), pushed
    assert torch.equal(logits(receiver), logits(model))


@given(
    st.lists(st.tuples(st.sampled_from(["row", "column"]), st.integers(0, 3), st.integers(0, 3)), min_size=1), st.data()
)
def test_what_changed_is_what_a_log_of_all_steps_says(plan: list[tuple[str, int, int]], data: st.DataObject):
    weight, journal = torch.zeros(5, 5), Journal()
    log = [weight.clone()]  # after each step
    for axis, start, count in plan:
        journal.begin(weight, Slice(axis, start, 2))
        for _ in range(count):
            write_block(weight, journal.active, read_block(weight, journal.active) + 1)
            journal.count_step()
            log.append(weight.clone())
    since = data.draw(st.integers(1, len(log) - 1)) if len(log) > 1 else 0
    covered = torch.zeros(5, 5, dtype=torch.bool)
    for block in changed_since(journal.visits, since):
        covered |= slice_mask(block, (5, 5))
    assert torch.equal(covered, weight != log[since]) or since == 0


def test_a_receiver_may_be_made_for_inference_only():
    tuner = attach(mlp(), r=2, mode="row", interval=3)
    with torch.inference_mode():
        receiver = mlp()
    for x, y in batches(2):
        step(tuner.model, torch.optim.SGD(tuner.parameters(), lr=0.1), x, y)
    apply_slices(receiver, tuner.delta_since(0))
    assert same(receiver.state_dict(), merged(tuner))


def test_a_write_that_no_step_made_is_sent_with_its_slice():
    tuner, receiver = attach(mlp(), r=2, mode="row", interval=3), mlp()
    with torch.no_grad():
        tuner.parameters()[0].mul_(2)  # an average, say, that no forward has seen yet
    apply_slices(receiver, tuner.delta_since(0))
    assert not same(receiver.state_dict(), mlp().state_dict())
    assert same(receiver.state_dict(), merged(tuner))


# -- undo, and steps that are not there ------------------------------------------------------------------------------


def test_a_receiver_from_before_an_undone_visit_goes_on():
    tuner = attach(mlp(), r=2, mode="alternate", interval=2)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.05)
    data = batches(9)
    for x, y in data[:4]:
        step(tuner.model, optimizer, x, y)
    receiver, fresh = mlp(), mlp()
    apply_slices(receiver, tuner.delta_since(0))
    step(tuner.model, optimizer, *data[4])
    tuner.undo()
    for number, (x, y) in enumerate(data[5:], start=4):
        apply_slices(receiver, tuner.delta_since(4 if number < 7 else number - 1))
        assert same(receiver.state_dict(), merged(tuner))
        step(tuner.model, optimizer, x, y)
    apply_slices(fresh, tuner.delta_since(0))
    assert same(fresh.state_dict(), merged(tuner))


@pytest.mark.parametrize(("start_values", "allowed"), [("pretrained", True), ("zero", False)])
def test_what_a_receiver_saw_of_an_undone_visit_is_refused(start_values: str, allowed: bool):
    tuner = attach(mlp(), r=2, mode="row", interval=2, start_values=start_values)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.05)
    for x, y in batches(3):
        step(tuner.model, optimizer, x, y)
    tuner.undo()  # of step 3
    with pytest.raises(ConfigError, match="step=3, but adapter 'default' made 2 optimizer steps.*say step=0"):
        tuner.delta_since(3)
    for x, y in batches(1):
        step(tuner.model, optimizer, x, y)
    with pytest.raises(
        UnsupportedError, match="steps 3 to 3 were taken back by undo.*step=0; a receiver that was last at step=2"
    ):
        tuner.delta_since(3)
    if allowed:
        assert tuner.delta_since(2)
    else:  # the beginning of the visit that was taken back had changed values already
        with pytest.raises(UnsupportedError, match="were taken back by undo"):
            tuner.delta_since(2)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_slices_cannot_say_is_refused():
    with pytest.raises(ConfigError, match="no layer of this Sequential has slices of an adapter 'default'"):
        delta_since(mlp(), 0)
    with pytest.raises(UnsupportedError, match="0 has additive slices"):
        attach(mlp(), r=2, interval=2, additive=True).delta_since(0)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match="weight without values"):
        attach(empty, r=2, interval=2).delta_since(0)
    masked = get_peft_model(gpt2(), config("random_mask"))
    with pytest.raises(UnsupportedError, match="transposed"):
        delta_since(masked, 0)


def test_other_trained_parameters_are_refused_or_left_out_by_request():
    model = get_peft_model(llama(), config(modules_to_save=["lm_head"]))
    with pytest.raises(UnsupportedError, match="lm_head.*is trained, too, and not by slices"):
        delta_since(model, 0)
    model.requires_grad_(False)  # a model that is only used still has another head
    with pytest.raises(UnsupportedError, match="lm_head"):
        delta_since(model, 0)
    assert all("lm_head" not in name for name in delta_since(model, 0, slices_only=True))
    loose = attach(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), r=2, interval=2, train_rest=True)
    with pytest.raises(UnsupportedError, match="0.base_layer.bias is trained, too"):
        loose.delta_since(0)
    assert loose.delta_since(0, slices_only=True).keys() == {"0.weight"}


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ({"9.weight": [(Slice("row", 0, 1), torch.ones(1, 6))]}, "no weight '9.weight'; it must be a plain copy"),
        ({"0.weight": [(Slice("row", 10, 2), torch.ones(2, 6))]}, "row slice of width 2 at 10 does not fit"),
        ({"0.weight": [(Slice("row", 0, 2), torch.ones(2, 11))]}, "values of shape (2, 11) for .* expected (2, 6)"),
        ({"0.bias": [(Slice("row", 0, 2), torch.ones(2, 6))]}, "0.bias has shape (11,), expected a matrix"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(slices: Delta, message: str):
    receiver, before = mlp(), mlp().state_dict()
    good = {"2.weight": [(Slice("row", 0, 1), torch.ones(1, 11))]}
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        apply_slices(receiver, good | slices)
    assert same(receiver.state_dict(), before)


def test_a_wrapped_model_is_no_receiver():
    sender, receiver = (get_peft_model(llama(), config()) for _ in range(2))
    with pytest.raises(ConfigError, match="without adapters"):
        apply_slices(receiver, delta_since(sender, 0))


def test_quantised_receivers_are_refused_before_anything_is_written():
    target = {"a": torch.zeros(2, 2), "b": torch.zeros(2, 2, dtype=torch.int8)}
    slices = {name: [(Slice("row", 0, 1), torch.ones(1, 2))] for name in target}
    with pytest.raises(ConfigError, match="apply_slices: b is Tensor of torch.int8"):
        apply_slices(target, slices)
    assert not target["a"].any()


def test_after_a_load_everything_has_to_be_asked_for_once(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    tuner = attach(model, r=1, mode="row", interval=9)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for number in range(3):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        if number == 0:
            tuner.save(tmp_path / "s.safetensors")
    tuner.load(tmp_path / "s.safetensors")
    with pytest.raises(UnsupportedError, match="slices were loaded from a file"):
        tuner.delta_since(1)
    tuner.delta_since(0)
    assert tuner.delta_since(1) == {}
