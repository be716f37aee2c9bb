"""Files that somebody damaged, mixed up, or made on purpose: one sentence, nothing executed, nothing followed."""

from __future__ import annotations

import ast
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import slicefine
from cli_helpers import recipe
from peft_helpers import THIRD_PARTY, config, llama, logits, train
from slicefine import SliceFineConfig, attach
from slicefine.cli.main import main
from slicefine.errors import AdapterFileError, ConfigError, DataError
from slicefine.files import adapter as adapter_files
from slicefine.files.adapter import files_beside, read_adapter
from slicefine.reading import read_json
from slicefine.sweeps.recipes import read_recipe
from slicefine.training import folders, trained
from slicefine.training.checkpoints import damaged

ROOT = Path(__file__).parents[1]
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
pytestmark = THIRD_PARTY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = get_peft_model(llama(), config("row"))
    train(model)
    model.save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def flip(file: Path, at: int = -5) -> None:
    """One bit of a file."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(bytes(content))


class Canary:
    """Sings when it is unpickled."""

    def __init__(self, nest: Path) -> None:
        self.nest = nest

    def __reduce__(self) -> Any:
        return (Path.touch, (self.nest,))


# -- checksums --------------------------------------------------------------------------------------------------------


def test_a_single_bit_is_found_and_the_tensor_named(folder: Path, capsys):
    assert main(["verify", str(folder)]) == 0
    whole = r"whole    \S+: \d+ layers and 0 other tensors, checksums agree\n"
    assert re.fullmatch(whole, capsys.readouterr().out)
    model = get_peft_model(llama(), config("row"))
    flip(folder / FILE)
    message = r"adapter_model.safetensors: tensor base_model\S+slicefine_\w+ is not what was saved"
    for read in (
        lambda: read_adapter(folder),
        lambda: PeftModel.from_pretrained(llama(), folder),
        lambda: model.load_adapter(folder, "default"),  # an adapter that is there, as a Trainer that resumes
    ):
        with pytest.raises(AdapterFileError, match=message):
            read()
    assert main(["verify", str(folder), str(folder.parent / "none")]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in shown] == ["DAMAGED  ", "MISSING  "]
    assert "is not what was saved" in shown[0]
    assert "no such file or folder" in shown[1]


def test_weights_of_one_save_and_configuration_of_another_are_told_apart(folder: Path):
    model = get_peft_model(llama(), config("row"))
    train(model, 3)
    model.save_pretrained(folder.parent / "b")
    (folder / FILE).write_bytes((folder.parent / "b" / FILE).read_bytes())
    with pytest.raises(AdapterFileError, match="mixed with another's"):
        PeftModel.from_pretrained(llama(), folder)


def test_files_without_checksums_still_load(folder: Path, capsys):
    expected = logits(PeftModel.from_pretrained(llama(), folder))
    found = json.loads((folder / CONFIG).read_text())
    assert found.pop("checksums").keys() == load_file(folder / FILE).keys()
    (folder / CONFIG).write_text(json.dumps(found))
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder)), expected)
    assert main(["verify", str(folder)]) == 0
    assert "without checksums" in capsys.readouterr().out
    for odd in ("x", {"a": 1}, {"a": "0" * 63}, [1]):
        (folder / CONFIG).write_text(json.dumps({**found, "checksums": odd}))
        with pytest.raises(AdapterFileError, match="are no checksums"):
            read_adapter(folder)


def test_a_tuner_file_is_checked_too(tmp_path: Path, capsys):
    tuner = attach(nn.Sequential(nn.Linear(6, 8)), r=2, interval=1)
    tuner.save(tmp_path / "t.safetensors")
    tuner.load(tmp_path / "t.safetensors")
    assert main(["verify", str(tmp_path / "t.safetensors")]) == 0
    flip(tmp_path / "t.safetensors")
    with pytest.raises(AdapterFileError, match=r"t.safetensors: tensor 0.slicefine_\w+ is not what was saved"):
        tuner.load(tmp_path / "t.safetensors")
    assert main(["verify", str(tmp_path / "t.safetensors")]) == 1


def test_values_that_are_not_finite_are_found(folder: Path, capsys):
    tensors = load_file(folder / FILE)
    tensors[next(key for key in tensors if key.endswith("active"))][0, 0] = float("nan")
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    adapter_files.seal(folder)
    assert main(["verify", str(folder)]) == 1
    assert "holds NaN or infinite values" in capsys.readouterr().out


# -- nothing is executed ----------------------------------------------------------------------------------------------


def test_no_module_unpickles_or_evaluates():
    """``torch.load`` is called in one place, with ``weights_only``; nothing else turns bytes into objects with code."""
    found = set()
    for file in sorted(Path(slicefine.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                odd = name in ("eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "os.system")
                odd |= name.startswith(("pickle.", "marshal.", "shelve.", "dill.", "joblib.", "subprocess."))
                weights_only = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                if odd and not (name == "torch.load" and weights_only):
                    found.add(f"{file.name}: {name}")
    assert found <= ALLOWED_CALLS


# of these none sees a file's content
ALLOWED_CALLS: set[str] = set()


def test_a_pickle_in_an_adapters_place_is_not_opened(folder: Path):
    (folder / FILE).unlink()
    torch.save({"x": Canary(folder / "sings")}, folder / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match=r"adapter_model.safetensors is missing"):
        read_adapter(folder)
    with pytest.raises(Exception, match="Weights only load failed"):  # PEFT's own loader
        PeftModel.from_pretrained(llama(), folder)
    assert not (folder / "sings").exists()


def checkpoint(path: Path, step: int = 1) -> Path:
    path.mkdir(parents=True)
    torch.save({"state": {0: torch.arange(1000.0)}}, path / "optimizer.pt")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def test_a_checkpoint_that_is_torn_or_no_data_is_passed_by(tmp_path: Path, capsys):
    run = tmp_path / "run"
    one, two, three = (checkpoint(run / "checkpoints" / f"checkpoint-{n}", n) for n in (1, 2, 10))
    settings = recipe("x", "y", run, resume=True)
    assert folders.open_folder(settings).checkpoint == three
    torch.save({"x": Canary(tmp_path / "sings")}, three / "optimizer.pt")
    assert "something else than tensors and plain values" in str(damaged(three))
    with pytest.warns(UserWarning, match=r"goes on from checkpoint-2: .*checkpoint-10\S*optimizer.pt holds"):
        assert folders.open_folder(settings).checkpoint == two
    flip(two / "optimizer.pt", 1500)  # in the numbers: as if a page had never reached the disk
    with pytest.warns(UserWarning, match="goes on from checkpoint-1"):
        assert folders.open_folder(settings).checkpoint == one
    (one / "optimizer.pt").write_bytes((one / "optimizer.pt").read_bytes()[:-50])
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):
        folders.open_folder(settings)
    with pytest.raises(ConfigError, match=r"holds no whole checkpoint \(.*optimizer.pt"):
        folders.open_folder(recipe("x", "y", run, resume=str(run)))
    with pytest.raises(ConfigError, match=r"resume: .*optimizer.pt holds"):
        folders.open_folder(recipe("x", "y", run, resume=str(three)))
    assert not (tmp_path / "sings").exists()
    assert main(["verify", str(run)]) == 1
    assert capsys.readouterr().out.count("DAMAGED") == 3


def test_models_and_what_lies_a_folder_below_are_checked(tmp_path: Path, capsys):
    get_peft_model(llama(), config("row")).save_pretrained(tmp_path / "run" / "adapter")
    llama().save_pretrained(tmp_path / "run" / "merged")
    assert main(["verify", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "run/adapter: 14 layers" in shown
    assert re.search(r"run/merged: a model of \d+ tensors, readable; it has no checksums", shown)
    weights = tmp_path / "run" / "merged" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, weights, {"format": "pt"})
    assert main(["verify", str(tmp_path / "run" / "merged")]) == 1
    assert "DAMAGED" in (shown := capsys.readouterr().out)
    assert "model.norm.weight: holds NaN or infinite values" in shown
    (tmp_path / "empty").mkdir()
    assert main(["verify", str(tmp_path / "empty"), str(tmp_path / "none")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "nothing to check here: expected an adapter" in lines[0]
    assert lines[1].startswith("MISSING")
    assert lines[1].endswith("none: no such file or folder.")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [{}]", "!!python/name:os.mkdir", "!!python/module:os"])
def test_a_recipe_makes_no_objects(tmp_path: Path, tag: str, capsys):
    file = tmp_path / "r.yaml"
    file.write_text("slice: {r: " + tag.format(tmp_path / "sings") + "}\n")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_recipe(file)
    assert main(["train", "--config", str(file), "--dry_run"]) == 1
    assert "cannot be read as YAML" in capsys.readouterr().err
    assert not (tmp_path / "sings").exists()


def run_file(folder: Path, **changes: Any) -> Path:
    columns = {"text": "text", "label": "label"}
    content: dict[str, Any] = {"version": 1, "adapter": True, "task": {}, "state": {}}
    content |= {"model": {"path": "them/base", "trust_remote_code": True}, "data": {"path": "x", "columns": columns}}
    folder.mkdir(exist_ok=True)
    (folder / "slicefine_run.json").write_text(json.dumps(content | changes))
    return folder


def test_a_run_file_cannot_switch_on_the_code_of_a_model(tmp_path: Path):
    folder = run_file(tmp_path / "a")
    assert trained.read_run(folder)["model"]["trust_remote_code"] is False
    assert trained.read_run(folder, trust_remote_code=True)["model"]["trust_remote_code"] is True
    with pytest.raises(AdapterFileError, match="model is no group of settings"):
        trained.read_run(run_file(folder, model=[1]))
    with pytest.raises(AdapterFileError, match="its settings make no sense"):
        trained.load_trained(run_file(folder, model={"path": "x", "dropout": "much"}))


@pytest.mark.parametrize("path", ["/etc/passwd", "~/keys", "../../keys"])
def test_a_run_file_from_the_hub_names_nothing_of_this_machine(tmp_path: Path, monkeypatch, path: str):
    monkeypatch.setattr(trained, "find_adapter", lambda name: tmp_path / "a")
    run_file(tmp_path / "a", data={"path": path, "columns": {}})
    with pytest.raises(AdapterFileError, match="names a file of this machine"):
        trained.read_run(Path("them/adapter"))
    assert trained.read_run(tmp_path / "a")["data"]["path"] == path  # one's own


# -- nothing is followed, nothing grows -------------------------------------------------------------------------------


def test_links_out_of_the_folder_do_not_travel(folder: Path):
    secret = folder.parent / "secret"
    secret.write_text("secret")
    (folder / "vocab.txt").symlink_to(secret)
    with pytest.raises(AdapterFileError, match=r"vocab.txt: a link to a file outside"):
        files_beside(folder)
    cached = folder.parent / "repo" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    (folder.parent / "repo" / "blobs").mkdir()
    (folder.parent / "repo" / "blobs" / "1").write_text("word")
    (cached / "vocab.txt").symlink_to("../../blobs/1")
    assert files_beside(cached) == [cached / "vocab.txt"]


DEEP = b"[" * 200_000
JSONS = {"deep": DEEP, "cut": b'{"r": ', "no text": b"\xff\xfe\x00", "digits": b"1" * 5000}


@pytest.mark.parametrize("case", JSONS)
def test_json_of_any_kind_is_refused(folder: Path, case: str):
    (folder / CONFIG).write_bytes(JSONS[case])
    for read in (read_adapter, SliceFineConfig.from_pretrained):
        with pytest.raises(AdapterFileError, match=r"adapter_config.json: not readable as JSON"):
            read(folder)
    with pytest.raises(DataError, match="Write it anew"):
        read_json(folder / CONFIG, "Write it anew", DataError)


def test_json_that_is_too_large_is_not_read_to_its_end(tmp_path: Path):
    with (tmp_path / "c.json").open("wb") as file:
        file.truncate(2**40)  # takes no room
    with pytest.raises(AdapterFileError, match="more than 64 MiB"):
        read_json(tmp_path / "c.json")
    with pytest.raises(AdapterFileError, match="cannot be read"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**30},
        {"r": float("nan")},
        {"r": "12"},
        {"r": None},
        {"minimum_steps": None},
        {"mask_fraction": "x"},
        {"rank_pattern": 1, "layout": 3, "share": [1]},
        {"positions": {"a": 1}},
        {"window": {}},
        {"reserve": ["/etc"]},
        {"history": -1},
    ],
)
def test_settings_of_another_kind_are_refused(folder: Path, changes: dict[str, Any]):
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(found | changes))
    if changes == {"r": 10**30}:  # a rank is clamped to the matrix
        assert SliceFineConfig.from_pretrained(folder).schedule().block_shape((4, 3)) == (4, 3)
        return
    with pytest.raises((AdapterFileError, ConfigError)):
        SliceFineConfig.from_pretrained(folder)


def test_aliases_do_not_grow(tmp_path: Path, capsys):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    bomb, loop, deep = tmp_path / "bomb.yaml", tmp_path / "loop.yaml", tmp_path / "deep.yaml"
    bomb.write_text("\n".join(lines))
    loop.write_text("base: &a {b: *a}\n")
    deep.write_text("[" * 20_000)
    began = time.monotonic()
    for file in (bomb, loop):
        with pytest.raises(ConfigError, match="more than 100,000 values, aliases followed"):
            read_recipe(file)
    with pytest.raises(ConfigError, match="nested too deep"):
        read_recipe(deep)
    assert main(["sweep", "--config", str(bomb)]) == 1
    assert main(["train", f"--config={bomb}"]) == 1
    assert "aliases followed" in capsys.readouterr().err
    assert time.monotonic() - began < 60  # not a measurement: 10^12 values would take for ever


# -- the fuzzers' corpus ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["adapter", "config", "recipe"])
def test_the_corpus_lets_nothing_out_but_our_errors(target: str, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "fuzz"))
    sys.modules.pop("targets", None)
    import targets

    files = sorted((ROOT / "fuzz" / "corpus" / target).iterdir())
    outcomes = {targets.TARGETS[target](file.read_bytes()) for file in files}
    assert {"read", "refused"} <= outcomes
