"""A LoRA export works in stock PEFT, in a process that cannot import slicefine, and says no where it must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from peft_helpers import IDS, THIRD_PARTY, config, llama, logits, train
from slicefine import SliceFineConfig
from slicefine.cli.main import main
from slicefine.errors import AdapterFileError, ConfigError, UnsupportedError
from slicefine.files import export
from slicefine.files.adapter import read_adapter, seal
from slicefine.files.checkpoint import Checkpoint, find_checkpoint
from slicefine.files.export import Runtime, changes, export_lora, read_lora
from slicefine.peft import SliceFineLinear
from slicefine.training.contents import read_contents

pytestmark = THIRD_PARTY


def gpt2(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, **settings))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "wte" not in name:
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=32, max_position_embeddings=32, num_labels=8))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return model


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}


def trained(tmp_path, kind="llama", mode="alternate", steps=21, dtype=None, **settings):
    """A base and an adapter on disk, after ten moves; returns both folders and the model's own logits."""
    base = MODELS[kind]() if dtype is None else MODELS[kind](dtype=dtype)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    more = {"task_type": "SEQ_CLS"} if kind == "bert" else {}
    model = get_peft_model(base, config(mode, **{"seed": 3, **more, **settings}))
    if kind == "bert":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=torch.tensor([0, 1, 2])).loss.backward()
            optimizer.step()
    else:
        train(model, steps)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", logits(model)


def exported(tmp_path, **options):
    adapter = read_adapter(tmp_path / "adapter")
    with Checkpoint(tmp_path / "base") as base:
        return export_lora(adapter, base, tmp_path / "lora", **options)


STOCK = """
import sys
sys.modules["slicefine"] = None  # importing it fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
base, lora, kind, out = sys.argv[1:]
auto, more = (AutoModelForSequenceClassification, {"num_labels": 8}) if kind == "bert" else (AutoModelForCausalLM, {})
model = PeftModel.from_pretrained(auto.from_pretrained(base, **more), lora).eval()
assert type(model.base_model).__name__ == "LoraModel"
with torch.no_grad():
    torch.save(model(input_ids=(torch.arange(24).reshape(3, 8) % 29)).logits, out)
"""


@pytest.mark.parametrize("kind", MODELS)
def test_stock_peft_gives_the_same_logits_without_slicefine(tmp_path: Path, kind):
    for mode in ("row", "column", "alternate"):
        folder = tmp_path / mode
        folder.mkdir()
        base, _, wanted = trained(folder, kind, mode)
        made = exported(folder)
        assert max(made.ranks.values()) > 2  # several positions
        words = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            STOCK,
            str(base),
            str(folder / "lora"),
            kind,
            str(folder / "out"),
        ]
        subprocess.run(words, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        found = torch.load(folder / "out")
        plain = logits(MODELS[kind]())
        assert (wanted - plain).abs().max() > 0.1  # training did something
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("to", ["vllm", "llama.cpp"])
def test_runtimes_with_one_rank_get_one_rank(tmp_path: Path, to):
    _, _, wanted = trained(tmp_path, rank_pattern={"q_proj": 1})
    made = exported(tmp_path, to=to)
    (rank,) = set(made.ranks.values())
    written = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert written["r"] == written["lora_alpha"] == rank
    assert [written[name] for name in ("rank_pattern", "alpha_pattern", "modules_to_save")] == [{}, {}, None]
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {rank}
    assert all(".lora_" in key for key in tensors)
    assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "lora")), wanted, rtol=0, atol=1e-5 * 20)


def test_ranks_differ_between_layers_where_the_loader_allows(tmp_path: Path):
    _, _, wanted = trained(tmp_path, rank_pattern={"q_proj": 1})
    ranks = exported(tmp_path).ranks
    assert ranks["model.layers.0.self_attn.q_proj"] < ranks["model.layers.0.self_attn.k_proj"]
    assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "lora")), wanted, rtol=0, atol=1e-5 * 20)


def test_a_base_that_was_trained_in_less_precision_than_its_file(tmp_path: Path):
    """Only what was trained is a change, not the rounding of the base when it was loaded."""
    trained(tmp_path, dtype=torch.bfloat16)
    exact = exported(tmp_path)
    llama().save_pretrained(tmp_path / "base")  # the same weights, unrounded
    again = exported(tmp_path)
    one, two = (load_file(made.folder / "adapter_model.safetensors") for made in (exact, again))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_trained_tokens_go_along(tmp_path: Path):
    _, _, wanted = trained(tmp_path, trainable_token_indices=[3, 4])
    exported(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "lora")), wanted, rtol=0, atol=1e-5 * 20)
    with pytest.raises(UnsupportedError, match="llama.cpp loads no tensors beside the factors"):
        exported(tmp_path, to="llama.cpp")


def test_a_half_precision_base_loses_nothing_in_the_factors(tmp_path: Path):
    """The difference of two bfloat16 values is kept in fp32, so that the sum is the trained value again."""
    trained(tmp_path, dtype=torch.bfloat16)
    exported(tmp_path)
    merged = PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path / "adapter").merge_and_unload().state_dict()
    lora = PeftModel.from_pretrained(llama(torch.bfloat16).float(), tmp_path / "lora").merge_and_unload().state_dict()
    for name, weight in merged.items():
        assert_close(lora[name].bfloat16(), weight, rtol=0, atol=0)


def test_our_export_is_read_back_into_slices(tmp_path: Path):
    trained(tmp_path)
    exported(tmp_path, to="vllm")
    found = read_lora(tmp_path / "lora")
    adapter = read_adapter(tmp_path / "adapter")
    with Checkpoint(tmp_path / "base") as base:
        for name, layer, parts in changes(adapter, base):
            dense, again = torch.zeros(layer.shape), torch.zeros(layer.shape)
            for target, slices in ((dense, parts), (again, found[name])):
                for block, values in slices:
                    for i, line in zip(block.indices(), values, strict=True):
                        if block.axis == "row":
                            target[i] += line
                        else:
                            target[:, i] += line
            assert torch.equal(again, dense)
            assert bool(dense.any())


def test_truncation_reports_what_it_keeps(tmp_path: Path):
    trained(tmp_path)
    made = exported(tmp_path, rank=2)
    assert set(made.ranks.values()) == {2}
    assert all(0 < kept < 1 for kept in made.kept.values())
    with pytest.raises(AdapterFileError, match="are no slices"):
        read_lora(tmp_path / "lora")


def test_a_head_goes_along_to_peft_and_is_refused_for_others(tmp_path: Path):
    trained(tmp_path, "bert")
    made = exported(tmp_path)
    assert any("classifier" in key for key in load_file(made.folder / "adapter_model.safetensors"))
    with pytest.raises(UnsupportedError, match="vllm loads no tensors beside the factors.*slicefine merge"):
        exported(tmp_path, to="vllm")


def test_ranks_above_a_runtimes_are_refused_with_the_ways_out(tmp_path: Path, monkeypatch):
    trained(tmp_path)
    monkeypatch.setitem(export.RUNTIMES, "vllm", Runtime(True, 8, False))
    with pytest.raises(ConfigError, match="takes ranks up to 8, and the exact one is 16.*rank=8.*slicefine merge"):
        exported(tmp_path, to="vllm")
    assert not (tmp_path / "lora").exists()
    assert set(exported(tmp_path, to="vllm", rank=8).ranks.values()) == {8}


def test_random_masks_are_refused(tmp_path: Path):
    trained(tmp_path, mode="random_mask")
    with pytest.raises(UnsupportedError, match="random mask.*slicefine merge"):
        exported(tmp_path)


def test_another_base_is_refused_everywhere(tmp_path: Path):
    trained(tmp_path)
    llama(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterFileError, match="is not the one that the adapter was trained on"):
        exported(tmp_path)
    other = llama(seed=1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(AdapterFileError, match="is not the one that the adapter was trained on"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")
    base = {name.replace(".base_layer", ""): value for name, value in other.state_dict().items()}
    assert all(torch.equal(base[name], value) for name, value in before.items())
    PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path / "adapter")  # its own base, rounded


@pytest.mark.parametrize("how", ["state dict", "meta"])
def test_after_a_refused_load_the_model_is_as_before(tmp_path: Path, how):
    trained(tmp_path)
    other = llama(seed=1)
    if how == "meta":
        with pytest.raises(AdapterFileError, match="is not the one that the adapter was trained on"):
            PeftModel.from_pretrained(other, tmp_path / "adapter", low_cpu_mem_usage=True)
        return
    settings = SliceFineConfig.from_pretrained(str(tmp_path / "adapter"))
    settings.inference_mode, settings.base_model_name_or_path = False, None
    model = get_peft_model(other, settings)
    before = logits(llama(seed=1))
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    named = {}
    for key, value in file.items():
        layer, _, kind = key.rpartition(".slicefine_")
        named[f"{layer}.slicefine_{kind}.default"] = value
    with pytest.raises(AdapterFileError, match="is not the one that the adapter was trained on"):
        model.load_state_dict(named, strict=False)
    layer = next(m for m in model.modules() if isinstance(m, SliceFineLinear))
    assert torch.equal(layer.slicefine_active["default"], layer.weight_block("default"))
    assert_close(logits(model), before)
    train(model, 3)
    model.save_pretrained(tmp_path / "own")
    PeftModel.from_pretrained(llama(seed=1), tmp_path / "own")  # what was announced of the other file is forgotten


def test_a_sharded_base_is_read_across_its_files(tmp_path: Path):
    trained(tmp_path)
    exact = exported(tmp_path)
    one = load_file(exact.folder / "adapter_model.safetensors")
    llama().save_pretrained(tmp_path / "base", max_shard_size="4KB")
    (tmp_path / "base" / "model.safetensors").unlink(missing_ok=True)
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 2
    two = load_file(exported(tmp_path).folder / "adapter_model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_command(tmp_path: Path, capsys):
    base, adapter, _ = trained(tmp_path)
    words = ["export", "--adapter", str(adapter), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert "14 layers, rank 16\nwritten to" in capsys.readouterr().out
    assert main(words) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--rank", "3", "--to", "llama.cpp", "--model", str(base)]) == 0
    assert "energy of the change that the smaller rank keeps: at least" in capsys.readouterr().out
    inside = ["export", "--adapter", str(adapter), "--output", str(tmp_path), "--overwrite"]
    assert main(inside) == 1
    assert "which would be replaced" in capsys.readouterr().err
    for target, message in ((base, "which would be replaced"), (base / "config.json", "is no folder")):
        words = ["export", "--adapter", str(adapter), "--output", str(target), "--overwrite"]
        assert main(words) == 1
        assert message in capsys.readouterr().err
    assert (base / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "onnx"], "to='onnx' is unknown; expected one of lora, vllm, llama.cpp"),
        (["--dtype", "int8"], "dtype='int8' is unknown"),
        (["--rank", "0"], "rank=0 must be at least 1"),
        (["--model", "nowhere/at-all"], "no such folder, and the hub does not give it"),
    ],
)
def test_bad_settings_of_the_command(tmp_path: Path, words, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, adapter, _ = trained(tmp_path, steps=1)
    assert main(["export", "--adapter", str(adapter), "--output", str(tmp_path / "out"), *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_adapters(tmp_path: Path):
    _, folder, _ = trained(tmp_path, steps=1)
    path = folder / "adapter_config.json"
    good = json.loads(path.read_text())

    def refused(message, **changed):
        path.write_text(json.dumps({**good, **changed}))
        with pytest.raises(AdapterFileError, match=message):
            read_adapter(folder)

    refused("an adapter of LORA, not of SliceFine", peft_type="LORA")
    refused("says nothing of the weight of .*down_proj", weights=None)
    broken = {name: facts | {"shape": [1]} for name, facts in good["weights"].items()}
    refused("makes no sense", weights=broken)
    small = {name: facts | {"shape": [4, 4]} for name, facts in good["weights"].items()}
    refused("has lines of 24, which do not fit a weight of 4 x 4", weights=small)
    for facts in ({"shape": [float("inf"), 8]}, {"shape": [10**12, 8]}, {"shape": [0, 8]}):
        refused("makes no sense", weights={name: own | facts for name, own in good["weights"].items()})
    infinite = {name: own | {"sample": [[float("inf"), 0, 1]]} for name, own in good["weights"].items()}
    refused("sample of the base's weight is corrupt", weights=infinite)
    outside = {name: own | {"sample": [[0, 99, 1]]} for name, own in good["weights"].items()}
    refused("sample of the base's weight lies outside", weights=outside)
    refused("what it says of the weights makes no sense", weights=[1])
    refused("format version 99, and this slicefine reads up to", format_version=99)
    path.write_text(json.dumps(good))
    weights = folder / "adapter_model.safetensors"
    tensors = {key: t.clone() for key, t in load_file(weights).items()}  # the file is written anew
    wide = {key: t.clone() for key, t in tensors.items()}
    for key in wide:
        if "journal" in key:
            wide[key][:, 2] = 10**11  # a slice of that width would not fit into any memory
    save_file(wide, weights)
    seal(folder)
    with pytest.raises(AdapterFileError, match="lies outside a matrix of shape"):
        read_adapter(folder)
    assert read_contents(folder).layers[0].rows >= 10**11  # counted, not listed
    save_file({key: value for key, value in tensors.items() if "journal" not in key}, weights)
    seal(folder)
    with pytest.raises(AdapterFileError, match="has no journal tensor"):
        read_adapter(folder)
    save_file({**tensors, "base_model.model.x.slicefine_future": torch.zeros(1)}, weights)
    seal(folder)
    with pytest.raises(AdapterFileError, match="unknown tensor .*slicefine_future; update slicefine"):
        read_adapter(folder)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AdapterFileError, match="cannot be read as a safetensors file"):
        read_adapter(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match="adapter_model.safetensors is missing"):
        read_adapter(folder)


def test_bad_bases(tmp_path: Path):
    trained(tmp_path, steps=1)
    folder = tmp_path / "bad"
    folder.mkdir()
    with pytest.raises(AdapterFileError, match="no model.safetensors and no model.safetensors.index.json here"):
        Checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "../base/model.safetensors"}}')
    with pytest.raises(AdapterFileError, match="is not a file of this folder; it is not followed"):
        Checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(AdapterFileError, match="not a readable index"):
        Checkpoint(folder)
    (folder / "model.safetensors.index.json").unlink()
    save_file({"other.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    adapter = read_adapter(tmp_path / "adapter")
    with Checkpoint(folder) as base, pytest.raises(AdapterFileError, match="0 of its tensors could be the weight of"):
        list(changes(adapter, base))
    save_file({f"{name}.weight": torch.zeros(1, 1) for name in adapter.layers}, folder / "model.safetensors")
    with Checkpoint(folder) as base, pytest.raises(AdapterFileError, match=r"has shape \(1, 1\), and the adapter was"):
        list(changes(adapter, base))
    assert find_checkpoint(adapter, str(folder)) == folder
    adapter.config["base_model_name_or_path"] = None
    with pytest.raises(AdapterFileError, match="does not name its base model; give it with --model"):
        find_checkpoint(adapter)
