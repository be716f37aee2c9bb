"""The fast path equals the slow twin, step by step, across moves: weights, optimizer state, outputs."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_helpers import batches, losses, mlp, slice_mask, step
from slicefine import attach
from slicefine.reference import Listing1Linear, ReferenceSliceLinear, run
from slicefine.schedule import Schedule

STEPS, INTERVAL, REWARM = 200, 13, 5  # 15 moves: every layer's sweep goes around
SCHEDULES = {
    "row": Schedule("row", 2, 2),
    "column": Schedule("column", 3, 3),
    "alternate": Schedule("alternate", 2, 3),
    "random_mask": Schedule("random_mask", 1, 1, seed=4),
}


def make_optimizer(name, parameters):
    if name == "SGD":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.02)
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.05)


def fast(schedule, policy, dtype, **settings):
    model = mlp(dtype=dtype)
    options = {"interval": INTERVAL, "state_policy": policy, "rewarm_steps": REWARM} | settings
    tuner = attach(
        model,
        mode=schedule.mode,
        r_row=schedule.row_rank,
        r_column=schedule.column_rank,
        positions=schedule.positions,
        seed=schedule.seed,
        **options,
    )
    return model, tuner


def slow(schedule, dtype):
    model = mlp(dtype=dtype)
    layers = {}
    for name, module in list(model.named_children()):
        if isinstance(module, nn.Linear):
            layers[name] = ReferenceSliceLinear(module, schedule, name)
            setattr(model, name, layers[name])
    return model.requires_grad_(False), layers


def active_state(optimizer, parameter, lines):
    """Optimizer state of the active entries (padding left out), and the step count."""
    state = {k: v for k, v in optimizer.state.get(parameter, {}).items() if v is not None}
    return {k: v[: lines.shape[0], : lines.shape[1]] if v.dim() == 2 else v for k, v in state.items()}


def flat(tensors):
    return torch.cat([t.reshape(-1).to(tensors[0]) for t in tensors])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("policy", ["reset", "rewarm", "keep"])
@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW"])
@pytest.mark.parametrize("mode", SCHEDULES)
def test_fast_path_equals_the_twin(mode, optimizer_name, policy, dtype):
    schedule = SCHEDULES[mode]
    data = batches(20, dtype=dtype) * (STEPS // 20)
    model, tuner = fast(schedule, policy, dtype)
    optimizer = make_optimizer(optimizer_name, tuner.parameters())
    twin, layers = slow(schedule, dtype)
    for layer in layers.values():
        layer.part_T.requires_grad_()
    twin_optimizer = make_optimizer(optimizer_name, [layer.part_T for layer in layers.values()])
    fast_steps = iter(data)

    def compare(number):
        step(model, optimizer, *next(fast_steps))
        ours, theirs = [], []
        for name, layer in layers.items():
            fast_layer = tuner.layers[name]
            ours.append(fast_layer.dense())
            theirs.append(layer.weight().detach())
            if number % INTERVAL == 0:  # the fast path has moved already; the twin moves after this function
                continue
            parameter = fast_layer.slicefine_active["default"]
            assert fast_layer.states["default"].journal.active == layer.active
            state = active_state(optimizer, parameter, layer.lines())
            twin_state = active_state(twin_optimizer, layer.part_T, layer.lines())
            assert state.keys() == twin_state.keys()
            ours += [parameter.detach(), *state.values()]
            theirs += [layer.part_T.detach(), *twin_state.values()]
        assert [t.shape for t in ours] == [t.shape for t in theirs]
        assert_close(flat(ours), flat(theirs), msg=lambda m: f"step {number}: {m}")

    run(layers, twin_optimizer, losses(twin, data), INTERVAL, policy, REWARM, compare)
    assert tuner.mover.visits - 1 == STEPS // INTERVAL >= 6
    for name, layer in tuner.layers.items():  # the sweeps went around
        journal = layer.states["default"].journal
        assert mode == "random_mask" or len(journal.slices()) < len(journal.visits), name
    x = data[0][0]
    assert_close(model(x), twin(x))


@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW"])
@pytest.mark.parametrize("policy", ["reset", "rewarm"])
def test_state_is_fresh_right_after_a_move(optimizer_name, policy):
    model, tuner = fast(SCHEDULES["alternate"], policy, torch.float64)
    optimizer = make_optimizer(optimizer_name, tuner.parameters())
    for number, (x, y) in enumerate(batches(2 * INTERVAL), start=1):
        step(model, optimizer, x, y)
        for parameter in tuner.parameters():
            state = [v for v in optimizer.state[parameter].values() if v is not None]
            zero = all(bool((v == 0).all()) for v in state)
            assert zero == (number % INTERVAL == 0)


@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW"])
@pytest.mark.parametrize("mode", SCHEDULES)
def test_only_the_active_block_changes(mode, optimizer_name):
    model, tuner = fast(SCHEDULES[mode], "reset", torch.float64, interval=3)
    optimizer = make_optimizer(optimizer_name, tuner.parameters())
    others = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")}
    assert others
    for x, y in batches(20):
        active = dict(tuner.mover.slices())
        before = {name: layer.dense().clone() for name, layer in tuner.layers.items()}
        step(model, optimizer, x, y)
        for name, layer in tuner.layers.items():
            mask = slice_mask(active[name], layer.shape)
            changed = layer.dense() != before[name]
            assert not changed[~mask].any(), name
            assert changed[mask].all(), name
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)


@pytest.mark.filterwarnings("ignore:SliceFine. the rank is larger:UserWarning")  # on purpose: all of every matrix
@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW"])
@pytest.mark.parametrize("mode", ["row", "column", "random_mask"])
def test_full_rank_equals_full_fine_tuning(mode, optimizer_name):
    data = batches(40)
    plain = mlp()
    for module in plain:
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.requires_grad_(False)
    plain_optimizer = make_optimizer(optimizer_name, [p for p in plain.parameters() if p.requires_grad])
    model = mlp()
    tuner = attach(model, mode=mode, r=11, mask_fraction=1.0, interval=1000)
    optimizer = make_optimizer(optimizer_name, tuner.parameters())
    for x, y in data:
        step(plain, plain_optimizer, x, y)
        step(model, optimizer, x, y)
    for name, layer in tuner.layers.items():
        assert_close(layer.dense(), plain.get_submodule(name).weight.detach())
    assert_close(model(data[0][0]), plain(data[0][0]))


# -- the twin itself: it is only worth something if it is right -------------------------------------------------------


@pytest.mark.parametrize("mode", SCHEDULES)
def test_the_twin_starts_as_the_base_and_moving_changes_nothing(mode):
    plain = mlp()
    x = batches(1)[0][0]
    twin, layers = slow(SCHEDULES[mode], torch.float64)
    for _ in range(8):
        assert_close(twin(x), plain(x))
        for layer in layers.values():
            layer.move()
            assert_close(layer.weight(), layer.full, rtol=0, atol=0)


@pytest.mark.parametrize("mode", SCHEDULES)
def test_the_twins_forward_is_its_weights_product(mode):
    torch.manual_seed(0)
    layer = ReferenceSliceLinear(nn.Linear(6, 9, dtype=torch.float64), SCHEDULES[mode])
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    for _ in range(7):
        with torch.no_grad():
            layer.lines().add_(torch.randn_like(layer.lines()))
        assert_close(layer(x), nn.functional.linear(x, layer.weight(), layer.bias))
        layer.move()


def test_each_increment_counts_once():
    """Algorithm 1 as printed adds a finished increment to W0 and to dW and outputs their sum."""
    layer = ReferenceSliceLinear(nn.Linear(2, 2, bias=False), Schedule("row", 1, 1))
    start = layer.full.clone()
    with torch.no_grad():
        layer.part_T.add_(1.0)
    layer.move()
    assert_close(layer.weight(), start + torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    layer.move()
    assert_close(layer.weight(), start + torch.tensor([[1.0, 1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("position", [0, 3, 7, 99])
@pytest.mark.parametrize("mode", ["row", "column"])
def test_listing_1_as_printed(mode, position):
    torch.manual_seed(0)
    base = nn.Linear(9, 9)
    layer = Listing1Linear(base, mode, rank=2)
    layer.reinit_from_full(base.weight.detach(), position)
    x = torch.randn(2, 4, 9)
    assert_close(layer(x), base(x))
    layer(x).square().sum().backward()
    base(x).square().sum().backward()
    start = min(position, 7)
    block = base.weight.grad[start : start + 2] if mode == "row" else base.weight.grad[:, start : start + 2]
    assert_close(layer.part_T.grad, block)
    assert layer.part_A.grad is None
    assert layer.part_B.grad is None


def test_a_moved_listing_1_is_never_updated_by_its_optimizer():
    """The defect that one persistent parameter avoids."""
    base = nn.Linear(4, 4)
    layer = Listing1Linear(base, "row", rank=1)
    optimizer = torch.optim.SGD([layer.part_T], lr=1.0)
    layer.reinit_from_full(base.weight.detach(), 1)
    before = layer.part_T.detach().clone()
    layer(torch.ones(1, 4)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert torch.equal(layer.part_T, before)
