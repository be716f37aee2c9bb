"""A run that was broken off and goes on leaves what an uninterrupted one leaves; benchmarks/resume.py has many more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from cli_helpers import recipe, save_bert, save_reviews
from core_helpers import batches, mlp, step
from peft_helpers import config, llama, same, weights
from slicefine import SliceFineCallback, attach, movers_of
from slicefine.errors import ConfigError
from slicefine.training import continuing as continuing_module
from slicefine.training import methods as methods_module
from slicefine.training import run as run_module
from slicefine.training import session as session_module
from slicefine.training.run import train
from slicefine.training.settings import TrainingSettings, TrainSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by PEFT
]

# 32 reviews in batches of 8: an epoch has 4 steps; slices move after each third one
BASE: dict[str, Any] = {
    "slice__interval": 3,
    "slice__moves": None,
    "slice__state_policy": "rewarm",
    "model__dropout": 0.1,
    "training__learning_rate": 1e-2,
    "training__evaluate_before": False,
    "verify": False,
}
ASIDE = ("train_seconds", "seconds_per_step", "peak_memory_bytes", "output", "command", "date", "settings", "history")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reviews(tmp_path_factory.mktemp("reviews"), rows=32)


class PulledError(Exception):
    """The power is gone."""


class Pull(TrainerCallback):
    """Breaks a run off: before an optimizer step, or while the model is evaluated after one."""

    def __init__(self, step: int, evaluating: bool = False) -> None:
        self.step, self.evaluating = step, evaluating

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step and not self.evaluating:
            raise PulledError

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.evaluating:
            raise PulledError


def broken(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, *callbacks: Any) -> None:
    """Run until the callbacks break it off."""
    original = session_module.Session.trainer

    def watched(self: Any, *args: Any) -> Any:
        trainer = original(self, *args)
        for callback in callbacks:
            trainer.add_callback(callback)
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(session_module.Session, "trainer", watched)
        with pytest.raises(PulledError):
            train(settings)


def left(folder: Path) -> dict[str, Any]:
    """Everything that a run left but times, memory and the command; tensors as lists, so that == says it."""
    metrics = json.loads((folder / "metrics.json").read_text())
    history = [
        {k: v for k, v in entry.items() if not k.endswith(("runtime", "_per_second"))} for entry in metrics["history"]
    ]
    files = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
    return {k: v for k, v in metrics.items() if k not in ASIDE} | {"history": history, "files": files}


@pytest.mark.parametrize(
    ("changes", "pull"),
    [
        ({"training__logging_steps": 4, "training__save_steps": 3}, Pull(7)),  # in the second epoch's order by length
        ({"training__save_steps": 2, "training__load_best": False}, Pull(4, evaluating=True)),  # at an epoch's end
    ],
    ids=["order and loss", "epoch end"],
)
def test_a_run_that_goes_on_leaves_what_a_whole_one_leaves(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], pull: Pull
):
    def settings(name: str, **more: Any) -> TrainSettings:
        return recipe(bert, reviews, tmp_path / name, **{**BASE, **changes, **more})

    train(settings("whole"))
    broken(settings("parts"), monkeypatch, pull)
    resumed = train(settings("parts", resume=True))
    assert left(tmp_path / "parts") == left(tmp_path / "whole")
    names = [sorted(p.name for p in (tmp_path / run / "checkpoints").iterdir()) for run in ("whole", "parts")]
    assert names[0] == names[1]
    assert resumed["seconds_per_step"] > 0


def test_early_stopping_is_not_forgotten(bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    changes = {**BASE, "training__learning_rate": 1e-12, "training__evaluate": "steps", "training__evaluate_steps": 1}
    changes["training__early_stopping"] = 2
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_trained", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(recipe(bert, reviews, tmp_path / "run", **changes))
    report = train(recipe(bert, reviews, tmp_path / "run", resume=True, **changes))
    assert report["steps"] == 3  # the first value, and twice none that is better
    assert report["best_step"] == 1


def test_a_checkpoints_positions_are_kept(bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    changes = {**BASE, "training__save_steps": 2, "training__max_steps": 4}
    broken(recipe(bert, reviews, tmp_path / "run", **changes), monkeypatch, Pull(4))
    kept = json.loads((tmp_path / "run/checkpoints/checkpoint-2/adapter_config.json").read_text())["positions"]
    monkeypatch.setattr(methods_module, "measured_positions", lambda *args: pytest.fail("measured again"))
    report = train(recipe(bert, reviews, tmp_path / "run", resume=True, **changes))
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["positions"] == kept
    assert report["settings"]["slice"]["positions"] == "energy"


def test_a_run_that_was_moved_elsewhere_knows_its_best_checkpoint(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    changes = {**BASE, "training__learning_rate": 1e-12, "training__evaluate": "steps", "training__evaluate_steps": 2}
    broken(recipe(bert, reviews, tmp_path / "run", **changes, training__max_steps=6), monkeypatch, Pull(6))
    (tmp_path / "run").rename(tmp_path / "moved")
    report = train(recipe(bert, reviews, tmp_path / "moved", resume=True, **changes, training__max_steps=6))
    assert report["best_step"] == 2
    journal = load_file(tmp_path / "moved/adapter/adapter_model.safetensors")
    assert max(int(t[-1, 4]) for name, t in journal.items() if name.endswith("slicefine_journal")) == 2


# -- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_no_half_of_a_checkpoint(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    changes = {**BASE, "training__save_steps": 2, "training__max_steps": 4, "training__evaluate": "no"}
    original = Trainer._save_rng_state

    def fails(self: Any, folder: str) -> None:
        if self.state.global_step == 4:
            raise PulledError
        original(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", fails)
        broken(recipe(bert, reviews, tmp_path / "run", **changes), monkeypatch)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert train(recipe(bert, reviews, tmp_path / "run", resume=True, **changes))["steps"] == 4
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-4/trainer_state.json").read_text())
    assert state["global_step"] == 4


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in (2, 4, 6):
        (tmp_path / f"checkpoint-{number}").mkdir()
    seen: list[list[str]] = []

    def looks(folder: Path, **kwargs: Any) -> None:
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        original(folder, **kwargs)

    original: Callable[..., None] = shutil.rmtree
    monkeypatch.setattr(continuing_module.shutil, "rmtree", looks)
    continuing_module.remove_checkpoints(tmp_path, {"checkpoint-2"}, newest=1)
    assert seen[-1] == ["checkpoint-2", "checkpoint-6"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]


def test_save_steps_are_checked():
    with pytest.raises(ConfigError, match=r"training.save_steps=0 must be at least 1; leave it out for the default"):
        TrainingSettings(save_steps=0)


# -- a script with Trainer ------------------------------------------------------------------------------------------


class Lengths(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Texts of several lengths."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        if i >= len(self):  # whoever iterates stops here
            raise IndexError(i)
        return {"input_ids": [3 + (i * 7 + j) % 29 for j in range(3 + i % 5)]}


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100)}


def script(folder: Path, again: bool = False, *callbacks: Any) -> nn.Module:
    model = get_peft_model(llama(attention_dropout=0.1), config("alternate", interval=3))
    arguments: dict[str, Any] = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 1}
    arguments |= {"learning_rate": 0.02, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments |= {"train_sampling_strategy": "group_by_length"}
    made = TrainingArguments(str(folder), **arguments)
    Trainer(model, made, padded, Lengths(), callbacks=list(callbacks)).train(resume_from_checkpoint=again)
    return model


def test_a_script_goes_on_in_the_middle_of_an_epoch_that_is_ordered_by_length(tmp_path: Path):
    whole = script(tmp_path / "whole")
    for pulled, again in ((4, False), (9, True), (11, True)):  # twice in one epoch: the second time it knows it, too
        with pytest.raises(PulledError):
            script(tmp_path / "parts", again, Pull(pulled))
    assert same(weights(script(tmp_path / "parts", True)), weights(whole))


def test_steps_that_a_scaler_skipped_do_not_shift_the_moves_of_a_resumed_run():
    class State:
        max_steps, global_step, log_history, epoch = 9, 5, (), 0.5

    model = get_peft_model(llama(), config("row", interval=3))
    callback = SliceFineCallback()
    state = State()
    state.stateful_callbacks = {"SliceFineCallback": callback.state()}
    state.stateful_callbacks["SliceFineCallback"]["attributes"]["starts"] = {"default": 0}
    (mover,) = movers_of(model)
    for layer in mover.layers.values():
        for _ in range(4):  # of five steps one was skipped
            layer.states["default"].journal.count_step()
    callback.on_train_begin(None, state, None, model=model)
    assert mover.run_start == 0


def test_a_checkpoint_of_an_earlier_release_goes_on(tmp_path: Path):
    with pytest.raises(PulledError):
        script(tmp_path, False, Pull(4))
    for path in tmp_path.glob("checkpoint-*/trainer_state.json"):
        state = json.loads(path.read_text())
        del state["stateful_callbacks"]["SliceFineCallback"]
        path.write_text(json.dumps(state))
    assert movers_of(script(tmp_path, True))[0].step == 12


# -- a loop of one's own --------------------------------------------------------------------------------------------


def test_a_file_written_just_after_a_move_keeps_the_history_in_the_bases_precision(tmp_path: Path):
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Any]) -> None:
        for x, y in data:
            step(model, optimizer, x.bfloat16(), y.bfloat16())

    data = batches(6)
    files = []
    for name in ("whole", "parts"):
        model = mlp(dtype=torch.bfloat16)
        tuner = attach(model, mode="alternate", r=2, interval=2)
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.5)
        run(model, optimizer, data[:4])
        if name == "parts":
            tuner.save(tmp_path / "middle")
            model = mlp(dtype=torch.bfloat16)
            tuner = attach(model, mode="alternate", r=2, interval=2)
            tuner.load(tmp_path / "middle")
            optimizer = torch.optim.SGD(tuner.parameters(), lr=0.5)
        run(model, optimizer, data[4:])
        tuner.save(tmp_path / name)
        files.append(load_file(tmp_path / name))
    assert files[0].keys() == files[1].keys()
    for key, tensor in files[0].items():
        assert (tensor.dtype, tensor.tolist()) == (files[1][key].dtype, files[1][key].tolist()), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"training__learning_rate": 0.1, "training__seed": 7},
            r"training.learning_rate was 0.01 and is 0.1; training.seed was",
        ),
        ({"slice__r": 3}, r"slice.r was 2 and is 3. A run goes on with the settings that it began with"),
    ],
)
def test_a_run_goes_on_with_its_own_settings(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
):
    changes = {**BASE, "training__save_steps": 2}
    broken(recipe(bert, reviews, tmp_path / "run", **changes), monkeypatch, Pull(3))
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(ConfigError, match=message):
        train(recipe(bert, reviews, tmp_path / "run", resume=True, **changes | change))
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before
    free = {"training__logging_steps": 2, "training__workers": 0}
    with pytest.warns(UserWarning, match="training.epochs was 2 and is 3, so the run's plan"):
        assert (
            train(recipe(bert, reviews, tmp_path / "run", resume=True, **changes | free, training__epochs=3))["steps"]
            == 12
        )
