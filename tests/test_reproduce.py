"""Tables of the paper: every recipe is sound, averages are computed, and a small one runs, resumes and prints."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from cli_helpers import ROOT, save_bert, save_reviews
from slicefine.cli.main import main
from slicefine.errors import ConfigError, DataError
from slicefine.methods import methods
from slicefine.sweeps.paper import FOLDER, METHODS, TASKS, PaperTable, find_recipe, read_table
from slicefine.sweeps.report import as_search
from slicefine.sweeps.reproduce import beside_the_paper, markdown, price_chart, reproduce
from slicefine.sweeps.results import Summary, row_averages, table_entries, value
from slicefine.sweeps.run import ARCHIVE
from slicefine.sweeps.settings import SweepSettings, ViewSettings, cells, extended, final_run, runs_of, train_settings
from slicefine.tasks import get_task

pytestmark = [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")]
TABLES = sorted(file for file in (ROOT / FOLDER).glob("*.yaml") if file.name not in (METHODS, TASKS))
SCALES = [(file, scale) for file in TABLES for scale in yaml.safe_load(file.read_text())["scales"]]


@pytest.mark.parametrize(("file", "scale"), SCALES, ids=[f"{file.stem}-{scale}" for file, scale in SCALES])
def test_every_recipe_of_a_table_is_sound(file: Path, scale: str):
    table = read_table(file, scale)
    grid = cells(table.settings)
    rows_seen, heads_seen = set(), set()
    for cell in grid:  # every method and every task once: reading all pairs takes minutes
        row, head = cell.label(table.settings.view.rows), cell.label(table.settings.view.columns)
        if row in rows_seen and head in heads_seen:
            continue
        rows_seen.add(row)
        heads_seen.add(head)
        run = runs_of(table.settings, cell, 0)[0]
        train_settings(run.recipe)
        settings = train_settings(final_run(table.settings, cell, 1, run.tuned).recipe)
        get_task(settings.task, settings.model, settings.data)  # knows the metric
    view = table.settings.view
    heads = {cell.label(view.columns) for cell in grid}
    if view.apart:
        heads = {f"{head} {name}" for head in heads for name in view.metrics[head]}
    assert heads == set(table.columns) or scale == "here"
    rows = {cell.label(table.settings.view.rows) for cell in grid}
    assert scale == "here" or set(table.paper) <= rows, "a row of the paper is missing at its own scale"
    if table.settings.split == "test":  # the search must not see what is published
        assert all(run.recipe["data"]["limit_test"] == 0 for run in runs_of(table.settings, grid[0], 0))
        assert table.settings.tune_seed not in table.settings.seeds


def test_every_method_of_the_registry_has_a_row():
    rows = yaml.safe_load((ROOT / FOLDER / METHODS).read_text())
    used = {settings.get("method.name", "slicefine") for settings in rows.values()}
    assert used == set(methods())


def test_published_averages_are_recomputed():
    table = read_table(find_recipe(str(ROOT / FOLDER / "table7.yaml")), "paper")
    assert table.average("FT") == pytest.approx(84.80, abs=0.02)  # Table 7 prints 84.80
    assert table.average("SliceFine-5RC") == pytest.approx(86.35, abs=0.02)
    assert table.average("nobody") is None


def write(folder: Path, content: dict, rows: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METHODS).write_text(yaml.safe_dump(rows or {"LoRA": {"method.name": "lora"}}))
    (folder / TASKS).write_text("small: {a: {}}")
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    return folder / "small.yaml"


def test_recipes_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scale = {"vary": {"task": {"a": {}}}}
    for content, message in (
        ({"title": "t", "scales": {"paper": scale}}, "scale='here' is not there; it has paper"),
        ({"title": "t", "tables": 1, "scales": {"here": scale}}, "unknown fields tables; expected claim"),
        ({"title": "t", "scales": {"here": {**scale, "methods": ["DoRA"]}}}, "methods DoRA are not in methods.yaml"),
        (
            {"title": "t", "scales": {"here": {**scale, "tasks": "glue"}}},
            "tasks='glue' is not in tasks.yaml; it has small",
        ),
        ({"title": "t", "scales": {"here": {**scale, "cells": 1}}}, "scale here: .*cells"),
        ({"title": "t", "columns": ["a"], "paper": {"x": [1, 2]}, "scales": {"here": scale}}, "x has 2 numbers for 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_table(write(tmp_path, content), "here")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_table(tmp_path / "bad.yaml", "here")
    (tmp_path / "bad.yaml").write_text("[]")
    with pytest.raises(ConfigError, match="expected a mapping, got list"):
        read_table(tmp_path / "bad.yaml", "here")
    with pytest.raises(ConfigError, match="'table99' is no recipe of a table; there are .*table7"):
        find_recipe("table99")
    monkeypatch.chdir(tmp_path)
    assert find_recipe("table7").is_file()


def test_a_recipe_says_only_what_differs_from_the_one_that_it_extends(tmp_path: Path):
    scale = {"vary": {"task": {"a": {}}}, "base": {"model": {"path": "x", "dtype": "float32"}}, "methods": ["LoRA"]}
    write(tmp_path, {"title": "t", "columns": ["a"], "paper": {"LoRA": [1]}, "scales": {"here": scale}})
    child = tmp_path / "child.yaml"
    child.write_text("extends: small\ntitle: u\nscales: {here: {base: {model: {path: y}}}}")
    table = read_table(child, "here")
    assert (table.name, table.settings.title, table.columns, table.paper) == ("child", "u", ["a"], {})
    assert table.settings.base == {"model": {"path": "y", "dtype": "float32"}}
    assert list(table.settings.vary) == ["method", "task"]
    (tmp_path / "third.yaml").write_text("extends: child")
    with pytest.raises(ConfigError, match="extends child, which extends another; name the first one"):
        read_table(tmp_path / "third.yaml", "here")
    (tmp_path / "third.yaml").write_text("extends: nobody")
    with pytest.raises(ConfigError, match=r"third.yaml: extends: there is no nobody.yaml beside it"):
        read_table(tmp_path / "third.yaml", "here")
    (tmp_path / "third.yaml").write_text("extends: small\nscales: {here: null}")
    with pytest.raises(ConfigError, match=r"third.yaml: scales: here: expected settings of a sweep, got None"):
        read_table(tmp_path / "third.yaml", "here")
    (tmp_path / "third.yaml").write_text("extends: ../small")
    with pytest.raises(ConfigError, match=r"extends: '../small' is no name of a recipe in the same folder"):
        read_table(tmp_path / "third.yaml", "here")


def test_a_test_set_needs_runs_that_chose_without_it():
    vary = {"slice.r": [1]}
    for settings in ({"tune_seed": None}, {"tune_seed": 1, "seeds": [1, 2]}):
        with pytest.raises(ConfigError, match="the runs that choose must not be those that count"):
            SweepSettings(vary=vary, split="test", **settings)
    with pytest.raises(ConfigError, match="split='dev' is unknown; expected validation or test"):
        SweepSettings(vary=vary, split="dev")
    with pytest.raises(ConfigError, match="extend=-1 must not be negative"):
        SweepSettings(vary=vary, extend=-1)


def test_a_search_asks_for_no_number_that_only_tests_have():
    view = ViewSettings(metrics={"commonsense": ["boolq"]}, apart=True)
    settings = SweepSettings(vary={"slice.r": [1]}, tune={"slice.moves": [1]}, tune_seed=0, seeds=[1, 2], split="test")
    found = as_search(replace(settings, title="T", view=view, search_only=True))
    assert (found.title, found.split, found.seeds) == ("T: search, validation, seed 0", "validation", [0])
    assert (found.view.metrics, found.view.apart) == ({}, False)
    with pytest.raises(ConfigError, match="search_only=true: the sweep tunes nothing"):
        SweepSettings(vary={"slice.r": [1]}, search_only=True)


def test_lists_grow_only_at_their_ends():
    assert extended([0.333, 1.0, 3.0], 0.333) == [0.111, 0.333, 1.0, 3.0]
    assert extended([1, 2], 2) == [1, 2, 4.0]
    assert extended([1], 1) == [1]
    assert extended([3, 1], 3) == [3, 1]
    assert extended(["a", "b"], "a") == ["a", "b"]
    assert extended([True, False], True) == [True, False]


def summary(row: str, column: str, value: float, **metrics: float) -> Summary:
    found = {name: [number] for name, number in metrics.items()}
    return Summary({"method": row, "task": column}, [value], found, {}, 10, 20, 1.0, 2.0**20)


FOUND = [
    *(summary("A", "one", 0.8), summary("A", "two", 0.5, f1=0.6, accuracy=0.4)),
    *(summary("B", "one", 0.7), summary("B", "two", 0.5, f1=0.9, accuracy=0.4)),
    summary("C", "one", 0.9),  # lacks a column
]


def test_averages_and_ranks_are_over_all_numbers():
    view = ViewSettings(metrics={"two": ["accuracy", "f1"]})
    found = row_averages(table_entries(FOUND, view, "method", "task"))
    assert found["A"] == (pytest.approx((0.8 + 0.4 + 0.6) / 3), pytest.approx((1 + 1.5 + 2) / 3))
    assert found["B"] == (pytest.approx((0.7 + 0.4 + 0.9) / 3), pytest.approx((2 + 1.5 + 1) / 3))
    assert "C" not in found
    view.apart = True
    apart = table_entries(FOUND, view, "method", "task")
    assert list(apart["A"]) == ["one", "two accuracy", "two f1"]
    assert row_averages(apart)["A"] == pytest.approx(found["A"])


def table_of(settings: SweepSettings) -> PaperTable:
    return PaperTable("small", "the paper", ["one", "two"], {"A": ["90.0", "80/70"], "B": ["80.0", "60/61"]}, settings)


def test_ours_and_the_papers_stand_beside_each_other():
    settings = SweepSettings(title="T", vary={"method": ["A", "B", "C"], "task": ["one", "two"]})
    settings.view.metrics = {"two": ["accuracy", "f1"]}
    table = table_of(settings)
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(beside_the_paper(table, FOUND))
    shown = console.export_text()
    assert [row.split()[1::2] for row in shown.splitlines() if "│ A" in row] == [["A", "60.00", "2", "80.00", "1"]]
    text = markdown(table, FOUND)
    assert "| A | 80.0 ± 0.0 | 40.0/60.0 ± 0.0 | 60.00 | 1.5 | 10 | 20 | 1.00 | 1 |" in text
    assert "| C | 90.0 ± 0.0 | - | - | - |" in text
    chart = price_chart(table, FOUND)
    assert [line.label for line in chart.panels[0].lines] == ["A", "B"]
    assert len(chart.panels) == 3  # memory is known on a GPU alone
    untimed = [replace(FOUND[0], seconds=None), *FOUND[1:]]  # one of them ran beside other work
    assert "s/run" not in markdown(table, untimed)
    assert "| A | 80.0 ± 0.0 | 40.0/60.0 ± 0.0 | 60.00 | 1.5 | 10 | 20 | 1.00 |\n" in markdown(table, untimed)
    shown = [panel.x_label for panel in price_chart(table, untimed).panels]
    assert shown == ["entries trained at a time", "file (MiB)"]
    measured = [replace(item, memory=3 * 2.0**20, forgotten=0.25) for item in FOUND]
    assert price_chart(table, measured).panels[3].lines[0].x == [3.0]
    assert "| A | 80.0 ± 0.0 | 40.0/60.0 ± 0.0 | 60.00 | 1.5 | 10 | 20 | 1.00 | 1 | +0.250 |" in markdown(
        table, measured
    )


def test_a_small_table_runs_resumes_and_is_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bert, reviews = save_bert(tmp_path), save_reviews(tmp_path)
    content = {
        "title": "Small",
        "source": "nobody",
        "columns": ["short", "long"],
        "paper": {"LoRA": [50, 60]},
        "scales": {
            "here": {
                "base": {
                    "model": {"path": bert},
                    "data": {"path": reviews, "validation": "none", "test": "validation.jsonl", "limit_test": 0},
                    "training": {"max_steps": 2, "batch_size": 8, "evaluate": "no", "evaluate_before": False},
                },
                "methods": ["LoRA", "BitFit"],
                "vary": {"task": {"short": {"task.max_length": 8}, "long": {"task.max_length": 16}}},
                "tune": {"training.rate_factor": [1.0, 3.0]},
                "extend": 1,
                "tune_seed": 0,
                "seeds": [1, 2],
                "final": {"data.limit_test": 8},
                "split": "test",
                "view": {
                    "rows": "method",
                    "columns": "task",
                    "averages": True,
                    "reference": {"method": ["LoRA", "BitFit"]},
                },
            }
        },
    }
    rows = {"LoRA": {"method.name": "lora"}, "BitFit": {"method.name": "bitfit"}}
    file = write(tmp_path / "recipes", content, rows)
    command = ["reproduce", str(file), "--output", str(tmp_path / "out")]
    assert main([*command, "--limit", "5"]) == 1  # killed half-way: all five went into the search
    runs = tmp_path / "out" / "runs"
    first = {path.name: path.read_text() for path in runs.iterdir()}
    assert len(first) == 5
    capsys.readouterr()
    assert main([*command, "--search_only", "true"]) == 0
    assert "Small: search, validation, seed 0" in capsys.readouterr().out
    searched = {path.name: json.loads(path.read_text()) for path in runs.iterdir()}
    assert {outcome["seed"] for outcome in searched.values()} == {0}
    assert sorted(path.name for path in runs.parent.iterdir()) == ["runs", "search.json"]  # no table of the paper
    chosen = json.loads((tmp_path / "out" / "search.json").read_text())["cells"]
    for cell in chosen:
        own = [outcome for outcome in searched.values() if outcome["labels"] == cell["labels"]]
        assert cell["mean"] == max(outcome["value"] for outcome in own)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "averages beside nobody" in shown
    after = {path.name: path.read_text() for path in runs.iterdir()}
    assert {name: after[name] for name in first} == first
    outcomes = [json.loads(text) for text in after.values()]
    counted = [outcome for outcome in outcomes if outcome["seed"] in (1, 2)]
    assert len(counted) == 2 * 2 * 2
    assert all("test" in outcome["after"] for outcome in counted)
    assert not any("test" in outcome["after"] for outcome in outcomes if outcome["seed"] == 0)
    tried = {(o["labels"]["method"], o["labels"]["task"]): 0 for o in outcomes}
    for outcome in outcomes:
        tried[outcome["labels"]["method"], outcome["labels"]["task"]] += outcome["seed"] == 0
    assert set(tried.values()) <= {2, 3}  # a third rate where the better one was at an end
    compared = json.loads((tmp_path / "out" / "index.json").read_text())["differences"]["method"]
    assert [(row["label"], row["reference"], row["count"]) for row in compared] == [
        ("BitFit", "LoRA", 4),
        ("LoRA", "BitFit", 4),
    ]
    assert compared[0]["mean"] == pytest.approx(-compared[1]["mean"])
    archive = tmp_path / "archived"  # one line per run is as good as one file per run
    archive.mkdir()
    (archive / ARCHIVE).write_text("".join(json.dumps(outcome) + "\n" for outcome in outcomes))
    assert main([*command[:-1], str(archive)]) == 0
    assert not (archive / "runs").exists()
    assert (archive / "table.md").read_text() == (tmp_path / "out" / "table.md").read_text()
    (archive / ARCHIVE).write_text("{")
    assert main([*command[:-1], str(archive)]) == 1
    assert "not readable as one result per line" in capsys.readouterr().err

    for name in ("index.json", "table.json", "table.md", "figure.png", "prices.png"):
        assert (tmp_path / "out" / name).is_file()

    with pytest.raises(DataError, match="it measured no train set; set data.train, or split"):
        value(counted[0], "train")
    again = [*command[:-1], str(tmp_path / "again")]
    assert main(again) == 0
    for path in (tmp_path / "again" / "runs").iterdir():
        one, other = json.loads(path.read_text()), json.loads(after[path.name])
        assert one["after"] == other["after"]
        assert [h.get("loss") for h in one["history"]] == [h.get("loss") for h in other["history"]]


def test_a_dry_run_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bert, reviews = save_bert(tmp_path), save_reviews(tmp_path)
    base = {"model": {"path": bert}, "data": {"path": reviews}, "training": {"max_steps": 4, "batch_size": 8}}
    tasks = {"at hand": {}, "missing": {"data.path": "./nowhere"}}
    view = {"rows": "slice.r", "columns": "task"}
    here = {"base": base, "vary": {"slice.r": [1], "task": tasks}, "seeds": [0], "view": view}
    settings = read_table(write(tmp_path / "r", {"title": "T", "scales": {"here": here}}), "here").settings
    torch.manual_seed(0)
    assert reproduce(table_of(replace(settings, dry_run=True)), Console(width=150)) == []
    shown = capsys.readouterr().out
    assert "2 cells, 0 runs to choose and 1 that count" in shown
    assert "not at hand: data.path='./nowhere': no such file or folder" in shown
    assert "hours with 1 workers" in shown
