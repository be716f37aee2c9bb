"""Merging on disk equals merging in memory, touches nothing else, and stays small in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from peft_helpers import IDS, THIRD_PARTY, config, gpt2, llama, logits, train
from slicefine.cli.main import main
from slicefine.errors import AdapterFileError, UnsupportedError
from slicefine.files.adapter import read_adapter, seal
from slicefine.files.checkpoint import Checkpoint
from slicefine.files.merge import merge_files, stored_tensors

pytestmark = THIRD_PARTY


def trained(tmp_path: Path, build, mode="alternate", shard="5GB", **settings):
    """A base on disk (in shards of that size) and an adapter trained on it; returns the trained model."""
    base = build()
    base.save_pretrained(tmp_path / "base", max_shard_size=shard)
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "pytorch_model.bin").write_text("the base's weights in another format")
    model = get_peft_model(base, config(mode, **settings))
    train(model, 7)
    model.save_pretrained(tmp_path / "a")
    return model


@pytest.mark.parametrize("shard", ["5GB", "4KB"], ids=["single", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["row", "column", "alternate", "random_mask"])
def test_it_equals_merging_in_memory(tmp_path: Path, mode, dtype, shard):
    model = trained(tmp_path, lambda: llama(dtype), mode, shard)
    assert main(["merge", "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "m")]) == 0
    wanted = model.merge_and_unload().state_dict()
    found = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype).state_dict()
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype
        assert torch.equal(found[name], wanted[name])
    names = {p.name for p in (tmp_path / "base").iterdir()} - {"pytorch_model.bin"}
    assert {p.name for p in (tmp_path / "m").iterdir()} == names
    assert len([n for n in names if n.endswith(".safetensors")]) == 1 if shard == "5GB" else True


@pytest.mark.parametrize("mode", ["row", "column", "alternate", "random_mask"])
def test_transposed_weights(tmp_path: Path, mode):
    model = trained(tmp_path, gpt2, mode, target_modules=["c_attn", "c_proj", "c_fc"])
    assert main(["merge", "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "m")]) == 0
    assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(tmp_path / "m")), logits(model))


def test_a_module_that_the_base_has_is_replaced_and_a_new_one_refused(tmp_path: Path):
    model = trained(tmp_path, llama, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert main(["merge", "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "m")]) == 0
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "m")), logits(model))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k.replace("lm_head", "score"): t for k, t in tensors.items()}, file, metadata={"format": "pt"})
    seal(tmp_path / "a")
    with Checkpoint(tmp_path / "base") as base, pytest.raises(UnsupportedError, match=r"no place for \(score.weight"):
        merge_files(read_adapter(tmp_path / "a"), base, tmp_path / "m2")
    save_file({k: t[:3] if "lm_head" in k else t for k, t in tensors.items()}, file, metadata={"format": "pt"})
    seal(tmp_path / "a")
    with Checkpoint(tmp_path / "base") as base, pytest.raises(AdapterFileError, match=r"lm_head.weight has shape"):
        merge_files(read_adapter(tmp_path / "a"), base, tmp_path / "m2")
    assert not (tmp_path / "m2").exists()


def test_another_base_is_refused_before_anything_is_written(tmp_path: Path, capsys):
    trained(tmp_path, llama)
    llama(seed=1).save_pretrained(tmp_path / "other")
    words = ["merge", "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "m")]
    assert main([*words, "--model", str(tmp_path / "other")]) == 1
    assert "is not the one that the adapter was trained on" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_lower_precision_on_disk_is_kept_and_said(tmp_path: Path):
    model = trained(tmp_path, llama)
    wanted = {k: v.bfloat16() for k, v in model.merge_and_unload().state_dict().items()}
    file = tmp_path / "base" / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    # the rest is what bf16 makes of the base; slices are what it makes of the trained values
    with pytest.warns(UserWarning, match="values were rounded to bfloat16"):
        assert main(["merge", "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "m")]) == 0
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 8, (2**40).to_bytes(8, "little") + b"{}", b"\x02" + b"\x00" * 7 + b"[]"]
)
def test_a_broken_header_is_a_sentence(tmp_path: Path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(AdapterFileError, match="cannot be read as a safetensors file"):
        stored_tensors(tmp_path / "x.safetensors")


def test_memory_stays_near_the_adapters_size(tmp_path: Path):
    """The peak of a merge does not hold the base: private memory, since mapped files are the kernel's."""
    base = llama(hidden_size=256, intermediate_size=40000, num_attention_heads=4, num_key_value_heads=4)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").stat().st_size > 2.4e8
    model = get_peft_model(base, config("column", target_modules=["down_proj"]))
    train(model, 3)
    model.save_pretrained(tmp_path / "a")
    code = """
import sys, pathlib, threading, time
from slicefine.files.adapter import read_adapter
from slicefine.files.checkpoint import Checkpoint
from slicefine.files.merge import merge_files
def private():
    fields = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024
folder = pathlib.Path(sys.argv[1])
adapter = read_adapter(folder / "a")
peak, begin, done = [0], private(), threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], private()); time.sleep(0.001)
watcher = threading.Thread(target=watch); watcher.start()
with Checkpoint(folder / "base") as base:
    merge_files(adapter, base, folder / "m")
done.set(); watcher.join()
print(peak[0] - begin)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3e7
    assert torch.equal(
        load_file(tmp_path / "m" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"],
        model.merge_and_unload().state_dict()["model.layers.0.mlp.down_proj.weight"],
    )


def test_an_adapter_of_peft_alone_needs_no_run_file(tmp_path: Path):
    trained(tmp_path, llama)
    assert not (tmp_path / "a" / "slicefine_run.json").exists()
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "SLICEFINE"
    assert main(["merge", "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "m")]) == 0
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "a")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "m"), IDS), logits(loaded, IDS))


def test_a_folder_with_two_forms_of_the_weights_is_merged_in_the_one_that_loads(tmp_path: Path):
    model = trained(tmp_path, llama)
    llama(seed=1).save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    for file in (tmp_path / "shards").glob("model*"):
        file.rename(tmp_path / "base" / file.name)
    save_file({"x": torch.zeros(2)}, tmp_path / "base" / "consolidated.safetensors")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    assert main(["merge", "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "m")]) == 0
    assert [file.name for file in (tmp_path / "m").glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "m")), logits(model))
