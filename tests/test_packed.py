"""Slices beside a weight: the packed lines read as a matrix, and training equals training in place."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from core_helpers import batches, mlp, step
from slicefine import attach
from slicefine.errors import AdapterFileError, ConfigError, ContentError, UnsupportedError
from slicefine.functional import Active, block_view, line_index, pad_block, read_block, write_block
from slicefine.geometry import Slice
from slicefine.packed import PackedDelta

SHAPE = (5, 6)
BLOCKS = [*(Slice("row", start, 2) for start in (0, 1, 3)), *(Slice("column", start, 3) for start in (0, 2, 3))]
MODES = {"row": {"r": 2}, "column": {"r": 3}, "alternate": {"r_row": 2, "r_column": 3}}


def packed(dtype=torch.float64):
    return PackedDelta(SHAPE, dtype, torch.device("cpu"))


def as_dense(delta):
    return delta.read(Slice("row", 0, SHAPE[0]))


@given(st.lists(st.tuples(st.sampled_from(BLOCKS), st.sampled_from(["write", "view", "zero"]), st.integers(0, 9))))
def test_it_is_a_matrix_of_zeros_until_written(actions):
    delta, dense = packed(), torch.zeros(SHAPE, dtype=torch.float64)
    for block, action, seed in actions:
        values = torch.randn(block_view(dense, block).shape, generator=torch.Generator().manual_seed(seed)).double()
        values = torch.zeros_like(values) if action == "zero" else values
        view = delta.view(block) if action == "view" else None
        if view is None:
            write_block(delta, block, values)
        else:
            assert torch.equal(view, read_block(dense, block))
            view.copy_(values)
        write_block(dense, block, values)
        for other in BLOCKS:
            assert torch.equal(read_block(delta, other), read_block(dense, other))
    x, y = torch.randn(2, 3, SHAPE[1]).double(), torch.randn(2, 3, SHAPE[0]).double()
    wanted = y + F.linear(x, dense)
    assert_close(delta.add_to_layer(lambda _: y.clone(), x), wanted)
    assert_close(delta.add_to_layer(lambda _: y.clone().transpose(0, 1).contiguous().transpose(0, 1), x), wanted)
    weight = torch.ones(SHAPE, dtype=torch.float64)
    delta.add_to(weight)
    assert_close(weight, 1 + dense)


def test_blocks_that_lie_together_are_written_through_a_view_and_others_are_not():
    delta = packed()
    assert delta.view(Slice("row", 1, 2)) is not None
    assert delta.view(Slice("row", 0, 2)) is None  # its second line came first


@pytest.mark.parametrize("compiling", [False, True])  # the latter is made of operators that the compiler knows
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("blocks", [[], BLOCKS[:1], BLOCKS[-1:], [BLOCKS[0], BLOCKS[-1]]])
def test_the_product_is_differentiable_in_what_goes_in(monkeypatch, blocks, shared, compiling):
    delta = packed()
    for block in blocks:
        write_block(delta, block, torch.randn(read_block(delta, block).shape, dtype=torch.float64))
    x, y = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (SHAPE[1], SHAPE[0]))
    weight = torch.randn(SHAPE, dtype=torch.float64)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)

    def product(x, y):
        return delta.add_to_layer(lambda x: F.linear(x, weight) + y, x, shared)

    assert_close(product(x, y), y + F.linear(x, weight + as_dense(delta)))
    assert torch.autograd.gradcheck(product, (x, y))
    assert torch.autograd.gradcheck(lambda x: delta.add_to_layer(lambda _: torch.zeros_like(y), x, shared), (x,))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("blocks", [[], BLOCKS[:1], BLOCKS[-1:], [BLOCKS[0], BLOCKS[-1], BLOCKS[3]]])
def test_the_product_with_the_sum_is_that_of_the_dense_matrix_with_its_gradients(blocks, keeps):
    delta, made = packed(), []
    for block in blocks:
        write_block(delta, block, torch.randn(read_block(delta, block).shape, dtype=torch.float64))
    weight = torch.randn(SHAPE, dtype=torch.float64)
    x, bias = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((2, 3, SHAPE[1]), (SHAPE[0],)))

    def dense():
        made.append(weight.clone())
        return made[-1]

    for active in [None, *BLOCKS]:
        parameter = None if active is None else torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
        known = active and Active(parameter, line_index(active, SHAPE), active.axis, None, None)
        both = (weight + as_dense(delta)).requires_grad_()
        made.clear()
        found, wanted = delta.multiply_sum(dense, x, bias, known, keeps), F.linear(x, both, bias)
        assert_close(found, wanted)
        inputs = [x, bias] if active is None else [x, bias, parameter]
        gradient = torch.randn_like(found)
        gradients = torch.autograd.grad(found, inputs, gradient)
        dx, db, dw = torch.autograd.grad(wanted, [x, bias, both], gradient)
        assert_close(gradients[:2], (dx, db))
        if active is not None:
            assert_close(gradients[2], pad_block(read_block(dw, active), parameter.shape))
        assert len(made) == (1 if keeps else 2)
    assert torch.autograd.gradcheck(lambda x, bias: delta.multiply_sum(dense, x, bias, None, keeps), (x, bias))
    assert not delta.multiply_sum(dense, x.detach()).requires_grad


def test_the_product_with_the_sum_leaves_out_what_must_not_change_and_refuses_other_content():
    delta, block = packed(), BLOCKS[0]
    owner = SimpleNamespace(content=1, label="here")
    parameter = torch.zeros(2, SHAPE[1], dtype=torch.float64, requires_grad=True)
    fixed = torch.zeros(2, SHAPE[1], dtype=torch.bool)
    fixed[0, 1] = True
    active = Active(parameter, line_index(block, SHAPE), block.axis, owner, fixed)
    x = torch.randn(4, SHAPE[1], dtype=torch.float64)

    def product():
        return delta.multiply_sum(lambda: torch.ones(SHAPE, dtype=torch.float64), x, active=active).sum()

    product().backward()
    assert torch.equal(parameter.grad == 0, fixed)
    late = product()
    owner.content = 2
    with pytest.raises(ContentError, match="here: the weights changed between forward and backward"):
        late.backward()


@pytest.mark.parametrize("hooks", ["own", "global"])
def test_a_gradient_that_hooks_were_given_stays_as_they_saw_it(hooks):
    """It is what the base layer sent, without the lines beside its weight, and nobody adds to it afterwards."""
    model, tuner = trained("alternate", True, OPTIMIZERS["sgd"], steps=20)
    layer = next(iter(tuner.layers.values()))
    seen = []

    def keep(module, grad_input, grad_output):
        if module is layer.base_layer:
            seen.append((grad_input[0], F.linear(grad_output[0], layer.base_weight.t())))

    made = layer.base_layer.register_full_backward_hook(keep)
    if hooks == "global":
        made.remove()
        made = torch.nn.modules.module.register_module_full_backward_hook(keep)
    x, y = batches(1, seed=9)[0]
    try:
        (model(x.clone().requires_grad_()) - y).square().mean().backward()
    finally:
        made.remove()
    assert_close(*seen[0])
    assert not layer.packed.empty


def test_the_input_may_come_by_name():
    gradients = []
    for named in (False, True):
        _, tuner = trained("column", True, OPTIMIZERS["sgd"], steps=20)
        layer = next(iter(tuner.layers.values()))
        x = batches(1, seed=9)[0][0].requires_grad_()
        (layer(input=x) if named else layer(x)).square().sum().backward()
        gradients.append(x.grad)
    assert_close(*gradients)


@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16])
def test_the_product_is_taken_in_the_narrower_precision(inputs, values):
    delta = packed(values)
    for block in (BLOCKS[0], BLOCKS[-1]):
        write_block(delta, block, torch.randn(read_block(delta, block).shape))
    x, y = torch.randn(4, SHAPE[1], dtype=inputs, requires_grad=True), torch.zeros(4, SHAPE[0], dtype=inputs)
    narrow = torch.bfloat16 if torch.bfloat16 in (inputs, values) else torch.float32
    found = delta.add_to_layer(lambda _: y, x)
    found.sum().backward()
    assert found.dtype == x.grad.dtype == inputs
    tolerance = {} if narrow == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    assert_close(found.float(), F.linear(x, as_dense(delta).to(inputs)).float(), **tolerance)
    assert_close(x.grad.float(), as_dense(delta).float().sum(0).expand(4, -1), **tolerance)
    alone = packed(values)
    write_block(alone, BLOCKS[0], torch.randn(read_block(alone, BLOCKS[0]).shape))
    product = alone.add_to_layer(lambda _: torch.zeros(4, SHAPE[0], dtype=inputs), x)
    assert torch.equal(product, product.to(narrow).to(inputs))


@pytest.mark.parametrize("mode", MODES)
def test_disabling_between_forward_and_backward_changes_no_gradient(mode):
    """As in DPO without a reference model; what lay beside the weight is made anew in between."""
    gradients = []
    for interrupted in (False, True):
        model, tuner = trained(mode, True, OPTIMIZERS["sgd"], steps=20)
        x, y = batches(1, seed=9)[0]
        loss = (model(x) - y).square().mean()
        if interrupted:
            with torch.no_grad(), tuner.disabled():
                model(x)
        loss.backward()
        gradients.append([p.grad.clone() for p in tuner.parameters()])
    assert_close(*gradients)


def test_a_backward_over_other_slices_is_refused():
    model, tuner = trained("column", True, OPTIMIZERS["sgd"], steps=20)
    x, y = batches(1, seed=9)[0]
    loss = (model(x) - y).square().mean()
    tuner.move()
    with pytest.raises(ContentError, match="changed between forward and backward"):
        loss.backward()


def test_a_random_mask_is_refused():
    with pytest.raises(UnsupportedError, match="a random mask has no lines"):
        packed().read(Slice("entries", 0, 4))
    with pytest.raises(ConfigError, match="cannot be additive"):
        attach(mlp(), mode="random_mask", additive=True, interval=5)


def matrices(tuner):
    return [layer.packed.read(Slice("row", 0, layer.shape[0])) for layer in tuner.layers.values()]


def trained(mode, additive, optimizer, steps=120, **settings):
    model = mlp()
    tuner = attach(model, mode=mode, additive=additive, interval=7, **MODES[mode], **settings)
    made = optimizer(tuner.parameters())
    for x, y in batches(steps):
        step(model, made, x, y)
    return model, tuner


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0),
}


@pytest.mark.parametrize("policy", ["reset", "rewarm", "keep"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", MODES)
def test_training_beside_the_weight_equals_training_in_it(mode, optimizer, policy):
    base = mlp()
    model, tuner = trained(mode, True, OPTIMIZERS[optimizer], state_policy=policy)
    twin, dense = trained(mode, False, OPTIMIZERS[optimizer], state_policy=policy)
    x = batches(1, seed=9)[0][0]
    assert tuner.mover.visits == dense.mover.visits > 10
    assert_close(model(x), twin(x))
    for (name, layer), delta in zip(tuner.layers.items(), matrices(tuner), strict=True):
        assert torch.equal(layer.base_layer.weight, base.get_submodule(name).weight)  # never written
        assert_close(layer.base_layer.weight + delta, dense.layers[name].weight)
    with tuner.disabled():
        assert torch.equal(model(x), base(x))
    for ours, theirs in zip(tuner.delta().values(), dense.delta().values(), strict=True):
        assert [s for s, _ in ours] == [s for s, _ in theirs]
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_disabling_between_steps_changes_nothing(mode):
    """Coming back writes block after block, so another line may own a crossing: kept views must not survive it."""
    results = []
    for interrupted in (False, True):
        model = mlp()
        tuner = attach(model, mode=mode, additive=True, interval=4, **MODES[mode])
        optimizer = OPTIMIZERS["sgd"](tuner.parameters())
        for x, y in batches(30):
            step(model, optimizer, x, y)
            if interrupted:
                with tuner.disabled():
                    model(x)
        results.append(model(batches(1, seed=9)[0][0]))
    assert_close(*results)  # who owns a crossing decides the order of a sum


@pytest.mark.parametrize("mode", MODES)
def test_undo_and_files_and_copies(mode, tmp_path):
    model, tuner = trained(mode, True, OPTIMIZERS["sgd"], steps=30)
    x = batches(1, seed=9)[0][0]
    lines = matrices(tuner)
    tuner.move()
    tuner.undo()
    assert all(map(torch.equal, matrices(tuner), lines))
    before = model(x)
    assert_close(copy.deepcopy(model)(x), before)  # who owns a crossing decides the order of a sum
    tuner.save(tmp_path / "a.safetensors")
    other = mlp()
    again = attach(other, mode=mode, additive=True, interval=7, **MODES[mode])
    again.load(tmp_path / "a.safetensors")
    assert all(map(torch.equal, matrices(again), matrices(tuner)))
    assert_close(other(x), before)
    assert {k: [s for s, _ in v] for k, v in again.delta().items()} == {
        k: [s for s, _ in v] for k, v in tuner.delta().items()
    }


@pytest.mark.parametrize("additive", [True, False])
def test_a_file_of_the_other_kind_is_refused(additive, tmp_path):
    _, tuner = trained("row", additive, OPTIMIZERS["sgd"], steps=3)
    tuner.save(tmp_path / "a.safetensors")
    other = attach(mlp(), mode="row", r=2, additive=not additive, interval=7)
    with pytest.raises(AdapterFileError, match=f"written with additive={additive}.*attach with additive={additive}"):
        other.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("merge", [False, True])
def test_unloading(merge):
    base = mlp()
    model, tuner = trained("alternate", True, OPTIMIZERS["sgd"], steps=30)
    x = batches(1, seed=9)[0][0]
    wanted = model(x) if merge else base(x)
    plain = tuner.unload(merge=merge)
    assert all(type(module) in (nn.Linear, nn.Tanh) for module in plain)
    assert_close(plain(x), wanted, rtol=0 if not merge else None, atol=0 if not merge else None)


def test_it_follows_the_model_to_another_precision():
    model, _ = trained("alternate", True, OPTIMIZERS["sgd"], steps=30)
    x = batches(1, seed=9)[0][0]
    before = model(x)
    assert_close(model.to(torch.float32)(x.float()), before.float())


def test_nothing_of_the_weights_size_is_made():
    from core_helpers import Allocations

    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 48))
    tuner = attach(model, mode="alternate", r=2, additive=True, interval=2)
    optimizer = OPTIMIZERS["sgd"](tuner.parameters())
    x, y = torch.randn(3, 64), torch.randn(3, 48)
    step(model, optimizer, x, y)
    with Allocations() as seen:
        for _ in range(7):
            step(model, optimizer, x, y)
    assert seen.largest < 48 * 96 / 4


@pytest.mark.parametrize("additive", [True, False])
def test_a_state_dict_of_the_other_kind_is_refused(additive):
    model, _ = trained("alternate", additive, OPTIMIZERS["sgd"], steps=20)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = mlp(seed=2)
    tuner = attach(other, mode="alternate", additive=not additive, interval=7, **MODES["alternate"])
    x = batches(1, seed=9)[0][0]
    before = other(x)
    with pytest.raises(AdapterFileError, match=f"attach with additive={additive}"):
        other.load_state_dict(state)
    assert_close(other(x), before)
    same = mlp(seed=2)
    again = attach(same, mode="alternate", additive=additive, interval=7, **MODES["alternate"])
    same.load_state_dict(state)
    assert_close(same(x), model(x))
    with again.disabled():
        assert_close(same(x), mlp()(x))
    assert tuner.additive is not additive


def test_disabling_under_inference_mode_leaves_a_model_that_trains():
    model, tuner = trained("alternate", True, OPTIMIZERS["sgd"], steps=20)
    x, y = batches(1, seed=9)[0]
    with torch.inference_mode(), tuner.disabled():
        model(x)
    optimizer = OPTIMIZERS["sgd"](tuner.parameters())
    before = model(x)
    for _ in range(9):
        step(model, optimizer, x, y)
    assert (model(x) - y).square().mean() < (before - y).square().mean()
