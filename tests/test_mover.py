"""When slices move, and what happens to the optimizer's state: any loop, any optimizer, nothing in silence."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

from core_helpers import Allocations, batches, lines_of, mlp, step
from slicefine import attach
from slicefine.errors import ConfigError, NumericalError, OptimizerError, UnsupportedError
from slicefine.fingerprint import fingerprint
from slicefine.geometry import Slice
from slicefine.mover import Mover, movers_of
from slicefine.optimizers import reset_optimizer_state
from slicefine.pace import FALLBACK_INTERVAL, MoveSettings
from slicefine.schedule import Moves, Schedule, slice_at


def make(**settings):
    model = mlp()
    options = {"mode": "alternate", "r": 2, "interval": 4} | settings
    return model, attach(model, **options)


def train(model, optimizer, count, seed=1):
    for x, y in batches(count, seed):
        step(model, optimizer, x, y)


def sgd(tuner, lr=0.1):
    return torch.optim.SGD(tuner.parameters(), lr=lr)


def visits(tuner):
    return [[tuple(v) for v in layer.states["default"].journal.visits] for layer in tuner.layers.values()]


# -- when -------------------------------------------------------------------------------------------------------------


def test_moves_after_every_interval_in_the_schedules_order():
    model, tuner = make()
    optimizer = sgd(tuner)
    starts = []
    for x, y in batches(12):
        step(model, optimizer, x, y)
        starts.append(tuner.mover.visits)
    assert starts == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4]
    schedule = Schedule("alternate", 2, 2)
    for name, layer in tuner.layers.items():
        journal = layer.states["default"].journal
        assert [v.slice for v in journal.visits] == [slice_at(schedule, i, layer.shape, name) for i in range(4)]
        assert [(v.first_step, v.last_step) for v in journal.visits] == [(1, 4), (5, 8), (9, 12), (13, 12)]
    assert tuner.mover.step == 12
    assert tuner.mover.slices() == {n: slice_at(schedule, 3, layer.shape, n) for n, layer in tuner.layers.items()}


def test_gradient_accumulation_does_not_move():
    model, tuner = make(interval=2)
    optimizer = sgd(tuner)
    for number, (x, y) in enumerate(batches(24), start=1):
        (model(x) - y).square().mean().backward()
        if number % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
        assert tuner.mover.step == number // 4
        assert tuner.mover.visits == 1 + number // 8


def test_a_number_of_moves_is_spread_over_the_run():
    model, tuner = make(interval=None, moves=3, total_steps=40, minimum_steps=5)
    train(model, sgd(tuner), 60)
    assert [v[1:] for v in visits(tuner)[0]] == [(1, 10), (11, 20), (21, 30), (31, 60)]


def test_a_second_run_counts_its_own_moves():
    model, tuner = make(interval=None, moves=1, total_steps=4, minimum_steps=1)
    optimizer = sgd(tuner)
    train(model, optimizer, 4)
    assert tuner.mover.visits == 2
    tuner.move()  # between the runs, on purpose
    tuner.mover.begin_run(6)
    train(model, optimizer, 6)
    assert [v[1:] for v in visits(tuner)[0]] == [(1, 2), (3, 4), (5, 7), (8, 10)]


def test_a_resumed_run_goes_on_where_it_stopped():
    model, tuner = make(interval=None, moves=3, total_steps=12, minimum_steps=1)
    optimizer = sgd(tuner)
    train(model, optimizer, 4)
    tuner.mover.begin_run(12, done=4)
    train(model, optimizer, 8)
    assert [v[1:] for v in visits(tuner)[0]] == [(1, 3), (4, 6), (7, 9), (10, 12)]


@pytest.mark.parametrize("state_policy", ["reset", "rewarm", "keep"])
@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("mode", ["row", "column", "alternate"])
def test_a_run_allocates_nothing_of_the_weights_size(mode, window, state_policy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 48, bias=False), nn.Tanh(), nn.Linear(48, 48))
    tuner = attach(
        model, mode=mode, r=2, interval=3, window=window, state_policy=state_policy, target_modules=["0", "2"]
    )
    optimizer = torch.optim.AdamW(tuner.parameters(), fused=True)
    x = torch.randn(3, 48)
    fingerprint(x)  # makes a table of factors, once per process
    with Allocations() as allocations:
        for _ in range(12):
            step(model, optimizer, x, x)
    assert tuner.mover.visits == 5
    # outputs have 3 x 64 entries, slices 2 x 64 and a weight 48 x 64
    assert 0 < allocations.largest <= 3 * 64


def test_unknown_length_warns_once_and_uses_the_papers_interval():
    model, tuner = make(interval=None, moves=8)
    optimizer = sgd(tuner, lr=1e-3)
    x, y = batches(1)[0]
    with pytest.warns(UserWarning, match="moves=8 needs the run's length.*every 500 steps instead"):
        step(model, optimizer, x, y)
    assert tuner.mover.plan == Moves(FALLBACK_INTERVAL)
    step(model, optimizer, x, y)  # a second warning would be an error


def test_warnings_at_the_start_of_a_run():
    with pytest.warns(
        UserWarning, match=r"the slice will not move in this run of 30 steps \(a position gets at least 50\)"
    ):
        make(interval=None, moves=8, total_steps=30)
    with pytest.warns(UserWarning, match=r"will not move in this run of 4 steps \(it moves every 4\)"):
        make(total_steps=4)
    with pytest.warns(
        UserWarning, match=r"6 moves go around the matrix of 0 \(shape \(11, 6\)\) from move 6 on"
    ) as record:
        make(mode="row", interval=10, total_steps=70)
    assert len(record) == 1  # one message for all layers... about the first that wraps
    make(mode="row", interval=10, total_steps=30)  # two moves: layer 2 has three blocks
    make(positions="fixed", total_steps=3)
    make(interval=None, moves=0, total_steps=3)
    make(positions=[0, 1], mode="row", total_steps=30)
    make(mode="random_mask", interval=1, total_steps=300)


def test_moves_0_stays_put():
    model, tuner = make(interval=None, moves=0)
    train(model, sgd(tuner), 10)
    assert tuner.mover.visits == 1
    assert tuner.mover.step == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state_policy": "forget"}, "state_policy='forget' is unknown; expected one of reset, rewarm, keep"),
        ({"interval": 0}, "interval=0 must be an integer of at least 1"),
        ({"moves": -1}, "moves=-1 must be an integer of at least 0"),
        ({"moves": 2.0}, "moves=2.0 must be an integer"),
        ({"total_steps": 0}, "total_steps=0 must be an integer of at least 1"),
        ({"rewarm_steps": True}, "rewarm_steps=True must be an integer"),
        ({"minimum_steps": 0}, "minimum_steps=0 must be"),
        ({"moves": None}, "give either moves= .* or interval="),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MoveSettings(**settings)


# -- GradScaler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_steps_that_grad_scaler_skips_do_not_count(fused):
    model = mlp(dtype=torch.float32)
    tuner = attach(model, mode="alternate", r=2, interval=2)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    seen = []
    for number, (x, y) in enumerate(batches(9, dtype=torch.float32)):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        scaler.scale(loss).backward()
        if number in (1, 4, 5):
            tuner.parameters()[1].grad[0, 0] = float("inf")
        before = [layer.dense().clone() for layer in tuner.layers.values()]
        scaler.step(optimizer)
        scaler.update()
        seen.append(tuner.mover.step)
        if number in (1, 4, 5):
            assert all(torch.equal(b, layer.dense()) for b, layer in zip(before, tuner.layers.values(), strict=True))
    assert seen == [1, 1, 2, 3, 3, 3, 4, 5, 6]
    assert tuner.mover.visits == 4


# -- optimizers -------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD dampening": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.5),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "transformers Adafactor": lambda p: transformers.optimization.Adafactor(
        p, lr=0.01, scale_parameter=False, relative_step=False, beta1=0.9
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_equals_a_fresh_state(name):
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(8, 3, 4, generator=generator)
    used, other = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = OPTIMIZERS[name]([used, other])
    for gradient in gradients[:4]:
        used.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
    kept = {k: copy.deepcopy(v) for k, v in optimizer.state[other].items()}
    reset_optimizer_state(optimizer, used)
    fresh = nn.Parameter(used.detach().clone())
    fresh_optimizer = OPTIMIZERS[name]([fresh])
    for gradient in gradients[4:]:
        used.grad, fresh.grad, other.grad = gradient.clone(), gradient.clone(), None
        optimizer.step()
        fresh_optimizer.step()
        assert_close(used, fresh, rtol=0, atol=0)
    for key, value in optimizer.state[used].items():
        assert (
            torch.equal(torch.as_tensor(value or 0), torch.as_tensor(fresh_optimizer.state[fresh][key] or 0))
            if (not isinstance(value, torch.Tensor))
            else torch.equal(value, fresh_optimizer.state[fresh][key])
        ), key
    for key, value in optimizer.state[other].items():  # the neighbour keeps its state
        assert_close(torch.as_tensor(value), torch.as_tensor(kept[key])) if value is not None else None


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])  # older torch builds Adagrad's state once
def test_reset_keeps_the_storage_that_a_captured_graph_would_use(kind):
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = kind([parameter], lr=0.1)
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    before = {k: v.data_ptr() for k, v in optimizer.state[parameter].items()}
    reset_optimizer_state(optimizer, parameter)
    assert {k: v.data_ptr() for k, v in optimizer.state[parameter].items()} == before
    reset_optimizer_state(optimizer, nn.Parameter(torch.ones(1)))  # never stepped: nothing to do


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_with_each_optimizer_moves_and_stays_in_the_slices(name):
    mode = "row" if "Adafactor" in name else "alternate"
    model, tuner = make(mode=mode, interval=3)
    base = {n: layer.dense().clone() for n, layer in tuner.layers.items()}
    optimizer = OPTIMIZERS[name](tuner.parameters())
    train(model, optimizer, 8)
    assert tuner.mover.visits == 3
    for n, layer in tuner.layers.items():
        journal = layer.states["default"].journal
        changed = layer.dense() != base[n]
        assert changed.any()
        inside = torch.zeros_like(changed)
        for block in journal.slices():
            lines_of(inside, block)[:] = True
        assert not changed[~inside].any()
    with tuner.disabled():
        assert all(torch.equal(layer.dense(), base[n]) for n, layer in tuner.layers.items())


class Muon(torch.optim.SGD):
    pass


class LBFGS(torch.optim.SGD):
    pass


class SparseAdam(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Muon, "orthogonalises whole matrices"),
        (LBFGS, "evaluates the loss several times"),
        (SparseAdam, "sparse gradients"),
    ],
)
def test_optimizers_that_cannot_work_are_refused_by_name(kind, reason):
    model, tuner = make()
    with pytest.raises(UnsupportedError, match=f"does not work with {kind.__name__}: it .*{reason}.*Use AdamW"):
        train(model, kind(tuner.parameters(), lr=0.1), 1)


@pytest.mark.parametrize("kind", ["Adafactor", "transformers Adafactor"])
def test_adafactor_is_refused_where_padding_would_enter_its_averages(kind):
    model, tuner = make(mode="alternate")
    with pytest.raises(
        UnsupportedError, match=r"Adafactor averages over a whole parameter, .* such as 0. Use mode='row'"
    ):
        train(model, OPTIMIZERS[kind](tuner.parameters()), 1)


def test_an_optimizer_without_the_slices_is_noticed():
    model, _tuner = make(train_rest=True)
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n.endswith("bias")], lr=0.1)
    train(model, optimizer, 2)
    with pytest.raises(
        OptimizerError, match=r"gradients arrive, but 3 optimizer steps went by .* Build the optimizer after"
    ):
        train(model, optimizer, 1)


def test_an_optimizer_of_something_else_is_left_alone():
    model, tuner = make()
    other = nn.Linear(2, 2)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    optimizer = sgd(tuner)
    for x, y in batches(5):
        other(torch.ones(1, 2)).sum().backward()
        other_optimizer.step()
        step(model, optimizer, x, y)
        other_optimizer.step()
    assert tuner.mover.step == 5


def test_an_idle_model_with_a_gradient_does_not_stop_the_training_of_another():
    model, tuner = make()
    x, y = batches(1)[0]
    (model(x) - y).square().mean().backward()  # an analysis, say; nobody ever steps this model
    other = mlp()
    train(other, torch.optim.SGD(other.parameters(), lr=0.1), 10)
    assert tuner.mover.step == 0


def test_stepping_inside_backward_is_refused():
    model, tuner = make()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in tuner.parameters()}
    for parameter in tuner.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    x, y = batches(1)[0]
    with pytest.raises(OptimizerError, match=r"SGD steps inside the backward pass.*Step once after backward"):
        (model(x) - y).square().mean().backward()


@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_two_optimizers_that_share_the_parameters(order, interval):
    """A move must wait for the last optimizer of a round: it would take the old slice's gradient to the new one."""
    model, tuner = make(interval=interval)
    twin, twin_tuner = make(interval=interval)
    parameters = tuner.parameters()
    optimizers = [torch.optim.AdamW(parameters[:1], lr=0.01), torch.optim.AdamW(parameters[1:], lr=0.01)]
    single = torch.optim.AdamW(twin_tuner.parameters(), lr=0.01)
    for x, y in batches(9):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        for i in order:
            optimizers[i].step()
        step(twin, single, x, y)
        for name, layer in tuner.layers.items():
            assert_close(layer.dense(), twin_tuner.layers[name].dense(), rtol=0, atol=0)
    assert visits(tuner) == visits(twin_tuner)


def test_gradients_of_an_old_slice_never_reach_a_new_one():
    model, tuner = make(interval=1)
    first, rest = tuner.parameters()[:1], tuner.parameters()[1:]
    optimizers = [torch.optim.SGD(first, lr=0.1), torch.optim.SGD(rest, lr=0.1)]
    x, y = batches(1)[0]
    (model(x) - y).square().mean().backward()
    optimizers[0].step()
    assert tuner.mover.visits == 2
    before = [p.detach().clone() for p in rest]
    optimizers[1].step()
    assert all(torch.equal(a, b) for a, b in zip(before, rest, strict=True))


def test_a_new_optimizer_takes_over():
    model, tuner = make(interval=3)
    first = torch.optim.AdamW(tuner.parameters(), lr=0.01)  # still there, but it does not step any more
    train(model, first, 4)
    second = sgd(tuner)
    train(model, second, 5)
    assert tuner.mover.step == 9
    assert tuner.mover.visits == 4


# -- moving by hand ---------------------------------------------------------------------------------------------------


def test_explicit_moves_and_undo():
    model, tuner = make(mode="row", interval=100)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.01)
    train(model, optimizer, 3)
    stage = {n: layer.dense().clone() for n, layer in tuner.layers.items()}
    tuner.move()
    assert {s.start for s in tuner.mover.slices().values()} == {2}
    assert all(torch.equal(stage[n], layer.dense()) for n, layer in tuner.layers.items())
    assert all(bool((v == 0).all()) for p in tuner.parameters() for v in optimizer.state[p].values())
    train(model, optimizer, 3, seed=2)
    tuner.mover.move({"2": Slice("row", 1, 2)})
    assert tuner.mover.slices() == {"0": Slice("row", 4, 2), "2": Slice("row", 1, 2), "4": Slice("row", 3, 2)}
    train(model, optimizer, 2, seed=3)
    tuner.undo(2)
    assert all(torch.equal(stage[n], layer.dense()) for n, layer in tuner.layers.items())
    assert {s.start for s in tuner.mover.slices().values()} == {0}
    assert all(bool((v == 0).all()) for p in tuner.parameters() for v in optimizer.state[p].values())
    for layer in tuner.layers.values():
        assert torch.equal(layer.block("default"), lines_of(layer.dense(), layer.states["default"].journal.active))
    with pytest.raises(UnsupportedError, match="the first visit has nothing before it"):
        tuner.undo()


def test_a_move_to_a_wrong_place_moves_no_layer():
    _model, tuner = make(mode="row")
    before = tuner.mover.slices()
    with pytest.raises(ConfigError, match="4: row slice of width 2 at 9 does not fit"):
        tuner.mover.move({"4": Slice("row", 9, 2)})
    assert tuner.mover.slices() == before
    with tuner.disabled():
        for action in (tuner.move, tuner.undo):
            with pytest.raises(
                ConfigError, match=r"0: the active adapters are \[\], but only 'default' alone can be moved"
            ):
                action()
    assert tuner.mover.slices() == before


def test_a_move_of_an_unknown_layer_moves_no_layer():
    _model, tuner = make(mode="row")
    before = tuner.mover.slices()
    with pytest.raises(ConfigError, match=r"no sliced layer is named '1'; the names are \['0', '2', '4'\]"):
        tuner.mover.move({"1": Slice("row", 0, 2)})
    assert tuner.mover.slices() == before


def test_undoing_more_than_the_history_holds_takes_nothing_back():
    model, tuner = make(history=2)
    train(model, sgd(tuner), 14)
    before = visits(tuner)
    with pytest.raises(UnsupportedError, match="before the last 2 of 4 visits only"):
        tuner.undo(3)
    assert visits(tuner) == before
    tuner.undo(2)
    assert tuner.mover.visits == 2


def test_positions_of_the_user():
    model, tuner = make(mode="column", positions=[3, 0, 1], interval=2)
    train(model, sgd(tuner), 7)
    assert [v[0].start for v in visits(tuner)[0]] == [3, 0, 1, 3]

    def by_name(visit, layer, shape):
        return Slice("row", {"0": 4, "2": 2, "4": 0}[layer] + visit, 1)

    model, tuner = make(mode="row", r=1, positions=by_name, interval=2)
    train(model, sgd(tuner), 5)
    assert [[v[0].start for v in layer] for layer in visits(tuner)] == [[4, 5, 6], [2, 3, 4], [0, 1, 2]]


def test_a_position_that_is_wrong_later_moves_no_layer():
    model, tuner = make(mode="row", r=1, positions=lambda visit, layer, shape: Slice("row", 4 * visit, 1), interval=2)
    with pytest.raises(ConfigError, match="positions function, layer '2', visit 2: row slice of width 1 at 8"):
        train(model, sgd(tuner), 5)
    assert {s.start for s in tuner.mover.slices().values()} == {4}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_slice_that_is_not_finite_is_not_committed(value):
    model, tuner = make(interval=3)
    optimizer = sgd(tuner)
    train(model, optimizer, 2)
    x, y = batches(1)[0]
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    tuner.parameters()[1].grad[1, 2] = value
    with pytest.raises(NumericalError, match=r"steps 1 to 3: the active slice of 2 is NaN or infinite \(1 of 3"):
        optimizer.step()
    assert tuner.mover.visits == 1
    with tuner.disabled():
        assert torch.equal(tuner.layers["2"].dense(), mlp()[2].weight)


# -- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["reset", "rewarm", "keep"])
@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "AdamW fused", "RMSprop"])
def test_padding_never_has_gradient_decay_or_norm(name, policy):
    model, tuner = make(interval=3, state_policy=policy, rewarm_steps=2)
    optimizer = OPTIMIZERS[name](tuner.parameters())
    padded = 0
    for x, y in batches(14):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        for layer, parameter in zip(tuner.layers.values(), tuner.parameters(), strict=True):
            block = layer.block("default")
            outside = torch.ones_like(parameter, dtype=torch.bool)
            outside[: block.shape[0], : block.shape[1]] = False
            padded += int(outside.sum())
            assert not parameter.grad[outside].any()
            assert not parameter.detach()[outside].any()
            assert_close(parameter.detach().norm(), block.norm())
        optimizer.step()
    assert padded > 0
    assert tuner.mover.active_entries() == sum(layer.block("default").numel() for layer in tuner.layers.values())


# -- movers of a model ------------------------------------------------------------------------------------------------


def test_movers_of_finds_a_models_own_and_survives_the_tuner():
    model, tuner = make()
    other, _ = make()
    mover = tuner.mover
    assert movers_of(model) == [mover]
    assert movers_of(other) != [mover]
    del tuner, mover
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train(model, optimizer, 9)
    (mover,) = movers_of(model)
    assert mover.visits == 3


def test_two_adapters_have_a_mover_each_and_only_the_active_one_moves():
    model, tuner = make(mode="row")
    for name, layer in tuner.layers.items():
        layer.add_slice("second", Schedule("column", 1, 1), name)
    second = Mover("second", tuner.layers, MoveSettings(interval=2))
    assert movers_of(model) == [tuner.mover, second]
    for layer in tuner.layers.values():
        layer.apply_only(["second"])
    optimizer = torch.optim.SGD([layer.slicefine_active["second"] for layer in tuner.layers.values()], lr=0.1)
    train(model, optimizer, 5)
    assert (second.visits, tuner.mover.visits) == (3, 1)
    assert (second.step, tuner.mover.step) == (5, 0)


def test_an_adapter_of_a_deleted_ones_name_has_one_mover():
    model, tuner = make(mode="row")
    old = tuner.mover
    for name, layer in tuner.layers.items():
        layer.delete_slice("default")
        layer.add_slice("default", Schedule("row", 2, 2), name)
        layer.apply_only(["default"])
    new = Mover("default", tuner.layers, MoveSettings(interval=2))
    assert movers_of(model) == [new]
    train(model, sgd(tuner), 5)
    assert (new.step, new.visits) == (5, 3)
    assert (old.step, old.slices()) == (0, {})


def test_plans():
    assert MoveSettings(interval=7, moves=3).plan(100) == Moves(7)
    assert MoveSettings(moves=0).plan(None) == Moves(None, 0)
    assert MoveSettings(moves=3).plan(None) is None
    assert MoveSettings(moves=3, total_steps=400).plan(None) == Moves(100, 3)
    assert MoveSettings(moves=3, total_steps=400).plan(800) == Moves(200, 3)


def test_no_warning_in_an_ordinary_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tuner = make(total_steps=9)
        train(model, sgd(tuner), 9)
