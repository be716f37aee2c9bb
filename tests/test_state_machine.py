"""Everything that can be done with slices, in random order, beside a dense model; the long run is a benchmark."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "state_machine.py"


@pytest.fixture(scope="module")
def script():
    # pickled models name classes of this module, so it has to be found under its name
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import state_machine

        yield state_machine
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.mark.parametrize("machine", ["AttachMachine", "PeftMachine"])
def test_random_sequences_agree_with_a_dense_model(script, machine):
    script.EXECUTED.clear()
    script.campaign(getattr(script, machine), sequences=15, steps=20, seed=None, shrink=True)
    assert script.EXECUTED["sequences"] >= 15
    assert {"train", "move", "undo", "save", "load"} <= set(script.EXECUTED)


def test_the_campaign_writes_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["--sequences", "4", "--steps", "5", "--out", str(tmp_path / "s.json")]
    monkeypatch.setattr(sys, "argv", ["state_machine.py", *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["sequences"] >= 4
    assert record["divergences"] == 0
