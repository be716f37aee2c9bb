"""PROPETL: against the layers of its authors, gradients included, and what its masks keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import RobertaConfig, RobertaForSequenceClassification

from bottleneck_helpers import bert, build, check_trains, llama, logits, recorded
from slicefine.errors import ConfigError, UnsupportedError
from slicefine.methods import Base, find, options_of
from slicefine.methods.base import merge_layers
from slicefine.methods.bottleneck import Adapter, AfterLayer
from slicefine.methods.prefix import Prefix, Prompt, Site
from slicefine.methods.propetl import BeforeNorm, Factors, Mask, MaskedAdapter, MaskedFactors, MaskedPrefix

NAMES = ["propetl_adapter", "propetl_prefix", "propetl_lora"]
DRAW = torch.Generator().manual_seed(0)


def fill(given, places):
    """Put the authors' tensors into our parameters; masks of adapters lie transposed in theirs."""
    with torch.no_grad():
        for theirs, ours in places.items():
            ours.copy_(given[theirs].mT if theirs.endswith(("down_mask", "up_mask")) else given[theirs])


def check(given, places, result, shape=None):
    """Result, and all gradients of the sum of its squares."""
    expected = given["out"] if shape is None else shape(given["out"])
    assert_close(result, expected, atol=1e-6, rtol=1e-6)
    result.square().sum().backward()
    for theirs, ours in places.items():
        grad = given[f"grad.{theirs}"]
        assert_close(ours.grad, grad.mT if theirs.endswith(("down_mask", "up_mask")) else grad, atol=1e-4, rtol=1e-5)
    assert set(places) >= {name.removeprefix("grad.") for name in given if name.startswith("grad.")}


def test_the_adapter_is_that_of_the_authors():
    given = recorded("propetl", "adapter")
    shared = Adapter(torch.zeros(1), 12, 4, torch.relu)
    adapter, norm = MaskedAdapter(shared, 0.5, DRAW), nn.LayerNorm(12)
    places = {
        **{f"shared.adapter_down.0.{kind}": getattr(shared.down, kind) for kind in ("weight", "bias")},
        **{f"shared.adapter_up.{kind}": getattr(shared.up, kind) for kind in ("weight", "bias")},
        **{f"norm.{kind}": getattr(norm, kind) for kind in ("weight", "bias")},
        "mask.down_mask": adapter.down.scores,
        "mask.up_mask": adapter.up.scores,
    }
    fill(given, places)
    check(given, places, BeforeNorm(norm, adapter)(given["x"] + given["before"]))


def test_the_prefix_is_that_of_the_authors():
    given = recorded("propetl", "prefix")
    prompt, up = Prompt(torch.zeros(1), 5, 12, 6, DRAW), nn.Linear(6, 24)
    masks = [Mask((5, 24), 120, 0.1, DRAW) for _ in range(3)]
    layers = [Prefix(Site("", 4, 3, 12), MaskedPrefix(prompt, up, mask)) for mask in masks]
    places = {
        "shared.wte.weight": prompt.states,
        **{f"shared.control_trans.0.{kind}": getattr(prompt.down, kind) for kind in ("weight", "bias")},
        **{f"shared.control_trans.2.{kind}": getattr(up, kind) for kind in ("weight", "bias")},
    }
    fill(given, places)
    scores = given.pop("shared.adapters_mask.adapters_mask")
    gradients = given.pop("grad.shared.adapters_mask.adapters_mask")
    fill({str(i): row for i, row in enumerate(scores)}, {str(i): mask.scores for i, mask in enumerate(masks)})
    check(given, places, torch.stack([torch.stack(layer(2)) for layer in layers]))
    assert_close(torch.stack([mask.scores.grad for mask in masks]), gradients, atol=1e-4, rtol=1e-5)


def test_the_low_rank_layer_is_that_of_the_authors():
    given = recorded("propetl", "lora")
    base = nn.Linear(8, 10)
    shared = Factors(base.weight, 3, DRAW)
    layer = MaskedFactors(base, shared, 4 / 3, 0.1, DRAW)
    places = {
        "layer.weight": base.weight,
        "layer.bias": base.bias,
        "layer.loras.task.lora_A": shared.A,
        "layer.loras.task.lora_B": shared.B,
        "layer.adapters_mask.task.lora_A_mask": layer.mask_A.scores,
        "layer.adapters_mask.task.lora_B_mask": layer.mask_B.scores,
    }
    fill(given, places)
    check(given, places, layer(given["x"]))


@pytest.mark.parametrize(("keep", "kept"), [(0.1, 2), (0.5, 10), (0.97, 20), (1, 20)])
def test_a_mask_keeps_its_share_of_the_largest_scores(keep, kept):
    mask = Mask((4, 5), 5, keep, DRAW)
    chosen = mask(torch.ones(4, 5)).bool()
    assert chosen.sum() == kept
    assert kept == 20 or mask.scores.abs()[chosen].min() > mask.scores.abs()[~chosen].max()


GIVEN = {
    "propetl_adapter": {"reduction": 4, "keep": 0.3},
    "propetl_prefix": {"length": 4, "bottleneck": 6, "keep": 0.3},
    "propetl_lora": {"r": 4, "alpha": 8, "keep": 0.3, "mask_rate": 3.0},
}


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("name", NAMES)
def test_what_trains_is_counted_and_comes_back_from_its_file(name, make, tmp_path):
    check_trains(name, make(), tmp_path, **GIVEN[name])


@pytest.mark.parametrize("name", NAMES)
def test_masks_move_on_their_own_rate(name):
    base, method = bert(), find(name)
    options = options_of(method, {"mask_rate": 7.0})
    model = method.build(base, options)
    factors = {n: method.groups(n, options) for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, factor in factors.items() if factor == 7.0} == {n for n in factors if n.endswith(".scores")}
    assert set(factors.values()) == {1.0, 7.0}


def test_low_rank_layers_share_by_place_and_merge():
    base = bert()
    base = Base(base.model, base.head, target_modules=["query", "value"])
    plain = logits(base.model)
    model = build("propetl_lora", base, r=4, keep=0.5)
    assert torch.equal(logits(model), plain)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MaskedFactors)}
    assert len(layers) == 4
    shared = {n.rpartition(".")[2]: m.shared for n, m in layers.items()}
    assert all(m.shared is shared[n.rpartition(".")[2]] for n, m in layers.items())
    assert shared["query"] is not shared["value"]
    with torch.no_grad():
        for factors in shared.values():
            factors.B.normal_(generator=DRAW)
    changed = logits(model)
    assert not torch.allclose(changed, plain, atol=1e-3)
    merge_layers(model)
    assert not any(isinstance(m, MaskedFactors) for m in model.modules())
    assert_close(logits(model), changed, atol=1e-5, rtol=1e-5)


def test_adapters_lie_before_the_norm_of_a_sum_else_after_the_part():
    model = build("propetl_adapter", bert())
    assert isinstance(model.get_submodule("bert.encoder.layer.1.output.LayerNorm"), BeforeNorm)
    model = build("propetl_adapter", llama())
    assert isinstance(model.get_submodule("model.layers.1.mlp.down_proj"), AfterLayer)


@pytest.mark.parametrize(
    ("width", "layers", "heads", "published"),
    [(768, 12, 12, {"adapter": 1.87e6, "lora": 1.77e6}), (1024, 24, 16, {"adapter": 5.40e6, "lora": 4.19e6})],
    ids=["base", "large"],
)
def test_entries_of_roberta_are_the_papers(width, layers, heads, published):
    """With the classifier; the paper's LoRA leaves out the prototypes, and its prefix is not shared."""
    with torch.device("meta"):
        config = RobertaConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)
        model = RobertaForSequenceClassification(config)
    base = Base(model, ("classifier",), target_modules=["query", "value"])
    head = sum(p.numel() for p in base.model.classifier.parameters())

    def count(name):
        return find(name).count(base, options_of(find(name), {}))

    assert abs(count("propetl_adapter") + head - published["adapter"]) < 6e3
    prototypes = 2 * 32 * 2 * width
    assert abs(count("propetl_lora") - prototypes + head - published["lora"]) < 8e3
    shared = 64 * width + width * 512 + 512 + 513 * 2 * width
    assert count("propetl_prefix") == shared + layers * 64 * 2 * width


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_a_share_outside_of_one_is_refused(name, keep):
    with pytest.raises(ConfigError, match=f"keep={keep}: expected more than 0 and at most 1"):
        build(name, bert(), keep=keep)


def test_layers_of_different_widths_cannot_share():
    from slicefine.methods.propetl import _one

    with pytest.raises(UnsupportedError, match=r"shares one prototype, and widths differ: \[4, 8\]"):
        _one([8, 4, 8], "widths")
