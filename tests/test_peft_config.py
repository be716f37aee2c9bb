"""`SliceFineConfig` under PEFT: which layers, which ranks, what is counted, reused and refused."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from peft_helpers import IDS, MODES, THIRD_PARTY, config, layers, llama, logits, same, train, weights
from slicefine import SliceFineConfig, movers_of
from slicefine.errors import ConfigError, UnsupportedError
from slicefine.peft import SliceFineLinear

pytestmark = THIRD_PARTY


class Thin(nn.Module):
    """Layers with few rows or columns, beside one that is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(3, 12)
        self.block = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 2)])
        self.norm = nn.LayerNorm(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.block[1](self.block[0](self.wide(x))))


def sliced(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, _ in layers(model)}


# -- which layers -----------------------------------------------------------------------------------------------------

LAYERS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LAYERS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
ALL = {f"model.layers.{i}.{name}" for i in (0, 1) for name in LAYERS}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ALL),
        ({"target_modules": "all-linear"}, ALL),
        ({"target_modules": ["q_proj", "down_proj"]}, {n for n in ALL if n.endswith(("q_proj", "down_proj"))}),
        ({"target_modules": r".*layers\.1\..*_proj"}, {n for n in ALL if ".1." in n}),
        ({"exclude_modules": ["q_proj", "k_proj"]}, {n for n in ALL if not n.endswith(("q_proj", "k_proj"))}),
        ({"exclude_modules": r".*mlp.*"}, {n for n in ALL if "mlp" not in n}),
        ({"layers_to_transform": [1]}, {n for n in ALL if ".1." in n}),
        ({"layers_to_transform": 0, "target_modules": "all-linear"}, {n for n in ALL if ".0." in n}),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, {n for n in ALL if ".0." in n}),
        ({"layers_to_transform": [1], "target_modules": ["v_proj"]}, {"model.layers.1.self_attn.v_proj"}),
        ({"modules_to_save": ["down_proj"]}, {n for n in ALL if not n.endswith("down_proj")}),
    ],
)
def test_the_chosen_layers_are_sliced(settings: dict[str, Any], expected: set[str]):
    assert sliced(get_peft_model(llama(), config(**settings))) == expected


def test_conv1d_layers_are_sliced_by_output_units():
    tiny = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 32}
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(**tiny, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, config("row", interval=100))
    train(model, steps=2)
    name = "transformer.h.0.attn.c_attn.weight"
    assert isinstance(base.transformer.h[0].attn.c_attn.base_layer, Conv1D)
    changed = (weights(model)[name] != before[name]).any(dim=0)  # Conv1D keeps (in, out): a row is a column there
    assert changed[:2].all()
    assert not changed[2:].any()
    assert all(torch.equal(p, before[n]) for n, p in model.unload().state_dict().items())


def test_a_classifier_head_is_trained_in_full_and_saved(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
    start = copy.deepcopy(base)
    model = get_peft_model(base, config(task_type="SEQ_CLS"))
    assert "classifier" not in sliced(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=torch.tensor([0, 1, 1])).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    found = PeftModel.from_pretrained(start, tmp_path)
    assert torch.equal(logits(found), logits(model))
    head = model.base_model.model.classifier
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)


def test_trainable_tokens_are_trained_and_saved_beside_the_slices(tmp_path):
    model = get_peft_model(llama(), config(trainable_token_indices=[3, 5]))
    train(model)
    model.save_pretrained(tmp_path)
    found = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(found), logits(model))
    assert same(weights(model.unload()), weights(llama()))


# -- ranks ------------------------------------------------------------------------------------------------------------


def test_rank_pattern_sets_the_rank_of_single_layers():
    model = get_peft_model(llama(), config("row", rank_pattern={"q_proj": 1, r"layers\.1\.mlp\..*": 4}))
    widths = {
        name.removeprefix("base_model.model.model."): layer.block("default").shape[0] for name, layer in layers(model)
    }
    assert widths["layers.0.self_attn.q_proj"] == widths["layers.1.self_attn.q_proj"] == 1
    assert widths["layers.1.mlp.up_proj"] == 4
    assert widths["layers.0.mlp.up_proj"] == widths["layers.0.self_attn.v_proj"] == 2


@pytest.mark.parametrize("settings", [{"r": 5}, {"r": 1, "rank_pattern": {r"block\.\d": 5, "wide": 1}}])
def test_a_rank_above_a_thin_matrix_is_clamped_and_listed(settings: dict[str, Any]):
    with pytest.warns(UserWarning, match=r"larger than 1 thin layers and was clamped there: block\.1 to 2"):
        model = get_peft_model(Thin(), SliceFineConfig(mode="row", target_modules="all-linear", **settings))
    assert model.base_model.model.block[1].block("default").shape == (2, 12)


def test_a_rank_named_for_a_layer_that_is_too_thin_is_an_error_that_leaves_the_model_alone():
    base = Thin()
    named = SliceFineConfig(mode="row", r=1, target_modules="all-linear", rank_pattern={"block.1": 5})
    with pytest.raises(ConfigError, match=r"rank_pattern names block\.1 with rank 5, but its weight has 2 rows only"):
        get_peft_model(base, named)
    assert not sliced(base)
    assert all(p.requires_grad for p in base.parameters())


# -- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_printed_count_is_active_entries_and_nothing_is_added(mode: str, capsys: pytest.CaptureFixture[str]):
    base = llama()
    total = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, config(mode, r=2, interval=1))
    for _ in range(2):  # a row block, then, in alternate mode, a column block of another size
        expected = 0
        for _, layer in layers(model):
            active = layer.states["default"].journal.active
            rows, columns = layer.shape
            expected += {"row": 2 * columns, "column": 2 * rows, "entries": 2 * columns}[active.axis]
        assert model.get_nb_trainable_parameters() == (expected, total)
        model.print_trainable_parameters()
        printed = capsys.readouterr().out
        assert f"trainable params: {expected:,d} || all params: {total:,d}" in printed
        assert "added params: 0" in printed
        assert movers_of(model)[0].active_entries() == expected
        movers_of(model)[0].move()


def test_another_method_s_count_is_left_alone(capsys: pytest.CaptureFixture[str]):
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.get_nb_trainable_parameters() == (trainable, sum(p.numel() for p in model.parameters()))
    model.print_trainable_parameters()
    assert "added params" not in capsys.readouterr().out


def test_status_reports_the_adapters():
    model = get_peft_model(llama(), config(target_modules=["q_proj"]), adapter_name="first")
    model.add_adapter("second", config(target_modules=["q_proj"]))
    status = model.get_model_status()
    assert (status.peft_types["first"], status.adapter_model_type) == ("SLICEFINE", "SliceFineModel")
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["first"], [])
    assert status.available_adapters == ["first", "second"]
    assert status.requires_grad == {"first": True, "second": False}
    rows = model.get_layer_status()
    assert [row.name for row in rows] == [f"model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert {row.module_type for row in rows} == {"slicefine.SliceFineLinear"}
    assert rows[0].devices == {"first": ["cpu"], "second": ["cpu"]}
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["first"]


def test_prepare_model_for_kbit_training_leads_to_a_model_that_trains():
    base = prepare_model_for_kbit_training(llama(torch.bfloat16), use_gradient_checkpointing=True)
    model = get_peft_model(base, config())
    before = weights(model)
    train(model, steps=3)
    assert movers_of(model)[0].step == 3
    assert not same(weights(model), before)
    assert same(weights(model.unload()), before)


# -- configuration objects --------------------------------------------------------------------------------------------


def test_a_configuration_can_be_reused(tmp_path):
    settings = config("alternate", target_modules="all-linear")
    fresh = copy.deepcopy(settings)
    first = get_peft_model(llama(), settings)
    train(first)
    first.save_pretrained(tmp_path)
    assert settings == fresh
    assert settings.target_modules == "all-linear"
    assert settings.layout is None
    second = get_peft_model(llama(num_hidden_layers=1), settings)
    assert len(sliced(second)) == 7
    train(second, steps=2)
    second.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(first))
    assert movers_of(second)[0].step == 2


def test_two_adapters_made_from_one_configuration_do_not_share_state(tmp_path):
    settings = config("row")
    model = get_peft_model(llama(), settings, adapter_name="first")
    train(model)
    model.save_pretrained(tmp_path)
    model.add_adapter("second", settings)
    model.set_adapter("second")
    assert [mover.step for mover in movers_of(model)] == [5, 0]
    assert model.peft_config["first"] is not model.peft_config["second"]
    model.save_pretrained(tmp_path)
    first, second = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("first", "second"))
    assert first["layout"] != second["layout"]
    assert model.peft_config["first"].layout is None  # of the file, not of the next training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "diagonal"}, "mode='diagonal' is unknown; expected one of row, column"),
        ({"r": 0}, r"r=0 must be an integer of at least 1"),
        ({"positions": "spiral"}, "positions='spiral' is unknown"),
        ({"state_policy": "forget"}, "state_policy='forget' is unknown"),
        ({"moves": -1}, "moves=-1 must be an integer of at least 0"),
        ({"interval": 0}, "interval=0 must be an integer of at least 1"),
        ({"mask_fraction": 2.0, "mode": "random_mask"}, "must lie in"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used"),
        ({"layers_pattern": "layers"}, "`layers_pattern` needs `layers_to_transform`"),
    ],
)
def test_a_wrong_setting_is_refused_when_the_configuration_is_made(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        SliceFineConfig(**settings)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_layer_that_is_not_linear_is_refused_and_the_model_left_alone():
    base = Thin()
    with pytest.raises(UnsupportedError, match="norm: SliceFine trains the weights of .* not LayerNorm"):
        get_peft_model(base, SliceFineConfig(mode="row", r=1, target_modules=["wide", "norm"]))
    assert not sliced(base)
    assert all(p.requires_grad for p in base.parameters())


def test_a_layer_that_is_not_linear_is_refused_for_a_second_adapter_and_the_first_one_goes_on():
    model = get_peft_model(Thin(), SliceFineConfig(mode="row", r=1, target_modules=["wide"], interval=1))
    with pytest.raises(UnsupportedError, match="norm: SliceFine trains"):
        model.add_adapter("second", SliceFineConfig(mode="row", r=1, target_modules=["wide", "norm"]))
    assert list(model.peft_config) == ["default"]
    assert sliced(model) == {"wide"}
    assert list(model.base_model.model.wide.states) == ["default"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 3))[:, 0].sum().backward()
    optimizer.step()
    assert movers_of(model)[0].visits == 2


def test_a_tied_weight_is_refused():
    with (
        pytest.warns(UserWarning, match="a tied layer is part of the adapter"),  # PEFT says so before we refuse
        pytest.raises(ConfigError, match=r"lm_head: its weight is tied to model\.embed_tokens\.weight"),
    ):
        get_peft_model(llama(tie_word_embeddings=True), config(target_modules=["q_proj", "lm_head"]))


def test_no_matching_layer_is_an_error():
    with pytest.raises(ValueError, match=r"Target modules \{'x_proj'\} not found"):
        get_peft_model(llama(), config(target_modules=["x_proj"]))


def test_a_name_that_the_model_does_not_have_is_warned_of(recwarn: pytest.WarningsRecorder):
    get_peft_model(llama(), config(target_modules=["q_proj", "norm"], exclude_modules=["norm"]))  # exists
    assert not [w for w in recwarn if "target_modules names" in str(w.message)]
    with pytest.warns(UserWarning, match=r"target_modules names 'o_porj', .* no such module; did you mean o_proj\?"):
        get_peft_model(llama(), config(target_modules=["q_proj", "o_porj"]))


def test_batches_of_several_adapters_are_refused():
    model = get_peft_model(llama(), config(), adapter_name="first").eval()
    model.add_adapter("second", config())
    with pytest.raises(UnsupportedError, match="one batch with several adapters"):
        model(input_ids=IDS, adapter_names=["first", "second", "__base__"])
    with pytest.raises(UnsupportedError, match="one batch with several adapters"):
        model.generate(input_ids=IDS, adapter_names=["first", "second", "__base__"], max_length=10)
    _, layer = next(layers(model))
    with pytest.raises(UnsupportedError, match="one batch with several adapters"):
        layer(torch.randn(3, 2, 16), adapter_names=["first", "second", "__base__"])


def test_a_mixed_model_is_refused():
    with pytest.raises(ValueError, match=re.escape("SLICEFINE")):
        get_peft_model(llama(), config(), mixed=True)
    mixed = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    assert isinstance(mixed, PeftMixedModel)
    with pytest.raises(ValueError, match=re.escape("SLICEFINE")):
        mixed.add_adapter("slices", config())


def test_hotswap_is_refused(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    model = get_peft_model(llama(), config())
    model.save_pretrained(tmp_path)
    before = weights(model)
    with pytest.raises(ValueError, match="only supports LORA but SLICEFINE was passed"):  # PEFT's own refusal
        hotswap_adapter(model, tmp_path, "default")
    assert same(weights(model), before)


def test_the_layer_s_repr_names_the_method():
    model = get_peft_model(llama(), config())
    assert repr(next(layers(model))[1]).startswith("slicefine.SliceFineLinear(")
    assert isinstance(next(layers(model))[1], SliceFineLinear)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lora_alpha", "a slice is trained in place: nothing is added that would need it"),
        ("rank", "did you mean r\\?"),
        ("target_module", "did you mean target_modules\\?"),
    ],
)
def test_settings_of_another_method_say_what_there_is_instead(name: str, hint: str):
    with pytest.raises(ConfigError, match=f"unexpected keyword argument '{name}': {hint}"):
        SliceFineConfig(**{name: 1})
