"""Positions by energy of inputs and of output gradients: equal to brute force, plain data, followed by all."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from slicefine import ConfigError, DataError, Schedule, attach, energy_positions
from slicefine.energy import gradient_energy, input_energy
from slicefine.schedule import slice_at

SCALES = torch.tensor([0.1, 3.0, 0.2, 0.3, 5.0, 0.4, 2.0])


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 2, 7, generator=generator) * SCALES for _ in range(count)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3))


def test_energy_equals_brute_force():
    model = network()
    x = torch.cat(batches()).reshape(-1, 7)
    hidden = torch.relu(model[0](x)).detach()
    found = input_energy(model, batches())
    torch.testing.assert_close(found["0"], x.double().square().mean(0), rtol=1e-6, atol=1e-6)  # summed in fp32
    torch.testing.assert_close(found["3"], hidden.double().square().mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("r", [1, 2, 3, 7, 9])
def test_blocks_come_in_the_order_of_their_energy(r: int):
    starts = energy_positions(network(), batches(), r=r, target_modules=["0"])["0"]["column"]
    energy, width = input_energy(network(), batches())["0"], min(r, 7)
    sums = [float(energy[start : start + width].sum()) for start in starts]
    assert sums == sorted(sums, reverse=True)
    assert len(set(starts)) == len(starts) == -(-7 // width)


def squared(output: torch.Tensor) -> torch.Tensor:
    return (output * torch.tensor([1.0, -2.0, 0.5])).square().mean()


def test_gradient_energy_equals_brute_force_and_leaves_the_model_alone():
    model = network().train()
    model[0].weight.requires_grad_(False)
    found = gradient_energy(model, batches(), loss=squared)
    expected = {"0": 0.0, "3": 0.0}
    for batch in batches():
        first = (batch @ model[0].weight.T + model[0].bias).detach().requires_grad_()
        last = torch.relu(first) @ model[3].weight.T + model[3].bias
        for name, gradient in zip(("0", "3"), torch.autograd.grad(squared(last), [first, last]), strict=True):
            expected[name] += gradient.double().reshape(-1, gradient.shape[-1]).square().sum(0) / 24
    for name, energy in expected.items():
        torch.testing.assert_close(found[name], energy, rtol=1e-5, atol=1e-9)  # the gradients are fp32
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_before_an_activation_in_place_have_a_gradient_energy():
    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    found = gradient_energy(model, batches(), loss=squared)
    plain = nn.Sequential(model[0], nn.ReLU(), model[2])
    torch.testing.assert_close(found["0"], gradient_energy(plain, batches(), loss=squared)["0"])


def test_rows_come_in_the_order_of_their_gradient():
    model = network()
    positions = energy_positions(model, iter(batches()), r=3, r_row=2, axes=("row", "column"), loss=squared)
    energy = gradient_energy(model, batches(), loss=squared)["0"]
    sums = [float(energy[start : start + 2].sum()) for start in positions["0"]["row"]]
    assert sums == sorted(sums, reverse=True)
    assert sorted(positions["0"]["row"]) == [0, 2, 4]
    assert sorted(positions["0"]["column"]) == [0, 3, 4]
    tuner = attach(model, r_row=2, r_column=3, mode="alternate", positions=positions, interval=1)
    assert tuner.mover.slices()["0"].start == positions["0"]["row"][0]


def test_axes_are_checked_and_rows_need_a_loss():
    for axes in ([], ["entries"]):
        with pytest.raises(ConfigError, match="expected some of row, column"):
            energy_positions(network(), batches(), axes=axes)
    assert set(energy_positions(network(), batches(), axes=["row"], loss=squared)["0"]) == {"row"}
    with pytest.raises(
        ConfigError, match="the model returned Tensor without a loss; give batches with labels, or loss="
    ):
        energy_positions(network(), batches(), axes=["row"])
    with pytest.raises(DataError, match="the gradients of 3 are not finite"):
        gradient_energy(network(), batches(), loss=lambda output: output.sum() * float("inf"))


def test_what_carries_no_gradient_is_left_out():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.used, self.unused = nn.Linear(7, 6), nn.Linear(6, 3), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                hidden = self.frozen(x)
            return {"loss": squared(self.used(hidden))}

    model = Model()
    model.used.eval()
    found = energy_positions(model, batches(), r=2, axes=["row", "column"])
    assert {name: set(axes) for name, axes in found.items()} == {"frozen": {"column"}, "used": {"column", "row"}}
    assert (model.training, model.frozen.training, model.used.training) == (True, True, False)
    with pytest.raises(DataError, match="no batch reached a linear layer"):
        gradient_energy(model, batches(), target_modules=["unused"])


def test_equal_energy_falls_back_to_the_sweep():
    assert energy_positions(nn.Sequential(nn.Linear(6, 2)), [torch.ones(1, 6)], r=2)["0"]["column"] == [0, 2, 4]


def test_visits_and_ranks_by_layer():
    found = energy_positions(network(), batches(), r=lambda name: {"0": 3, "3": 1}[name], visits=2)
    assert [len(found[name]["column"]) for name in ("0", "3")] == [2, 2]
    assert found["0"]["column"][0] in (3, 4)  # blocks 0-2, 3-5 and the clamped 4-6, which holds the two largest


def test_the_model_and_the_random_numbers_are_left_alone():
    model = network().train()
    before = torch.get_rng_state()
    energy_positions(model, [{"input": batch} for batch in batches()])
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("mode", ["column", "alternate"])
def test_attached_slices_follow_the_order(mode: str):
    model = network()
    positions = energy_positions(model, batches(), r=2)
    tuner = attach(model, r=2, mode=mode, positions=positions, interval=1)
    seen = {"row": [], "column": []}
    for _ in range(6):
        block = tuner.mover.slices()["0"]
        seen[block.axis].append(block.start)
        tuner.move()
    expected = positions["0"]["column"] * 2
    assert seen["column"] == expected[: len(seen["column"])]
    assert seen["row"] == [0, 2, 4][: len(seen["row"])]  # what the mapping leaves out sweeps


def test_peft_keeps_the_order_in_the_saved_configuration(tmp_path):
    pytest.importorskip("peft", reason="the extra peft is not installed")
    from peft import PeftModel, get_peft_model

    from slicefine import SliceFineConfig, movers_of

    base = network()
    positions = energy_positions(base, batches(), r=2, visits=3)
    model = get_peft_model(base, SliceFineConfig(r=2, mode="column", positions=positions, target_modules="all-linear"))
    assert next(iter(model.peft_config.values())).positions == positions
    assert movers_of(model)[0].slices()["0"].start == positions["0"]["column"][0]
    movers_of(model)[0].move()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["positions"] == positions
    loaded = PeftModel.from_pretrained(network(), tmp_path, is_trainable=True)
    assert movers_of(loaded)[0].slices()["0"].start == positions["0"]["column"][1]
    movers_of(loaded)[0].move()
    assert movers_of(loaded)[0].slices()["0"].start == positions["0"]["column"][2]


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "at least one batch"), ([torch.full((1, 7), float("nan"))], "are not finite")],
    ids=["none", "nan"],
)
def test_batches_that_say_nothing_are_refused(given: list[torch.Tensor], message: str):
    with pytest.raises(DataError, match=message):
        energy_positions(network(), given)


def test_a_rank_below_one_is_refused():
    with pytest.raises(ConfigError, match="layer '0': rank r=0 must be an integer of at least 1"):
        energy_positions(network(), batches(), r=0)


def test_layers_that_do_not_exist_are_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"target_modules=\['query'\] matches no .* are called 0, 3\."):
        energy_positions(network(), batches(), target_modules=["query"])


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ({"0": [0, 2]}, 'expected {"row" or "column": start indices}'),
        ({"0": {"columns": [0]}}, 'expected {"row" or "column": start indices}'),
        ({"0": {"column": []}}, "at least one start"),
        ({"0": {"column": ["a"]}}, "integer start indices"),
    ],
)
def test_a_wrong_mapping_is_refused(positions: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Schedule(positions=positions)


def test_a_start_outside_the_matrix_is_refused_at_once():
    with pytest.raises(ConfigError, match="layer '0': column slice of width 2 at 6"):  # the second column position
        attach(network(), r=2, positions={"0": {"column": [0, 6]}}, interval=1)


def test_an_unknown_layer_sweeps():
    schedule = Schedule("column", 2, 2, {"elsewhere": {"column": [4]}})
    assert [slice_at(schedule, visit, (6, 6), "fc").start for visit in range(3)] == [0, 2, 4]
