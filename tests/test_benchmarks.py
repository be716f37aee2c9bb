"""The long experiments in `benchmarks/` start and end: each in a smoke version."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

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
