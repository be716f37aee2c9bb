"""A moving window of blocks: only its layers train, backward stops below it, and everything else still holds."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import pickle
import socket
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from core_helpers import batches, mlp, slice_mask, step
from slicefine import Slice, SliceFineConfig, attach, movers_of
from slicefine.errors import ConfigError, OptimizerError
from slicefine.reference import ReferenceSliceLinear
from slicefine.schedule import Schedule, slice_at
from slicefine.window import DWELLS, ORDERS, Place, Window, block_numbers

# -- pure functions ---------------------------------------------------------------------------------------------------


def tops(window, count, visits):
    return [(r.start, r.stop) for r in (window.at(v, count) for v in range(visits))]


def test_the_orders_of_a_window():
    assert tops(Window(2), 6, 4) == [(4, 6), (2, 4), (0, 2), (4, 6)]
    assert tops(Window(2, "bottom-up"), 6, 4) == [(0, 2), (2, 4), (4, 6), (0, 2)]
    assert tops(Window(2, "fixed"), 6, 3) == [(4, 6)] * 3
    assert tops(Window(4), 6, 3) == [(2, 6), (0, 4), (2, 6)]  # the lowest one keeps its size
    assert tops(Window(0.5), 6, 2) == [(3, 6), (0, 3)]
    assert tops(Window(1 / 3), 6, 3) == [(4, 6), (2, 4), (0, 2)]
    assert tops(Window(9), 6, 2) == [(0, 6)] * 2


def test_the_dwell_of_a_window():
    assert tops(Window(2, dwell="top-heavy"), 6, 7) == [(4, 6)] * 3 + [(2, 4)] * 2 + [(0, 2)] + [(4, 6)]
    assert tops(Window(2, "bottom-up", (1, 2, 1)), 6, 4) == [(0, 2), (2, 4), (2, 4), (4, 6)]


@given(
    count=st.integers(1, 20),
    size=st.one_of(st.integers(1, 25), st.floats(0.01, 1.0)),
    order=st.sampled_from(ORDERS),
    dwell=st.sampled_from(DWELLS),
    seed=st.integers(0, 5),
)
def test_every_cycle_covers_every_block(count, size, order, dwell, seed):
    window = Window(size, order, dwell, seed)
    windows = window.windows(count)
    cycle = sum(range(1, len(windows) + 1)) if dwell == "top-heavy" else len(windows)
    for start in (0, cycle, 2 * cycle):
        seen = [window.at(visit, count) for visit in range(start, start + cycle)]
        assert {(r.start, r.stop) for r in seen} == {(r.start, r.stop) for r in windows}
        assert len({len(r) for r in seen}) == 1
        covered = set(itertools.chain(*seen))
        assert covered == (set(windows[0]) if order == "fixed" else set(range(count)))


@given(count=st.integers(1, 8), size=st.integers(1, 8), order=st.sampled_from(ORDERS), visits=st.integers(0, 20))
def test_turns_count_the_visits_inside(count, size, order, visits):
    for block in range(count):
        place = Place(Window(size, order), block, count)
        inside = [v for v in range(visits) if place.trains(v)]
        assert place.turn(visits) == len(inside)
        assert all(not place.below(v) for v in inside)


def test_blocks_come_from_names():
    names = [
        "embed.project",
        "encoder.block.0.a",
        "encoder.block.1.a",
        "decoder.block.0.a",
        "decoder.block.0.b",
        "head",
    ]
    assert list(block_numbers(names).values()) == [0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, r"window=0 must be a number of blocks"),
        ({"size": True}, r"window=True must be"),
        ({"size": 1.5}, r"window=1.5 is a share and must lie in \(0, 1\]"),
        ({"size": 2, "order": "sideways"}, r"window_order='sideways' is unknown; expected one of top-down"),
        ({"size": 2, "dwell": "long"}, r"window_dwell='long' is unknown; expected one of uniform"),
        ({"size": 2, "dwell": (1, 0)}, r"window_dwell=\(1, 0\): every window needs"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Window(**settings)


def test_settings_that_do_not_fit_the_model_are_refused():
    with pytest.raises(ConfigError, match=r"has 3 numbers, but 3 blocks make 2 windows of 2"):
        attach(mlp(), r=1, interval=1, window=2, window_dwell=(1, 1, 1))
    with pytest.raises(ConfigError, match=r"window_order and window_dwell need window="):
        attach(mlp(), r=1, interval=1, window_order="random")
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match=r"none of the layers \(a, b, ...\) has a number in its name"):
        attach(model, r=1, interval=1, window=1)


def test_containers_are_no_blocks():
    inside = [f"0.layer.{i}.{part}" for i in range(4) for part in ("up", "down")]
    assert list(block_numbers([*inside, "1"]).values()) == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    experts = [f"layers.{i}.experts.{e}.up" for i in range(3) for e in range(8)]
    assert sorted(set(block_numbers(experts).values())) == [0, 1, 2]
    assert list(block_numbers(["only.0.up"]).values()) == [0]


def test_a_window_that_does_not_fit_leaves_the_model_alone():
    from peft import get_peft_model

    for wrap in (
        lambda model: attach(model, r=1, interval=1, window=1, window_dwell=(1, 2)),
        lambda model: get_peft_model(
            model,
            SliceFineConfig(r=1, interval=1, window=1, window_dwell=[1, 2], target_modules=["0", "2", "4"]),
        ),
    ):
        model = mlp()
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        with pytest.raises(ConfigError, match=r"has 2 numbers, but 3 blocks make 3 windows of 1"):
            wrap(model)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
        assert movers_of(model) == []


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["row", "column", "alternate", "random_mask"])
@pytest.mark.parametrize("dwell", DWELLS)
def test_only_the_windows_active_slices_change(mode, dwell):
    model = mlp()
    tuner = attach(model, mode=mode, r=2, interval=2, window=1, window_dwell=dwell)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1, weight_decay=0.3)
    trained = set()
    for number, (x, y) in enumerate(batches(16)):
        before = {name: layer.dense().clone() for name, layer in tuner.layers.items()}
        active, visit = tuner.mover.slices(), number // 2
        step(model, optimizer, x, y)
        block = Window(1, dwell=dwell).at(visit, 3).start
        assert list(active) == [str(2 * block)]
        trained |= set(active)
        for name, layer in tuner.layers.items():
            changed = layer.dense() != before[name]
            if name in active:
                assert torch.equal(changed, slice_mask(active[name], layer.shape))
            else:
                assert not changed.any()
        idle = [p for n, p in zip(tuner.layers, tuner.parameters(), strict=True) if n not in trained]
        assert not any(p in optimizer.state for p in idle)  # no moments before the first turn
    assert trained == {"0", "2", "4"}


def reference_run(mode, window, interval, steps, decay):
    """The twin under a window: dense autograd, one optimizer, layers outside the window get no gradient."""
    model = mlp()
    schedule = Schedule(mode, 2, 2)
    layers = {n: ReferenceSliceLinear(model[int(n)], schedule, n) for n in ("0", "2", "4")}
    for name, layer in layers.items():
        model[int(name)] = layer
    optimizer = torch.optim.AdamW([layer.part_T for layer in layers.values()], lr=0.05, weight_decay=decay)
    turns = dict.fromkeys(layers, 0)
    for number, (x, y) in enumerate(batches(steps)):
        visit = number // interval
        inside = window.at(visit, 3)
        if number and number % interval == 0:
            for block, (name, layer) in enumerate(layers.items()):
                optimizer.state.pop(layer.part_T, None)
                if block in inside:
                    layer.go_to(slice_at(schedule, turns[name], layer.shape, name))
        if number % interval == 0:
            for block, name in enumerate(layers):
                turns[name] += block in inside
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        for block, layer in enumerate(layers.values()):
            if block not in inside:
                layer.part_T.grad = None
        optimizer.step()
        for layer in layers.values():  # padding is not part of the model
            inside_block = torch.zeros_like(layer.part_T)
            inside_block[: layer.active.width, : layer.lines().shape[1]] = 1
            layer.part_T.data.mul_(inside_block)
    return {name: layer.weight().detach() for name, layer in layers.items()}


@pytest.mark.parametrize("mode", ["row", "column", "alternate"])
@pytest.mark.parametrize("order", ORDERS)
def test_windows_equal_the_reference_twin(mode, order):
    window = Window(2, order)
    expected = reference_run(mode, window, 3, 60, 0.1)
    model = mlp()
    tuner = attach(model, mode=mode, r=2, interval=3, window=2, window_order=order)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.05, weight_decay=0.1)
    for x, y in batches(60):
        step(model, optimizer, x, y)
    for name, layer in tuner.layers.items():
        assert_close(layer.dense(), expected[name])


def test_backward_stops_below_the_window():
    model = mlp()
    tuner = attach(model, mode="row", r=2, interval=1, window=1)
    reached = []
    for name, module in model.named_modules():
        if name in ("0", "2", "4"):
            module.register_forward_hook(lambda _, args, y, name=name: reached.append((name, y.requires_grad)))
    (x, _), *_ = batches(1)
    model(x)
    assert reached == [("0", False), ("2", False), ("4", True)]
    reached.clear()
    tuner.move()
    model(x)
    assert reached == [("0", False), ("2", True), ("4", True)]


def test_nothing_is_kept_for_layers_below_the_window():
    model = mlp()
    tuner = attach(model, mode="row", r=2, interval=1, window=1)
    (x, _), *_ = batches(1)

    def kept():
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            model(x).sum()
        return len(shapes)

    top = kept()
    tuner.move()
    middle = kept()
    tuner.move()
    assert top < middle < kept()


def test_a_gradient_below_the_window_is_reported_once():
    model = mlp()
    attach(model, mode="row", r=2, interval=1, window=1)
    (x, _), *_ = batches(1)
    with pytest.warns(UserWarning, match=r"a gradient goes on below the window of blocks \(0\).*use_reentrant=False"):
        model(x.requires_grad_())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


def test_no_gradient_below_is_reported_where_nothing_trains():
    model = mlp()
    tuner = attach(model, mode="row", r=2, interval=1, window=1)
    for parameter in tuner.parameters():
        parameter.requires_grad_(False)
    (x, _), *_ = batches(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x.requires_grad_()).sum().backward()


def test_an_optimizer_without_the_slices_is_noticed_under_a_window():
    model = mlp()
    attach(model, mode="row", r=2, interval=1, window=1)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(OptimizerError, match=r"no optimizer holds the slices' parameters"):
        for x, y in batches(5):
            (model(x) - y).square().mean().backward()
            other.step()


def test_a_layer_outside_the_window_cannot_be_moved():
    tuner = attach(mlp(), mode="row", r=2, interval=1, window=1)
    with pytest.raises(ConfigError, match=r"move: 4 lies outside the window of blocks at the next visit"):
        tuner.mover.move({"4": Slice("row", 0, 2)})
    tuner.mover.move({"2": Slice("row", 3, 2)})
    assert tuner.mover.slices() == {"2": Slice("row", 3, 2)}


def test_layers_that_never_get_their_turn_are_reported():
    tuner = attach(mlp(), mode="row", r=2, moves=1, minimum_steps=1, window=1)
    with pytest.warns(UserWarning, match=r"gets to 2 of its positions in this run, so 1 layers never train \(0, ...\)"):
        tuner.mover.begin_run(10)
    tuner = attach(mlp(), mode="row", r=2, moves=2, minimum_steps=1, window=1, positions="fixed")
    tuner.mover.settings.minimum_steps = 50
    with pytest.warns(UserWarning, match=r"the slice will not move in this run of 2 steps"):
        tuner.mover.begin_run(2)


def test_a_pickled_model_does_not_carry_its_weights_twice():
    model = nn.Sequential(nn.Linear(200, 200))
    tuner = attach(model, mode="row", r=2, interval=5)
    before = len(pickle.dumps(model))
    step(model, torch.optim.SGD(tuner.parameters(), lr=0.1), torch.randn(3, 200), torch.zeros(3, 200))
    assert len(pickle.dumps(model)) < 1.1 * before


def test_zeroed_gradients_do_not_decay_idle_layers():
    model = mlp()
    tuner = attach(model, mode="row", r=2, interval=2, window=1)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1, weight_decay=0.5)
    for x, y in batches(4):  # the second window trains, the first one left gradients behind
        top = tuner.layers["4"].dense().clone()
        optimizer.zero_grad(set_to_none=False)
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert torch.equal(tuner.layers["4"].dense(), top)


def test_several_optimizers_move_the_window():
    model = mlp()
    tuner = attach(model, mode="row", r=2, interval=2, window=1)
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in tuner.parameters()]
    for x, y in batches(8):
        (model(x) - y).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert (tuner.mover.step, tuner.mover.visits) == (8, 5)


# -- what hangs on the journal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["row", "alternate"])
def test_the_journal_says_who_trained_when(mode):
    model = mlp()
    tuner = attach(model, mode=mode, r=2, interval=2, window=1)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for x, y in batches(8):
        step(model, optimizer, x, y)
    visits = {n: layer.states["default"].journal.visits for n, layer in tuner.layers.items()}
    assert {n: [v[1:] for v in vs] for n, vs in visits.items()} == {
        "4": [(1, 2), (3, 2), (5, 4), (7, 8), (9, 8)],
        "2": [(1, 0), (3, 4), (5, 4), (7, 6), (9, 8)],
        "0": [(1, 0), (3, 2), (5, 6), (7, 6), (9, 8)],
    }
    schedule = Schedule(mode, 2, 2)
    shape = tuner.layers["4"].shape
    assert visits["4"][3].slice == slice_at(schedule, 1, shape, "4")
    assert visits["4"][1].slice == slice_at(schedule, 0, shape, "4")


@pytest.mark.parametrize("mode", ["row", "column", "alternate", "random_mask"])
@pytest.mark.parametrize("stop", [3, 4, 6, 9])
def test_a_run_goes_on_from_a_file(tmp_path, mode, stop):
    data = batches(14)

    def start():
        model = mlp()
        return model, attach(model, mode=mode, r=2, interval=2, window=1, window_dwell="top-heavy")

    whole, tuner = start()
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for x, y in data:
        step(whole, optimizer, x, y)
    first, tuner_first = start()
    optimizer = torch.optim.SGD(tuner_first.parameters(), lr=0.1)
    for x, y in data[:stop]:
        step(first, optimizer, x, y)
    tuner_first.save(tmp_path / "slices.safetensors")
    second, tuner_second = start()
    tuner_second.load(tmp_path / "slices.safetensors")
    assert tuner_second.mover.slices() == tuner_first.mover.slices()
    optimizer = torch.optim.SGD(tuner_second.parameters(), lr=0.1)
    for x, y in data[stop:]:
        step(second, optimizer, x, y)
    for name, layer in tuner.layers.items():
        assert torch.equal(layer.dense(), tuner_second.layers[name].dense())
        assert layer.states["default"].journal.visits == tuner_second.layers[name].states["default"].journal.visits


def test_undo_takes_the_window_back():
    model = mlp()
    tuner = attach(model, mode="row", r=2, interval=2, window=1)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    states = []
    for x, y in batches(7):
        states.append((tuner.mover.slices(), [layer.dense().clone() for layer in tuner.layers.values()]))
        step(model, optimizer, x, y)
    tuner.undo()
    slices, weights = states[4][0], states[6][1]
    assert tuner.mover.slices() == slices
    for layer, weight in zip(tuner.layers.values(), weights, strict=True):
        assert_close(layer.dense(), weight)


def test_unload_and_copies_keep_every_bit():
    model = mlp()
    originals = [p.detach().clone() for p in model.parameters()]
    tuner = attach(model, mode="alternate", r=2, interval=1, window=2)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for x, y in batches(5):
        step(model, optimizer, x, y)
    twin = copy.deepcopy(model)
    (mover,) = movers_of(twin)
    assert mover.slices() == tuner.mover.slices()
    mover.move()
    assert mover.slices() != tuner.mover.slices()
    tuner.unload()
    for original, parameter in zip(originals, model.parameters(), strict=True):
        assert torch.equal(original, parameter)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("mode", ["row", "column"])
def test_one_compilation_per_window(mode):
    torch.compiler.reset()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    plain, model = mlp(), mlp()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    tuners = [attach(m, mode=mode, r=2, interval=1, window=1) for m in (plain, model)]
    optimizers = [torch.optim.SGD(tuner.parameters(), lr=0.1) for tuner in tuners]
    for x, y in batches(9):
        step(plain, optimizers[0], x, y)
        step(compiled, optimizers[1], x, y)
    assert tuners[1].mover.visits == 10
    assert len(compilations) == 3
    for mine, other in zip(tuners[0].layers.values(), tuners[1].layers.values(), strict=True):
        assert_close(mine.dense(), other.dense())


# -- PEFT, Trainer, several processes ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_peft_counts_what_trains_and_keeps_the_setting(tmp_path):
    from peft import PeftModel, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    def bert():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
        return BertForSequenceClassification(BertConfig(num_hidden_layers=4, **sizes))

    config = SliceFineConfig(r=2, mode="row", interval=1, window=0.5, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(bert(), config)
    half = 2 * (5 * 2 * 16 + 2 * 32)  # two blocks: five layers with 16 inputs, one with 32
    pooler, head = 2 * 16, 16 * 2 + 2
    assert model.get_nb_trainable_parameters()[0] == half + pooler + head
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for seed in range(3):
        ids = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (mover,) = movers_of(model)
    assert mover.visits == 4
    assert all(".layer.0." in n or ".layer.1." in n for n in mover.slices())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)
    (other,) = movers_of(again)
    assert other.slices() == mover.slices()
    assert again.peft_config["default"].window == 0.5
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_a_weighted_sum_stands_under_no_window():
    from peft import get_peft_model

    config = SliceFineConfig(r=2, mode="row", interval=1, window=1, target_modules=["0", "2", "4"])
    model = get_peft_model(mlp(), config, adapter_name="a")
    model.add_adapter("b", config)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")
    model.set_adapter("c")
    mover = movers_of(model)[-1]
    assert (mover.name, len(mover.slices())) == ("c", 3)
    assert model.peft_config["c"].window is None


def _distributed(rank, port, queue):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model = mlp()
    tuner = attach(model, mode="alternate", r=2, interval=2, window=1)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.05, weight_decay=0.1)
    for x, y in batches(12):
        step(wrapped, optimizer, x[2 * rank : 2 * rank + 2], y[2 * rank : 2 * rank + 2])
    queue.put((rank, [layer.dense().numpy() for layer in tuner.layers.values()], tuner.mover.visits))
    torch.distributed.destroy_process_group()


def test_two_processes_train_the_same_windows_as_one():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_distributed, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = sorted((queue.get(timeout=120) for _ in processes), key=lambda item: item[0])
    for process in processes:
        process.join(timeout=30)
    model = mlp()
    tuner = attach(model, mode="alternate", r=2, interval=2, window=1)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.05, weight_decay=0.1)
    for x, y in batches(12):
        step(model, optimizer, x, y)
    for _, weights, visits in results:
        assert visits == tuner.mover.visits == 7
        for mine, other in zip(weights, tuner.layers.values(), strict=True):
            assert_close(torch.from_numpy(mine), other.dense())
