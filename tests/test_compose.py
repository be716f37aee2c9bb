"""Composed adapters: what one alone changed stays bit for bit, the rest follows the policy that was named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.testing import assert_close

from peft_helpers import THIRD_PARTY, config, llama, train
from slicefine.cli.main import main
from slicefine.errors import AdapterFileError, ConfigError, UnsupportedError
from slicefine.files.adapter import read_adapter, write_adapter
from slicefine.files.checkpoint import Checkpoint
from slicefine.files.compose import compose, overlaps

pytestmark = THIRD_PARTY


def starts(*positions):
    return list(positions)


def adapter(tmp_path, name, positions, mode="row", ids_seed=0, **settings):
    """An adapter folder whose slices visited the given starts."""
    base = llama()
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    if not (tmp_path / "base").exists():
        base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(mode, positions=positions, target_modules=["q_proj", "down_proj"], **settings))
    ids = torch.randint(3, 30, (3, 8), generator=torch.Generator().manual_seed(ids_seed))
    train(model, 2 * len(positions) - 1 if isinstance(positions, list) else 7, ids=ids)
    model.save_pretrained(tmp_path / name)
    return model


def weights(tmp_path, name):
    model = PeftModel.from_pretrained(llama(), tmp_path / name)
    return {n: p for n, p in model.merge_and_unload().state_dict().items() if "q_proj" in n or "down_proj" in n}


def composed(tmp_path, *names, **options):
    adapters = [read_adapter(tmp_path / name) for name in names]
    with Checkpoint(tmp_path / "base") as base:
        write_adapter(compose(adapters, base, **options), tmp_path / "c")
    return weights(tmp_path, "c")


def parts(tmp_path):
    base = {n: p for n, p in llama().state_dict().items() if "q_proj" in n or "down_proj" in n}
    return base, weights(tmp_path, "a"), weights(tmp_path, "b")


@pytest.mark.parametrize("mode", ["row", "column"])
def test_disjoint_slices_add_up_untouched(tmp_path: Path, mode):
    adapter(tmp_path, "a", starts(0, 4), mode)
    adapter(tmp_path, "b", starts(2, 8), mode, ids_seed=1)
    assert overlaps([read_adapter(tmp_path / "a"), read_adapter(tmp_path / "b")]) == []
    found = composed(tmp_path, "a", "b")
    base, a, b = parts(tmp_path)
    for name, weight in found.items():
        wanted = torch.where(a[name] != base[name], a[name], b[name])
        assert torch.equal(weight, wanted)
        assert not torch.equal(a[name], base[name])
        assert not torch.equal(b[name], base[name])


@pytest.mark.parametrize("policy", ["sum", "last", "mean"])
def test_alternate_slices_cross_and_the_policy_decides(tmp_path: Path, policy):
    adapter(tmp_path, "a", starts(0, 4, 2), "alternate")
    adapter(tmp_path, "b", starts(8, 2, 2), "alternate", ids_seed=1)
    first, second = read_adapter(tmp_path / "a"), read_adapter(tmp_path / "b")
    assert all(found.crossings for found in overlaps([first, second]))
    options = {"weights": [1.0, 3.0]} if policy == "mean" else {}
    found = composed(tmp_path, "a", "b", policy=policy, **options)
    base, a, b = parts(tmp_path)
    several = 0
    for name, weight in found.items():
        delta_a, delta_b = a[name] - base[name], b[name] - base[name]
        both = (delta_a != 0) & (delta_b != 0)
        several += int(both.sum())
        alone = torch.where(delta_b != 0, b[name], a[name])
        assert torch.equal(weight[~both], alone[~both])
        mixed = {"sum": delta_a + delta_b, "last": delta_b, "mean": (delta_a + 3 * delta_b) / 4}[policy]
        assert_close(weight[both], (base[name] + mixed)[both])
    assert several > 0
    with pytest.raises(ConfigError, match=f"{several:,} entries in 4 layers were changed by several adapters"):
        composed(tmp_path, "a", "b")


def test_the_result_is_an_adapter_like_any_other(tmp_path: Path):
    adapter(tmp_path, "a", starts(0, 4))
    adapter(tmp_path, "b", starts(2, 8), ids_seed=1)
    composed(tmp_path, "a", "b")
    model = PeftModel.from_pretrained(llama(), tmp_path / "c", is_trainable=True)
    train(model, 3)
    model.unload()
    base = llama().state_dict()
    assert all(torch.equal(value, base[name]) for name, value in model.base_model.model.state_dict().items())
    again = read_adapter(tmp_path / "c")
    assert [v.first_step for v in again.layers["model.layers.0.self_attn.q_proj"].visits] == [1, 3, 4, 6]


def test_what_was_written_is_what_was_read(tmp_path: Path):
    adapter(tmp_path, "a", starts(0, 4, 2), "alternate")
    write_adapter(read_adapter(tmp_path / "a"), tmp_path / "again")
    one, two = weights(tmp_path, "a"), weights(tmp_path, "again")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_refusals(tmp_path: Path):
    adapter(tmp_path, "a", starts(0, 4))
    adapter(tmp_path, "b", starts(2, 8))
    adapter(tmp_path, "wide", starts(2, 8), r=3)
    adapter(tmp_path, "mask", "sweep", "random_mask")
    a, b, wide, mask = (read_adapter(tmp_path / name) for name in ("a", "b", "wide", "mask"))
    with Checkpoint(tmp_path / "base") as base:
        for adapters, options, message in (
            ([a], {}, "1 adapter; give at least two"),
            ([a, b], {"policy": "max"}, "policy='max' is unknown; expected one of refuse, sum, last, mean"),
            ([a, b], {"weights": [1.0, 1.0]}, "weights are for policy='mean'"),
            ([a, b], {"policy": "mean", "weights": [1.0]}, "one per adapter"),
            ([a, b], {"policy": "mean", "weights": [1.0, -1.0]}, "must be positive numbers"),
            ([a, b], {"head": 2}, "head=2 is none of the 2 adapters"),
            ([a, wide], {}, "wide has r=3, .*a has r=2; one adapter has one mode and rank"),
        ):
            with pytest.raises(ConfigError, match=message):
                compose(adapters, base, **options)
        with pytest.raises(UnsupportedError, match="was trained with a random mask"):
            compose([mask, mask], base)
    llama(seed=1).save_pretrained(tmp_path / "other")
    message = "is not the one that the adapter was trained on"
    with Checkpoint(tmp_path / "other") as base, pytest.raises(AdapterFileError, match=message):
        compose([a, b], base)


def test_heads_need_a_choice(tmp_path: Path):
    adapter(tmp_path, "a", starts(0, 4), modules_to_save=["lm_head"])
    adapter(tmp_path, "b", starts(2, 8), modules_to_save=["lm_head"], ids_seed=1)
    with pytest.raises(ConfigError, match="2 adapters bring tensors of their own.*head="):
        composed(tmp_path, "a", "b")
    composed(tmp_path, "a", "b", head=1)
    heads = [PeftModel.from_pretrained(llama(), tmp_path / n).base_model.model.lm_head for n in ("a", "b", "c")]
    first, second, found = (head.modules_to_save["default"].weight for head in heads)
    assert torch.equal(found, second)
    assert not torch.equal(found, first)


def test_the_command(tmp_path: Path, capsys):
    adapter(tmp_path, "a", starts(0, 4))
    adapter(tmp_path, "b", starts(4, 8), ids_seed=1)
    pair = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["compose", *pair]) == 0
    shown = capsys.readouterr().out
    assert "meet in 4 layers: 8 common" in shown
    assert "  model.layers.0.self_attn.q_proj: rows 4-5; columns none; 0 crossings" in shown
    words = ["compose", *pair, "--output", str(tmp_path / "out")]
    assert main(words) == 1
    assert "were changed by several adapters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--policy", "mean", "--weights", "[1, 2]"]) == 0
    assert "written to" in capsys.readouterr().out
    assert main([*words, "--policy", "mean", "--head", "x", "--overwrite"]) == 1
    assert "head='x' is none of the adapters" in capsys.readouterr().err


def test_adapters_of_different_bases_are_told_apart(tmp_path: Path, capsys):
    adapter(tmp_path, "a", starts(0, 4))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    config_file = tmp_path / "b" / "adapter_config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "base_model_name_or_path": "elsewhere"}))
    pair = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["compose", *pair]) == 0
    assert "they name different base models" in capsys.readouterr().out
    first, second = (read_adapter(folder) for folder in pair)
    name, layer = next(iter(second.layers.items()))
    wider = replace(second, layers={**second.layers, name: replace(layer, shape=(layer.shape[0] * 2, layer.shape[1]))})
    with pytest.raises(ConfigError, match=rf"belong to different base models: the weight of {name} is"):
        overlaps([first, wider])
