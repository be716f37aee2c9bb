"""Sweeps: from a recipe to runs, resuming, tuning, statistics; and what a run can change about its backbone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from scipy.stats import bootstrap
from transformers import AutoModel

from cli_helpers import ROOT, SHARED, recipe, save_bert, save_reviews
from slicefine.cli.main import main
from slicefine.errors import ConfigError
from slicefine.sweeps import run as run_module
from slicefine.sweeps.report import sweep
from slicefine.sweeps.results import differences, spread, summaries, sweep_chart
from slicefine.sweeps.settings import SweepSettings, ViewSettings, cells, merged, runs_of, train_settings
from slicefine.training.run import train
from slicefine.training.settings import BackboneSettings, LotterySettings, SliceSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by PEFT
]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reviews(tmp_path_factory.mktemp("reviews"))


def base(bert: str, reviews: str) -> dict:
    return {
        "model": {"path": bert},
        "data": {"path": reviews},
        "slice": {"r": 2, "mode": "row", "positions": "sweep", "moves": 1, "minimum_steps": 1},
        "training": {"max_steps": 3, "batch_size": 8, "evaluate": "no", "evaluate_before": False},
    }


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_axes_in_order():
    settings = SweepSettings(
        vary={"slice.r": [1, 5], "kind": {"a": {"slice.mode": "row"}, "b": {"slice.mode": "column"}}}, seeds=[3]
    )
    found = cells(settings)
    assert [cell.labels for cell in found] == [
        (("slice.r", r), ("kind", kind)) for r in ("1", "5") for kind in ("a", "b")
    ]
    (run,) = runs_of(settings, found[3], 3)
    assert run.recipe == {"slice": {"r": 5, "mode": "column"}, "training": {"seed": 3}}
    settings.only = {"kind": ["b"]}
    assert [cell.label("kind") for cell in cells(settings)] == ["b", "b"]
    settings.only = {"kind": ["c"]}
    with pytest.raises(ConfigError, match="'kind' has none of the labels asked for; it has a, b"):
        cells(settings)


def test_keys_differ_for_every_recipe_and_stay_the_same():
    settings = SweepSettings(vary={"slice.r": [1, 2]}, tune={"training.learning_rate": [0.1, 0.2]})
    keys = [run.key for cell in cells(settings) for seed in (0, 1) for run in runs_of(settings, cell, seed)]
    assert len(set(keys)) == 8
    assert keys == [run.key for cell in cells(settings) for seed in (0, 1) for run in runs_of(settings, cell, seed)]
    changed = SweepSettings(vary=settings.vary, tune=settings.tune, change={"training.epochs": 9})
    assert not set(keys) & {run.key for cell in cells(changed) for run in runs_of(changed, cell, 0)}


def test_merging_leaves_the_base_alone_and_takes_layer_names_whole():
    given = {"slice": {"r": 5}, "output": None}
    found = merged(given, {"slice.positions": {"a.b": {"row": [1]}}, "data": {"columns": {"text": "t"}}})
    assert given == {"slice": {"r": 5}, "output": None}
    assert found["slice"] == {"r": 5, "positions": {"a.b": {"row": [1]}}}
    assert found["data"]["columns"]["text"] == "t"
    with pytest.raises(ConfigError, match="'slice.r.x': 'r' is a value"):
        merged(given, {"slice.r.x": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vary": {}}, "name at least one axis"),
        ({"seeds": []}, "at least one seed"),
        ({"workers": 0}, "workers=0"),
        ({"vary": {"a": []}}, "needs a list of values"),
        ({"vary": {"a": {"x": 3}}}, "expected {setting: value}"),
        ({"view": ViewSettings(rows="b")}, "'b' is no axis"),
        ({"tune_per": ["b"]}, "'b' is no axis"),
        ({"vary": {"a": [1]}, "view": ViewSettings(reference={"a": "2"})}, "has no label '2'"),
    ],
)
def test_wrong_recipes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        cells(SweepSettings(**{"vary": {"a": [1]}, **changes}))


def test_a_runs_recipe_is_checked_like_any_other():
    assert train_settings({"slice": {"r": 3}}).slice.r == 3
    with pytest.raises(ConfigError, match=r"recipe is wrong: there is no setting slice.rr; did you mean slice.r\?"):
        train_settings({"slice": {"rr": 3}})
    with pytest.raises(ConfigError, match="no setting bogus; slicefine train --help_all lists them"):
        train_settings({"bogus": {"x": 1}})
    with pytest.raises(ConfigError, match="slice.positions='best'"):
        train_settings({"slice": {"positions": "best"}})


def test_every_sweep_of_the_project_is_valid():
    found = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))
    assert len(found) >= 9
    for path in found:
        content = yaml.safe_load(path.read_text())
        content["view"] = ViewSettings(**content.get("view", {}))
        settings = SweepSettings(**content)
        for cell in cells(settings):
            for run in runs_of(settings, cell, settings.seeds[0]):
                train_settings(run.recipe)


# -- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch):
    """Workers as threads of this process: starting others takes seconds."""
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(run_module, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(1))


def test_a_sweep_tunes_resumes_and_reports(bert, reviews, tmp_path, in_process, monkeypatch):
    settings = SweepSettings(
        title="ranks",
        base=base(bert, reviews),
        vary={"slice.r": [1, 4]},
        tune={"training.learning_rate": [1e-5, 3e-2]},
        seeds=[0, 1],
        view=ViewSettings(rows="slice.r", x="slice.r", reference={"slice.r": "1"}),
        output=str(tmp_path / "sweep"),
        limit=3,
    )
    assert len(sweep(settings, QUIET)) >= 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "runs").iterdir()}
    assert len(before) == 3
    settings.limit = None
    found = sweep(settings, QUIET)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "runs").iterdir()}
    assert before.items() <= after.items()  # what was there is not made again
    assert len(after) == 2 * 2 + 2  # rates for the first seed, then the better one
    assert [len(item.values) for item in found] == [2, 2]
    index = json.loads((tmp_path / "sweep" / "index.json").read_text())
    assert len(index["runs"]) == 4
    assert index["versions"]["torch"] == version("torch")
    for item, cell in zip(found, cells(settings), strict=True):
        tried = [run_module.stored(tmp_path / "sweep", run) for run in runs_of(settings, cell, 0)]
        best = max(tried, key=lambda outcome: (outcome["score"], -outcome["after"]["validation"]["loss"]))
        assert item.tuned == best["tuned"]
        assert item.values[0] == best["value"]
    lost = tmp_path / "sweep" / "runs" / f"{index['runs'][0]}.json"
    value = json.loads(lost.read_text())["value"]
    lost.unlink()
    assert [item.values for item in sweep(settings, QUIET)] == [item.values for item in found]  # the same once more
    assert json.loads(lost.read_text())["value"] == value
    monkeypatch.setattr(run_module, "_execute", lambda *_: pytest.fail("nothing was left to do"))
    assert [item.values for item in sweep(settings, QUIET)] == [item.values for item in found]
    assert (tmp_path / "sweep" / "figure.png").stat().st_size > 1000


def test_of_equal_metrics_the_least_loss_is_chosen(tmp_path):
    tune = {"training.rate_factor": [0.1, 0.3, 1.0, 3.0]}
    settings = SweepSettings(base={}, vary={"slice.r": [1]}, tune=tune, seeds=[0], output=str(tmp_path))
    runs = runs_of(settings, cells(settings)[0], 0)
    (tmp_path / "runs").mkdir()
    for run, score, loss in zip(runs, (0.6, 0.67, 0.67, 0.67), (0.1, float("nan"), 0.61, 0.63), strict=True):
        outcome = {"score": score, "after": {"validation": {"loss": loss}}}
        (tmp_path / "runs" / f"{run.key}.json").write_text(json.dumps(outcome))
    assert run_module._best(tmp_path, runs) == (("training.rate_factor", 1.0),)


def test_a_limit_that_ends_within_the_search_says_how_to_go_on(bert, reviews, tmp_path, in_process):
    settings = SweepSettings(
        base=base(bert, reviews),
        vary={"slice.r": [1]},
        tune={"training.learning_rate": [1e-3, 3e-3]},
        tune_seed=0,
        seeds=[1],
        output=str(tmp_path / "sweep"),
        limit=1,
    )
    with pytest.raises(ConfigError, match="no run that counts has succeeded yet.*The same command goes on"):
        sweep(settings, QUIET)
    assert len(list((tmp_path / "sweep" / "runs").iterdir())) == 1


def test_a_run_that_fails_is_told_and_tried_again(bert, reviews, tmp_path, in_process):
    settings = SweepSettings(
        base=base(bert, reviews),
        vary={"column": {"good": {}, "bad": {"data.columns.text": "nothing"}}},
        seeds=[0],
        output=str(tmp_path / "sweep"),
    )
    found = sweep(settings, QUIET)
    assert [item.labels["column"] for item in found] == ["good"]
    (bad,) = (path for path in (tmp_path / "sweep" / "runs").iterdir() if path.name.startswith("bad"))
    assert "DataError" in json.loads(bad.read_text())["error"]
    bad.write_text("{")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        sweep(settings, QUIET)


def test_the_command_runs_workers_as_processes(bert, reviews, tmp_path, capsys):
    content = {"base": base(bert, reviews), "vary": {"slice.r": [1, 2]}, "seeds": [0]}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["sweep", "--config", str(path), "--dry_run"]) == 0
    assert "2 cells, 1 seeds" in capsys.readouterr().out
    assert main(["sweep", "--config", str(path), "--output", str(tmp_path / "out"), "--workers", "2", "--keep"]) == 0
    shown = capsys.readouterr().out
    assert "2/2" in shown
    assert len(list((tmp_path / "out" / "folders").glob("*/adapter/adapter_model.safetensors"))) == 2
    assert main(["sweep", "--config", str(path)]) == 1
    assert "output: name the folder" in capsys.readouterr().err


# -- statistics -------------------------------------------------------------------------------------------------------


def outcome(value: float, seed: int, **labels: str) -> dict:
    counts = {"trainable": 1, "changed": 2}
    after = {"validation": {"accuracy": value}}
    facts = {"labels": labels, "seed": seed, "after": after, "tuned": {}, "counts": counts, "key": "run"}
    return {**facts, "train_seconds": 1.0, "file_bytes": 3, "metric": "accuracy"}


def test_a_killed_sweep_leaves_no_worker_and_goes_on_to_the_same_results(bert, reviews, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"base": base(bert, reviews), "vary": {"slice.r": [1, 2]}, "seeds": [0, 1]}))

    def start(folder: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "from slicefine.cli import main; raise SystemExit(main())", "sweep"]
        words = ["--config", str(file), "--output", str(tmp_path / folder), "--workers", "1"]
        return subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def results(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / folder / "runs").glob("*.json")}

    whole, killed = start("whole"), start("killed")
    deadline = time.monotonic() + 300
    while not results("killed") and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    killed.wait()
    finished = results("killed")
    assert 0 < len(finished) < 4
    assert psutil.wait_procs(workers, timeout=60)[1] == []  # all have ended
    assert start("killed").wait(timeout=300) == 0
    assert whole.wait(timeout=300) == 0
    again = results("killed")
    assert finished.items() <= again.items()  # what was finished is kept, byte for byte
    expected = {name: json.loads(text) for name, text in results("whole").items()}
    assert again.keys() == expected.keys()
    for name, text in again.items():
        outcome = json.loads(text)
        for key in ("after", "counts", "moves", "recipe"):
            assert outcome[key] == expected[name][key]
        assert [entry.get("loss") for entry in outcome["history"]] == [e.get("loss") for e in expected[name]["history"]]


def test_a_time_is_known_if_every_run_has_one():
    settings = SweepSettings(vary={"kind": ["a"]}, seeds=[0, 1])
    found = [outcome(1.0, seed, kind="a") for seed in (0, 1)]
    assert summaries(settings, found)[0].seconds == 1.0
    del found[1]["train_seconds"]
    assert summaries(settings, found)[0].seconds is None


def test_differences_pair_runs_that_are_otherwise_the_same():
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 2.0, ("b", 1): 3.5, ("b", 2): 9.0}
    found = differences([outcome(v, seed, kind=kind) for (kind, seed), v in values.items()], "kind", "a")
    (only,) = found
    assert (only.label, only.count, only.mean, only.least, only.most) == ("b", 2, 0.75, 0.5, 1.0)
    many = np.random.default_rng(0).normal(0.3, 1, 40)
    runs = [outcome(0.0, i, kind="a") for i in range(40)] + [outcome(float(x), i, kind="b") for i, x in enumerate(many)]
    (only,) = differences(runs, "kind", "a", draws=20_000)
    expected = bootstrap((many,), np.mean, method="percentile", n_resamples=20_000, rng=0).confidence_interval
    assert (only.low, only.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_summaries_and_charts_follow_the_grid():
    settings = SweepSettings(vary={"task": {"x": {}, "y": {}}, "r": {"1": {}, "8": {}}}, seeds=[0, 1])
    settings.view = ViewSettings(rows="task", columns="r")
    runs = [
        outcome(i / 10 + seed, seed, task=t, r=r)
        for i, (t, r) in enumerate([("x", "1"), ("x", "8"), ("y", "1")])
        for seed in (0, 1)
    ]
    found = summaries(settings, runs)
    assert [item.labels for item in found] == [{"task": t, "r": r} for t, r in (("x", "1"), ("x", "8"), ("y", "1"))]
    assert [item.mean for item in found] == pytest.approx([0.5, 0.6, 0.7])
    assert found[0].deviation == pytest.approx(np.std([0, 1], ddof=1))
    assert spread([2.0]) == 0
    (panel,) = sweep_chart(settings, found, "c").panels
    assert [(line.label, list(line.x)) for line in panel.lines] == [("x", [1.0, 8.0]), ("y", ["1"])]


# -- backbone, importance and start values in a run -------------------------------------------------------------------


def slices_of(folder: Path) -> dict:
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    return config["positions"]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_pruned_backbone_is_the_adapters_base(bert, reviews, tmp_path, share):
    settings = recipe(bert, reviews, tmp_path / "run", backbone__prune=share, training__epochs=1, verify=True)
    settings.slice.positions = "energy"
    report = train(settings)
    assert report["reload_identical"]
    assert report["unload_identical"]
    # read as a model: some versions of transformers write other names of norms than they read
    changed, original = (AutoModel.from_pretrained(f).state_dict() for f in (tmp_path / "run" / "base", bert))
    frozen, zero = 0, 0
    positions = slices_of(tmp_path / "run")
    for name, before in original.items():
        after = changed[name]
        if before.dim() < 2:
            assert torch.equal(after, before)
            continue
        kept = torch.zeros(before.shape, dtype=torch.bool)
        layer = f"bert.{name}".removesuffix(".weight")
        if layer in positions or ".dense" in layer or ".query" in layer or ".key" in layer or ".value" in layer:
            for visit in range(len(report["moves"]) + 1):
                axis = ("row", "column")[visit % 2]
                starts = positions[layer][axis]
                start = starts[visit // 2 % len(starts)]
                kept.narrow(visit % 2, start, 2).fill_(True)
        assert torch.equal(after[kept], before[kept]), name
        frozen += int((~kept).sum())
        zero += int((after[~kept] == 0).sum())
    assert zero == pytest.approx(share * frozen, abs=2)


def test_a_new_backbone_keeps_biases_and_the_head_is_trained(bert, reviews, tmp_path):
    settings = recipe(bert, reviews, tmp_path / "run", backbone__reinitialise="lecun", training__epochs=1)
    settings.slice.positions = "sweep"
    report = train(settings)
    assert report["reload_identical"]
    changed, original = (load_file(Path(folder) / "model.safetensors") for folder in (tmp_path / "run" / "base", bert))
    weight = "encoder.layer.0.intermediate.dense.weight"
    assert changed[f"bert.{weight}"].std() == pytest.approx((1 / 32) ** 0.5, rel=0.1)
    assert torch.equal(
        changed["bert.encoder.layer.0.intermediate.dense.bias"], original[weight.replace("weight", "bias")]
    )


@pytest.mark.parametrize("importance", ["wanda", "lottery"])
def test_positions_by_importance_are_opposite_orders(bert, reviews, tmp_path, importance):
    orders = {}
    for category in ("most", "least"):
        settings = recipe(bert, reviews, tmp_path / category, training__epochs=1)
        settings.slice = SliceSettings(
            r=4, mode="column", positions=category, importance=importance, moves=0, lottery=LotterySettings(2, 3, 0.4)
        )
        report = train(settings)
        assert report["unload_identical"]  # pruning rounds left no trace
        orders[category] = slices_of(tmp_path / category)
    for layer, own in orders["most"].items():
        assert own["column"] == orders["least"][layer]["column"][::-1]
        assert sorted(own["row"]) == sorted(orders["least"][layer]["row"])


def test_start_values_reach_a_run(bert, reviews, tmp_path):
    settings = recipe(bert, reviews, tmp_path / "run", slice__start_values="zero", training__learning_rate=1e-9)
    settings.slice.positions, settings.slice.moves, settings.slice.mode = "sweep", 0, "row"
    report = train(settings)
    assert report["unload_identical"]
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    active = [value for name, value in tensors.items() if name.endswith("slicefine_active")]
    assert active
    assert all(value.abs().max() < 1e-4 for value in active)


def test_a_resumed_run_takes_the_backbone_that_was_written(bert, reviews, tmp_path):
    from slicefine.training.backbone import with_changed_backbone

    settings = recipe(bert, reviews, tmp_path / "run", backbone__prune=0.3)
    first = with_changed_backbone(settings, tmp_path / "run")
    stamp = (tmp_path / "run" / "base" / "model.safetensors").stat().st_mtime_ns
    again = with_changed_backbone(settings, tmp_path / "run", resumed=True)
    assert first == again
    assert (tmp_path / "run" / "base" / "model.safetensors").stat().st_mtime_ns == stamp
    assert not again.backbone.changed
    plain = recipe(bert, reviews, tmp_path / "other")
    assert with_changed_backbone(plain, tmp_path / "other") is plain


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BackboneSettings(prune=1.2), r"backbone.prune=1\.2"),
        (lambda: BackboneSettings(reinitialise="ones"), "expected one of xavier"),
        (lambda: SliceSettings(importance="size"), "slice.importance='size'"),
        (lambda: SliceSettings(positions="best"), "slice.positions='best'.*most, least, mixed"),
        (lambda: SliceSettings(positions="most", share=[0, 2]), "positions=most differs between runs"),
        (lambda: LotterySettings(rounds=0), "must be at least 1"),
        (lambda: LotterySettings(share=1.0), "must lie in"),
        (lambda: SliceSettings(start_values="ones"), "slice: start_values='ones'"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.skipif(not (SHARED / "data" / "glue").is_dir(), reason="the data sets are not here")
def test_a_real_sweep_in_small(tmp_path, in_process, monkeypatch):
    monkeypatch.chdir(SHARED)
    content = yaml.safe_load((ROOT / "recipes" / "sweeps" / "importance.yaml").read_text())
    content["view"] = ViewSettings(**content["view"])
    tiny = {"training.max_steps": 1, "training.epochs": 1, "data.limit_train": 32, "data.limit_validation": 16}
    settings = SweepSettings(**content, output=str(tmp_path / "out"), change={**tiny, "slice.lottery.steps": 1})
    settings.only = {"task": ["sst2"], "slices": ["rows"], "category": ["most important", "losing ticket"]}
    settings.seeds, settings.view, settings.tune = [0], ViewSettings(), {"training.learning_rate": [0.002]}
    assert len(sweep(settings, QUIET)) == 2
