"""PEFT's promises for layers that are no plain linear ones: attention, embeddings, convolutions, experts."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import MixtralConfig, MixtralForCausalLM

from slicefine import ConfigError, ContentError, SliceFineConfig, UnsupportedError
from slicefine.files.adapter import read_adapter, write_adapter
from slicefine.files.checkpoint import Checkpoint
from slicefine.files.export import export_lora
from slicefine.files.merge import merge_files
from slicefine.peft import SliceFineLinear

# peft asks for it
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Mixed(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "mixed"}
        self.embed = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.attention(query=x, key=x, value=x, need_weights=False)[0])


TARGETS = ["embed", "conv", "attention", "out_proj", "head"]
TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 11]])


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed()


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=32,
    )
    return MixtralForCausalLM(config).eval()


CASES = {
    "mixed": (mixed, {"target_modules": TARGETS}, lambda model: model(TOKENS), 5),
    "mixtral": (
        mixtral,
        {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        lambda model: model(input_ids=TOKENS).logits,
        8,
    ),
}


def settings(case: str, **options) -> SliceFineConfig:
    return SliceFineConfig(r=2, mode="alternate", interval=2, **CASES[case][1], **options)


def train(model: nn.Module, call, steps: int = 5) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    losses = []
    for _ in range(steps):
        loss = (call(model) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("case", CASES)
def test_training_saving_disabling_and_unloading(case, tmp_path):
    make, _, call, count = CASES[case]
    base = make()
    with torch.no_grad():
        untouched = call(base)
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, settings(case))
    layers = [m for m in model.modules() if isinstance(m, SliceFineLinear)]
    assert len(layers) == count
    losses = train(model, call)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = call(model)
        assert not torch.allclose(trained, untouched)
        with model.disable_adapter():
            assert_close(call(model), untouched)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make(), tmp_path)
        assert_close(call(loaded), trained)
        merged = loaded.merge_and_unload()
        assert_close(call(merged), trained)
        weights = {n.replace(".base_layer", ""): p for n, p in model.base_model.model.named_parameters()}
        assert all(torch.equal(p, weights[n]) for n, p in merged.named_parameters())  # bit for bit
        assert not any(isinstance(m, SliceFineLinear) for m in merged.modules())
        assert merged.state_dict().keys() == before.keys()
        plain = model.unload()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("case", CASES)
def test_a_second_adapter_goes_beside_the_first(case):
    make, _, call, count = CASES[case]
    model = get_peft_model(make(), settings(case))
    train(model, call, 2)
    with torch.no_grad():
        first = call(model)
    model.add_adapter("second", settings(case))
    assert sum(isinstance(m, SliceFineLinear) for m in model.modules()) == count
    model.set_adapter("second")
    train(model, call, 2)
    model.set_adapter("default")
    with torch.no_grad():
        assert_close(call(model), first, rtol=0, atol=0)
    model.delete_adapter("second")
    with torch.no_grad():
        assert_close(call(model), first, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_the_delta_has_the_weights_own_shape(case):
    make, _, call, _ = CASES[case]
    base = make()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, settings(case))
    train(model, call)
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, SliceFineLinear)}
    deltas = {n: m.get_delta_weight("default") for n, m in layers.items()}
    names = {n: f"{n.replace('.base_layer', '')}.{m.kind.parameter}" for n, m in layers.items()}
    after = model.merge_and_unload().state_dict()
    for path, delta in deltas.items():
        assert delta.abs().sum() > 0
        assert_close(before[names[path]] + delta, after[names[path]])


def test_rows_of_experts_are_the_same_units_of_all_of_them():
    model = get_peft_model(mixtral(), SliceFineConfig(r=2, mode="row", moves=0, **CASES["mixtral"][1]))
    before = copy.deepcopy(model.base_model.model.state_dict())
    train(model, CASES["mixtral"][2], 3)
    after = model.merge_and_unload().state_dict()
    old = {name.replace(".base_layer", ""): t for name, t in before.items() if "slicefine_" not in name}
    changed = (after["model.layers.0.mlp.experts.down_proj"] != old["model.layers.0.mlp.experts.down_proj"]).any(2)
    assert changed[:, 2:].sum() == 0  # experts, rows
    assert changed[:, :2].any(0).all()


def test_what_cannot_be_trained_or_converted_says_so():
    with pytest.raises(UnsupportedError, match=r"norm: SliceFine trains the weights of linear"):
        get_peft_model(mixtral(), SliceFineConfig(target_modules=["norm"]))
    with pytest.raises(ConfigError, match=r"rank_pattern names conv with rank 9, .* choose at most 8"):
        get_peft_model(mixed(), SliceFineConfig(mode="column", target_modules=["conv"], rank_pattern={"conv": 9}))
    with pytest.raises(ValueError, match="no `target_parameters` found"):
        get_peft_model(mixtral(), SliceFineConfig(target_modules=[], target_parameters=["experts.side_proj"]))
    model = get_peft_model(mixed(), settings("mixed"))
    kinds = {m.kind.layout: m.supports_lora_conversion() for m in model.modules() if isinstance(m, SliceFineLinear)}
    assert kinds == {"linear": True, "embedding": False, "convolution": False, "packed": False, "hidden": False}


def trained_folder(base: nn.Module, folder, **options) -> dict[str, torch.Tensor]:
    """Train, save base and adapter beside each other; the merged weights."""
    save_file({k: v.clone() for k, v in base.state_dict().items()}, folder / "model.safetensors")
    model = get_peft_model(base, SliceFineConfig(r=2, interval=2, **options))
    train(model, CASES["mixed"][2])
    model.save_pretrained(folder / "adapter")
    return {k: v.clone() for k, v in model.merge_and_unload().state_dict().items()}


def test_files_merge_what_lies_in_matrices(tmp_path):
    base = mixed()
    expected = trained_folder(base, tmp_path, target_modules=["embed", "attention", "out_proj", "head"])
    with Checkpoint(tmp_path) as checkpoint:
        merge_files(read_adapter(tmp_path / "adapter"), checkpoint, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_files_refuse_what_does_not(tmp_path):
    trained_folder(mixed(), tmp_path, target_modules=["conv"])
    adapter = read_adapter(tmp_path / "adapter")
    assert {name: (layer.layout, layer.tensor) for name, layer in adapter.layers.items()} == {
        "conv": ("convolution", "conv.weight")
    }
    with Checkpoint(tmp_path) as checkpoint:
        with pytest.raises(UnsupportedError, match=r"conv.weight is no matrix \(convolution, \(8, 8, 3\)\)"):
            merge_files(adapter, checkpoint, tmp_path / "merged")
        with pytest.raises(UnsupportedError, match="export: conv .* is no linear layer, and LoRA's loaders"):
            export_lora(adapter, checkpoint, tmp_path / "lora")
    assert not (tmp_path / "merged").exists()


def test_several_parameters_of_one_module_are_told_apart_in_files(tmp_path):
    model = get_peft_model(mixtral(), settings("mixtral"))
    train(model, CASES["mixtral"][2])
    model.save_pretrained(tmp_path)
    layers = read_adapter(tmp_path).layers
    experts = {name: (layer.path, layer.shape) for name, layer in layers.items() if "layers.0.mlp" in name}
    assert experts == {
        "model.layers.0.mlp.experts.gate_up_proj": ("model.layers.0.mlp.experts.base_layer", (48, 16 * 4)),
        "model.layers.0.mlp.experts.down_proj": ("model.layers.0.mlp.experts", (16, 24 * 4)),
    }
    write_adapter(read_adapter(tmp_path), tmp_path / "again")
    with torch.no_grad():
        found = PeftModel.from_pretrained(mixtral(), tmp_path / "again")(input_ids=TOKENS).logits
        assert_close(found, model(input_ids=TOKENS).logits)


def test_all_linear_means_packed_attention_too():
    model = get_peft_model(mixed(), SliceFineConfig(mode="row", r=1, target_modules="all-linear"))
    names = {n for n, m in model.base_model.model.named_modules() if isinstance(m, SliceFineLinear)}
    assert names == {"attention", "attention.base_layer.out_proj", "head"}
    model.add_adapter("second", SliceFineConfig(mode="row", r=1, target_modules="all-linear"))
    layers = [m for m in model.modules() if isinstance(m, SliceFineLinear)]
    assert len(layers) == 3
    assert all("second" in m.states for m in layers)


def of_adapter(model: nn.Module, name: str) -> set[str]:
    """Layers that an adapter trains, by the names that its file gives them."""
    layers = (m for m in model.modules() if isinstance(m, SliceFineLinear) and name in m.states)
    return {layer.states[name].layer_name for layer in layers}


@pytest.mark.parametrize("first", [["attention"], ["attention", "out_proj"], ["out_proj"]])
@pytest.mark.parametrize(
    "second", [["attention", "out_proj", "head"], ["out_proj", "head"], ["attention", "head"], ["out_proj"]]
)
def test_a_second_adapter_may_choose_other_parts_of_attention(first, second, tmp_path):
    model = get_peft_model(mixed(), SliceFineConfig(r=1, interval=9, target_modules=first))
    model.add_adapter("second", SliceFineConfig(r=1, interval=9, target_modules=second))
    full = {"attention": "attention", "out_proj": "attention.out_proj", "head": "head"}
    assert of_adapter(model, "second") == {full[name] for name in second}
    model.set_adapter("second")
    train(model, CASES["mixed"][2], 2)
    with torch.no_grad():
        expected = model(TOKENS)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixed(), tmp_path / "second")
    with torch.no_grad():
        assert_close(loaded(TOKENS), expected)
    assert not any(isinstance(m, SliceFineLinear) for m in model.unload().modules())


def test_the_output_projection_alone_is_loaded_beside_an_adapter_of_attention(tmp_path):
    model = get_peft_model(mixed(), SliceFineConfig(r=1, interval=9, target_modules=["out_proj"]))
    train(model, CASES["mixed"][2], 2)
    model.save_pretrained(tmp_path)
    both = get_peft_model(mixed(), SliceFineConfig(r=1, interval=9, target_modules=["attention"]))
    both.load_adapter(tmp_path, "second")
    both.set_adapter("second")
    with torch.no_grad():
        assert_close(both(TOKENS), model(TOKENS))
    with pytest.raises(ValueError, match="Target modules .*nowhere.* not found"):
        both.add_adapter("third", SliceFineConfig(r=1, interval=9, target_modules=["nowhere"]))


@pytest.mark.parametrize("trains", [True, False])
def test_a_projection_that_changes_before_backward_is_refused(trains):
    """Its weight is read without a call: the attention around it, which has slices too, looks after it."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = get_peft_model(nn.Sequential(OrderedDict(attention=attention)), attention_config(["attention"]))
    model.add_adapter("second", attention_config(["out_proj"]))
    model.set_adapter("second")
    inside = model.base_model.model.attention.base_layer.out_proj
    with torch.no_grad():
        inside.slicefine_active["second"].add_(1)
    model.set_requires_grad("second", trains)
    x = torch.randn(2, 3, 8, requires_grad=True)
    layer = model.base_model.model.attention
    message = "attention.out_proj: the weights changed between forward and backward"
    layer(x, x, x)[0].sum().backward()  # the content is the forward's
    y = layer(x, x, x)[0]
    with model.disable_adapter(), pytest.raises(ContentError, match=message):
        y.sum().backward()
    model.set_requires_grad("second", trains)
    with model.disable_adapter():
        y = layer(x, x, x)[0]
    with pytest.raises(ContentError, match=message):
        y.sum().backward()


def attention_config(targets: list[str]) -> SliceFineConfig:
    return SliceFineConfig(r=1, mode="row", interval=9, target_modules=targets)


@pytest.mark.parametrize("first", [["experts.gate_up_proj"], ["experts.down_proj"]])
def test_a_second_adapter_may_choose_other_parameters_of_one_module(first, tmp_path):
    both = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(mixtral(), SliceFineConfig(r=1, interval=9, target_modules=[], target_parameters=first))
    model.add_adapter("second", SliceFineConfig(r=1, interval=9, target_modules=[], target_parameters=both))
    model.set_adapter("second")
    train(model, CASES["mixtral"][2], 2)
    call = CASES["mixtral"][2]
    with torch.no_grad():
        expected = call(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(call(PeftModel.from_pretrained(mixtral(), tmp_path / "second")), expected)
    names = {name for name, _ in mixtral().named_parameters()}
    assert {name for name, _ in model.unload().named_parameters()} == names


def test_weighted_sums_of_convolutions_load_back(tmp_path):
    model = get_peft_model(mixed(), SliceFineConfig(r=1, interval=9, mode="column", target_modules=["conv"]))
    train(model, CASES["mixed"][2], 2)
    model.add_weighted_adapter(["default"], [0.5], "sum")
    model.set_adapter("sum")
    with torch.no_grad():
        expected = model(TOKENS)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(PeftModel.from_pretrained(mixed(), tmp_path / "sum")(TOKENS), expected)


def test_merged_adapters_do_not_train():
    model = get_peft_model(mixed(), SliceFineConfig(r=1, interval=9, target_modules=["attention", "out_proj", "head"]))
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(TOKENS).sum().backward()


def test_a_refused_adapter_leaves_no_wrapper():
    base = mixed()
    names = [name for name, _ in base.named_parameters()]
    with pytest.raises(UnsupportedError, match="norm: SliceFine trains the weights of .* not LayerNorm"):
        base.norm = nn.LayerNorm(3)
        get_peft_model(base, SliceFineConfig(target_modules=["attention", "out_proj", "norm"]))
    assert [name for name, _ in base.named_parameters() if not name.startswith("norm")] == names
