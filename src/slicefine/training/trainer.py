"""transformers' Trainer with three small additions: a rate for the head, a stop at NaN, and a record of the run."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ..errors import ConfigError, NumericalError
from ..mover import movers_of

__all__ = ["Record", "SliceTrainer", "check_weights"]

_REMEDY = (
    "Nothing was saved after the last whole checkpoint. Lower training.learning_rate, clip gradients "
    "(training.max_grad_norm), switch bf16 off, or look for bad rows in the data."
)


class SliceTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose new head may have its own learning rate, and which stops at the first loss that is not finite."""

    def __init__(self, *args: Any, head_parameters: list[Any], head_rate: float | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head = {id(parameter) for parameter in head_parameters}
        self._head_rate = head_rate
        # reading a loss waits for a GPU, so there it is read when the loss is logged; a move checks the slices anyway
        self.check_every = 1 if self.args.device.type == "cpu" else max(1, int(self.args.logging_steps))
        self._bad: Any = None

    def create_optimizer(self, model: Any = None) -> Any:
        """As transformers', then the head's parameters go into groups with their own rate."""
        fresh = self.optimizer is None
        try:
            optimizer = super().create_optimizer(model)
        except ImportError as error:
            name = getattr(self.args.optim, "value", self.args.optim)
            raise ConfigError(f"training.optimizer={name!r}: {error}") from error
        if fresh and self._head_rate is not None:
            for group in list(optimizer.param_groups):
                head = [p for p in group["params"] if id(p) in self._head]
                group["params"] = [p for p in group["params"] if id(p) not in self._head]
                if head:
                    settings = {k: v for k, v in group.items() if k != "params"}
                    optimizer.add_param_group({**settings, "params": head, "lr": self._head_rate})
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; raises `NumericalError` at a loss that is not finite (on a GPU: when it is logged)."""
        loss = super().training_step(*args, **kwargs)
        bad = ~torch.isfinite(loss)
        self._bad = bad if self._bad is None else self._bad | bad
        step = self.state.global_step + 1
        if step % self.check_every == 0 and bool(self._bad):
            found = f"step {step}: the loss is {float(loss)}"
            if self.check_every > 1:
                found = f"steps {step - self.check_every + 1} to {step}: a loss is not finite"
            raise NumericalError(f"{found}. {_REMEDY}")
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', which would take one more step when the resumed run has made all of them already."""
        if self.state.global_step >= self.state.max_steps > 0:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; raises `NumericalError` before a model that is no longer sound is saved."""
        found = super().evaluation_loop(*args, **kwargs)
        loss = (found.metrics or {}).get(f"{kwargs.get('metric_key_prefix', 'eval')}_loss", 0.0)
        if math.isnan(loss):
            raise NumericalError(f"evaluation after step {self.state.global_step}: the loss is {loss}. {_REMEDY}")
        return found


def check_weights(model: Any, step: int) -> None:
    """Raise `NumericalError` if a trained weight is not finite; no loss follows the last step to show it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(parameter.isfinite().all()):
            raise NumericalError(f"step {step}: {name} is no longer finite. {_REMEDY}")


class Record(TrainerCallback):  # type: ignore[misc]
    """Notes how long optimizer steps take and after which steps the slices moved."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.moves: list[int] = []
        self._began = 0.0
        self._visits = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take over the moves of the run that is resumed."""
        for mover in movers_of(model)[:1]:
            layer = next(iter(mover.layers.values()))
            visits = layer.states[mover.name].journal.visits
            self.moves = [visit.first_step - 1 for visit in visits[1:]]
            self._visits = len(visits)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Stop the clock; note a move."""
        self.seconds.append(time.perf_counter() - self._began)
        movers = movers_of(model)
        if movers and movers[0].visits != self._visits:
            self._visits = movers[0].visits
            self.moves.append(state.global_step)
