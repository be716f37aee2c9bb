"""`slicefine plan` says before a run what the run then has: entries, bytes, moves; and it changes nothing."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers.trainer_pt_utils import get_length_grouped_indices

from cli_helpers import recipe, save_bert, save_llama, save_reviews, write_rows
from slicefine.bench.workload import kept_bytes, state_bytes
from slicefine.cli.main import main
from slicefine.cli.plan import PlanSettings
from slicefine.mover import movers_of
from slicefine.training.compare import compare
from slicefine.training.forecast import forecasts
from slicefine.training.methods import make_trainable, typical_batches
from slicefine.training.run import train
from slicefine.training.session import build
from slicefine.training.settings import SliceSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by PEFT
]


def full(settings):
    return build(replace(settings, method=replace(settings.method, name="full")))


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize(("mode", "r"), [("row", 2), ("column", 3), ("alternate", 2), ("random_mask", 1)])
def test_the_run_has_what_was_forecast(tmp_path: Path, mode, r, window):
    model, data = save_bert(tmp_path / "model"), save_reviews(tmp_path / "data")
    settings = recipe(model, data, tmp_path / "run", slice__mode=mode, slice__r=r, slice__window=window)
    settings.training.load_best = False
    (forecast,) = forecasts(full(settings), [mode], [r], batches=2, rounds=1)
    report = train(settings)
    if window is None:  # else the report counts the last window, the forecast the first
        assert forecast.trainable == report["counts"]["trainable"]
    assert forecast.changed == report["counts"]["changed"]
    assert forecast.moves == report["moves"]
    assert forecast.file == pytest.approx(report["file_bytes"], rel=0.1)


@pytest.mark.parametrize("bias", ["all", "slicefine_only"])
def test_the_run_has_the_biases_that_were_forecast(tmp_path: Path, bias):
    """They count as trained and as changed, and lie in the file, which reloads."""
    model, data = save_bert(tmp_path / "model"), save_reviews(tmp_path / "data")
    settings = recipe(model, data, tmp_path / "run", slice__mode="row", slice__bias=bias, verify=True)
    settings.training.load_best = False
    (plain,) = forecasts(full(replace(settings, slice=replace(settings.slice, bias="none"))), ["row"], [2], 2, 1)
    (forecast,) = forecasts(full(settings), ["row"], [2], batches=2, rounds=1)
    report = train(settings)
    assert forecast.trainable == report["counts"]["trainable"] > plain.trainable
    assert forecast.changed == report["counts"]["changed"]
    assert forecast.trainable - plain.trainable == forecast.changed - plain.changed
    assert forecast.file == pytest.approx(report["file_bytes"], rel=0.2)
    assert report["reload_identical"] is True
    assert report["unload_identical"] is True


def trainer_batches(session, settings):
    """Every batch of an epoch, as transformers' Trainer makes them with these settings."""
    rows, size = session.prepared.splits["train"], settings.training.batch_size
    lengths = [len(ids) for ids in rows["input_ids"]]
    generator = torch.Generator().manual_seed(settings.training.seed)
    if settings.training.group_by_length:
        together = size * settings.training.gradient_accumulation
        order = get_length_grouped_indices(lengths, together, generator=generator)
    else:
        order = torch.randperm(len(rows), generator=generator).tolist()
    for at in range(0, len(order), size):
        yield dict(session.prepared.collator([rows[i] for i in order[at : at + size]]))


@pytest.mark.parametrize("grouped", [True, False])
def test_batches_stand_for_an_epoch(tmp_path: Path, grouped):
    settings = recipe(save_bert(tmp_path / "model"), save_reviews(tmp_path / "data"), None)
    settings.training.group_by_length = grouped
    session = full(settings)
    sizes = sorted(batch["input_ids"].numel() for batch in trainer_batches(session, settings))
    typical, largest = typical_batches(session.loaded, settings, session.prepared, 2)
    assert [batch["input_ids"].numel() for batch in typical] == [sizes[len(sizes) // 4], sizes[3 * len(sizes) // 4]]
    assert largest["input_ids"].numel() == sizes[-1]
    assert len(typical_batches(session.loaded, settings, session.prepared, 1000)[0]) == len(sizes)


@pytest.mark.parametrize(("mode", "r"), [("row", 2), ("column", 3)])
def test_state_and_activations_are_those_of_a_step(tmp_path: Path, mode, r):
    settings = recipe(save_bert(tmp_path / "model"), save_reviews(tmp_path / "data"), None, slice__interval=100)
    session = full(settings)
    (forecast,) = forecasts(session, [mode], [r], batches=1, rounds=1)
    session.loaded.model.requires_grad_(False)
    chosen = replace(settings, slice=replace(settings.slice, mode=mode, r=r, positions="sweep"))
    model = make_trainable(session.loaded, session.task, chosen, session.prepared).train()
    batch = max(trainer_batches(session, settings), key=lambda batch: batch["input_ids"].numel())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    assert forecast.kept == kept_bytes(model, lambda: model(**batch))
    model(**batch).loss.backward()
    optimizer.step()
    assert forecast.state == state_bytes(optimizer) > 8 * forecast.trainable
    assert forecast.memory > forecast.kept + forecast.state
    assert forecast.ratio > 0 < forecast.seconds


def test_a_window_is_forecast_at_its_costliest(tmp_path: Path):
    changes = {"slice__window": 1, "slice__mode": "row"}
    settings = recipe(save_bert(tmp_path / "model"), save_reviews(tmp_path / "data"), None, **changes)
    (short,) = forecasts(full(replace(settings, slice=replace(settings.slice, moves=0))), ["row"], [2], 1, 1)
    (whole,) = forecasts(full(settings), ["row"], [2], 1, 1)
    (without,) = forecasts(full(replace(settings, slice=replace(settings.slice, window=None))), ["row"], [2], 1, 1)
    assert short.kept < whole.kept < without.kept  # the top window, the low one, all layers
    assert short.state < whole.state == without.state


def test_checkpointing_is_forecast(tmp_path: Path):
    settings = recipe(save_bert(tmp_path / "model"), save_reviews(tmp_path / "data"), None)
    (plain,) = forecasts(full(settings), ["row"], [2], 1, 1)
    settings.training.gradient_checkpointing = True
    (saved,) = forecasts(full(settings), ["row"], [2], 1, 1)
    assert saved.kept < plain.kept


def test_static_slices_are_forecast_as_such(tmp_path: Path):
    settings = recipe(save_bert(tmp_path / "model"), save_reviews(tmp_path / "data"), None, slice__positions="fixed")
    (static,) = forecasts(full(settings), ["row"], [2], 1, 1)
    assert static.changed == static.trainable


def test_a_forecast_changes_nothing(tmp_path: Path):
    settings = recipe(save_bert(tmp_path / "model"), save_reviews(tmp_path / "data"), None)
    session = full(settings)
    before = {name: value.clone() for name, value in session.loaded.model.state_dict().items()}
    found = list(forecasts(session, ["row", "column"], [1, 2], batches=2, rounds=1))
    assert [(f.mode, f.r) for f in found] == [("row", 1), ("row", 2), ("column", 1), ("column", 2)]
    after = session.loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert movers_of(session.loaded.model) == []
    assert found[2].kept < found[0].kept  # columns keep less


def test_the_command_names_what_fits(tmp_path: Path, capsys):
    model = save_llama(tmp_path / "model")
    rows = [{"text": "the film was very good " * 3} for _ in range(16)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    words = ["plan", "--model.path", model, "--data.path", str(tmp_path / "data"), "--task.name", "causal-lm"]
    words += ["--modes", "[row, column]", "--ranks", "[1, 4]", "--batches", "1", "--rounds", "1"]
    words += ["--training.batch_size", "4", "--training.max_steps", "30", "--slice.interval", "10"]
    assert main([*words, "--memory", "1"]) == 0
    printed = capsys.readouterr().out
    assert "30 optimizer steps; moves after steps 10, 20, 30" in printed
    assert "fits 1 GiB and trains most at a time: --slice.mode column --slice.r 4" in printed
    assert main([*words, "--memory", "0.00001"]) == 0
    assert "nothing fits 1e-05 GiB: column r=1 needs" in capsys.readouterr().out


def test_the_runs_own_mode_and_rank_are_among_those_compared():
    plan = PlanSettings(slice=SliceSettings(r=3, mode="random_mask"))
    assert (plan.modes, plan.ranks) == (["row", "column", "alternate", "random_mask"], [3, 5, 12])
    assert PlanSettings(modes=["row"], ranks=[7]).ranks == [7]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modes", "[diagonal]"], "modes: 'diagonal' is unknown; expected some of row"),
        (["--modes", "[]"], "modes=[]: name at least one mode"),
        (["--ranks", "[0]"], "ranks=[0] must be at least 1"),
        (["--memory", "0"], "memory=0.0 must be positive: GiB"),
        (["--rounds", "0"], "rounds=0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused(words, message, capsys):
    assert main(["plan", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_short_run_is_said_not_to_move(tmp_path: Path):
    settings = recipe(save_bert(tmp_path / "model"), save_reviews(tmp_path / "data"), None, slice__minimum_steps=500)
    console = Console(record=True, width=120, file=io.StringIO())
    compare(settings, ["row"], [1], batches=1, rounds=1, console=console)
    assert "moves after no step" in console.export_text()
