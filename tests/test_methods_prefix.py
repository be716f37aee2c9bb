"""Prefixes: against the package `adapters`, against plain softmax, with masks, caches and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    VideoMAEConfig,
    VideoMAEModel,
    ViTConfig,
    ViTModel,
)

from bottleneck_helpers import (
    IDS,
    MASK,
    SHAPE,
    bert,
    build,
    check_trains,
    fill_prefix,
    llama,
    llama_config,
    logits,
    prefixes,
    recorded,
    recorded_base,
)
from slicefine.errors import ConfigError, UnsupportedError
from slicefine.methods import Base, find, options_of
from slicefine.methods.base import merge_layers
from slicefine.methods.prefix import sites


@pytest.mark.parametrize(
    ("family", "name", "flat"), [("bert", "prefix", False), ("bert", "flat", True), ("llama", "prefix", False)]
)
def test_prefix_is_prefix_tuning_of_adapters(family, name, flat):
    base, given = recorded_base(family), recorded(f"adapters_{family}", name)
    inputs, expected = recorded(f"adapters_{family}", "in"), given.pop("out")
    with torch.no_grad():
        plain = base.model(**inputs).logits
        model = build("prefix", base, length=3, bottleneck=8, flat=flat)
        fill_prefix(model, given)
        found = model(**inputs).logits
    assert not given
    assert_close(found, expected, atol=2e-6, rtol=2e-6)
    assert (found - plain).abs().max() > 1e-3


def vit():
    return ViTModel(ViTConfig(image_size=8, patch_size=4, **SHAPE), add_pooling_layer=False)


def videomae():
    return VideoMAEModel(VideoMAEConfig(image_size=8, patch_size=4, num_frames=2, **SHAPE))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4))


PICTURE, VIDEO = torch.randn(2, 3, 8, 8), torch.randn(2, 2, 3, 8, 8)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(vit, {"pixel_values": PICTURE}), (videomae, {"pixel_values": VIDEO}), (gpt2, {"input_ids": IDS})],
)
def test_attention_is_softmax_over_prefix_and_tokens(make, inputs):
    """A twin of one attention layer, line by line, from what the layer was given."""
    base = Base(make().eval())
    model = build("prefix", base, length=3, bottleneck=4)
    seen = record_attention(model, inputs)
    assert len(seen) == 2
    for prefix, (query, key, value, causal, result) in zip(prefixes(model), seen, strict=True):
        keys, values = prefix(query.shape[0])
        scores = query @ torch.cat([keys, key], dim=2).mT * query.shape[-1] ** -0.5
        if causal:
            later = torch.ones(query.shape[2], key.shape[2]).triu(1).bool()
            scores[..., 3:].masked_fill_(later, -torch.inf)
        expected = scores.softmax(-1) @ torch.cat([values, value], dim=2)
        assert_close(result, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


def record_attention(model, inputs):
    """Queries, keys, values as they reach the attention function, and what it returns."""
    from transformers import AttentionInterface

    from slicefine.methods import prefix as ours

    seen = []

    def attend(module, query, key, value, attention_mask, **more):
        result = ours._attend(module, query, key, value, attention_mask, **more)
        assert attention_mask is None
        seen.append((query, key, value, module.is_causal, result[0]))
        return result

    AttentionInterface.register(ours._NAME, attend)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        AttentionInterface.register(ours._NAME, ours._attend)
    return seen


@pytest.mark.parametrize("make", [bert, llama])
def test_padding_is_not_seen_and_the_prefix_is(make):
    base = make()
    plain = logits(base.model)
    model = build("prefix", base, length=3, bottleneck=4)
    found = logits(model)
    assert not torch.allclose(found, plain, atol=1e-3)
    with torch.no_grad():
        ids = torch.where(MASK == 0, torch.tensor(7), IDS)
        changed = model(input_ids=ids, attention_mask=MASK).logits
    kept = MASK.bool() if changed.dim() == 3 else MASK[:, 0].bool()  # a class is read from the first token
    assert torch.equal(changed[kept], found[kept])
    # and without a mask, where sdpa is asked for causal attention without one
    with torch.no_grad():
        assert_close(model(input_ids=IDS).logits, logits(model, torch.ones_like(MASK)))


def test_a_token_sees_no_later_one():
    model = build("prefix", llama(), length=3, bottleneck=4)
    later = IDS.clone()
    later[:, -1] = 3
    with torch.no_grad():
        first, second = model(input_ids=IDS).logits, model(input_ids=later).logits
    assert torch.equal(first[:, :-1], second[:, :-1])


@pytest.mark.parametrize("mask", [MASK, torch.ones_like(MASK)], ids=["padded", "whole"])
def test_a_cache_gives_the_same_tokens(mask):
    model = build("prefix", llama(), length=3, bottleneck=4)
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = model.generate(input_ids=IDS, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **settings))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_may_have_been_loaded_for_eager_attention(attention):
    base = llama()
    expected = logits(build("prefix", base, length=3, bottleneck=4))
    model = LlamaForCausalLM._from_config(llama_config(), attn_implementation=attention).eval()
    model.load_state_dict(llama().model.state_dict())
    assert_close(logits(build("prefix", Base(model), length=3, bottleneck=4)), expected)


def test_models_without_a_prefix_are_left_alone():
    base = bert()
    plain, copied = logits(base.model), copy.deepcopy(base.model)
    model = build("prefix", base, length=3, bottleneck=4)
    found = logits(model)
    assert torch.equal(logits(copied), plain)
    again = copy.deepcopy(model)
    with torch.no_grad():
        prefixes(again)[0].values.prompt.states.add_(1)
    assert torch.equal(logits(model), found)
    assert not torch.allclose(logits(again), found)


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("flat", [False, True])
def test_what_trains_is_counted_and_comes_back_from_its_file(flat, make, tmp_path):
    check_trains("prefix", make(), tmp_path, length=4, bottleneck=6, flat=flat)


def test_a_prefix_cannot_be_merged():
    with pytest.raises(UnsupportedError, match="Prefix computes what no single layer of the base can"):
        merge_layers(build("prefix", bert(), length=2))


@pytest.mark.parametrize(
    ("width", "layers", "heads", "published"), [(768, 12, 12, 0.96e6), (1024, 24, 16, 2.03e6)], ids=["base", "large"]
)
def test_entries_of_roberta_are_the_papers(width, layers, heads, published):
    """The paper's prefix tuning: twenty keys and values per layer, trained as they are, and the classifier."""
    with torch.device("meta"):
        config = RobertaConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)
        base = Base(RobertaForSequenceClassification(config), ("classifier",))
    method = find("prefix")
    head = sum(p.numel() for p in base.model.classifier.parameters())
    found = method.count(base, options_of(method, {"length": 20, "flat": True})) + head
    assert abs(found - published) < 6e3
    assert found == layers * 20 * 2 * width + (width + 1) * (width + 2)
    ours = method.count(base, options_of(method, {}))
    assert ours == 30 * width + width * 512 + 512 + layers * 513 * 2 * width


def test_grouped_queries_have_prefixes_of_the_keys_heads():
    found = sites(llama())
    assert [(site.heads, site.size, site.width) for site in found] == [(2, 8, 32)] * 2


def test_bad_options_are_refused():
    with pytest.raises(ConfigError, match="flat=1: expected true or false"):
        build("prefix", bert(), flat=1)


def test_models_that_cannot_take_a_prefix_are_refused_by_name():
    t5 = T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(UnsupportedError, match="T5ForConditionalGeneration is none. Use"):
        build("prefix", Base(T5ForConditionalGeneration(t5)))
    with pytest.raises(UnsupportedError, match="Sequential is none. Use"):
        build("prefix", Base(nn.Sequential(nn.Linear(4, 4))))
    crossed = BertConfig(vocab_size=40, is_decoder=True, add_cross_attention=True, **SHAPE)
    with pytest.raises(UnsupportedError, match="BertLMHeadModel has 4 attention layers, 2 of them crossed"):
        build("prefix", Base(BertLMHeadModel(crossed)))
    model = build("prefix", Base(T5EncoderModel(t5).eval()), length=2)
    with pytest.raises(UnsupportedError, match="T5Attention attends with position_bias"):
        model(input_ids=IDS)


def test_keys_of_another_shape_are_refused_by_name():
    model = build("prefix", llama(), length=2)
    prefixes(model)[0].site = prefixes(model)[0].site._replace(heads=4)
    with pytest.raises(UnsupportedError, match="LlamaAttention has keys .* configuration tells of 4 heads of 8"):
        logits(model)
