"""What `slicefine info` shows: positions, losses noted with them, distances from the base, and a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from core_helpers import batches, mlp, step
from peft_helpers import THIRD_PARTY, config, llama, train
from slicefine import attach
from slicefine.cli.main import main
from slicefine.errors import AdapterFileError
from slicefine.files.adapter import read_adapter
from slicefine.files.checkpoint import Checkpoint
from slicefine.files.distance import Distance, distances
from slicefine.mover import movers_of
from slicefine.pace import check_progress

pytestmark = THIRD_PARTY


def folder(tmp_path: Path, mode: str = "alternate"):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, config(mode, target_modules=["q_proj", "down_proj"]))
    (mover,) = movers_of(model)
    for number in range(3):
        train(model, 2)
        mover.note(2 * number + 2, loss=3.0 - number, eval_accuracy=0.25 * number)
    model.save_pretrained(tmp_path / "a")
    return model


def test_values_go_with_the_visit_of_their_step():
    model = mlp()
    tuner = attach(model, mode="row", r=2, interval=2)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for x, y in batches(5):
        step(model, optimizer, x, y)
    tuner.mover.note(loss=1.5)
    tuner.mover.note(2, loss=4.0)  # of the first visit: steps 1 and 2
    tuner.mover.note(3, loss=3.0)
    tuner.mover.note(4, loss=2.0)  # the last one of a visit counts
    tuner.mover.note(9, loss=9.0)  # of no step that the weights know
    noted = [{"step": 2.0, "loss": 4.0}, {"step": 4.0, "loss": 2.0}, {"step": 5.0, "loss": 1.5}]
    assert tuner.mover.progress == noted
    tuner.undo()
    assert tuner.mover.progress == noted[:2]


def test_progress_survives_a_file(tmp_path: Path):
    folder(tmp_path)
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["progress"]
    assert saved[:3] == [{"step": 2.0 * n + 2, "loss": 3.0 - n, "eval_accuracy": 0.25 * n} for n in range(3)]
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "a")
    assert movers_of(loaded)[0].progress == saved
    model = mlp()
    tuner = attach(model, mode="row", r=2, interval=2)
    tuner.mover.note(loss=0.5)
    tuner.save(tmp_path / "s.safetensors")
    other = attach(mlp(), mode="row", r=2, interval=2)
    other.load(tmp_path / "s.safetensors")
    assert other.mover.progress == [{"step": 0.0, "loss": 0.5}]


@pytest.mark.parametrize("progress", [5, [5], [{"loss": "low"}], {"loss": 1}])
def test_progress_that_makes_no_sense_is_refused(progress):
    with pytest.raises(AdapterFileError, match=r"somewhere: progress is no list of losses and metrics"):
        check_progress(progress, "somewhere")


@pytest.mark.parametrize("mode", ["row", "column", "alternate", "random_mask"])
def test_distances_are_those_of_the_dense_weights(tmp_path: Path, mode):
    model = folder(tmp_path, mode)
    base = llama().state_dict()
    merged = model.merge_and_unload().state_dict()
    adapter = read_adapter(tmp_path / "a")
    with Checkpoint(tmp_path / "base") as files:
        found = distances(adapter, files)
    assert found.keys() == adapter.layers.keys()
    for name, blocks in found.items():
        key = f"{name}.weight"
        delta, plain = merged[key] - base[key], base[key]
        for block, distance in blocks.items():
            if block.axis == "entries":
                continue
            part = slice(block.start, block.start + block.width)
            at = part if block.axis == "row" else (slice(None), part)
            assert distance.change == pytest.approx(float(delta[at].norm()), rel=1e-5)
            assert distance.relative == pytest.approx(float(delta[at].norm() / plain[at].norm()), rel=1e-5)
            trained = [visit for visit in adapter.layers[name].visits if visit.last_step >= visit.first_step]
            assert distance.change > 0 or block not in [visit.slice for visit in trained]
    assert Distance(0.0, 0.0).relative == 0
    assert Distance(1.0, 0.0).relative == math.inf


def test_the_command_shows_tables_and_draws(tmp_path: Path, capsys):
    folder(tmp_path)
    assert main(["info", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    second = next(line for line in shown.splitlines() if "3-4" in line and "2.0000" in line)
    assert [cell.strip() for cell in second.split("│")[1:-1]] == ["2", "3-4", "2.0000", "-1.0000", "0.2500", "+0.2500"]
    assert main(["info", str(tmp_path / "a"), "--layers", "--distance", "--picture", str(tmp_path / "p.png")]) == 0
    shown = capsys.readouterr().out
    assert "rows 0-1" in shown
    assert "columns 0-1" in shown
    assert "%" in shown
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert main(["info", str(tmp_path / "a"), "--picture", str(tmp_path / "p.png" / "p.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_trainer_notes_what_it_logs_also_when_it_resumes(tmp_path: Path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = Dataset.from_list([{"input_ids": [3 + i, 4, 5, 6], "labels": [3 + i, 4, 5, 6]} for i in range(8)])

    def trainer(steps: int) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path / "out"),
            max_steps=steps,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_steps=3,
            eval_strategy="steps",
            eval_steps=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            lr_scheduler_type="constant",
        )
        model = get_peft_model(llama(), config("row", interval=2, target_modules=["q_proj"]))
        return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)

    whole = trainer(6)
    whole.train()
    progress = movers_of(whole.model)[0].progress
    assert len(progress) == 3
    assert all(entry.keys() == {"step", "loss", "eval_loss"} for entry in progress)
    resumed = trainer(6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert movers_of(resumed.model)[0].progress == progress
    assert isinstance(whole.model, nn.Module)


def test_notes_of_steps_that_were_taken_back_are_left_out(tmp_path: Path):
    """A best checkpoint is restored: what was noted later belongs to other weights."""
    tuner = attach(mlp(), mode="row", r=2, interval=2)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for x, y in batches(1):
        step(tuner.model, optimizer, x, y)
    tuner.mover.note(loss=3.0)
    best = {k: v.clone() for k, v in tuner.model.state_dict().items()}
    for x, y in batches(3):
        step(tuner.model, optimizer, x, y)
    tuner.mover.note(2, loss=2.0)
    tuner.mover.note(4, loss=1.0)
    tuner.model.load_state_dict(best)
    assert tuner.mover.step == 1
    assert tuner.mover.sound_progress() == [{}]
    tuner.mover.note(4, loss=0.0)
    assert tuner.mover.progress[0]["loss"] == 2.0
