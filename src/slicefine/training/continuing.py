"""What transformers' checkpoints lack: they come when asked for, and carry over everything that is counted."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..durable import write_file
from ..errors import ConfigError
from ..mover import movers_of
from ..peft.callback import kept_by
from ..peft.stopping import at_epoch_end
from ..reading import read_json

__all__ = ["Continued", "KeepSettings", "Patience", "Record", "SaveEvery", "check_settings", "remove_checkpoints"]

SETTINGS = "slicefine_settings.json"  # in each checkpoint: what its run was told
# settings that do not decide what a run comes to
FREE = {"training.eval_batch_size", "training.evaluate_before", "training.logging_steps", "training.report_to"}
FREE |= {"training.workers", "training.save_steps", "training.save_limit", "training.gradient_checkpointing"}
LENGTH = ("training.epochs", "training.max_steps")


class SaveEvery(TrainerCallback):  # type: ignore[misc]
    """Ask for a checkpoint every so many optimizer steps, whenever evaluations are.

    At an epoch's last step it is written after the evaluation: a run that is resumed there would not make it.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Inside an epoch."""
        if state.global_step % self.steps == 0 and not at_epoch_end(state, control):
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At its end, and at the run's."""
        if state.global_step % self.steps == 0 or state.global_step >= state.max_steps:
            control.should_save = True


class KeepSettings(TrainerCallback):  # type: ignore[misc]
    """Write the run's settings into each checkpoint, so that nobody goes on with others unawares.

    Args:
        settings: groups of settings as plain data.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint was written."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            write_file(folder / SETTINGS, json.dumps(_flat(self.settings), indent=2, default=str) + "\n")


def check_settings(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Compare the settings of a run that goes on with those that it began with.

    Args:
        checkpoint: to go on from.
        settings: as in `KeepSettings`.

    Raises:
        ConfigError: naming what differs; a run of another length is warned of only.
    """
    path = checkpoint / SETTINGS
    if not path.is_file():  # written before this was kept
        return
    before, now = read_json(path), json.loads(json.dumps(_flat(settings), default=str))
    names = sorted((before.keys() | now.keys()) - FREE)
    changed = [name for name in names if before.get(name) != now.get(name)]
    wrong = [name for name in changed if name not in LENGTH]
    if wrong:
        listed = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in wrong[:3])
        raise ConfigError(
            f"resume: {listed}{f' ({len(wrong)} settings in all)' if len(wrong) > 3 else ''}. A run goes on with the "
            f"settings that it began with; give those, or start a new run in another output. (If only a folder "
            f"moved, correct it in {path}.)"
        )
    if changed:
        warnings.warn(
            f"SliceFine: {changed[0]} was {before.get(changed[0])!r} and is {now.get(changed[0])!r}, so the run's plan "
            "of moves and rates is another one than before.",
            UserWarning,
            stacklevel=2,
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``{"training.seed": 42, ...}``."""
    return {f"{group}.{name}": value for group, values in settings.items() for name, value in values.items()}


class Patience(EarlyStoppingCallback):  # type: ignore[misc]
    """Early stopping that goes on counting after a resume; transformers' begins anew."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the count of the run that is resumed."""
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if state.global_step:
            self.early_stopping_patience_counter = kept_by(self, state).get("early_stopping_patience_counter", 0)

    @property
    def over(self) -> bool:
        """Whether the run was to stop."""
        return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)


class Record(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Notes how long optimizer steps take and after which steps the slices moved, over all parts of a run.

    Attributes:
        moves: optimizer steps after which the slices moved.
        steps: how many steps were timed, and ``step_seconds`` what they took in all.
    """

    def __init__(self) -> None:
        self.moves: list[int] = []
        self.steps = 0
        self.step_seconds = 0.0
        self.seconds_before = 0.0  # of the parts of the run before this one, until their last checkpoint
        self._began: float | None = None
        self._step_began = 0.0
        self._visits = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = {"steps": self.steps, "step_seconds": self.step_seconds, "seconds": self.seconds}
        return {"args": {}, "attributes": kept}

    @property
    def seconds(self) -> float:
        """What the run took until now, or until it was stopped."""
        if self._began is None:
            return self.seconds_before
        return self.seconds_before + time.perf_counter() - self._began

    def stop(self) -> None:
        """Stop the clock of the whole run."""
        self.seconds_before, self._began = self.seconds, None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take over times and moves of the run that is resumed."""
        for mover in movers_of(model)[:1]:
            layer = next(iter(mover.layers.values()))
            visits = layer.states[mover.name].journal.visits
            self.moves = [visit.first_step - 1 for visit in visits[1:]]
            self._visits = len(visits)
        found = kept_by(self, state) if state.global_step else {}
        self.steps, self.step_seconds = found.get("steps", 0), found.get("step_seconds", 0.0)
        self.seconds_before = found.get("seconds", 0.0)
        self._began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Stop the clock; note a move."""
        self.steps += 1
        self.step_seconds += time.perf_counter() - self._step_began
        movers = movers_of(model)
        if movers and movers[0].visits != self._visits:
            self._visits = movers[0].visits
            self.moves.append(state.global_step)


class Continued(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Carries over a resume what a ``Trainer`` counts anew: the loss since the last log entry, and of the whole run.

    Args:
        trainer: which adds them up.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        if not hasattr(self.trainer, "_tr_loss"):  # before training, and in early releases of transformers 5
            return {"args": {}, "attributes": {}}
        since = self.trainer._globalstep_last_logged
        kept = {"loss": float(self.trainer._tr_loss), "total": self.trainer._total_loss_scalar, "logged": since}
        return {"args": {}, "attributes": kept}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the sums of the run that is resumed, and its best checkpoint, if the folder was moved."""
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and state.best_model_checkpoint is None and best.is_dir():
            state.best_model_checkpoint = str(best)
        found = kept_by(self, state) if state.global_step else {}
        if found:
            self.trainer._tr_loss = torch.tensor(found["loss"], device=args.device)
            self.trainer._total_loss_scalar = found["total"]
            self.trainer._globalstep_last_logged = found["logged"]
            self.trainer._initial_global_step = 0  # the mean loss is over all steps


def remove_checkpoints(folder: Path, keep: set[str], newest: int = 0) -> None:
    """Remove all checkpoints of a folder but those named, and the newest ones.

    Each loses its name before its first file goes: what is half removed must not look like a checkpoint.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in found[: len(found) - newest]:
        if path.name not in keep:
            gone = path.with_name(f".{path.name}-removed")
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
