"""Adapter folders: what reloads bit for bit, what is written into them, and which files are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from peft_helpers import IDS, MODES, THIRD_PARTY, config, layers, llama, logits, same, train, weights
from slicefine import SliceFineConfig, movers_of
from slicefine.errors import AdapterFileError, ConfigError
from slicefine.files.adapter import seal

pytestmark = THIRD_PARTY
FILE = "adapter_model.safetensors"


def trained(mode: str = "alternate", dtype: torch.dtype = torch.float32, **settings: object) -> PeftModel:
    model = get_peft_model(llama(dtype), config(mode, **settings))
    train(model)
    return model


SAVED = {"alternate": torch.bfloat16, "column": torch.float32}
NEW_PROCESS = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig

folder, ids = sys.argv[1], torch.load(sys.argv[1] + "/ids.pt")
try:
    found = {"error": PeftConfig.from_pretrained(folder + "/column/adapter")}
except (KeyError, ValueError) as error:
    found = {"error": str(error)}
import slicefine

for mode in sys.argv[2:]:
    model = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/{mode}/adapter", dtype="auto").eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    found[mode] = logits, dict(model.unload().named_parameters())
torch.save(found, folder + "/found.pt")
"""


@pytest.fixture(scope="module")
def new_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh interpreter reads from saved adapters, beside what this one had."""
    folder = tmp_path_factory.mktemp("saved")
    torch.save(IDS, folder / "ids.pt")
    here = {}
    for mode, dtype in SAVED.items():
        llama(dtype).save_pretrained(folder / mode / "base")
        model = get_peft_model(type(llama()).from_pretrained(folder / mode / "base", dtype="auto"), config(mode))
        train(model)
        model.save_pretrained(folder / mode / "adapter")
        here[mode] = logits(model)
    subprocess.run([sys.executable, "-c", NEW_PROCESS, str(folder), *SAVED], check=True, timeout=300)
    return {"here": here, **torch.load(folder / "found.pt")}


@pytest.mark.parametrize("mode", SAVED)
def test_a_new_process_gives_bit_identical_logits_and_unloads_bit_identical_weights(new_process, mode: str):
    found, unloaded = new_process[mode]
    assert torch.equal(found, new_process["here"][mode])
    assert same({n: p.detach() for n, p in unloaded.items()}, weights(llama(SAVED[mode])))


def test_a_process_that_did_not_import_slicefine_cannot_read_the_type(new_process):
    assert "SLICEFINE" in new_process["error"]  # the reason for the line in the model card


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_a_reloaded_adapter_is_the_saved_one(tmp_path: Path, mode: str, dtype: torch.dtype, low_cpu_mem_usage: bool):
    model = trained(mode, dtype)
    model.save_pretrained(tmp_path)
    found = PeftModel.from_pretrained(llama(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(found), logits(model))
    assert same(weights(found), weights(model))
    assert movers_of(found)[0].slices() == movers_of(model)[0].slices()
    assert movers_of(found)[0].step == 5
    with found.disable_adapter():
        assert same(weights(found), weights(llama(dtype)))
    assert same(weights(found.unload()), weights(llama(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_after_a_reload_as_if_nothing_had_happened(tmp_path: Path, dtype: torch.dtype):
    model = trained(dtype=dtype, interval=3)
    model.save_pretrained(tmp_path)
    found = PeftModel.from_pretrained(llama(dtype), tmp_path, is_trainable=True)
    for each in (model, found):
        each.train()
        train(each, steps=4)
    assert movers_of(found)[0].slices() == movers_of(model)[0].slices()
    assert movers_of(found)[0].visits == movers_of(model)[0].visits == 4
    assert same(weights(found), weights(model))
    assert torch.equal(logits(found), logits(model))


def test_a_second_adapter_is_saved_in_its_own_folder_and_loads_beside_another(tmp_path: Path):
    model = trained()
    model.add_adapter("other", config("row"))
    model.set_adapter("other")
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    found = PeftModel.from_pretrained(llama(), tmp_path)
    default = logits(found)
    found.load_adapter(tmp_path / "other", "other")
    assert torch.equal(logits(found), default)
    found.set_adapter("other")
    assert torch.equal(logits(found), expected)
    assert "import slicefine" in (tmp_path / "other" / "README.md").read_text()


def test_the_state_dict_round_trip_works_into_an_adapter_that_has_moved_elsewhere():
    model = trained()
    found = get_peft_model(llama(), config(positions="random", seed=9))
    train(found, steps=7)
    result = set_peft_model_state_dict(found, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(logits(found), logits(model))
    assert same(weights(found.unload()), weights(llama()))


def test_a_whole_state_dict_brings_its_own_base_and_unloads_to_it():
    model = get_peft_model(llama(), config())
    train(model)
    other = get_peft_model(llama(seed=1), config())
    set_peft_model_state_dict(other, {key: tensor.clone() for key, tensor in model.state_dict().items()})
    assert torch.equal(logits(other), logits(model))
    assert same(weights(other.unload()), weights(llama()))


def test_the_auto_class_finds_the_base_model_by_itself(tmp_path: Path):
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(type(llama()).from_pretrained(tmp_path / "base"), config())
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(found), logits(model))


def test_the_file_holds_visited_lines_and_no_dense_weight(tmp_path: Path):
    trained("row").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    assert {key.rpartition(".slicefine_")[2] for key in tensors} == {"active", "journal", "rows"}
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.slicefine_rows"].shape == (4, 24)


def test_the_model_card_says_import_slicefine_once_and_keeps_what_was_there(tmp_path: Path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n", encoding="utf-8")
    model = trained()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.count("import slicefine") == 1
    assert "My own words." in card
    assert "library_name: peft" in card


def test_the_model_card_replaces_the_empty_template(tmp_path: Path):
    model = trained()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "More Information Needed" not in card
    assert card.count("# SliceFine adapter") == card.count("- PEFT ") == 1
    assert "rank 2), trained in place; no added parameters." in card


def test_a_saved_configuration_reads_back_equal(tmp_path: Path):
    settings = config("alternate", r_row=3, positions=[0, 4], rank_pattern={"q_proj": 1}, target_modules=["q_proj"])
    settings.save_pretrained(tmp_path)
    found = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(found, SliceFineConfig)
    assert found.to_dict() == settings.to_dict()
    assert found.schedule() == settings.schedule()


def test_starts_given_as_a_range_are_saved_as_a_list(tmp_path: Path):
    config(positions=range(0, 6, 2)).save_pretrained(tmp_path)
    assert SliceFineConfig.from_pretrained(tmp_path).positions == [0, 2, 4]


def test_a_position_function_is_left_out_of_the_file(tmp_path: Path):
    from slicefine import Slice

    model = get_peft_model(llama(), config("row", positions=lambda visit, name, shape: Slice("row", visit % 4, 2)))
    train(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["positions"] == "sweep"
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


# -- files that are refused -------------------------------------------------------------------------------------------


def change(folder: Path, how: str) -> None:
    """Damage an adapter folder."""
    tensors = load_file(folder / FILE)
    key = "base_model.model.model.layers.1.self_attn.v_proj.slicefine_"
    if how == "journal missing":
        del tensors[key + "journal"]
    elif how == "rows missing":
        del tensors[key + "rows"]
    elif how == "active missing":
        del tensors[key + "active"]
    elif how == "rows short":
        tensors[key + "rows"] = tensors[key + "rows"][1:].clone()
    elif how == "journal impossible":
        tensors[key + "journal"][0, 2] = -1
    elif how == "journal outside":
        tensors[key + "journal"][-1, 1] = 1000
    elif how == "journal float":
        tensors[key + "journal"] = tensors[key + "journal"].float()
    elif how == "unknown layer":
        tensors[key.replace("v_proj", "x_proj") + "journal"] = tensors[key + "journal"].clone()
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    seal(folder)  # as somebody would who wants it to be loaded


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("journal missing", "and no journal"),
        ("active missing", "active block of shape None"),
        ("rows missing", "slicefine_rows has shape None"),
        ("rows short", "slicefine_rows has shape"),
        ("journal impossible", "impossible entry"),
        ("journal outside", "outside a matrix"),
        ("journal float", "expected an integer tensor"),
        ("unknown layer", "x_proj .* which this model does not train"),
    ],
)
def test_a_damaged_file_is_refused_and_changes_nothing(tmp_path: Path, how: str, message: str):
    trained("row").save_pretrained(tmp_path)
    change(tmp_path, how)
    model = get_peft_model(llama(), config(), adapter_name="mine")
    train(model)
    before = weights(model)
    with pytest.raises(AdapterFileError, match=message):
        model.load_adapter(tmp_path, "loaded")
    assert same(weights(model), before)
    assert model.active_adapters == ["mine"]
    base = llama()
    with pytest.raises(AdapterFileError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert same(weights(base), weights(llama()))


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ({}, {"r": 3}),
        ({}, {"mode": "random_mask"}),
        ({"hidden_size": 24}, {}),
        ({"num_hidden_layers": 1}, {}),
        ({"num_hidden_layers": 3}, {}),
    ],
)
def test_a_file_for_other_settings_or_another_base_is_refused(tmp_path: Path, base: dict, settings: dict):
    trained("row", target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    other = llama(**base)
    given = config(**{"mode": "row", "target_modules": ["q_proj", "v_proj"], **settings})
    before = weights(other)
    with pytest.raises(AdapterFileError, match=r"base model|rank"):
        PeftModel.from_pretrained(other, tmp_path, config=given)
    assert same(weights(other), before)


def test_a_truncated_file_is_refused(tmp_path: Path):
    trained().save_pretrained(tmp_path)
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[: len(data) // 2])
    base = llama()
    with pytest.raises(Exception, match=r"(?i)safetensor|header|incomplete"):
        PeftModel.from_pretrained(base, tmp_path)
    assert same(weights(base), weights(llama()))


def test_a_merged_model_reloads_without_slicefine(tmp_path: Path):
    model = trained()
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    found = type(llama()).from_pretrained(tmp_path)
    assert torch.equal(logits(found), expected)
    assert not list(layers(found))


def test_a_file_may_hold_the_last_slice_in_the_bases_precision(tmp_path: Path):
    sizes, outputs = [], []
    for values in ("master", "base"):
        model = get_peft_model(llama(torch.bfloat16), config("row", save_values=values, target_modules=["q_proj"]))
        train(model, 3)
        model.save_pretrained(tmp_path / values)
        tensors = load_file(tmp_path / values / "adapter_model.safetensors")
        found = {t.dtype for key, t in tensors.items() if "slicefine_active" in key}
        assert found == {torch.float32 if values == "master" else torch.bfloat16}
        sizes.append(sum(t.numel() * t.element_size() for t in tensors.values()))
        outputs.append(logits(PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path / values)))
    assert sizes[1] < sizes[0]
    assert torch.equal(*outputs)
    with pytest.raises(ConfigError, match="save_values='half' is unknown; expected master or base"):
        config(save_values="half")


def test_a_pickle_takes_the_place_of_an_older_file(tmp_path: Path):
    """PEFT's option; of both files PEFT would read the older one."""
    model = trained("row")
    model.save_pretrained(tmp_path)
    train(model)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(path.name for path in tmp_path.glob("adapter_model*")) == ["adapter_model.bin"]
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    model.save_pretrained(tmp_path)
    train(model)
    assert not torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
