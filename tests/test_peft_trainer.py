"""transformers' `Trainer` with nothing added: planned moves, resume, the best checkpoint, precision, accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_helpers import THIRD_PARTY, config, layers, llama, logits, same, weights
from slicefine import Slice, SliceFineCallback, movers_of
from slicefine.errors import AdapterFileError

pytestmark = [
    *THIRD_PARTY,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),  # transformers 5 renames the setting
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # there is no accelerator
]


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """16 fixed sequences of 6 tokens."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, 32, (16, 6), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def first_slice(model: nn.Module) -> Slice:
    """The active slice of the first layer."""
    return next(iter(movers_of(model)[0].slices().values()))


class Watch(TrainerCallback):
    """Notes slices and weights after every optimizer step."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.slices: dict[int, Slice] = {}
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.slices[state.global_step] = first_slice(model)
        self.weights[state.global_step] = weights(model)
        if state.global_step == self.stop:
            control.should_training_stop = control.should_save = True


class BestAtFour(Trainer):
    """A `Trainer` to which step 4 looks best."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_loss": abs(self.state.global_step - 4.0)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def trainer(
    model: nn.Module, folder: Path, watch: Watch | None = None, kind: type[Trainer] = Trainer, **settings: Any
) -> Trainer:
    arguments = {
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "max_steps": 8,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        **settings,
    }
    return kind(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        callbacks=[watch] if watch else [],
    )


def run(folder: Path, watch: Watch | None = None, base: nn.Module | None = None, **settings: Any) -> nn.Module:
    slices = {key: settings.pop(key) for key in ("mode", "moves", "minimum_steps", "interval") if key in settings}
    planned = {"mode": "row", "interval": None, "moves": 3, "minimum_steps": 1, **slices}
    model = get_peft_model(base or llama(), config(**planned))
    trainer(model, folder, watch, **settings).train()
    return model


def test_moves_are_spread_over_the_run_without_any_callback(tmp_path: Path):
    watch = Watch()
    model = run(tmp_path, watch)
    assert [block.start for block in watch.slices.values()] == [0, 2, 2, 4, 4, 6, 6, 6]
    assert (movers_of(model)[0].step, movers_of(model)[0].visits) == (8, 4)


def test_only_the_active_slice_changes_at_each_step(tmp_path: Path):
    watch = Watch()
    model = run(tmp_path, watch)
    before = weights(llama())
    name = next(n for n, _ in layers(model)).removeprefix("base_model.model.") + ".weight"
    start = 0
    for step, after in watch.weights.items():
        changed = (after[name] != before[name]).any(dim=1).nonzero().flatten().tolist()
        assert changed == [start, start + 1], step
        before, start = after, watch.slices[step].start
    assert same(weights(model.unload()), weights(llama()))


def test_gradient_accumulation_counts_optimizer_steps(tmp_path: Path):
    watch = Watch()
    whole = run(tmp_path / "whole", watch)
    parts = run(tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert movers_of(parts)[0].slices() == movers_of(whole)[0].slices()
    for name, weight in weights(parts).items():
        torch.testing.assert_close(weight, weights(whole)[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_run(tmp_path: Path, reentrant: bool):
    plain = run(tmp_path / "plain", max_steps=4, moves=1)
    recomputed = run(
        tmp_path / "recomputed",
        max_steps=4,
        moves=1,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert movers_of(recomputed)[0].slices() == movers_of(plain)[0].slices()
    for name, weight in weights(recomputed).items():
        torch.testing.assert_close(weight, weights(plain)[name])


def test_a_bf16_base_trains_an_fp32_master(tmp_path: Path):
    model = run(tmp_path, base=llama(torch.bfloat16), learning_rate=1e-4, mode="alternate")
    masters = [layer.slicefine_active["default"] for _, layer in layers(model)]
    assert {p.dtype for p in masters} == {torch.float32}
    assert any(not torch.equal(p.detach(), p.detach().bfloat16().float()) for p in masters)
    assert {p.dtype for p in weights(model).values()} == {torch.bfloat16}
    for _, layer in layers(model):
        assert torch.equal(layer.weight_block("default"), layer.slicefine_active["default"].bfloat16().float())
    assert same(weights(model.unload()), weights(llama(torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["row", "alternate"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, mode: str, dtype: torch.dtype):
    whole = run(tmp_path / "whole", base=llama(dtype), mode=mode)
    run(tmp_path / "parts", Watch(stop=5), base=llama(dtype), mode=mode)
    model = get_peft_model(llama(dtype), config(mode, interval=None, moves=3, minimum_steps=1))
    watch = Watch()
    trainer(model, tmp_path / "parts", watch).train(resume_from_checkpoint=True)
    assert sorted(watch.slices) == [6, 7, 8]
    assert movers_of(model)[0].slices() == movers_of(whole)[0].slices()
    for (_, found), (_, expected) in zip(layers(model), layers(whole), strict=True):
        assert found.states["default"].journal.visits == expected.states["default"].journal.visits
    assert same(weights(model), weights(whole))
    assert torch.equal(logits(model), logits(whole))
    assert same(weights(model.unload()), weights(llama(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_checkpoint_is_loaded_with_its_own_slices(tmp_path: Path, dtype: torch.dtype):
    watch = Watch()
    model = get_peft_model(llama(dtype), config("alternate", interval=None, moves=3, minimum_steps=1))
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer(model, tmp_path, watch, BestAtFour, load_best_model_at_end=True, **settings).train()
    assert watch.slices[4] != watch.slices[8]
    assert same(weights(model), watch.weights[4])
    assert first_slice(model) == watch.slices[4]
    assert movers_of(model)[0].step == 4
    assert same(weights(model.unload()), weights(llama(dtype)))


def test_a_run_that_is_too_short_to_move_says_so_at_the_start(tmp_path: Path):
    with pytest.warns(UserWarning, match="the slice will not move in this run of 2 steps"):
        run(tmp_path, minimum_steps=50, max_steps=2)


def test_the_callback_tells_the_length_to_loops_that_are_no_trainer():
    class State:
        max_steps, global_step = 8, 0

    model = get_peft_model(llama(), config("row", interval=None, moves=3, minimum_steps=1))
    SliceFineCallback().on_train_begin(None, State(), None, model=model)
    assert movers_of(model)[0].plan is not None
    assert movers_of(model)[0].plan.interval == 2


def test_a_checkpoint_that_was_not_read_is_no_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else the run would go on from the base model, with the schedule of a later step."""
    run(tmp_path, Watch(stop=5))
    model = get_peft_model(llama(), config("row", interval=None, moves=3, minimum_steps=1))
    going_on = trainer(model, tmp_path)
    monkeypatch.setattr(going_on, "_load_from_checkpoint", lambda *args, **kwargs: None)
    with pytest.raises(AdapterFileError, match="resumes after step 5, .*the checkpoint was not read into the model"):
        going_on.train(resume_from_checkpoint=True)


class Poison(TrainerCallback):
    """Makes the gradients of some steps infinite."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step + 1 in self.steps:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.inf)


@pytest.mark.filterwarnings("ignore:SliceFine. a step after step")
def test_losses_are_noted_with_their_visit_though_steps_were_left_out(tmp_path: Path):
    """Trainer counts a step that was left out, the adapter does not; a resumed run knows which ones they were."""
    settings = {"save_strategy": "steps", "save_steps": 5, "logging_steps": 1}
    noted = []
    for folder, stop in (("whole", None), ("parts", 5)):
        model = get_peft_model(llama(), config("row", interval=2, on_nonfinite="skip"))
        maker = trainer(model, tmp_path / folder, Watch(stop), **settings)
        maker.add_callback(Poison({2, 4, 7}))
        maker.train()
        if stop:
            model = get_peft_model(llama(), config("row", interval=2, on_nonfinite="skip"))
            maker = trainer(model, tmp_path / folder, **settings)
            maker.add_callback(Poison({2, 4, 7}))
            maker.train(resume_from_checkpoint=True)
        mover = movers_of(model)[0]
        assert (mover.step, mover.visits) == (5, 3)
        logged = [entry["loss"] for entry in maker.state.log_history if "loss" in entry]
        # steps 1, 3, 5, 6, 8 trained; after each, its own loss, and 7's is logged after the fourth
        assert [entry["step"] for entry in mover.progress] == [2.0, 4.0, 5.0]
        assert [entry["loss"] for entry in mover.progress] == [logged[3], logged[6], logged[7]]
        noted.append(mover.progress)
    assert noted[0] == noted[1]
