"""Slices that follow a model's structure: whole heads, and both sides of the same hidden units."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from peft_helpers import THIRD_PARTY
from slicefine import ConfigError, Slice, SliceFineConfig, attach, energy_positions
from slicefine.coupling import Fit, fitted, structure
from slicefine.schedule import Schedule, slice_at

pytestmark = THIRD_PARTY
IDS = torch.tensor([[1, 5, 9, 2, 7]])


def llama() -> LlamaForCausalLM:
    """Four heads of 4, two of which share keys and values with another one."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    return BertModel(config)


def of_block(found: dict[str, Fit], block: str) -> dict[str, tuple]:
    """A block's layers by the ends of their names."""
    own = {name.removeprefix(f"{block}."): fit for name, fit in found.items() if name.startswith(block)}
    return {n: (f.axis, f.partner.removeprefix(f"{block}."), f.group, f.rows, f.columns) for n, f in own.items()}


def test_the_structure_of_a_llama_with_grouped_heads():
    assert of_block(structure(llama(), True, True), "model.layers.1") == {
        "self_attn.q_proj": (None, "", 1, 4, 1),
        "self_attn.k_proj": (None, "", 1, 4, 1),
        "self_attn.v_proj": ("row", "self_attn.o_proj", 2, 4, 1),
        "self_attn.o_proj": ("column", "self_attn.o_proj", 2, 1, 4),
        "mlp.gate_proj": ("row", "mlp.down_proj", 1, 1, 1),
        "mlp.up_proj": ("row", "mlp.down_proj", 1, 1, 1),
        "mlp.down_proj": ("column", "mlp.down_proj", 1, 1, 1),
    }


def test_the_structure_of_a_bert_whose_output_lies_beside_the_attention():
    assert of_block(structure(bert(), True, True), "encoder.layer.0") == {
        "attention.self.query": (None, "", 1, 4, 1),
        "attention.self.key": (None, "", 1, 4, 1),
        "attention.self.value": ("row", "attention.output.dense", 1, 4, 1),
        "attention.output.dense": ("column", "attention.output.dense", 1, 1, 4),
        "intermediate.dense": ("row", "output.dense", 1, 1, 1),
        "output.dense": ("column", "output.dense", 1, 1, 1),
    }


def test_the_structure_of_packed_attention():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 24), 2, enable_nested_tensor=False)
    found = of_block(structure(model, True, True), "layers.0")
    assert found["self_attn"] == (None, "", 1, 4, 1)
    assert found["self_attn.out_proj"] == (None, "", 1, 1, 4)
    assert found["linear1"] == ("row", "linear2", 1, 1, 1)


@pytest.mark.parametrize("positions", ["sweep", "random", "fixed"])
@pytest.mark.parametrize("whole_heads", [False, True])
def test_coupled_slices_cover_the_same_units_and_heads_at_every_visit(positions, whole_heads):
    model = llama()
    tuner = attach(
        model, r=3, mode="alternate", positions=positions, coupled=True, whole_heads=whole_heads, interval=1, seed=5
    )
    seen = set()
    for _ in range(6):
        now = {name.removeprefix("model.layers.0."): block for name, block in tuner.mover.slices().items()}
        up, gate, down = now["mlp.up_proj"], now["mlp.gate_proj"], now["mlp.down_proj"]
        assert up == gate
        assert (up.axis, down.axis) == ("row", "column")
        assert up.indices() == down.indices()
        v, o = now["self_attn.v_proj"], now["self_attn.o_proj"]
        assert (v.axis, o.axis) == ("row", "column")
        assert (2 * v.start, 2 * v.width) == (o.start, o.width)
        if whole_heads:
            assert v.start % 4 == v.width % 4 == 0
            q = now["self_attn.q_proj"]
            assert q.axis == "column" or (q.start % 4 == q.width % 4 == 0)
        seen.add(up)
        tuner.move()
    assert (len(seen) == 1) == (positions == "fixed")


def test_measured_columns_order_both_sides():
    model = llama()
    measured = energy_positions(model, [{"input_ids": IDS, "labels": IDS}], r=5)
    tuner = attach(model, r=5, positions=measured, coupled=True, interval=1)
    down = measured["model.layers.0.mlp.down_proj"]["column"]
    for visit in range(3):
        blocks = tuner.mover.slices()
        assert blocks["model.layers.0.mlp.up_proj"].start == blocks["model.layers.0.mlp.down_proj"].start == down[visit]
        tuner.move()


def test_through_peft_and_back_from_a_file(tmp_path):
    config = SliceFineConfig(r=3, mode="row", coupled=True, whole_heads=True, interval=1, target_modules="all-linear")
    model = get_peft_model(llama(), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    with torch.no_grad():
        assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=0)
    layers = {name: m for name, m in loaded.named_modules() if hasattr(m, "slicefine_active")}
    shapes = {name.rpartition(".")[2]: tuple(m.slicefine_active["default"].shape) for name, m in layers.items()}
    assert shapes["v_proj"] == (4, 16)
    assert shapes["o_proj"] == (8, 16)
    assert shapes["down_proj"] == (3, 16)
    loaded.add_adapter("second", config)  # the structure is found again under the first adapter
    assert layers[next(n for n in layers if "v_proj" in n)].slicefine_active["second"].shape == (4, 16)


def test_ranks_are_rounded_up_to_heads_and_kept_inside():
    shape = (8, 16)
    assert fitted(Schedule("row", row_rank=5), Fit(rows=4), "q", shape).row_rank == 8
    assert slice_at(fitted(Schedule("row", row_rank=1), Fit(rows=4), "q", shape), 1, shape).start == 4
    coupled = fitted(Schedule("row", row_rank=99), Fit("column", "o", 2), "o", (16, 16))
    assert slice_at(coupled, 0, (16, 16)).width == 16
    assert fitted(Schedule("row"), None, "q", shape) == Schedule("row")


def test_models_without_that_structure_are_refused():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="whole_heads: no attention module of this Sequential tells its head size"):
        attach(plain, whole_heads=True)
    with pytest.raises(ConfigError, match="coupled: no two layers of this Sequential share hidden units"):
        attach(plain, coupled=True)
    with pytest.raises(ConfigError, match="draws single entries; whole_heads= and coupled= are for slices"):
        attach(llama(), mode="random_mask", coupled=True)
    assert not any(hasattr(m, "slicefine_active") for m in plain.modules())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(map(self.expert, range(3)))}) for _ in "ab")

    @staticmethod
    def expert(number: int) -> nn.ModuleDict:
        return nn.ModuleDict({"up_proj": nn.Linear(8, 20), "down_proj": nn.Linear(20, 8)})


def test_each_expert_is_coupled_with_its_own():
    found = structure(Experts(), False, True)
    assert all(found[name].partner == name.replace("up_proj", "down_proj") for name in found)
    assert len(found) == 12


def test_heads_that_share_values_are_coupled_whole():
    tuner = attach(llama(), r=2, coupled=True, interval=9)
    blocks = {name.rpartition(".")[2]: block for name, block in tuner.mover.slices().items()}
    assert (blocks["v_proj"].width, blocks["o_proj"].width) == (4, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reserve": {"model.layers.0.mlp.up_proj": [Slice("row", 0, 4)]}}, "would train different units"),
        ({"positions": lambda visit, layer, shape: Slice("row", 0, 4)}, "a positions function goes where it likes"),
    ],
)
def test_what_would_part_the_two_sides_is_refused(options, message):
    model = llama()
    with pytest.raises(ConfigError, match=message):
        attach(model, r=4, coupled=True, interval=9, **options)
    assert not any(hasattr(m, "slicefine_active") for m in model.modules())


def test_a_rank_of_one_side_only_is_refused():
    config = SliceFineConfig(r=4, coupled=True, rank_pattern={"up_proj": 2}, target_modules="all-linear")
    with pytest.raises(ConfigError, match="would train different units"):
        get_peft_model(llama(), config)


def test_starts_inside_heads_are_refused():
    with pytest.raises(ConfigError, match="give starts of heads, multiples of 4"):
        attach(llama(), r=4, mode="row", whole_heads=True, positions=[3], interval=9)
