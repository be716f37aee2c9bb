"""The command line: verbs, flags, recipes, messages."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import warnings
from pathlib import Path

import datasets
import pytest
import yaml

from cli_helpers import ROOT, SHARED, save_bert, save_reviews
from slicefine.cli import main
from slicefine.cli.main import VERBS, normalise

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by PEFT
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("files")
    return save_bert(folder / "bert"), save_reviews(folder / "reviews")


def write_recipe(path: Path, model: str, data: str, output: Path) -> Path:
    content = {
        "model": {"path": model},
        "data": {"path": data},
        "slice": {"r": 2, "minimum_steps": 4},
        "training": {"epochs": 1, "batch_size": 8},
        "output": str(output),
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_print_config_shows_every_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--slice.r", "7", "--print_config"])
    assert stop.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert set(shown) >= {
        "model",
        "data",
        "task",
        "method",
        "slice",
        "training",
        "output",
        "resume",
        "dry_run",
        "quiet",
    }
    assert shown["slice"]["r"] == 7
    assert shown["model"]["path"] == "minilm"


def shown_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_all_explains_every_setting(capsys: pytest.CaptureFixture[str]):
    shown = " ".join(shown_help(["train", "--help-all"], capsys).split())
    assert "rows or columns that are trained at a time" in shown
    assert "--training.max_grad_norm" in shown


@pytest.mark.parametrize("words", [[], *([verb] for verb in VERBS), ["analyze", "winners"]], ids=" ".join)
def test_help_fits_a_screen_and_shows_an_example(words: list[str], capsys: pytest.CaptureFixture[str]):
    shown = shown_help([*words, "--help"], capsys)
    assert len(shown.splitlines()) <= 45
    assert "examples:\n  slicefine" in shown
    assert "[options]" not in shown


def test_the_list_of_commands_is_that_of_the_files():
    files = {file.stem for file in Path(sys.modules["slicefine.cli"].__path__[0]).glob("[a-z]*.py")}
    assert files - {"main", "parsing"} == set(VERBS)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["trian"], "invalid choice: 'trian'. Did you mean train?"),
        (["train", "--data.paht", "x"], "--data.paht x. Did you mean --data.path?"),
        (["train", "--learning-rate=1"], "Did you mean --training.learning_rate?"),
        (["train", "--model", "my-bert"], "model is a group of settings. Did you mean --model.path my-bert?"),
        (["train", "--task", "causal-lm"], "Did you mean --task.name causal-lm?"),
        (["train", "--slice", "5"], "slice is a group of settings. Its parts are written as --group.name value."),
        (["merge"], "error: missing: --adapter, --output."),
        (["undo", "a"], "error: missing: --output."),
        (["info"], "error: missing: ADAPTER."),
        (["info", "a", "b"], "unrecognized arguments: b. Settings are written as --name value."),
        (["analyze", "spectra", "--model.path", "own"], 'Parser key "model". Did you mean --model own?'),
    ],
)
def test_a_word_that_does_not_exist_names_the_nearest(words: list[str], meant: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(words)
    shown = capsys.readouterr().err
    assert stop.value.code == 2
    assert meant in shown
    assert len(shown.splitlines()) == 2


@pytest.mark.parametrize(
    ("recipe", "meant"),
    [
        ("data: {pth: x}", "there is no setting data.pth. Did you mean data.path?"),
        ("slcie: {r: 3}", "there is no setting slcie.r. Did you mean slice.r?"),
        ("qqqq: 1", "there is no setting qqqq."),
        ("- 1\n- 2", "expected a mapping, got list. A recipe holds settings"),
        ("text,label\nfine: words,1", "line 2: mapping values are not allowed here. A recipe holds settings"),
    ],
)
def test_a_recipes_slip_is_named_with_what_was_meant(
    recipe: str, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "recipe.yaml").write_text(recipe)
    try:
        status = main(["train", "--config", str(tmp_path / "recipe.yaml")])
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr().err
    assert status != 0
    assert meant in shown
    assert len(shown.splitlines()) <= 2


def test_a_base_that_was_named_as_seen_from_another_folder_says_so(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    model, data = files
    shutil.copytree(model, tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    recipe = str(write_recipe(tmp_path / "recipe.yaml", "base", data, tmp_path / "run"))
    assert main(["train", "--config", recipe, "--quiet"]) == 0
    monkeypatch.chdir(tmp_path)
    adapter = str(tmp_path / "run" / "adapter")
    for words in (["eval", adapter], ["merge", "--adapter", adapter, "--output", "merged"]):
        assert main(words) == 1
        shown = capsys.readouterr().err
        assert "its base model was 'base' in training. That is no folder as seen from here" in shown
        assert "Say where the base is: --model DIR." in shown
    assert main(["eval", adapter, "--model", "here/base"]) == 0


def test_json_is_all_there_is_and_quiet_prints_nothing(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    recipe = str(write_recipe(tmp_path / "recipe.yaml", *files, run))
    assert main(["train", "--config", recipe, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((run / "metrics.json").read_text())
    adapter = str(run / "adapter")
    for words, key in ((["info", adapter], "layers"), (["eval", "--adapter", adapter], "accuracy")):
        assert main([*words, "--json"]) == 0
        assert key in json.loads(capsys.readouterr().out)
        assert main([*words, "--quiet"]) == 0
        assert capsys.readouterr().out == ""
    assert main(["verify", "--json", adapter]) == 0
    assert [part["error"] for part in json.loads(capsys.readouterr().out)] == [None]
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["verify", adapter, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["error"]


def test_our_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch):
    usual, seen = warnings.formatwarning, []

    def run(_: object) -> int:
        seen.append(warnings.formatwarning(UserWarning("SliceFine: the slice will not move"), UserWarning, "x.py", 3))
        seen.append(warnings.formatwarning(UserWarning("of others"), UserWarning, "x.py", 3))
        return 0

    monkeypatch.setattr(sys.modules["slicefine.cli.main"], "_run", run)
    assert main([]) == 0
    assert seen == [
        "slicefine: warning: the slice will not move\n",
        "slicefine: warning: x.py:3: UserWarning: of others\n",
    ]
    assert warnings.formatwarning is usual


def test_flags_stand_alone_and_may_have_dashes():
    assert normalise(["train", "--dry-run", "--data.limit-train=5"]) == [
        "train",
        "--dry_run=true",
        "--data.limit_train=5",
    ]
    assert normalise(["train", "--resume", "runs/x"]) == ["train", "--resume", "runs/x"]
    assert normalise(["train", "--resume"]) == ["train", "--resume=true"]
    assert normalise(["eval", "a", "--json"]) == ["eval", "--adapter", "a", "--json=true"]
    assert normalise(["info", "--adapter=a"]) == normalise(["info", "--adapter", "a"]) == ["info", "a"]
    assert normalise(["info", "--json", "runs/x"]) == ["info", "--json=true", "runs/x"]
    assert normalise(["plan", "--memory", "8", "--json", "false"]) == ["plan", "--memory", "8", "--json", "false"]
    assert normalise(["bench", "--layers", "1"]) == ["bench", "--layers", "1"]


def test_precision_and_checkpointing_stand_alone_too():
    assert normalise(["train", "--training.bf16", "--training.gradient-checkpointing", "--output", "x"]) == [
        "train",
        "--training.bf16=true",
        "--training.gradient_checkpointing=true",
        "--output",
        "x",
    ]


def test_a_file_that_cannot_be_read_is_one_line(
    files: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "train.csv").write_text("text,label\ngood,0\nbad,film,1\n")
    level = datasets.logging.get_verbosity()
    try:
        assert (
            main(["train", "--model.path", files[0], "--data.path", str(tmp_path), "--output", str(tmp_path / "o")])
            == 1
        )
        assert datasets.logging.get_verbosity() > logging.ERROR  # or it would print what it raises
    finally:
        datasets.logging.set_verbosity(level)
    shown = capfd.readouterr().err
    assert len(shown.splitlines()) == 1
    assert "saw 3. Correct the file, or write it anew." in shown


def test_all_verbs_in_a_row(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    written = write_recipe(tmp_path / "recipe.yaml", *files, run)
    assert main(["train", "--config", str(written), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "optimizer steps" in plan
    assert "1, after steps 4" in plan
    assert not run.exists()
    assert main(["train", "--config", str(written), "--slice.r", "3"]) == 0
    table = capsys.readouterr().out
    for line in (
        "accuracy (validation)",
        "trainable entries",
        "values changed",
        "added parameters",
        "moves made",
        "file size",
    ):
        assert line in table
    assert "yes, bit for bit" in table
    assert main(["eval", "--adapter", str(run / "adapter"), "--data.split", "validation"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["info", str(run / "adapter")]) == 0
    assert "steps per visit" in capsys.readouterr().out
    assert main(["merge", "--adapter", str(run / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slice.mode", "diagonal"], "slice: mode='diagonal' is unknown; expected one of row, column"),
        (["--slice.r", "0"], "row rank r=0 must be an integer of at least 1"),
        (["--method.name", "qlora"], "method.name='qlora' is unknown"),
        (["--task.name", "poetry"], "task.name='poetry' is unknown; expected one of causal-lm"),
        (["--task.metric", "bleu"], "task.metric='bleu' is unknown for text-classification; expected one of accuracy"),
        (["--data.path", "./nowhere"], "data.path='./nowhere': no such file or folder"),
        (["--resume", "./nowhere"], "resume: 'nowhere' is no folder"),
    ],
)
def test_mistakes_end_in_one_line_and_status_1(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("slicefine: error: ")
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--slice.r", "x"], ["--nonsense", "1"], ["--config", "nowhere.yaml"]])
def test_flags_that_do_not_parse_end_in_status_2(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["train", *words])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) < 12  # the message, not a page of options


def test_the_verbs_that_read_adapters_refuse_other_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for words in (["eval", "--adapter"], ["info"], ["merge", "--output", str(tmp_path / "m"), "--adapter"]):
        assert main([*words, str(tmp_path / "nowhere")]) == 1
        assert "nowhere" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "slicefine.cli.parsing")
    assert main(["train"]) == 2
    assert 'pip install "slicefine[train]"' in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_parses(file: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(file), "--print_config"])
    assert stop.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(file.read_text())
    assert shown["training"]["epochs"] == given["training"].get("epochs", shown["training"]["epochs"])


@pytest.mark.parametrize("name", ["mrpc", "cola", "gsm8k"])
def test_recipes_plan_their_real_data(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    if not SHARED.is_dir():
        pytest.skip("the folder shared/ with the real data sets is not beside the repository")
    for folder in ("data", "models"):  # recipes name them relative to the folder one works in
        (tmp_path / folder).symlink_to(SHARED / folder)
    monkeypatch.chdir(tmp_path)
    words = ["--data.limit_train", "200", "--data.limit_validation", "20", "--data.limit_test", "20"]
    assert main(["train", "--config", str(ROOT / f"recipes/{name}.yaml"), "--dry_run", *words]) == 0
    assert "optimizer steps" in capsys.readouterr().out
