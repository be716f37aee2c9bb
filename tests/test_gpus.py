"""What each of several GPUs holds and sends is computed from shapes; here the shapes are counted by hand."""

from __future__ import annotations

import doctest
import json

import pytest
import torch
from torch import nn

from peft_helpers import llama
from slicefine.cli.main import main
from slicefine.errors import ConfigError
from slicefine.schedule import Schedule
from slicefine.training import gpus
from slicefine.training.gpus import ModelShape, loads, shape_of
from slicefine.tuner import attach

ONE = ModelShape(matrices=((10, 6),), parameters=100, block=60, rest=40)


def test_formulas_by_hand():
    found = {(load.method, load.engine): load for load in loads(ONE, Schedule("column", 2, 3), 4, 2, lora_rank=2)}
    entries, factors = 3 * 10, 2 * (10 + 6)
    ddp, fsdp = found["slices", "DDP"], found["slices", "FSDP2"]
    assert (ddp.entries, ddp.holds, ddp.gathered, ddp.move) == (entries, 2 * 100 + 16 * entries, 0, 0)
    assert ddp.step == 2 * 3 * 4 * entries / 4
    assert fsdp.holds == (2 * 100 + 16 * entries) / 4
    assert fsdp.gathered == 2 * (2 * 60 + 40)
    gathers, scatter, values = 2 * 3 / 4 * (200 + 4 * entries), 3 / 4 * 4 * entries, 2 * 3 / 4 * 4 * entries
    assert fsdp.step == gathers + scatter + values
    assert fsdp.move == 2 * 3 / 4 * 6 * entries
    lora = found["LoRA", "FSDP2"]
    assert (lora.entries, lora.move) == (factors, 0)
    assert lora.step == 2 * 3 / 4 * (200 + 4 * factors) + 3 / 4 * 4 * factors
    assert found["LoRA", "DDP"].holds == 200 + 16 * factors


def test_one_gpu_sends_nothing():
    for load in loads(ONE, Schedule("row", 1, 1), 1):
        assert (load.step, load.move, load.gathered) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["row", "column", "alternate", "random_mask"])
def test_entries_are_those_of_the_parameters(mode):
    model = llama()
    shape = shape_of(model)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.block == sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert shape.rest == shape.parameters - 2 * shape.block
    entries = loads(shape, Schedule(mode, 2, 2), 2)[0].entries
    assert entries == sum(parameter.numel() for parameter in attach(model, mode=mode, r=2).parameters())


def test_weights_need_no_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 8192), nn.Linear(8192, 4096))
    assert shape_of(model).matrices == ((8192, 4096), (4096, 8192))


@pytest.mark.parametrize(("count", "rank"), [(0, 8), (2, 0)])
def test_numbers_below_one_are_refused(count, rank):
    with pytest.raises(ConfigError, match="must be at least 1"):
        loads(ONE, Schedule("row", 1, 1), count, lora_rank=rank)


def test_the_command_reads_a_configuration_alone(tmp_path, capsys):
    """A Llama of 70 billion parameters, of which no weight exists."""
    fields = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    fields |= {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--model.path", str(tmp_path), "--model.dtype", "bfloat16", "--slice.mode", "column", "--slice.r", "5"]
    assert main(["plan", "--gpus", "8", *flags]) == 0
    shown = capsys.readouterr().out
    assert "70.55B parameters on 8 GPUs, column r=5 and LoRA r=8" in shown
    assert "33,587,200" in shown  # 80 layers: 5 columns of 2 x 8192, 2 x 1024, 2 x 28672 and 1 x 8192 outputs
    assert 80 * 5 * (2 * 8192 + 2 * 1024 + 2 * 28672 + 8192) == 33_587_200


def test_a_folder_without_a_configuration_is_refused(tmp_path, capsys):
    assert main(["plan", "--gpus", "8", "--model.path", str(tmp_path)]) == 1
    assert "no configuration can be read" in capsys.readouterr().err


def test_doctests():
    assert doctest.testmod(gpus).failed == 0


def test_packed_attention_has_a_shape_too():
    shape = shape_of(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False))
    assert sorted(shape.matrices) == [(8, 8), (8, 16), (16, 8), (24, 8)]
