"""The layer: several adapters on one weight, copies, precision, loading, and the content that a backward may see."""

from __future__ import annotations

import copy
import io
import pickle
import random

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from core_helpers import batches, lines_of, mlp, step
from slicefine import attach
from slicefine.errors import AdapterFileError, ConfigError, ContentError, UnsupportedError
from slicefine.functional import _saved_tensor_hooks, write_block
from slicefine.geometry import Slice
from slicefine.layer import SliceLayer
from slicefine.schedule import Schedule, slice_at
from slicefine.transfer import file_tensors, load_tensors
from slicefine.weights import is_transposed, supports

OUT, IN = 7, 5
SCHEDULES = {
    "a": Schedule("row", 2, 2),
    "b": Schedule("alternate", 2, 2),
    "c": Schedule("random_mask", 1, 1, seed=3),
    "d": Schedule("column", 2, 2, "random"),
}


class Conv1D(nn.Module):
    """transformers' layer with a transposed weight, as far as slicefine looks at it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], self.nf)


def make_layer(dtype: torch.dtype = torch.float32, names: str = "a", base: nn.Module | None = None) -> SliceLayer:
    torch.manual_seed(1)
    layer = SliceLayer(base if base is not None else nn.Linear(IN, OUT, dtype=dtype))
    for name in names:
        layer.add_slice(name, SCHEDULES[name], f"fc.{name}")
    return layer


def change(layer: SliceLayer, name: str, amount: float = 1.0) -> None:
    """What an optimizer's step does, as the mover writes it back."""
    with torch.no_grad():
        layer.block(name).add_(amount * torch.randn_like(layer.block(name)))
    write_block(layer.dense(), layer.states[name].journal.active, layer.block(name))
    layer.mark_synced(name)
    layer.states[name].journal.count_step()


def train_visits(layer: SliceLayer, name: str, visits: int) -> Tensor:
    """Visit some positions, changing every one; returns the dense weight and leaves the layer reverted."""
    layer.apply_only([name])
    for visit in range(visits):
        if visit:
            layer.move(name, slice_at(SCHEDULES[name], visit, layer.shape, f"fc.{name}"))
        change(layer, name)
    result = layer.dense().clone()
    layer.apply_only([])
    return result


# -- several adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_200_random_switches_are_bit_exact(dtype):
    layer = make_layer(dtype, "abcd")
    base = layer.dense().clone()
    weights = {name: train_visits(layer, name, 6) for name in "abcd"}
    assert torch.equal(layer.dense(), base)
    chooser = random.Random(0)
    for _ in range(200):
        names = chooser.sample("abcd", k=chooser.choice([0, 1, 1, 1, 2, 3]))
        layer.apply_only(names)
        assert layer.applied == names
        if len(names) == 1:
            assert torch.equal(layer.dense(), weights[names[0]])
        elif not names:
            assert torch.equal(layer.dense(), base)
        else:
            total = base.double() + sum((weights[n].double() - base.double()) for n in names)
            tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
            assert_close(layer.dense().double(), total, **tolerance)


def test_contents_have_numbers_that_do_not_collide():
    layer = make_layer(names="ab")
    seen = {}
    for names in ([], ["a"], ["b"], ["a", "b"], ["a"], []):
        layer.apply_only(names)
        assert seen.setdefault(tuple(names), layer.content) == layer.content
    assert len(set(seen.values())) == 4
    layer.apply_only(["a"])
    before = layer.content
    change(layer, "a")
    assert layer.content != before


def test_training_two_at_once_is_refused_in_backward():
    layer = make_layer(names="ab")
    layer.apply_only(["a", "b"])
    y = layer(torch.randn(3, IN))
    with pytest.raises(UnsupportedError, match=r"fc.a: several SliceFine adapters are active .* train one at a time"):
        y.sum().backward()
    for parameter in layer.slicefine_active.values():
        parameter.requires_grad_(False)
    x = torch.randn(3, IN, requires_grad=True)
    layer(x).sum().backward()
    assert_close(x.grad, layer.dense().sum(0).expand(3, IN))


def test_adapter_names_and_deletion():
    layer = make_layer(names="ab")
    base = layer.dense().clone()
    with pytest.raises(ConfigError, match=r"fc.b: adapter 'a' exists already; delete it first"):
        layer.add_slice("a", SCHEDULES["a"], "fc.b")
    weight = train_visits(layer, "a", 3)
    layer.apply_only(["a"])
    layer.delete_slice("b")
    assert torch.equal(layer.dense(), weight)
    layer.delete_slice("a")
    assert torch.equal(layer.dense(), base)
    assert not layer.states
    assert not list(layer.slicefine_active.parameters())


def test_loading_both_of_two_active_adapters():
    source, target = make_layer(names="ad"), make_layer(names="ad")
    for layer, visits in ((source, 3), (target, 2)):
        for name in "ad":
            train_visits(layer, name, visits)
    target.apply_only(["a", "d"])
    state = {k: v for k, v in source.state_dict().items() if "slicefine" in k}
    target.load_state_dict(state, strict=False)
    assert target.applied == ["a", "d"]
    source.apply_only(["a", "d"])
    assert torch.equal(target.dense(), source.dense())
    for name in "ad":
        target.apply_only([name])
        source.apply_only([name])
        assert torch.equal(target.dense(), source.dense())
    target.apply_only([])
    assert torch.equal(target.dense(), make_layer().dense())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_two_active_adapters_has_the_same_sum(duplicate):
    layer = make_layer(names="ad")
    weights = {name: train_visits(layer, name, 3) for name in "ad"}
    layer.apply_only(["a", "d"])
    twin = duplicate(layer)
    twin(torch.randn(2, IN))
    assert torch.equal(twin.dense(), layer.dense())
    for name in "ad":
        twin.apply_only([name])
        assert torch.equal(twin.dense(), weights[name])


def test_a_parameter_written_while_two_adapters_are_active_enters_their_sum():
    layer = make_layer(names="ad")
    for name in "ad":
        train_visits(layer, name, 3)
    expected = copy.deepcopy(layer)
    layer.apply_only(["a", "d"])
    for model in (layer, expected):
        with torch.no_grad():
            model.slicefine_active["a"].fill_(2.0)
    layer(torch.randn(2, IN))
    expected.apply_only(["a", "d"])  # there it was written while neither was active
    assert torch.equal(layer.dense(), expected.dense())


# -- kinds of base layers ---------------------------------------------------------------------------------------------


def test_a_transposed_base_equals_a_linear_one():
    conv = Conv1D(OUT, IN)
    linear = nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    assert is_transposed(conv)
    assert not is_transposed(linear)
    x = torch.randn(2, 3, IN)
    for name in "abcd":
        layers = [make_layer(names=name, base=copy.deepcopy(base)) for base in (conv, linear)]
        for layer in layers:
            assert layer.shape == (OUT, IN)
            layer.apply_only([name])
            torch.manual_seed(5)
            for visit in range(5):
                layer.move(name, slice_at(SCHEDULES[name], visit + 1, layer.shape, "fc"))
                change(layer, name)
            layer(x).square().sum().backward()
        assert_close(layers[0].dense(), layers[1].dense(), rtol=0, atol=0)
        assert_close(layers[0].slicefine_active[name].grad, layers[1].slicefine_active[name].grad)
        for layer in layers:
            layer.apply_only([])
        assert torch.equal(layers[0].base_layer.weight, conv.weight)


def test_what_cannot_be_sliced_is_refused():
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    computed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    for layer in (nn.LayerNorm(4), nn.ConvTranspose2d(1, 1, 1), quantised, computed):
        assert not supports(layer)
        with pytest.raises(UnsupportedError, match=r"trains the weight of linear \(nn.Linear, Conv1D"):
            SliceLayer(layer)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Slice("row", 6, 2), "row slice of width 2 at 6 does not fit a matrix of shape"),
        (
            Slice("row", 0, 3),
            r"a row slice of width 3 needs a parameter of shape \(3, 5\), but the adapter's has \(2, 5\)",
        ),
        (Slice("column", 0, 2), r"a column slice of width 2 needs a parameter of shape \(2, 7\)"),
        (Slice("entries", 0, 4), r"a entries slice of width 4 needs a parameter of shape \(1, 4\)"),
    ],
)
def test_a_slice_that_the_parameter_cannot_hold_is_refused_and_changes_nothing(block, message):
    layer = make_layer()
    layer.apply_only(["a"])
    before = (layer.dense().clone(), list(layer.states["a"].journal.visits), layer.states["a"].index)
    with pytest.raises(ConfigError, match=f"fc.a: {message}"):
        layer.move("a", block)
    assert torch.equal(layer.dense(), before[0])
    assert layer.states["a"].journal.visits == before[1]
    assert layer.states["a"].index is before[2]


def test_a_move_drops_the_gradient_of_the_slice_that_it_leaves():
    layer = make_layer()
    layer.apply_only(["a"])
    layer(torch.randn(3, IN)).sum().backward()
    assert layer.slicefine_active["a"].grad is not None
    layer.move("a", Slice("row", 2, 2))
    assert layer.slicefine_active["a"].grad is None


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy of the model", "deepcopy of the tuner", "pickle"])
def test_a_copy_is_independent_and_moves_by_itself(how):
    model = mlp()
    tuner = attach(model, mode="alternate", r=2, interval=3)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.01)
    data = batches(12)
    for x, y in data[:4]:
        step(model, optimizer, x, y)
    frozen = {k: v.clone() for k, v in model.state_dict().items()}
    if how == "pickle":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    elif how == "deepcopy of the model":
        twin = copy.deepcopy(model)
    else:
        twin = copy.deepcopy(tuner).model
    twin_optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.01)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x, y in data[4:]:
        step(twin, twin_optimizer, x, y)
    assert all(torch.equal(v, frozen[k]) for k, v in model.state_dict().items())
    for x, y in data[4:]:
        step(model, optimizer, x, y)
    layers = [m for m in twin.modules() if isinstance(m, SliceLayer)]
    assert len(layers) == 3
    for layer, mine in zip(layers, tuner.layers.values(), strict=True):
        journal = layer.states["default"].journal
        assert journal is not mine.states["default"].journal
        assert journal.visits == mine.states["default"].journal.visits
        assert len(journal.visits) == 5
        assert torch.equal(layer.dense(), mine.dense())
        layer.apply_only([])
        mine.apply_only([])
        assert torch.equal(layer.dense(), mine.dense())


# -- precision --------------------------------------------------------------------------------------------------------


def test_casting_to_bfloat16_keeps_slices_working():
    layer = make_layer(names="ab")
    train_visits(layer, "a", 3)
    layer.apply_only(["a"])
    base = make_layer().dense().clone()
    trained = layer.dense().clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.dense(), trained.bfloat16())
    y = layer(torch.randn(3, IN, dtype=torch.bfloat16))
    y.sum().backward()
    assert torch.equal(layer.dense(), trained.bfloat16())
    layer.apply_only(["b"])
    layer.apply_only([])
    assert torch.equal(layer.dense(), base.bfloat16())


def test_updates_below_bfloat16_resolution_accumulate_in_the_fp32_master():
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    tuner = attach(model, mode="row", r=1, interval=300)
    (parameter,) = tuner.parameters()
    assert parameter.dtype == torch.float32
    optimizer = torch.optim.SGD([parameter], lr=1e-4)
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    for number in range(100):
        optimizer.zero_grad()
        model(x)[:, 0].sum().backward()
        optimizer.step()
        if number == 0:  # 1 - 1e-4 is 1 in bfloat16
            assert torch.equal(model[0].dense(), torch.ones(4, 4, dtype=torch.bfloat16))
    expected = torch.ones(4, 4)
    expected[0] = 1 - 100 * 1e-4
    assert_close(parameter.detach(), expected[:1])
    assert torch.equal(model[0].dense(), expected.bfloat16())


def test_a_rewarmed_update_keeps_its_precision_over_bfloat16():
    model = nn.Sequential(nn.Linear(4, 2, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    tuner = attach(model, mode="row", r=1, interval=1000, state_policy="rewarm", rewarm_steps=100)
    tuner.move()
    (parameter,) = tuner.parameters()
    optimizer = torch.optim.SGD([parameter], lr=1e-4)
    for _ in range(50):
        optimizer.zero_grad()
        model(torch.ones(1, 4, dtype=torch.bfloat16))[:, 1].sum().backward()
        optimizer.step()
    assert_close(parameter.detach(), torch.full((1, 4), 1 - 1e-4 * sum(range(1, 51)) / 100))


# -- writes that bypass the optimizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_parameter_written_elsewhere_reaches_the_weight(name, active):
    layer = make_layer(names=name)
    base = layer.dense().clone()
    train_visits(layer, name, 2)
    if active:
        layer.apply_only([name])
    with torch.no_grad():
        layer.slicefine_active[name].copy_(torch.full_like(layer.slicefine_active[name], 9.0))
    block = layer.states[name].journal.active
    if active:
        layer(torch.randn(2, IN))
    else:  # nobody has to run the model first: merging and unloading do not
        layer.apply_only([name])
    assert bool((lines_of(layer.dense(), block) == 9.0).all())
    layer.apply_only([])
    assert torch.equal(layer.dense(), base)
    layer.apply_only([name])
    assert bool((lines_of(layer.dense(), block) == 9.0).all())


def test_a_move_commits_what_was_written_elsewhere():
    layer = make_layer()
    layer.apply_only(["a"])
    with torch.no_grad():
        layer.slicefine_active["a"].fill_(3.0)
    layer.move("a", Slice("row", 4, 2))
    assert bool((layer.dense()[:2] == 3.0).all())
    assert torch.equal(layer.block("a"), layer.dense()[4:6])


def test_a_replaced_parameter_object_reaches_the_weight():
    layer = make_layer()
    layer.apply_only(["a"])
    layer.slicefine_active["a"] = nn.Parameter(torch.full((2, IN), 4.0))
    layer(torch.randn(2, IN))
    assert bool((layer.dense()[:2] == 4.0).all())


def test_the_rewarm_memory_follows_a_loaded_parameter_with_padding():
    model = mlp(dtype=torch.float32)
    tuner = attach(model, mode="alternate", r=2, interval=3, state_policy="rewarm", rewarm_steps=50)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for x, y in batches(4, dtype=torch.float32):
        step(model, optimizer, x, y)
    layer = tuner.layers["2"]
    assert layer.block("default").shape != layer.slicefine_active["default"].shape
    with torch.no_grad():
        layer.slicefine_active["default"].fill_(1.0)
    x, y = batches(1, dtype=torch.float32)[0]
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    gradient = layer.slicefine_active["default"].grad.clone()
    optimizer.step()
    # second step after the move: 2 / 50 of the update, from the loaded values
    assert_close(layer.slicefine_active["default"].detach(), 1.0 - 2 / 50 * 0.1 * gradient)


# -- state_dict -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["row", "column", "alternate", "random_mask"])
def test_state_dict_round_trip_continues_the_run(mode):
    def build():
        model = mlp()
        tuner = attach(model, mode=mode, r=2, interval=3)
        return model, tuner, torch.optim.AdamW(tuner.parameters(), lr=0.01)

    model, tuner, optimizer = build()
    data = batches(16)
    for x, y in data[:8]:
        step(model, optimizer, x, y)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other, other_tuner, other_optimizer = build()
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    assert torch.equal(other(data[0][0]), model(data[0][0]))
    assert other_tuner.mover.slices() == tuner.mover.slices()
    for x, y in data[8:]:
        step(model, optimizer, x, y)
        step(other, other_optimizer, x, y)
    assert other_tuner.mover.visits == tuner.mover.visits == 6
    for name in tuner.layers:
        assert torch.equal(other_tuner.layers[name].dense(), tuner.layers[name].dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("active", ["", "a", "b", "c", "da", "bcd"])
def test_a_whole_state_dict_unloads_to_its_own_base(active, dtype):
    layer, other = make_layer(dtype, "abcd"), make_layer(dtype, "abcd", nn.Linear(IN, OUT, dtype=dtype))
    base = layer.dense().clone()
    assert not torch.equal(other.dense(), base)
    weights = {name: train_visits(layer, name, 5) for name in "abcd"}
    train_visits(other, "a", 7)
    layer.apply_only(list(active))
    other.apply_only(["b"])
    other.load_state_dict({key: tensor.clone() for key, tensor in layer.state_dict().items()})
    assert other.applied == ["b"]
    for name in "abcd":
        other.apply_only([name])
        assert torch.equal(other.dense(), weights[name])
    other.apply_only([])
    assert torch.equal(other.dense(), base)


def test_slices_alone_restore_everything_over_the_same_base():
    layer, other = make_layer(names="ab"), make_layer(names="ab")
    weights = {name: train_visits(layer, name, 5) for name in "ab"}
    state = {k: v for k, v in layer.state_dict().items() if "slicefine" in k}
    assert any("slicefine_rows" in k for k in state)
    result = other.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    base = other.dense().clone()
    for name in "ab":
        other.apply_only([name])
        assert torch.equal(other.dense(), weights[name])
    other.apply_only([])
    assert torch.equal(other.dense(), base)


def test_a_refused_file_leaves_the_layer_as_it_was():
    layer = make_layer()
    weight = train_visits(layer, "a", 3)
    layer.apply_only(["a"])
    tensors = file_tensors(layer, "a") | {"active": layer.slicefine_active["a"].detach().clone()}
    broken = [
        {k: t for k, t in tensors.items() if k != "rows"},
        {k: t for k, t in tensors.items() if k != "journal"},
        {k: t for k, t in tensors.items() if k != "active"},
        tensors | {"active": torch.zeros(3, IN)},
        tensors | {"journal": tensors["journal"] + 100},
    ]
    for case in broken:
        with pytest.raises(AdapterFileError, match=r"fc\.a|journal"):
            load_tensors(layer, "a", case)
        layer(torch.randn(2, IN))
        assert torch.equal(layer.dense(), weight)
    load_tensors(layer, "a", tensors)
    assert torch.equal(layer.dense(), weight)


# -- content at backward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_dpo_pattern_gives_the_dense_gradients(name):
    """Policy forward, reference forward with the adapter off, then one backward through both losses."""
    layer = make_layer(torch.float64, name)
    train_visits(layer, name, 2)
    reference = layer.dense().clone()
    layer.apply_only([name])
    policy = layer.dense().clone().requires_grad_()
    x = torch.randn(4, IN, dtype=torch.float64)
    twin_x, x = x.clone().requires_grad_(), x.requires_grad_()

    def loss(chosen: Tensor, frozen: Tensor) -> Tensor:
        return -torch.nn.functional.logsigmoid((chosen - frozen).sum(-1)).mean()

    bias = layer.base_layer.bias.detach()
    linear = nn.functional.linear
    loss(linear(twin_x, policy, bias).tanh(), linear(twin_x, reference, bias).detach().tanh()).backward()

    y = layer(x).tanh()
    layer.apply_only([])
    with torch.no_grad():
        frozen = layer(x).tanh()
    layer.apply_only([name])
    loss(y, frozen).backward()
    block = layer.states[name].journal.active
    assert_close(
        layer.slicefine_active[name].grad, pad_like(lines_of(policy.grad, block), layer.slicefine_active[name])
    )
    assert_close(x.grad, twin_x.grad)


def pad_like(lines: Tensor, parameter: Tensor) -> Tensor:
    padded = torch.zeros_like(parameter)
    padded[: lines.shape[0], : lines.shape[1]] = lines
    return padded


def test_backward_while_another_content_is_in_place_raises():
    layer = make_layer(names="ab")
    x = torch.randn(2, IN, requires_grad=True)
    layer.apply_only(["a"])
    y = layer(x)
    layer.apply_only([])
    with pytest.raises(ContentError, match=r"fc.[ab]: the weights changed between forward and backward"):
        y.sum().backward()
    y = layer(x)  # no adapter trains here, but the input gradient needs this content
    layer.apply_only(["a"])
    with pytest.raises(ContentError, match=r"fc.[ab]: the weights changed"):
        y.sum().backward()
    layer.apply_only(["a"])
    y = layer(x)
    layer.move("a", Slice("row", 4, 2))
    with pytest.raises(ContentError, match="the weights changed"):
        y.sum().backward()


def test_optimizer_step_between_forward_and_backward_raises():
    model = mlp()
    tuner = attach(model, r=2, interval=100)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    (x, y), _ = data = batches(2)
    step(model, optimizer, x, y)
    early = (model(x) - y).square().mean()
    step(model, optimizer, *data[1])
    with pytest.raises(ContentError, match="an optimizer step, a move, or another adapter"):
        early.backward()


def test_switching_inside_inference_mode_does_not_spoil_training():
    layer = make_layer(names="b")
    train_visits(layer, "b", 3)
    layer.apply_only(["b"])
    weight = layer.dense().clone()
    with torch.inference_mode():
        layer.apply_only([])
        layer(torch.randn(2, IN))
        layer.apply_only(["b"])
    assert torch.equal(layer.dense(), weight)
    for visit in range(3, 6):
        layer(torch.randn(2, IN)).sum().backward()
        change(layer, "b")
        layer.move("b", slice_at(SCHEDULES["b"], visit, layer.shape))
    layer.apply_only([])
    assert torch.equal(layer.dense(), make_layer().dense())


# -- a base without values --------------------------------------------------------------------------------------------


def test_attach_on_the_meta_device_then_materialise():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    tuner = attach(model, mode="alternate", r=2, interval=2)
    assert tuner.mover.active_entries() == 2 * 6 + 2 * 4
    assert all(p.is_meta for p in tuner.parameters())
    real = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    expected_tuner = attach(copy.deepcopy(real), mode="alternate", r=2, interval=2)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for ours, theirs in ((model[0].base_layer, real[0]), (model[2].base_layer, real[2])):
            ours.weight.copy_(theirs.weight)
            ours.bias.copy_(theirs.bias)
    optimizers = [torch.optim.AdamW(t.parameters(), lr=0.01) for t in (tuner, expected_tuner)]
    for _ in range(5):
        x = torch.randn(3, 6)
        for t, optimizer in zip((tuner, expected_tuner), optimizers, strict=True):
            step(t.model, optimizer, x, torch.zeros(3, 2))
    assert tuner.mover.visits == 3
    for name, layer in tuner.layers.items():
        assert torch.equal(layer.dense(), expected_tuner.layers[name].dense())
    with tuner.disabled():
        assert torch.equal(model[0].dense(), real[0].weight)


# -- other machinery --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's compiler does it
@pytest.mark.parametrize(("mode", "graphs"), [("row", 1), ("column", 1), ("alternate", 2), ("random_mask", 1)])
@pytest.mark.parametrize("reserve", [{}, {"2": [Slice("row", 0, 1), Slice("column", 4, 2)]}], ids=["", "reserve"])
def test_a_compiled_model_is_not_compiled_again_at_each_move(mode, graphs, reserve):
    if reserve and mode == "random_mask":
        pytest.skip("masks reserve nothing")
    torch.compiler.reset()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    plain, model = mlp(), mlp()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    tuners = [attach(m, mode=mode, r=2, interval=1, reserve=reserve) for m in (plain, model)]
    optimizers = [torch.optim.SGD(tuner.parameters(), lr=0.1) for tuner in tuners]
    for x, y in batches(11):
        step(plain, optimizers[0], x, y)
        step(compiled, optimizers[1], x, y)
    assert tuners[1].mover.visits == 12
    assert len(compilations) == graphs  # one per orientation, whatever the number of moves
    for mine, other in zip(tuners[0].layers.values(), tuners[1].layers.values(), strict=True):
        assert_close(mine.dense(), other.dense())


def test_data_parallel_is_refused():
    with pytest.raises(UnsupportedError, match=r"fc.a: nn.DataParallel copies .* Start one process per GPU"):
        make_layer()._replicate_for_data_parallel()


class Products(TorchDispatchMode):
    """Counts the layer's own forward products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(_saved_tensor_hooks is None, reason="this PyTorch does not tell whether tensors are kept by hooks")
@pytest.mark.parametrize("mode", ["row", "column", "alternate"])
def test_checkpointing_does_not_repeat_the_last_product(mode):
    """Recomputing stops at the last tensor that is kept, and a slice's is kept before the layer's product."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    tuner = attach(model, mode=mode, r=2, interval=100)
    x = torch.randn(5, 8, requires_grad=True)
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in (x, *tuner.parameters())]
    for p in (x, *tuner.parameters()):
        p.grad = None
    y = checkpoint(model, x, use_reentrant=False)
    with Products() as seen:
        y.square().sum().backward()
    assert seen.count == 1  # of two layers, the first one's
    for p, grad in zip((x, *tuner.parameters()), wanted, strict=True):
        assert_close(p.grad, grad)


def test_parameters_are_asked_for_in_the_way_in_which_an_engine_gathers_them():
    """DeepSpeed's stage 3 puts its own dictionary under a module, which gathers a parameter that is looked up."""

    class Gathers(dict):
        asked = 0

        def __getitem__(self, key):
            Gathers.asked += 1
            return super().__getitem__(key)

    model = nn.Sequential(nn.Linear(4, 4))
    tuner = attach(model, r=2, mode="row", interval=9)
    holder = tuner.layers["0"].slicefine_active
    holder._parameters = Gathers(holder._parameters)
    model(torch.ones(1, 4))
    assert Gathers.asked > 0
