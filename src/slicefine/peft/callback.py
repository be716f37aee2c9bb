"""Trainer's side: it tells the mover how long the run is. Moves themselves ride on the optimizer's step."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback

from ..mover import movers_of

__all__ = ["SliceFineCallback"]


class SliceFineCallback(TrainerCallback):
    """Give every SliceFine adapter of the model the run's total steps and the steps done before a resume.

    ``Trainer`` gets it by itself; pass it to loops that take transformers callbacks but are not a ``Trainer``.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for mover in movers_of(model) if model is not None else []:
            mover.begin_run(state.max_steps, done=state.global_step)
