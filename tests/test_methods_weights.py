"""RoCoFT, Propulsion, LoRA-XS, MoSLoRA and DiffFit: against the authors' layers, published counts, and SliceFine."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTModel,
)

from bottleneck_helpers import IDS, bert, build, check_trains, llama, logits, recorded
from slicefine import attach
from slicefine.errors import ConfigError, UnsupportedError
from slicefine.geometry import Slice
from slicefine.methods import Base, find, options_of
from slicefine.methods.base import merge_layers
from slicefine.methods.dense import DenseLayer, MixedFactors, ScaledOutput
from slicefine.methods.files import own_tensors
from slicefine.methods.lora_xs import singular_factors
from slicefine.methods.rocoft import FirstLines

CLOSE = {"rtol": 2e-6, "atol": 2e-6}


def given(part: str) -> dict[str, Tensor]:
    return recorded("methods_weights", part)


def dense(found: dict[str, Tensor]) -> nn.Linear:
    rows, columns = found["weight"].shape
    layer = nn.Linear(columns, rows).requires_grad_(False)
    layer.weight.copy_(found["weight"])
    layer.bias.copy_(found["bias"])
    return layer


def check_layer(layer: DenseLayer, found: dict[str, Tensor], own: dict[str, tuple[nn.Parameter, str]]) -> None:
    """Output and gradients of a layer as recorded, then the merged layer's output."""
    y = layer(found["x"])
    y.backward(found["dy"])
    assert_close(y, found["y"], **CLOSE)
    assert {id(parameter) for parameter, _ in own.values()} == {id(p) for p in layer.parameters() if p.requires_grad}
    for name, (parameter, kind) in own.items():
        gradient = parameter.grad.t() if kind == "transposed" else parameter.grad
        assert_close(gradient, found[f"grad.{name}"], rtol=1e-5, atol=1e-5)
    assert_close(layer.merged()(found["x"]), found["y"], **CLOSE)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_rocoft_is_the_authors_layer(axis: str):
    found = given(axis)
    layer = FirstLines(dense(found), Slice(axis, 0, 3), bias=True)
    lines = found["lines"] if axis == "row" else found["lines"].t()
    assert layer.lines.shape == lines.shape
    with torch.no_grad():
        layer.lines.copy_(lines)
    kind = "plain" if axis == "row" else "transposed"
    check_layer(layer, found, {"lines": (layer.lines, kind), "bias": (layer.bias, "plain")})


def test_propulsion_is_the_authors_layer():
    found = given("propulsion")
    layer = ScaledOutput(dense(found), find("propulsion").options["power"])
    with torch.no_grad():
        layer.scale.copy_(found["scale"])
    check_layer(layer, found, {"scale": (layer.scale, "plain")})


def test_lora_xs_is_the_authors_layer():
    found = given("lora_xs")
    layer = MixedFactors(dense(found), found["A"], found["mixer"], found["B"], 16 / 3, dropout=0.0, trained=False)
    check_layer(layer, found, {"mixer": (layer.mixer, "plain")})


def test_lora_xs_has_the_authors_factors():
    found = given("lora_xs")
    A, B = singular_factors(found["weight"], 3)
    for i in range(3):  # the sign of a pair of singular vectors is free
        assert_close(torch.outer(B[:, i], A[i]), torch.outer(found["B"][:, i], found["A"][i]), **CLOSE)
    assert_close(B.t() @ B, torch.eye(3), **CLOSE)


def test_factors_of_lora_xs_follow_from_the_weight():
    torch.manual_seed(0)
    weight = torch.randn(60, 4) @ torch.randn(4, 50) + 0.3 * torch.randn(60, 50)
    A, B = singular_factors(weight, 6)
    assert bool((B.gather(0, B.abs().argmax(dim=0, keepdim=True)) > 0).all())
    u, s, v = torch.linalg.svd(weight)
    assert_close(A.norm(dim=1), s[:6], rtol=1e-3, atol=0)
    assert_close(B @ A, u[:, :6] * s[:6] @ v[:6], rtol=0, atol=5e-2)
    again = singular_factors(weight + 1e-5 * torch.randn(60, 50), 6)  # as another machine rounds
    assert_close(again, (A, B), rtol=0, atol=5e-2)


def test_moslora_is_the_authors_layer():
    found = given("moslora")
    layer = MixedFactors(dense(found), found["A"], found["mixer"], found["B"], 2.0, dropout=0.0, trained=True)
    assert isinstance(layer.A, nn.Parameter)
    assert isinstance(layer.B, nn.Parameter)
    own = {"A": (layer.A, "plain"), "mixer": (layer.mixer, "plain"), "B": (layer.B, "plain")}
    check_layer(layer, found, own)


VIT = {  # ours: theirs
    "layernorm_before": "norm1",
    "layernorm_after": "norm3",
    "attention.q_proj": "attn1.to_q",
    "attention.k_proj": "attn1.to_k",
    "attention.v_proj": "attn1.to_v",
    "attention.o_proj.base": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2.base": "ff.net.2",
}
SCALES = {"attention.o_proj.scale": "gamma_attn1", "mlp.fc2.scale": "gamma_ff"}


def test_diffit_is_the_block_of_difffit_pytorch():
    found = given("diffit")
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}
    config = ViTConfig(image_size=8, patch_size=4, layer_norm_eps=1e-5, hidden_act="gelu", **shape)
    model = build("diffit", Base(ViTModel(config, add_pooling_layer=False).eval()))
    block = model.layers[0]
    pairs = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in VIT.items() for kind in ("weight", "bias")}
    pairs |= SCALES
    own = dict(block.named_parameters())
    assert own.keys() == pairs.keys()
    with torch.no_grad():
        for ours, theirs in pairs.items():
            own[ours].copy_(found.pop(f"block.{theirs}"))
    assert not [name for name in found if name.startswith("block.")]
    y = block(found["x"])
    y.backward(found["dy"])
    assert_close(y, found["y"], rtol=1e-5, atol=1e-5)
    for ours, theirs in pairs.items():
        assert own[ours].requires_grad == (f"grad.{theirs}" in found), ours
        if own[ours].requires_grad:
            assert_close(own[ours].grad, found[f"grad.{theirs}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_rocoft_is_slicefine_whose_slice_never_moves(axis: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False)).double()
    x, target = torch.randn(4, 6).double(), torch.randn(4, 5).double()
    tuner = attach(copy.deepcopy(model), r=3, mode=axis, moves=0)
    ours = build("rocoft", Base(model), r=3, axis=axis)
    for one in (tuner.model, ours):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            (one(x) - target).square().mean().backward()
            optimizer.step()
    expected = tuner.unload(merge=True).state_dict()
    assert_close(merge_layers(ours).state_dict(), expected)


def roberta(size: str = "base", targets: str | list[str] = "all-linear") -> Base:
    """Shapes alone."""
    more = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(**(more if size == "large" else {})))
    return Base(model, ("classifier",), target_modules=targets)


SMALL_LARGE = ["query", "value", "attention.output.dense", "output.dense"]  # LoRA-XS' own choice for GLUE


@pytest.mark.parametrize(
    ("name", "base", "options", "published"),
    [
        ("rocoft", roberta(), {"r": 1}, 0.083),  # the original's table
        ("rocoft", roberta(), {"r": 1, "axis": "column"}, 0.083),
        ("rocoft", roberta(), {}, 0.249),  # Table 7 of SliceFine, too
        ("propulsion", roberta(targets=["query", "key", "value"]), {}, 0.028),  # "attention" of the original
        ("lora_xs", roberta("large", SMALL_LARGE), {}, 0.060),  # the original's largest
        ("lora_xs", roberta(), {"r": 60}, 0.26),  # Table 7
        ("moslora", roberta(), {"r": 10}, 1.67),  # Table 7
    ],
)
def test_counts_are_the_published_ones(name: str, base: Base, options: dict[str, Any], published: float):
    found = find(name).count(base, options_of(find(name), options)) / 1e6
    assert round(found, len(str(published).partition(".")[2])) == published


MODELS = {"bert": bert, "llama": llama}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rocoft", {"r": 2}),
        ("rocoft", {"r": 4, "axis": "column", "bias": True}),
        ("propulsion", {"power": 3}),
        ("lora_xs", {"r": 8}),
        ("moslora", {"r": 4, "mixer": "orthogonal", "dropout": 0.0}),
        ("diffit", {}),
    ],
)
def test_trains_saves_and_loads(name: str, options: dict[str, Any], family: str, tmp_path):
    base = MODELS[family]()
    if (name, family) == ("diffit", "llama"):
        with pytest.raises(UnsupportedError, match="diffit trains biases: LlamaForCausalLM has none"):
            build(name, base)
        return
    check_trains(name, base, tmp_path, **options)


def gpt2() -> Base:
    """A model whose layers keep their weights transposed."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=1, n_head=4)
    return Base(GPT2LMHeadModel(config).eval())


@pytest.mark.parametrize("make", [bert, llama, gpt2])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rocoft", {}),
        ("rocoft", {"axis": "column"}),
        ("rocoft", {"r": 16}),
        ("propulsion", {}),
        ("lora_xs", {"r": 8}),
        ("moslora", {"r": 4}),
        ("diffit", {}),
    ],
)
def test_merged_is_unmerged_and_the_start_is_the_base(name: str, options: dict[str, Any], make):
    if name == "diffit" and make is llama:
        return
    base = make()
    before = logits(base.model)
    model = build(name, base, **options)
    assert_close(logits(model), before, rtol=1e-3, atol=1e-3)  # LoRA-XS starts near it
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.requires_grad and not path.startswith("classifier"):
                p.add_(0.02 * torch.randn_like(p))
    after = logits(model)
    assert (after - before).abs().max() > 1e-3
    merged = merge_layers(model)
    assert not [m for m in merged.modules() if isinstance(m, DenseLayer)]
    assert_close(logits(merged), after, rtol=1e-4, atol=1e-4)


def test_factors_are_drawn_from_the_seed():
    one, other = build("moslora", bert()), build("moslora", bert())
    assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    again = bert()
    object.__setattr__(again, "seed", 1)
    third, key = build("moslora", again), "bert.encoder.layer.0.intermediate.dense"
    assert not torch.equal(third.get_submodule(key).A, one.get_submodule(key).A)
    mixer = build("moslora", bert(), mixer="orthogonal").get_submodule(key).mixer
    assert_close(mixer @ mixer.t(), torch.eye(16), rtol=1e-5, atol=1e-5)
    A = one.get_submodule(key).A
    assert 0.8 < A.abs().max() * 32**0.5 <= 1  # Kaiming's bound for a = sqrt(5)
    layer = build("lora_xs", bert()).get_submodule(key)
    assert 0.5e-5 < layer.mixer.std() < 2e-5


def test_lora_xs_has_no_more_directions_than_the_weight():
    base = llama()
    expected = find("lora_xs").count(base, {"r": 25, "alpha": 16})
    model = build("lora_xs", base)
    layer = model.get_submodule("model.layers.0.self_attn.k_proj")  # (16, 32)
    assert layer.mixer.shape == (16, 16)
    assert_close(layer.B @ layer.A, layer.weight, rtol=1e-4, atol=1e-4)
    assert sum(tensor.numel() for tensor in own_tensors(model).values()) == expected  # no file keeps the factors


def test_added_entries_are_not_rounded_to_half_precision():
    layer = ScaledOutput(nn.Linear(4, 3).bfloat16(), 15)
    assert layer.scale.dtype == torch.float32
    assert layer(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    half = copy.deepcopy(bert().model).bfloat16()
    for name in ("lora_xs", "moslora", "rocoft", "diffit"):
        base = Base(copy.deepcopy(half), ("classifier",))
        assert build(name, base)(input_ids=IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rocoft", {"axis": "both"}, "method.options.axis='both': rocoft expects one of 'row', 'column'"),
        ("rocoft", {"bias": "yes"}, "method.options.bias='yes': rocoft expects one of False, True"),
        ("rocoft", {"r": 33}, "method.options.r, bert.encoder.layer.0.attention.self.query: row slice of width 33"),
        ("propulsion", {"power": 0}, "method.options.power=0"),
        ("lora_xs", {"r": 0}, "method.options.r=0"),
        ("moslora", {"mixer": "eye"}, "method.options.mixer='eye': moslora expects one of 'kaiming', 'orthogonal'"),
        ("moslora", {"dropout": 1.5}, "method.options.dropout=1.5: moslora expects 0 to 1"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str):
    for work in (lambda: build(name, bert(), **options), lambda: count(name, options)):
        with pytest.raises(ConfigError, match=message):
            work()


def count(name: str, options: dict[str, Any]) -> int:
    return find(name).count(bert(), options_of(find(name), options))
