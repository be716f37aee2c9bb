"""Adapters on quantised bases through PEFT: everything that a plain base allows, by differences beside the weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from torch.testing import assert_close

from peft_helpers import IDS, THIRD_PARTY, config, layers, llama, logits
from quantised_helpers import SOME, ForwardOnly, NoGradient, cases, dense_values, dequantised, quantise
from slicefine import merge_errors, movers_of
from slicefine.errors import AdapterFileError, ConfigError, UnsupportedError
from slicefine.files.adapter import read_adapter, write_adapter
from slicefine.files.checkpoint import Checkpoint
from slicefine.files.compose import compose
from slicefine.files.distance import distances
from slicefine.files.export import export_lora
from slicefine.files.merge import merge_files
from slicefine.files.undo import undo
from slicefine.functional import read_block
from slicefine.geometry import Slice
from slicefine.peft import SliceFineConfig, SliceFineLinear

pytestmark = THIRD_PARTY
LINES = ("row", "column", "alternate")
READABLE = tuple(name for name in SOME if name != "forward only")


def base(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two Llama layers whose sides are multiples of bitsandbytes' blocks of 64."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return quantise(llama(dtype, hidden_size=64, intermediate_size=128, **heads), name)


def train(model: nn.Module, steps: int = 5, lr: float = 0.2) -> nn.Module:
    """SGD: its updates are linear in the gradient, so that rounding does not grow."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model


def outputs(model: nn.Module) -> Tensor:
    """Logits in training mode: in evaluation mode bitsandbytes' 8-bit layers quantise their inputs as well."""
    with torch.no_grad():
        return model.train()(input_ids=IDS).logits


def changes(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.packed.read(Slice("row", 0, layer.shape[0])) for name, layer in layers(model)}


@pytest.mark.parametrize("mode", LINES)
@pytest.mark.parametrize("name", cases(SOME))
def test_training_with_moves_equals_that_of_the_dense_model(name: str, mode: str):
    quantised = base(name)
    twin = get_peft_model(dequantised(quantised), config(mode))
    model = get_peft_model(quantised, config(mode))
    before = outputs(model)
    assert_close(outputs(twin), before, rtol=1e-4, atol=1e-5)
    train(model)
    train(twin)
    assert not torch.allclose(outputs(model), before, atol=1e-2)
    assert_close(outputs(model), outputs(twin), rtol=1e-3, atol=1e-4)
    for (_, layer), (_, dense) in zip(layers(model), layers(twin), strict=True):
        assert len(layer.states["default"].journal.visits) == len(dense.states["default"].journal.visits) == 3
        weight = dense_values(layer.base_layer) + layer.packed.read(Slice("row", 0, layer.shape[0]))
        assert_close(weight, dense.base_layer.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", cases(SOME))
def test_switching_adapters_off_on_and_away_leaves_the_base_as_it_was(name: str):
    plain = base(name).train()
    model = get_peft_model(base(name), config("column"))
    before = outputs(model)
    assert torch.equal(before, outputs(plain))
    first = outputs(train(model))
    with model.disable_adapter():
        assert torch.equal(outputs(model), before)
    assert_close(outputs(model), first)
    model.add_adapter("second", config("row", r=3))
    model.set_adapter("second")
    assert torch.equal(outputs(model), before)
    second = outputs(train(model))
    model.set_adapter("default")
    assert_close(outputs(model), first)
    model.base_model.set_adapter(["default", "second"], inference_mode=True)
    both = changes(model)
    model.set_adapter("second")
    assert_close(outputs(model), second)
    model.set_adapter("default")
    ones = changes(model)
    model.set_adapter("second")
    assert all(torch.allclose(both[n], ones[n] + c, atol=1e-6) for n, c in changes(model).items())
    model.set_adapter("default")
    model.delete_adapter("second")
    assert_close(outputs(model), first)
    left = model.unload()
    assert torch.equal(outputs(left), before)
    assert [type(m) for m in left.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("name", cases(SOME))
def test_reloading_onto_a_fresh_base_is_bit_identical_and_training_goes_on(name: str, tmp_path: Path):
    model = train(get_peft_model(base(name), config("alternate")), steps=3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(name), tmp_path, is_trainable=True)
    assert all(torch.equal(a, changes(again)[n]) for n, a in changes(model).items())
    assert torch.equal(logits(again), logits(PeftModel.from_pretrained(base(name), tmp_path)))
    assert_close(outputs(again), outputs(model))
    for part in (model, again):
        train(part, steps=4)
    assert_close(outputs(again), outputs(model), rtol=1e-4, atol=1e-5)
    assert [layer.states["default"].journal.visits for _, layer in layers(again)] == [
        layer.states["default"].journal.visits for _, layer in layers(model)
    ]


def test_a_file_says_that_it_holds_differences(tmp_path: Path):
    model = train(get_peft_model(base("forward only"), config("row")))
    model.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found["additive"] is True
    assert all(facts["additive"] and "sample" not in facts for facts in found["weights"].values())
    assert all(layer.additive for layer in read_adapter(tmp_path).layers.values())
    get_peft_model(llama(), config("row")).save_pretrained(tmp_path / "values")
    found = json.loads((tmp_path / "values" / "adapter_config.json").read_text())
    assert found["additive"] is False
    assert not any("additive" in facts for facts in found["weights"].values())


@pytest.mark.parametrize("name", cases(SOME))
def test_differences_fit_the_base_without_quantisation_and_values_do_not_fit_a_quantised_one(name, tmp_path):
    model = train(get_peft_model(base(name), config("alternate")))
    model.save_pretrained(tmp_path / "differences")
    dense = dequantised(base(name))
    before = {
        name: layer.weight.detach().clone() for name, layer in dense.named_modules() if isinstance(layer, nn.Linear)
    }
    plain = PeftModel.from_pretrained(dense, tmp_path / "differences")
    assert_close(outputs(plain), outputs(model), rtol=1e-4, atol=1e-5)
    merged = plain.merge_and_unload()
    for key, change in changes(model).items():
        layer = key.removeprefix("base_model.model.")
        assert_close(merged.get_submodule(layer).weight, before[layer] + change)
    values = get_peft_model(dequantised(base(name)), config("alternate"))
    train(values).save_pretrained(tmp_path / "values")
    with pytest.raises(AdapterFileError, match="hold values of a weight that was not quantised.*export it to LoRA"):
        PeftModel.from_pretrained(base(name), tmp_path / "values")


def test_a_model_of_both_kinds_keeps_values_and_differences_apart(tmp_path: Path):
    """As after loading with modules that are left unquantised."""
    mixed = quantise(llama(), "forward only", leave=("lm_head", "q_proj"))
    model = train(get_peft_model(mixed, config("alternate")))
    assert {layer.packed is None for _, layer in layers(model)} == {True, False}
    model.save_pretrained(tmp_path)
    fresh = quantise(llama(), "forward only", leave=("lm_head", "q_proj"))
    again = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits(again), logits(model))
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found["additive"] is None
    assert [n for n, facts in found["weights"].items() if not facts.get("additive")] == [
        n for n in found["weights"] if n.endswith("q_proj")
    ]


@pytest.mark.parametrize("name", cases(READABLE))
def test_merging(name: str):
    model = train(get_peft_model(base(name), config("alternate")))
    before, wanted = outputs(model), {n: dense_values(m.base_layer) + changes(model)[n] for n, m in layers(model)}
    model.merge_adapter()  # writes nothing: it can be taken back
    assert_close(outputs(model), before)
    model.unmerge_adapter()
    assert_close(outputs(model), before)
    expected = merge_errors(model)
    with pytest.warns(UserWarning, match=r"14 quantised weights took the slices in and were quantised anew"):
        merged = model.merge_and_unload()
    for key, values in wanted.items():
        found = dense_values(merged.get_submodule(key.removeprefix("base_model.model.")))
        error = torch.linalg.vector_norm(found - values) / torch.linalg.vector_norm(values)
        assert_close(float(error), expected[key].weight)
        assert error < (0.15 if name.startswith("nf4") else 0.02)
    assert_close(outputs(merged), outputs(dequantised(merged)), rtol=1e-3, atol=1e-3)


def test_merging_into_forward_only_layers_is_refused_before_anything_changes():
    mixed = quantise(llama(), "forward only", leave=("lm_head", "q_proj"))  # a layer that could be merged comes first
    model = train(get_peft_model(mixed, config("row", additive=True)))
    before = outputs(model)
    with pytest.raises(UnsupportedError, match="ForwardOnly only runs forward"):
        model.merge_and_unload()
    assert torch.equal(outputs(model), before)
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, SliceFineLinear)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # peft calls it
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", cases(READABLE))
def test_prepared_for_k_bit_training_with_checkpointing_and_half_precision(name: str, reentrant: bool):
    def made(checkpointing: bool) -> nn.Module:
        prepared = base(name, torch.bfloat16)
        prepared.is_loaded_in_8bit, prepared.is_loaded_in_4bit = name == "bnb 8-bit", name.startswith("nf4")
        prepared.quantization_method = "torchao" if name.startswith("torchao") else "bitsandbytes"
        options = {"use_reentrant": reentrant}
        prepared = prepare_model_for_kbit_training(prepared, checkpointing, options if checkpointing else None)
        return get_peft_model(prepared, config("alternate"))

    models = [train(made(checkpointing)) for checkpointing in (False, True)]
    assert all(p.dtype == torch.float32 for n, p in models[0].named_parameters() if p.requires_grad)
    for ours, theirs in zip(changes(models[0]).values(), changes(models[1]).values(), strict=True):
        assert ours.count_nonzero() > 0
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", cases(SOME))
def test_deltas_and_weighted_sums(name: str):
    model = train(get_peft_model(base(name), config("row")))
    model.add_adapter("second", config("row"))
    model.set_adapter("second")
    train(model)
    tuner = model.base_model
    tuner.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum")
    for _, layer in layers(model):
        parts = [layer.get_delta_weight(part) for part in ("default", "second", "sum")]
        assert parts[0].shape == layer.shape
        assert_close(parts[2], 0.5 * parts[0] - 2 * parts[1])


@pytest.mark.parametrize("name", cases(SOME))
def test_it_follows_the_model_to_another_precision(name: str):
    model = train(get_peft_model(base(name), config("alternate")))
    before = outputs(model)
    if name.startswith("torchao"):  # torchao has no casts of its weights: the slices alone
        for _, layer in layers(model):
            layer.packed.map(lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t)
    else:
        model.to(torch.bfloat16)
    assert all(layer.packed.dtype == torch.bfloat16 for _, layer in layers(model))
    assert_close(outputs(model).float(), before, rtol=0.1, atol=0.1)


def test_what_is_refused_is_said_where_it_is():
    with pytest.raises(ConfigError, match=r"q_proj: additive=False writes slices into the weight.*quantised"):
        get_peft_model(base("forward only"), config("row", additive=False))
    with pytest.raises(UnsupportedError, match=r"q_proj: mode='random_mask' trains scattered entries"):
        get_peft_model(base("forward only"), config("random_mask"))
    with pytest.raises(ConfigError, match="random_mask.*cannot be additive"):
        config("random_mask", additive=True)
    with pytest.raises(ConfigError, match="additive='yes' must be true, false, or null"):
        config("row", additive="yes")
    model = get_peft_model(llama(), config("row", additive=True))
    with pytest.raises(
        ConfigError, match="additive=False, and the adapters that the layer has already have additive=True"
    ):
        model.add_adapter("second", config("row"))
    refused = llama()
    for layer in refused.model.layers:
        layer.mlp.up_proj = NoGradient(layer.mlp.up_proj)
    with pytest.raises(UnsupportedError, match=r"up_proj: the base layer \(NoGradient\) passes no gradient"):
        train(get_peft_model(refused, config("row")))


def test_additive_everywhere_on_a_plain_base_equals_training_in_place():
    models = [train(get_peft_model(llama(), config("alternate", additive=additive))) for additive in (True, None)]
    assert_close(*[outputs(model) for model in models])
    assert [{layer.packed is not None for _, layer in layers(model)} for model in models] == [{True}, {False}]
    assert SliceFineConfig().additive is None


def test_names_choose_layers_that_are_no_linear_ones():
    model = get_peft_model(base("forward only"), config("row", target_modules=["q_proj", "down_proj"]))
    assert {name.rpartition(".")[2] for name, _ in layers(model)} == {"q_proj", "down_proj"}
    assert all(isinstance(layer.base_layer, ForwardOnly) for _, layer in layers(model))
    whole = get_peft_model(base("forward only"), config("row"))
    whole.add_adapter("second", config("row"))
    assert len(list(layers(whole))) == 14
    assert not any(name.endswith("lm_head") for name, _ in layers(whole))


def test_counts_say_what_lies_beside_the_weights(capsys: Any):
    model = get_peft_model(base("forward only"), config("row"))
    model.print_trainable_parameters()
    said = capsys.readouterr().out
    assert "added params: 0" not in said
    beside = sum(layer.packed.numel() for _, layer in layers(model))
    assert f"added params: {beside:,} (differences beside weights that are not written)" in said


@pytest.mark.parametrize("name", cases(READABLE))
def test_an_export_to_lora_gives_equal_logits_on_the_same_base(name: str, tmp_path: Path):
    model = train(get_peft_model(base(name), config("alternate")))
    model.save_pretrained(tmp_path / "slices")
    export_lora(read_adapter(tmp_path / "slices"), None, tmp_path / "lora")
    fresh = base(name)
    fresh.is_loaded_in_8bit, fresh.is_loaded_in_4bit = name == "bnb 8-bit", name.startswith("nf4")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated without", UserWarning)
        again = PeftModel.from_pretrained(fresh, tmp_path / "lora")
    assert isinstance(again.peft_config["default"], LoraConfig)
    assert_close(outputs(again), outputs(model), rtol=1e-4, atol=1e-5)


def saved(tmp_path: Path, name: str, mode: str = "alternate", **settings: Any) -> tuple[nn.Module, Path]:
    model = train(get_peft_model(base("forward only"), config(mode, **settings)))
    model.save_pretrained(tmp_path / name)
    return model, tmp_path / name


def test_the_export_command_needs_no_base(tmp_path: Path, capsys: Any):
    from slicefine.cli import main

    _, folder = saved(tmp_path, "a")
    assert main(["export", "--adapter", str(folder), "--output", str(tmp_path / "lora")]) == 0
    assert "14 layers" in capsys.readouterr().out
    assert main(["info", str(folder)]) == 0
    assert "differences beside the weights" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="hold values, so their base's weights are needed"):
        get_peft_model(llama(), config("row")).save_pretrained(tmp_path / "values")
        export_lora(read_adapter(tmp_path / "values"), None, tmp_path / "other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_files_adds_the_differences_to_the_base_without_quantisation(dtype: torch.dtype, tmp_path: Path):
    model, folder = saved(tmp_path, "a")
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    plain = llama(dtype, **size)
    plain.save_pretrained(tmp_path / "base")
    with Checkpoint(tmp_path / "base") as files:
        merge_files(read_adapter(folder), files, tmp_path / "merged")
        far = distances(read_adapter(folder), files)
    merged = type(plain).from_pretrained(tmp_path / "merged", dtype=dtype)
    for key, change in changes(model).items():
        layer = key.removeprefix("base_model.model.")
        weight = plain.get_submodule(layer).weight
        assert_close(merged.get_submodule(layer).weight, (weight.double() + change).to(dtype))
        for block, distance in far[layer].items():
            lines = read_block(weight.detach(), block).double()
            assert_close(distance.original, float(torch.linalg.vector_norm(lines)))
            assert_close(distance.change, float(torch.linalg.vector_norm(read_block(change, block).double())))


def test_adapters_of_differences_are_composed_and_undone(tmp_path: Path):
    first, one = saved(tmp_path, "one", "row")
    second, two = saved(tmp_path, "two", "row", share=[1, 2])
    _, values = saved(tmp_path, "three", "row")
    assert values
    parts = [read_adapter(folder) for folder in (one, two)]
    write_adapter(compose(parts, None, "sum"), tmp_path / "sum")
    summed = PeftModel.from_pretrained(base("forward only"), tmp_path / "sum")
    for key, change in changes(summed).items():
        assert_close(change, changes(first)[key] + changes(second)[key])
    get_peft_model(llama(hidden_size=64, intermediate_size=128), config("row")).save_pretrained(tmp_path / "plain")
    with pytest.raises(AdapterFileError, match="some hold values and others differences"):
        compose([parts[0], read_adapter(tmp_path / "plain")], None, "sum")
    write_adapter(undo(parts[0], 2), tmp_path / "undone")
    again = PeftModel.from_pretrained(base("forward only"), tmp_path / "undone", is_trainable=True)
    movers_of(first)[0].undo(2)
    assert all(torch.equal(change, changes(again)[key]) for key, change in changes(first).items())


def test_values_are_not_loaded_into_an_adapter_of_differences_nor_the_other_way_round(tmp_path: Path):
    size = {"hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model, folder = saved(tmp_path, "a", "row")
    plain = get_peft_model(llama(**size, **heads), config("row"))
    plain.save_pretrained(tmp_path / "values")
    before = changes(model)
    with pytest.raises(AdapterFileError, match="hold values of a weight that was not quantised"):
        set_peft_model_state_dict(model, load_peft_weights(str(tmp_path / "values"), device="cpu"))
    assert all(torch.equal(change, changes(model)[key]) for key, change in before.items())
    with pytest.raises(AdapterFileError, match="the file's slices are differences, and this layer's are values"):
        set_peft_model_state_dict(plain, load_peft_weights(str(folder), device="cpu"))


def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path):
    _, folder = saved(tmp_path, "a", "row")
    found = json.loads((folder / "adapter_config.json").read_text())
    for facts in found["weights"].values():
        del facts["additive"]
    (folder / "adapter_config.json").write_text(json.dumps(found))
    with pytest.raises(AdapterFileError, match="makes no sense"):
        read_adapter(folder)
