"""Trainer's side: it tells the mover the run's length and the losses. Moves themselves ride on the optimizer's step."""

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
            for entry in state.log_history if state.global_step else []:  # a resumed run's, from before
                mover.note(entry.get("step"), **_measured(entry))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        """Note the loss and the metrics with the visit that they belong to."""
        found = _measured(logs or {})
        for mover in movers_of(model) if found and model is not None else []:
            mover.note(state.global_step, **found)


def _measured(logs: dict[str, Any]) -> dict[str, float]:
    """The loss and the metrics in what Trainer logs, without its timings."""
    timing = ("runtime", "_per_second", "_time")
    return {
        name: value
        for name, value in logs.items()
        if (name == "loss" or name.startswith("eval_"))
        and isinstance(value, (int, float))
        and not name.endswith(timing)
    }
