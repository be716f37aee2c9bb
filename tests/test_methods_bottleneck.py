"""Adapters after and beside the parts of a block: against the package `adapters`, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification

from bottleneck_helpers import MASK, bert, build, check_trains, fill_prefix, llama, logits, recorded, recorded_base
from slicefine.bench.workload import enable_checkpointing
from slicefine.errors import ConfigError
from slicefine.methods import Base, find, options_of
from slicefine.methods.base import block_outputs
from slicefine.methods.bottleneck import AfterLayer


def fill_adapters(model, given, places):
    """Put the weights of `adapters` into ours: ``places`` maps our adapter to the path of theirs."""
    with torch.no_grad():
        for ours, theirs in places.items():
            adapter = model.get_submodule(ours)
            for name, part in (("down", "adapter_down.0"), ("up", "adapter_up")):
                for kind in ("weight", "bias"):
                    getattr(getattr(adapter, name), kind).copy_(given.pop(f"{theirs}.{part}.{kind}"))


BERT = "bert.encoder.layer.{}.{}"
HOULSBY = {
    "bert": {
        BERT.format(i, f"{part}.dense.adapter"): BERT.format(i, f"{part}.adapters.houlsby")
        for i in range(2)
        for part in ("attention.output", "output")
    },
    "llama": {
        f"model.layers.{i}.{ours}.adapter": f"model.layers.{i}.{theirs}.adapters.houlsby"
        for i in range(2)
        for ours, theirs in (("self_attn.o_proj", "attention_adapters"), ("mlp.down_proj", "output_adapters"))
    },
}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_houlsby_is_double_seq_bn_of_adapters(family):
    base, given = recorded_base(family), recorded(f"adapters_{family}", "houlsby")
    inputs, expected = recorded(f"adapters_{family}", "in"), given.pop("out")
    with torch.no_grad():
        plain = base.model(**inputs).logits
        model = build("houlsby", base, bottleneck=4, non_linearity="silu")
        fill_adapters(model, given, HOULSBY[family])
        found = model(**inputs).logits
    assert not given  # every weight of theirs has its place in ours
    assert_close(found, expected, atol=2e-6, rtol=2e-6)
    assert (found - plain).abs().max() > 1e-3


def test_mam_is_mam_of_adapters():
    base, given = recorded_base("bert"), recorded("adapters_bert", "mam")
    expected = given.pop("out")
    model = build("mam", base, length=2, prefix_bottleneck=8, bottleneck=8)
    places = {BERT.format(i, "intermediate.dense.adapter"): BERT.format(i, "output.adapters.mam") for i in range(2)}
    fill_adapters(model, given, places)
    fill_prefix(model, given)
    assert not given
    with torch.no_grad():
        found = model(**recorded("adapters_bert", "in")).logits
    assert_close(found, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("houlsby", {"bottleneck": 3, "norms": False, "non_linearity": "relu"}),
        ("mam", {"length": 2, "flat": True, "bottleneck": 5}),
    ],
)
def test_what_trains_is_counted_and_comes_back_from_its_file(name, given, make, tmp_path):
    check_trains(name, make(), tmp_path, **given)


def test_an_adapter_starts_near_nothing_and_a_parallel_one_at_nothing():
    base = bert()
    plain = logits(base.model)
    model = build("houlsby", base)
    assert 0 < (logits(model) - plain).abs().max() < 1e-2
    assert all(p.abs().max() <= 0.02 for n, p in model.named_parameters() if "adapter" in n)
    model = build("mam", bert())
    assert all(not p.any() for n, p in model.named_parameters() if "adapter.up" in n or "adapter.down.bias" in n)


def test_houlsby_trains_the_norms_unless_told_otherwise():
    for norms in (True, False):
        model = build("houlsby", bert(), norms=norms)
        assert all(p.requires_grad == norms for n, p in model.named_parameters() if "LayerNorm" in n)


def test_one_seed_is_one_start():
    def entries(seed):
        base = bert()
        model = build("houlsby", Base(base.model, base.head, seed=seed))
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "adapter" in n])

    first = entries(0)
    torch.manual_seed(99)
    assert torch.equal(first, entries(0))
    assert not torch.equal(first, entries(1))


def test_a_parallel_adapter_is_of_its_own_model_and_pass():
    model = build("mam", bert(), length=2, prefix_bottleneck=4, bottleneck=4)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "adapter.up" in name:
                parameter.fill_(0.1)
    before = logits(model)
    assert not torch.allclose(logits(copied), before)
    assert torch.equal(logits(model), before)
    enable_checkpointing(model)
    model.train()
    assert_close(logits(model), before)


def test_adapters_take_the_models_dtype():
    base = bert()
    base.model.bfloat16()
    model = build("houlsby", base)
    assert logits(model).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("width", "layers", "heads"), [(768, 12, 12), (1024, 24, 16)])
def test_entries_of_bert_follow_the_formulas(width, layers, heads):
    with torch.device("meta"):
        config = BertConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)
        base = Base(BertForSequenceClassification(config), ("classifier",))
    houlsby, mam = find("houlsby"), find("mam")
    norms = (2 * layers + 1) * 2 * width
    assert houlsby.count(base, options_of(houlsby, {})) == 2 * layers * (2 * width * 64 + 64 + width) + norms
    beside = layers * (2 * width * 32 + 32 + width)
    given = {"length": 32, "flat": True, "bottleneck": 32}
    assert mam.count(base, options_of(mam, given)) == layers * 32 * 2 * width + beside


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("houlsby", {"non_linearity": "sine"}, "non_linearity='sine' is unknown; expected one of gelu"),
        ("houlsby", {"norms": 1}, "norms=1: expected true or false"),
        ("houlsby", {"init_std": 0.0}, "init_std=0.0: expected more than 0"),
        ("mam", {"bottleneck": 0}, "bottleneck=0: expected a number like 512"),
        ("mam", {"flat": "no"}, "flat='no': expected true or false"),
    ],
)
def test_bad_options_are_refused(name, given, message):
    with pytest.raises(ConfigError, match=message):
        build(name, bert(), **given)


def test_a_model_without_known_parts_is_refused():
    with pytest.raises(ConfigError, match="adapters go after each block's attention and feed-forward part"):
        build("houlsby", Base(torch.nn.Sequential(torch.nn.Linear(4, 4))))
    base = bert()
    attention, _ = block_outputs(base)
    assert attention == [BERT.format(i, "attention.output.dense") for i in range(2)]
    assert isinstance(build("houlsby", base).get_submodule(attention[0]), AfterLayer)
    assert MASK.sum() < MASK.numel()  # all comparisons above have padding
