"""`slicefine report`: what the page says, that it is well-formed and safe, and that a browser shows all of it."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cli_helpers import recipe, save_bert, save_reviews
from slicefine.charts import Chart, Line, Panel
from slicefine.cli.main import main
from slicefine.errors import AdapterFileError, ConfigError, DataError
from slicefine.files.adapter import LayerFile, read_adapter
from slicefine.geometry import Slice
from slicefine.journal import Visit
from slicefine.plots import save_chart, svg
from slicefine.reports.content import read_chart, read_run, read_runs, read_study
from slicefine.reports.elements import clean, table
from slicefine.reports.facts import comparison
from slicefine.reports.layers import _COLOURS, MARKS_AT_MOST, _binned, _colour, _Mark, _place, layer_map
from slicefine.reports.page import make_page
from slicefine.reports.positions import Position, gains, positions
from slicefine.training.run import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by PEFT
]

METHODS = ("slicefine", "lora", "full", "head")
HOSTILE = "<script>alert(1)</script> \" ' & $x$ \x00 \ud800 映画"
VOID = {"meta", "img", "br", "hr", "link", "input"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all methods, in folders named after them."""
    folder = tmp_path_factory.mktemp("runs")
    model, data = save_bert(folder / "bert"), save_reviews(folder / "reviews")
    for method in METHODS:
        settings = recipe(model, data, folder / method, method__name=method)
        settings.training.evaluate, settings.training.evaluate_steps = "steps", 4
        settings.training.load_best = False
        train(settings)
    return folder


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an analysis leaves: lines with a gap, a heat map, and a study's own JSON."""
    folder = tmp_path_factory.mktemp("found")
    lines = [Line("rows", [1, 2, 3], [0.5, math.nan, 2.0], [0.1, 0.1, 0.1]), Line("columns", [1, 2], [3.0, 1.0])]
    many = Line("", list(range(5000)), [float(i % 7) for i in range(5000)], style="points")
    panels = [Panel("spectra", lines, "i", "eigenvalue", log_y=True, levels={"chance": 1.0}), Panel("many", [many])]
    save_chart(Chart("spectra", "Spectra of all groups", panels, "Spectra fall from 2 to 0.5."), folder)
    heat = Panel("", matrix=[[1.0, math.nan], [0.5, 0.2]], row_names=["a", "b"], scale="CKA")
    save_chart(Chart("shift", "Shift per block", [heat], "CKA falls to 0.2 in block b."), folder)
    content = {"numbers": {"x": 1}, "notes": ["The premise fails for columns."], "settings": {}}
    (folder / "study.json").write_text(json.dumps(content))
    (folder / "list.json").write_text("[1, 2]")
    return folder


class Reader(HTMLParser):
    """Elements in order with what lies in them; fails at an end tag that fits no start tag."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.words: list[tuple[tuple[str, ...], str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append((tuple(self.open), data))

    def found(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.tags if name == tag]


def check(page: str) -> Reader:
    """Everything that holds for each page."""
    reader = Reader(page)
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert all(len(reader.found(tag)) == 1 for tag in ("h1", "main", "header", "footer", "body"))
    assert not any(reader.found(tag) for tag in ("script", "link", "iframe", "img", "object", "base", "form"))
    assert not any(name.startswith("on") for _, attributes, _ in reader.tags for name in attributes)
    ids = [attributes["id"] for _, attributes, _ in reader.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    levels = [int(tag[1]) for tag, _, _ in reader.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(attributes.get("scope") in ("row", "col") for attributes in reader.found("th"))
    for _, attributes, _ in reader.tags:
        for name in ("href", "xlink:href", "src"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:image/png;base64,"))
            assert not target.startswith("#") or target == "#" or target[1:] in ids
        for target in re.findall(r"url\(([^)]*)\)", " ".join(value or "" for value in attributes.values())):
            assert target[1:] in ids
    pictures = re.findall("<figure>.*?</figure>", page, re.DOTALL)
    assert len(pictures) == len(reader.found("figure"))
    for picture in pictures:
        caption = re.search("<figcaption>(.+?)</figcaption>", picture, re.DOTALL)
        assert caption is not None
        root = ElementTree.fromstring(re.search("<svg.*</svg>", picture, re.DOTALL)[0])
        labels = root.attrib["aria-labelledby"].split()
        texts = {element.attrib.get("id"): element.text for element in root[:2]}
        assert root.attrib["role"] == "img"
        assert list(texts) == labels
        assert all(texts.values())
    return reader


def report(tmp_path: Path, *words: str) -> str:
    target = tmp_path / "report.html"
    assert main(["report", *words, "--output", str(target), "--overwrite"]) == 0
    return target.read_text(encoding="utf-8")


# -- what a page says -------------------------------------------------------------------------------------------------


def test_a_run_with_slices_has_every_section(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = report(tmp_path, str(files / "slicefine"))
    assert "1 run, 3 figures; written to" in capsys.readouterr().out
    check(page)
    metrics = json.loads((files / "slicefine" / "metrics.json").read_text())
    for heading in ("Summary", "Loss and metric", "What was trained", "Gain per move"):
        assert f"<h3>{heading}</h3>" in page
    for words in (
        "slicefine, mode alternate, rank 2",
        f"{metrics['counts']['trainable']:,} ({metrics['counts']['trainable'] / metrics['counts']['total']:.3%}",
        f"{metrics['counts']['changed']:,} (",
        f"{len(metrics['moves'])}, after steps {', '.join(map(str, metrics['moves']))}",
        f"{metrics['after']['validation']['accuracy']:.4f}",
        f"{metrics['before']['validation']['accuracy']:.4f} before training",
        f"torch {version('torch')}",
        "training 42, data 0",
        "<dt>time per step</dt>",
    ):
        assert words in page
    assert "Comparison" not in page
    assert "&quot;minimum_steps&quot;: 4" in page  # the recipe, folded in


@pytest.mark.parametrize("method", METHODS[1:])
def test_runs_without_slices_leave_their_sections_out(files: Path, tmp_path: Path, method):
    page = report(tmp_path, str(files / method))
    check(page)
    assert page.count("<figure>") == 1
    assert f"Method {method} has no slices: there is no map of them, and no gain per move." in page
    assert "What was trained</h3>" not in page


def test_several_runs_are_compared(files: Path, tmp_path: Path):
    folders = [str(files / method) for method in METHODS]
    page = report(tmp_path, *folders)
    check(page)
    assert page.count("<figure>") == 1 + 3 + 1 + 1 + 1
    assert len(page.encode()) < 2_000_000
    columns, rows = comparison(read_runs(folders))
    assert columns == [
        *("run", "method", "mode", "rank", "accuracy (validation)"),
        *("trained at a time", "changed", "file", "time", "memory"),
    ]
    for method, row in zip(METHODS, rows, strict=True):
        metrics = json.loads((files / method / "metrics.json").read_text())
        mode, rank = {"slicefine": ("alternate", "2"), "lora": ("none", "8")}.get(method, ("none", "none"))
        score = f"{metrics['after']['validation']['accuracy']:.4f}"
        counts = metrics["counts"]
        assert row[:7] == [method, method, mode, rank, score, f"{counts['trainable']:,}", f"{counts['changed']:,}"]
        assert "".join(f"<td>{cell}</td>" for cell in row[1:]) in page


def test_an_adapter_alone_tells_what_it_can(files: Path, tmp_path: Path):
    page = report(tmp_path, str(files / "slicefine" / "adapter"))
    check(page)
    assert "curves, times and memory are unknown" in page
    assert "slicefine, mode alternate, rank 2" in page
    assert page.count("<figure>") == 2
    assert "lora, rank 8" in report(tmp_path, str(files / "lora" / "adapter"))


def test_analyses_come_along(files: Path, analysis: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(files / "lora", run)
    shutil.copytree(analysis, run / "analysis")
    pages = [
        report(tmp_path, str(run)),
        report(tmp_path, str(files / "lora"), "--analysis", str(analysis)),
        report(tmp_path, str(analysis)),
    ]
    for page, figures in zip(pages, (3, 3, 2), strict=True):
        check(page)
        assert page.count("<figure>") == figures
        assert "<figcaption>CKA falls to 0.2 in block b.</figcaption>" in page
        assert "<li>The premise fails for columns.</li>" in page
        assert len(page) < 400_000  # 5000 points are one picture
    assert report(tmp_path, str(files / "lora"), "--analysis", f'["{analysis}"]') == pages[1]
    assert "Comparison" not in report(tmp_path, str(files / "lora"), str(analysis))


def test_charts_come_back_from_their_files(analysis: Path):
    study = read_study(analysis)
    assert [chart.name for chart in study.charts] == ["shift", "spectra"]
    assert study.notes == ["The premise fails for columns."]
    for chart in study.charts:
        assert chart.as_dict() == json.loads((analysis / f"{chart.name}.json").read_text())
    assert math.isnan(study.charts[0].panels[0].matrix[0][1])


def test_runs_of_one_name_are_told_apart(files: Path, tmp_path: Path):
    for name in ("x/one/run", "y/one/run"):
        shutil.copytree(files / "lora", tmp_path / name)
    runs = read_runs([str(tmp_path / name) for name in ("x/one/run", "y/one/run")])
    assert [run.name for run in runs] == ["x/one/run", "y/one/run"]
    with pytest.raises(ConfigError, match=r"run: given 2 times. Give each run once"):
        read_runs([str(tmp_path / "x/one/run"), str(tmp_path / "x/one/../one/run")])


# -- positions --------------------------------------------------------------------------------------------------------


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12))
def test_gains_are_differences(values):
    found = [Position(n, n, {"loss": value}) for n, value in enumerate(values)]
    assert gains(found, "loss")[1:] == np.diff(values).tolist()
    gap = Position(0, 0, {})
    assert gains([*found, gap, gap, found[0]], "loss")[-1] == values[0] - values[-1]
    assert all(math.isnan(change) for change in gains([gap, gap], "loss"))


def test_positions_are_those_of_the_log_and_of_the_adapter(files: Path):
    run, alone = read_run(files / "slicefine"), read_run(files / "slicefine" / "adapter")
    metrics = run.metrics
    history = [entry for entry in metrics["history"] if "loss" in entry]  # one per step
    found = positions(run)
    assert [(p.first, p.last) for p in found] == [(p.first, p.last) for p in positions(alone)]
    assert [p.last for p in found] == [*metrics["moves"], metrics["steps"]]
    for position, noted in zip(found, positions(alone), strict=True):
        losses = [entry["loss"] for entry in history if position.first <= entry["step"] <= position.last]
        assert position.values["mean loss"] == pytest.approx(np.mean(losses))
        assert position.values["loss"] == noted.values["loss"] == pytest.approx(losses[-1])
        assert position.values.get("accuracy") == noted.values.get("accuracy")
    assert any("accuracy" in position.values for position in found)


def test_a_run_that_never_moved_says_so(files: Path):
    run = read_run(files / "slicefine")
    still = replace(run, metrics={**run.metrics, "moves": []})
    page = make_page([still])
    check(page)
    assert "The slices stayed at one position" in page
    assert "dotted lines" not in page


# -- the map of the layers --------------------------------------------------------------------------------------------


def test_marks_lie_where_the_slices_are_and_say_how_far_they_went(files: Path):
    run = read_run(files / "slicefine")
    base = torch.load(_weights(files / "bert"), weights_only=True)
    drawn = ElementTree.fromstring(layer_map(run.adapter, run.distances, "p").svg)
    space = "{http://www.w3.org/2000/svg}"
    groups = [group for group in drawn if group.tag == f"{space}g"]
    assert len(groups) == len(run.adapter.layers)
    for group, (name, layer) in zip(groups, run.adapter.layers.items(), strict=True):
        assert group.find(f"{space}title").text == f"{name}, {layer.shape[0]} x {layer.shape[1]}"
        outline, *marks = group.findall(f"{space}rect")
        assert outline.get("class") == "layer"
        assert len(marks) == len(layer.values)
        weight = base[name.removeprefix("bert.")].double()
        for mark, (block, values) in zip(marks, layer.values.items(), strict=True):
            words = mark.find(f"{space}title").text
            original = weight[block.start : block.start + block.width]
            original = original if block.axis == "row" else weight[:, block.start : block.start + block.width].t()
            change = float((values.double() - original).norm() / original.norm())
            assert words.startswith(f"{block.axis}s {block.start} to {block.start + block.width - 1}, steps ")
            assert words.endswith(f"changed by {change:.2%}")
            side, at, size = (40, "y", "height") if block.axis == "row" else (84, "x", "width")
            length = side / layer.shape[block.axis == "column"]
            assert float(mark.get(at)) == pytest.approx(block.start * length, abs=0.01)
            assert float(mark.get(size)) == pytest.approx(block.width * length, abs=0.01)


def _weights(folder: Path) -> Path:
    from safetensors.torch import load_file

    target = folder / "weights.pt"
    weights = load_file(folder / "model.safetensors")
    torch.save({key.removesuffix(".weight"): value for key, value in weights.items()}, target)
    return target


def test_without_the_base_the_order_of_visits_is_shown(files: Path, tmp_path: Path):
    shutil.copytree(files / "slicefine", tmp_path / "run")
    file = tmp_path / "run" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "nobody/<nothing>"}))
    page = report(tmp_path, str(tmp_path / "run"))
    check(page)
    assert "How far each slice went is not known: base model &#x27;nobody/&lt;nothing&gt;&#x27; is not on this" in page
    assert "order of the visits" in page
    page = report(tmp_path, str(tmp_path / "run"), "--model", str(files / "bert"))
    assert "not known" not in page
    assert "relative change of the values" in page
    torch.manual_seed(3)
    other = save_bert(tmp_path / "other")
    assert "not known" in report(tmp_path, str(tmp_path / "run"), "--model", str(Path(other).parent))


def many_slices(layers: int, visits: int, axis: str = "column") -> dict[str, LayerFile]:
    shape = (64, 4 * visits)
    blocks = [Slice(axis, 4 * n, 4) for n in range(visits)]
    if axis == "entries":
        blocks = [Slice(axis, n, 9) for n in range(visits)]
    visited = [Visit(block, n + 1, n + 1) for n, block in enumerate(blocks)]
    own = LayerFile(shape, False, visited, dict.fromkeys(blocks, torch.zeros(1)), [], torch.float32, (4, 64), [])
    return {f"model.layers.{n}.mlp.up_proj": own for n in range(layers)}


def test_a_map_of_many_slices_stays_small(files: Path):
    adapter = replace(read_adapter(files / "slicefine"), layers=many_slices(100, 50))
    drawn = layer_map(adapter, None, "p")
    assert drawn.svg.count("<rect") <= MARKS_AT_MOST + 100 + 1
    assert "There are more than 2,000 slices: a mark stands for its part of the layer" in drawn.caption
    assert "more than" not in layer_map(replace(adapter, layers=many_slices(10, 50)), None, "p").caption
    drawn = layer_map(replace(adapter, layers=many_slices(1200, 3)), None, "p")
    assert "Of 1,200 layers the first 1,000 are drawn" in drawn.caption
    assert len(drawn.svg) < 500_000
    assert "Single entries" in layer_map(replace(adapter, layers=many_slices(2, 2, "entries")), None, "p").caption


def test_visits_without_a_step_are_not_drawn(files: Path):
    adapter = replace(read_adapter(files / "slicefine"), layers=many_slices(1, 3))
    (name, layer) = next(iter(adapter.layers.items()))
    idle = replace(layer, visits=[*layer.visits[:2], layer.visits[2]._replace(last_step=2)])
    assert layer_map(replace(adapter, layers={name: idle}), None, "p").svg.count("steps ") == 2


@given(
    starts=st.lists(st.integers(0, 90), min_size=1, max_size=30), parts=st.integers(1, 20), seed=st.integers(0, 2**16)
)
def test_parts_cover_the_slices_and_keep_the_largest_value(starts, parts, seed):
    values = np.random.default_rng(seed).random(len(starts))
    marks = [_Mark("row", s / 100, (s + 10) / 100, float(v), "") for s, v in zip(starts, values, strict=True)]
    found = _binned(marks, parts)
    assert len(found) <= parts
    assert max(mark.value for mark in found) == values.max()
    for line in range(100):
        middle = (line + 0.5) / 100
        own = [mark.value for mark in marks if mark.start < middle < mark.end]
        drawn = [mark.value for mark in found if mark.start <= middle <= mark.end]
        assert not own or max(drawn) >= max(own)
    for mark in found:
        assert any(each.start < mark.end and mark.start < each.end for each in marks)


def test_names_and_colours_of_the_map():
    assert _place("model.layers.11.mlp.experts.3.up_proj") == ("model.layers.11", "mlp.experts.3.up_proj")
    assert _place("pooler.dense") == ("pooler", "dense")
    assert _place("fc") == ("", "fc")
    assert _place("0") == ("0", "")
    assert [_colour(n / 7) for n in range(8)] == list(_COLOURS)
    assert _colour(math.inf) == _colour(5.0) == _COLOURS[-1]
    assert int(_colour(0.5 / 7)[:2], 16) == pytest.approx((0xAD + 0x5E) / 2, abs=1)


# -- safety -----------------------------------------------------------------------------------------------------------


def hostile(value):
    """The same JSON with every text replaced."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_whatever_files_say_is_text(files: Path, analysis: Path, tmp_path: Path):
    run = tmp_path / "<img src=x onerror=alert(2)>"
    shutil.copytree(files / "slicefine", run)
    shutil.copytree(analysis, run / "analysis")
    metrics = json.loads((run / "metrics.json").read_text())
    evil = {**hostile(metrics), "metric": HOSTILE, "settings": {**hostile(metrics["settings"]), HOSTILE: HOSTILE}}
    evil["after"] = {HOSTILE: {HOSTILE: 0.5, "accuracy": HOSTILE}, "test": HOSTILE}
    evil["history"] = [{**entry, f"eval_{HOSTILE}": 0.5} for entry in metrics["history"]]
    (run / "metrics.json").write_text(json.dumps(evil))
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    notes = [{"step": 1.0, "loss": 2.0 - n, f"eval_{HOSTILE}": 0.1 * n} for n in range(2)]
    config |= {"base_model_name_or_path": HOSTILE, "progress": notes}
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    check(report(tmp_path, str(run / "adapter")))
    for file in (run / "analysis").glob("*.json"):
        content = json.loads(file.read_text())
        styles = json.loads(
            json.dumps(hostile(content)).replace(json.dumps({"style": HOSTILE})[1:-1], '"style": "line"')
        )
        file.write_text(json.dumps(styles))
    page = report(tmp_path, str(run), str(files / "lora"))
    check(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "<img" not in page


def test_text_is_cleaned_and_escaped():
    assert clean(HOSTILE) == "<script>alert(1)</script> \" ' & $x$ \ufffd ? 映画"
    assert '<th scope="row">&lt;a&gt;</th><td>&quot;1&quot;</td>' in table("c", ["x", "y"], [["<a>", '"1"']])


def test_two_drawings_of_one_chart_have_ids_of_their_own():
    panels = [Panel("$x^{2$", [Line("a $b$ c", [1, 2], [3.0, 4.0])], marks=[1.5], log_y=True)]
    chart = Chart("same", "映画 <b>", panels, "Two points & a line.")
    first, second = svg(chart, "a"), svg(chart, "b")
    ids = [set(re.findall(r' id="([^"]+)"', text)) for text in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert svg(chart, "a") == first
    assert svg(chart).count('id="same-') == len(ids[0])
    for text, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= own
        assert "<style" not in text
    shown = "".join(ElementTree.fromstring(first).itertext())
    assert "$x^{2$" in shown  # no formula
    assert "a $b$ c" in shown


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", "{", "metrics.json: not readable as JSON"),
        ("metrics.json", "[]", "metrics.json: expected a JSON object, got list"),
        ("metrics.json", '{"after": 5}', "'after' is int, expected dict"),
        ("metrics.json", '{"after": {}, "metric": "a"}', "'counts' is NoneType, expected dict"),
        ("metrics.json", {"history": [5]}, "history has an entry whose step, loss or metric is no number"),
        ("metrics.json", {"history": [{"loss": 1.0}]}, "history has an entry whose step"),
        ("metrics.json", {"history": [{"loss": "low", "step": 1}]}, "history has an entry whose step"),
        ("metrics.json", {"moves": ["x"]}, r"moves and steps must be numbers, got \['x', 0\]"),
        ("metrics.json", {"steps": math.nan}, r"moves and steps must be numbers, got \[nan\]"),
        ("other.json", "{}", "no metrics.json, no adapter_config.json and no charts of `slicefine analyze` here"),
        ("slicefine_run.json", "{}", "a whole model, without metrics.json. Give the folder above it"),
        ("chart.json", {"panels": 5}, "chart.json: not a chart of `slicefine analyze`"),
        ("chart.json", '{"panels": []}', "KeyError: 'name'"),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path: Path, name, content, message):
    if isinstance(content, dict):
        whole = {"after": {}, "metric": "accuracy", "counts": {}, "history": [], "settings": {}}
        content = json.dumps({**whole, **content} if name == "metrics.json" else content)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_run(tmp_path)


def test_a_chart_with_an_unknown_style_is_refused():
    content = Chart("one", "One", [Panel(lines=[Line("a", [1], [2.0])])], "A point.").as_dict()
    content["panels"][0]["lines"][0]["style"] = "pie"
    with pytest.raises(DataError, match="here: not a chart .*style='pie' is unknown"):
        read_chart(content, "here")


def test_a_run_of_nothing_but_the_needed_keys_is_a_page(tmp_path: Path):
    whole = {"after": {}, "metric": "accuracy", "counts": {}, "history": [], "settings": {}}
    (tmp_path / "metrics.json").write_text(json.dumps({**whole, "moves": None, "before": 5}))
    page = make_page([read_run(tmp_path)])
    check(page)
    assert "not recorded" in page
    assert "Nothing was logged in this run" in page


def test_mistakes_on_the_command_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def shown(*words: str) -> str:
        assert main(["report", *words]) == 1
        return capsys.readouterr().err

    run, taken = str(files / "lora"), tmp_path / "taken.html"
    taken.write_text("mine")
    assert "nowhere: no such folder" in shown(str(tmp_path / "nowhere"))
    assert "exists. Choose another name, or --overwrite" in shown(run, "--output", str(taken))
    assert taken.read_text() == "mine"
    assert "is a folder. Give the name of a file" in shown(run, "--output", str(tmp_path))
    assert "cannot be written" in shown(run, "--output", str(taken / "report.html"))
    missing = str(tmp_path / "nowhere")
    assert f"analysis={missing!r}: no such folder" in shown(run, "--analysis", missing, "--output", f"{missing}.html")
    assert main(["report", run, "--output", str(taken), "--overwrite"]) == 0
    assert taken.read_text().startswith("<!DOCTYPE html>")
    assert [file.name for file in tmp_path.iterdir()] == ["taken.html"]
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    (broken / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterFileError, match="cannot be read as a safetensors file"):
        read_run(broken)


@pytest.mark.parametrize(
    "name",
    ["plots", *(f"reports.{n}" for n in ("content", "elements", "facts", "layers", "page", "positions", "writing"))],
)
def test_doctests_and_public_names(name):
    module = importlib.import_module(f"slicefine.{name}")
    assert doctest.testmod(module).failed == 0
    assert all(hasattr(module, public) for public in module.__all__)


# -- in a browser -----------------------------------------------------------------------------------------------------

PROBE = """<pre id="probe"></pre><script>
const found = {figures: [], overflow: document.documentElement.scrollWidth - window.innerWidth};
for (const picture of document.querySelectorAll("figure svg")) {
  const box = picture.getBoundingClientRect();
  const ids = picture.getAttribute("aria-labelledby").split(" ");
  const ink = [...picture.querySelectorAll("text")].map(part => getComputedStyle(part).fill);
  found.figures.push({width: box.width, height: box.height, ink: [...new Set(ink)],
    words: ids.map(id => document.getElementById(id).textContent.length),
    empty: [...picture.querySelectorAll("text")].filter(part => part.getBBox().width === 0).length});
}
const ids = [...document.querySelectorAll("[id]")].map(part => part.id);
found.duplicates = ids.filter((id, at) => ids.indexOf(id) !== at);
found.requests = performance.getEntriesByType("resource").map(entry => entry.name);
found.paper = getComputedStyle(document.body).backgroundColor;
document.getElementById("probe").textContent = JSON.stringify(found);
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    names = [os.environ.get("BROWSER_BINARY", ""), "chromium", "chromium-browser", "google-chrome", "chrome", "msedge"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium, Chrome or Edge on PATH; BROWSER_BINARY names one elsewhere")
    return found


def show(browser: str, file: Path, *flags: str) -> tuple[str, list[str]]:
    """The document after loading, and what the console said."""
    words = [
        *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
        *(f"--user-data-dir={file.parent / 'profile'}", "--virtual-time-budget=3000", "--enable-logging=stderr"),
        *("--v=0", "--host-resolver-rules=MAP * ~NOTFOUND", *flags, "--dump-dom", file.as_uri()),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def look(browser: str, file: Path, *flags: str) -> dict:
    """Measurements by a script in a copy of the page that may have one."""
    page = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", file.read_text(encoding="utf-8"))
    copy = file.with_name("probe.html")
    copy.write_text(page.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    document, console = show(browser, copy, *flags)
    assert console == []
    found: dict = json.loads(re.search('<pre id="probe">(.*?)</pre>', document, re.DOTALL)[1].replace("&amp;", "&"))
    return found


@pytest.fixture(scope="module")
def shown(files: Path, analysis: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    report(folder, *(str(files / method) for method in METHODS), "--analysis", str(analysis))
    return folder / "report.html"


def test_a_browser_loads_the_page_without_a_complaint(browser: str, shown: Path):
    document, console = show(browser, shown)
    assert console == []
    assert document.count("<figure>") == 9
    assert document.count('role="img"') == 9


@pytest.mark.parametrize(
    ("flags", "dark"),
    [
        (["--window-size=1200,900"], False),
        (["--window-size=1200,900", "--blink-settings=preferredColorScheme=0"], True),
        (["--window-size=500,900"], False),
    ],
)
def test_a_browser_shows_every_figure(browser: str, shown: Path, flags, dark):
    found = look(browser, shown, *flags)
    assert len(found["figures"]) == 9
    for figure in found["figures"]:
        assert figure["width"] > 250
        assert figure["height"] > 100
        assert min(figure["words"]) > 5
        assert figure["empty"] == 0
        assert figure["ink"] == ["rgb(228, 232, 238)" if dark else "rgb(28, 36, 48)"]
    assert found["paper"] == ("rgb(20, 24, 30)" if dark else "rgb(255, 255, 255)")
    assert found["overflow"] <= 0
    assert found["duplicates"] == []
    assert found["requests"] == []


def test_the_checks_in_the_browser_can_see(browser: str, shown: Path, tmp_path: Path):
    page = shown.read_text(encoding="utf-8")
    bad = page.replace("</main>", '<img src="http://example.invalid/x.png"><p id="run-1">twice</p></main>')
    (tmp_path / "bad.html").write_text(bad, encoding="utf-8")
    assert any("Content Security Policy" in line for line in show(browser, tmp_path / "bad.html")[1])
    (tmp_path / "bad.html").write_text(bad.replace("example.invalid/x.png", ""), encoding="utf-8")
    assert look(browser, tmp_path / "bad.html")["duplicates"] == ["run-1"]
    with pytest.raises(AssertionError):
        check(bad)
