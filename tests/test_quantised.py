"""Slices beside quantised weights: training equals that of the dense model with the same values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from quantised_helpers import FORMATS, SOME, ForwardOnly, NoGradient, cases, dense_values, dequantised, quantise
from slicefine import attach, merge_errors
from slicefine.errors import ConfigError, UnsupportedError
from slicefine.geometry import Slice
from slicefine.layer import SliceLayer
from slicefine.packed import PackedDelta
from slicefine.quantised import dense_product, format_of
from slicefine.weights import supports, trains, value_dtype

MODES = {"row": {"r": 3}, "column": {"r": 4}, "alternate": {"r_row": 3, "r_column": 4}}


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 32))


def made(name: str) -> nn.Module:
    return quantise(mlp(), name)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 32, generator=generator), torch.randn(6, 32, generator=generator)


def train(model: nn.Module, parameters, steps: int = 20) -> nn.Module:
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for seed in range(steps):
        x, y = batch(seed)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", cases())
def test_training_equals_that_of_the_dense_model(name, mode):
    model = made(name)
    twin, before = dequantised(model), [dense_values(layer) for layer in model if format_of(layer)]
    ours, theirs = (attach(m, mode=mode, interval=4, **MODES[mode]) for m in (model, twin))
    assert ours.additive
    assert not theirs.additive
    assert_close(model(batch(99)[0]), twin(batch(99)[0]))
    for m, tuner in ((model, ours), (twin, theirs)):
        train(m, tuner.parameters())
    assert ours.mover.visits == theirs.mover.visits == 5 + 1
    assert_close(model(batch(99)[0]), twin(batch(99)[0]), rtol=1e-4, atol=1e-5)
    for (_, layer), values, (_, dense) in zip(ours.layers.items(), before, theirs.layers.items(), strict=True):
        assert torch.equal(dense_values(layer.base_layer), values)  # never written
        change = layer.packed.read(Slice("row", 0, layer.shape[0]))
        assert change.count_nonzero() > 0
        assert_close(values + change, dense.base_layer.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", cases())
def test_what_a_layer_is(name):
    layer = made(name)[0]
    assert (trains(layer), supports(layer), SliceLayer(layer).shape) == (True, False, (64, 32))
    assert value_dtype(layer) == torch.float32
    if name != "forward only":
        assert_close(format_of(layer).dense(layer).float(), mlp()[0].weight, rtol=0.2, atol=0.05)


def test_what_is_no_quantised_layer():
    integers = nn.Linear(4, 4)
    integers.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    for layer in (nn.Linear(4, 4), nn.Embedding(4, 4), nn.BatchNorm1d(4), nn.LSTM(4, 4), integers):
        assert format_of(layer) is None
    narrow = type("FP8Linear", (nn.Linear,), {})(4, 4)  # transformers' layer for weights of one byte
    narrow.weight = nn.Parameter(narrow.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    assert format_of(narrow) is not None
    assert not supports(narrow)


DENSE = [name for name in FORMATS if name not in ("forward only", "hqq")]  # multiply with a dense weight in fp32


@pytest.mark.parametrize("name", cases(DENSE))
def test_the_dense_weight_that_slices_are_added_to_is_what_the_layer_multiplies_with(name):
    for layer in made(name)[::2]:
        x = torch.randn(2, 3, layer.in_features, requires_grad=True)
        known = dense_product(layer, x)
        assert known is format_of(layer)
        own, ours = layer(x), nn.functional.linear(x, known.factor(layer), layer.bias)
        assert_close(own, ours)
        assert name == "torchao int8" or torch.equal(own, ours)  # it scales the outputs
        assert_close(known.factor(layer), known.dense(layer), rtol=0, atol=0)
        gradient = torch.randn_like(own)
        assert_close(torch.autograd.grad(own, x, gradient), torch.autograd.grad(ours, x, gradient))
        assert known.factor(layer).data_ptr() != known.factor(layer).data_ptr()


def _nothing(*args: object) -> None:
    pass


def _patch(layer: nn.Module) -> None:
    layer.forward = layer.forward  # as accelerate's hooks do


WATCHED = {
    "forward hook": lambda layer: layer.register_forward_hook(_nothing),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(_nothing),
    "backward hook": lambda layer: layer.register_full_backward_hook(_nothing),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(_nothing),
    "other forward": _patch,
    "class of somebody's": lambda layer: setattr(layer, "__class__", type("Mine", (type(layer),), {})),
}


@pytest.mark.parametrize("what", WATCHED)
@pytest.mark.parametrize("name", cases(("bnb 8-bit", "nf4", "torchao int8")))
def test_a_layer_that_is_not_alone_with_its_product_runs_itself(name, what):
    layer, x = made(name)[0], torch.randn(3, 32)
    assert dense_product(layer, x) is not None
    WATCHED[what](layer)
    assert dense_product(layer, x) is None


@pytest.mark.parametrize("name", cases(("bnb 8-bit", "nf4", "torchao int8")))
def test_other_precisions_and_modes_run_the_layer_itself(name):
    layer, x = made(name)[0], torch.randn(3, 32)
    assert dense_product(layer, x.bfloat16()) is None
    assert dense_product(layer, x.to("meta")) is None
    with torch.autocast("cpu"):
        assert dense_product(layer, x) is None
    hook = nn.modules.module.register_module_forward_hook(_nothing)
    assert dense_product(layer, x) is None
    hook.remove()
    assert dense_product(layer, x) is not None
    assert (dense_product(layer.eval(), x) is None) is (name == "bnb 8-bit")  # which quantises inputs then
    if name == "nf4":
        layer.compute_dtype = torch.bfloat16
        assert dense_product(layer, x) is None


@pytest.mark.parametrize("name", cases(("bnb 8-bit", "nf4", "torchao int8")))
def test_a_model_of_half_precision_with_inputs_in_full_is_multiplied_in_full(name):
    """As `prepare_model_for_kbit_training` leaves a model that was loaded in bf16."""
    layer, x = quantise(mlp().bfloat16(), name)[0], torch.randn(3, 32)
    if name == "nf4":
        layer.weight.quant_state.dtype, layer.compute_dtype = torch.bfloat16, torch.float32
    layer.bias = nn.Parameter(layer.bias.detach().bfloat16())
    known = dense_product(layer, x)
    assert known.factor(layer).dtype == torch.float32
    delta = PackedDelta((64, 32), torch.float32, torch.device("cpu"))
    found = delta.multiply_sum(lambda: known.factor(layer), x, layer.bias)
    found.sum().backward()
    assert_close(layer.bias.grad, torch.full((64,), 3.0, dtype=torch.bfloat16))
    bias, layer.bias = layer.bias.detach(), None
    assert_close(found, layer(x) + bias)
    if name == "nf4":
        assert layer.weight.quant_state.dtype == torch.bfloat16


def test_activations_that_are_quantised_run_the_layer_itself():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = mlp()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    assert format_of(model[0]).name == "torchao"
    assert dense_product(model[0], torch.randn(3, 32)) is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", cases(DENSE))
def test_adding_to_the_dense_weight_gives_what_adding_to_the_output_gives(name, mode):
    """The slow twin is the same layer with a hook, which makes it run itself."""
    found = []
    for watched in (False, True):
        model = made(name)
        if watched:
            for layer in model[::2]:
                layer.register_forward_hook(_nothing)
        tuner = attach(model, mode=mode, interval=3, **MODES[mode])
        biases = [layer.bias.requires_grad_() for layer in tuner.layers.values() if layer.bias is not None]
        train(model, [*tuner.parameters(), *biases], steps=7)
        x = batch(99)[0].requires_grad_()
        y = model(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in (*tuner.parameters(), *biases)), *tuner.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", cases(DENSE))
def test_no_more_is_kept_for_backward_than_the_layer_keeps_itself(name):
    """But the slice's part of the input: columns of it, or a reference to all of it."""
    model = made(name)
    tuner = attach(model, mode="column", r=4, interval=5)
    train(model, tuner.parameters(), steps=2)
    layer, x = tuner.layers["2"], torch.randn(50, 64, requires_grad=True)
    own: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: (own.append(saved.numel()), saved)[1], lambda it: it):
        layer.base_layer(x)
    whole = layer.shape[0] * layer.shape[1]
    dense = whole if name.startswith("torchao") else 0
    assert max(own, default=0) >= dense  # torchao's layers keep it, bitsandbytes' make it once more
    assert sum(t.numel() for t in layer(x).grad_fn.saved_tensors if t is not None) == 50 * 4 + dense


@pytest.mark.parametrize("name", cases(SOME))
def test_settings_that_need_the_weight_are_refused(name):
    with pytest.raises(ConfigError, match=r"0: additive=False writes slices into the weight.*quantised"):
        attach(made(name), additive=False, interval=5)
    with pytest.raises(UnsupportedError, match=r"0: mode='random_mask' trains scattered entries.*Use mode row, column"):
        attach(made(name), mode="random_mask", interval=5)
    with pytest.raises(UnsupportedError, match=r"0: start_values='zero' replaces the weight's own values"):
        attach(made(name), start_values="zero", interval=5)


def test_a_layer_that_passes_no_gradient_is_refused():
    model = mlp()
    for place in (0, 2):
        model[place] = NoGradient(model[place])
    tuner = attach(model, interval=5, r=2)
    with pytest.raises(UnsupportedError, match=r"2: the base layer \(NoGradient\) passes no gradient to its input"):
        train(model, tuner.parameters())
    with torch.no_grad():
        model(batch(0)[0])


@pytest.mark.parametrize("name", cases([name for name in FORMATS if name != "forward only"]))
def test_merging_quantises_anew_and_says_what_it_lost(name):
    model = made(name)
    tuner = attach(model, interval=4, r=3)
    train(model, tuner.parameters())
    wanted = [
        dense_values(layer.base_layer) + layer.packed.read(Slice("row", 0, layer.shape[0]))
        for layer in tuner.layers.values()
    ]
    before = model(batch(99)[0])
    expected = merge_errors(model)
    assert torch.equal(model(batch(99)[0]), before)
    with pytest.warns(UserWarning, match=r"3 quantised weights took the slices in.*of the weight and.*of what was"):
        plain = tuner.unload(merge=True)
    assert [type(layer) for layer in plain] == [type(layer) for layer in made(name)]
    for values, layer, lost in zip(wanted, plain[::2], expected.values(), strict=True):
        found, change = dense_values(layer) - values, torch.linalg.vector_norm
        assert_close(float(change(found) / change(values)), lost.weight)
        assert 0 < lost.weight < (0.2 if "4" in name else 0.05)
        assert_close(values, dense_values(layer), rtol=0, atol=float(values.abs().max()) / 4)
    assert (plain(batch(99)[0]) - before).norm() < 0.2 * before.norm()


@pytest.mark.parametrize("name", cases(SOME))
def test_unloading_leaves_every_bit_as_it_was(name):
    model, base = made(name), made(name)
    tuner = attach(model, interval=4, r=3)
    train(model, tuner.parameters())
    with tuner.disabled():
        assert torch.equal(model(batch(99)[0]), base.train()(batch(99)[0]))
    plain = tuner.unload()
    assert [type(layer) for layer in plain] == [type(layer) for layer in base]
    for ours, theirs in zip(plain[::2], base[::2], strict=True):
        assert torch.equal(dense_values(ours), dense_values(theirs))
    assert torch.equal(plain(batch(99)[0]), base(batch(99)[0]))


def test_merging_into_a_forward_only_layer_is_refused_before_anything_changes():
    model = mlp()
    model[4] = ForwardOnly(model[4])
    tuner = attach(model, interval=4, r=3, additive=True)
    train(model, tuner.parameters())
    before = model(batch(99)[0])
    with pytest.raises(UnsupportedError, match=r"ForwardOnly only runs forward.*export it to LoRA"):
        tuner.unload(merge=True)
    assert torch.equal(model(batch(99)[0]), before)
    tuner.unload()


def test_a_torchao_format_that_cannot_be_made_anew_is_refused():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(type("StrangeTensor", (torch.Tensor,), {"__module__": "torchao.x"})(layer.weight.data))
    with pytest.raises(UnsupportedError, match=r"torchao's StrangeTensor cannot be quantised anew.*Int8Tensor"):
        format_of(layer).check(layer)


@pytest.mark.parametrize("packed_before", [False, True])
@pytest.mark.parametrize("name", cases(["nf4", "nf4, double"]))
def test_evaluation_leaves_a_4_bit_weight_trainable(name, packed_before):
    """bitsandbytes repacks it for inference on some CPUs: without a backward, and with rounded scales."""
    torch.manual_seed(0)
    model = quantise(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)), name, leave=("0",))  # whole blocks of 64
    if packed_before:
        with torch.no_grad():
            model.eval()(batch(0)[0])
    tuner = attach(model, interval=4, r=3, additive=True)
    values = dense_values(model[1].base_layer)
    with torch.no_grad():
        model.eval()(batch(0)[0])
    assert torch.equal(values, dense_values(model[1].base_layer))
    train(model.train(), tuner.parameters())
    assert all(layer.packed.count_nonzero() for layer in tuner.layers.values())
    assert tuner.unload()[1].support_avx512bf16_for_cpu == made(name)[0].support_avx512bf16_for_cpu


@pytest.mark.parametrize("name", cases(SOME))
def test_files_and_copies(name, tmp_path):
    model = made(name)
    tuner = attach(model, interval=4, r=3)
    train(model, tuner.parameters())
    x = batch(99)[0]
    before = model(x)
    assert_close(copy.deepcopy(model)(x), before)
    tuner.save(tmp_path / "a.safetensors")
    for base in (made(name), dequantised(made(name))):  # the same differences, beside whichever weight
        attach(base, interval=4, r=3, additive=True).load(tmp_path / "a.safetensors")
        assert_close(base(x), before)


@pytest.mark.parametrize("name", cases(SOME))
def test_half_precision_outside_keeps_an_fp32_master(name):
    model = quantise(mlp().to(torch.bfloat16), name)
    tuner = attach(model, interval=4, r=3)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.02, weight_decay=0)
    x, y = (part.to(torch.bfloat16) for part in batch(0))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(x) - y).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert model(x).dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in tuner.parameters())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", cases())
def test_a_model_that_is_moved_after_steps_stays_what_it_is(name: str):
    torch.manual_seed(0)
    model = quantise(mlp(), name)
    tuner = attach(model, r=2, mode="column", moves=1, total_steps=8, minimum_steps=1)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    x, y = batch(0)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    before = model(x)
    model.to(torch.device("cpu"))  # torchao swaps its tensors, which nothing may refer to meanwhile
    assert torch.equal(model(x), before)
