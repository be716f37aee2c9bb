"""transformers' Trainer with additions: a method's own rates and penalty, a stop at NaN, checkpoints that are whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..errors import ConfigError, NumericalError
from ..files.writing import atomic_folder
from ..methods import Method, options_of
from ..mover import movers_of
from ..peft.callback import SliceFineCallback
from .continuing import Continued, Patience, Record, remove_checkpoints

__all__ = ["SliceTrainer", "check_weights"]

_REMEDY = (
    "Nothing was saved after the last whole checkpoint. Lower training.learning_rate, clip gradients "
    "(training.max_grad_norm), switch bf16 off, or look for bad rows in the data."
)


class SliceTrainer(Trainer):  # type: ignore[misc]
    """Trainer that does what the method asks for, stops at the first loss that is not finite, and resumes exactly.

    Args:
        record: of times and moves.
        save_limit: checkpoints to keep, beside the best one.
        head_parameters: of the new head.
        head_rate: the head's own learning rate; None is everyone's.
        method: whose rates, optimizer, penalty and work after each step are used.
        options: of the method, as the recipe gives them.
    """

    def __init__(
        self,
        *args: Any,
        record: Record,
        save_limit: int,
        head_parameters: list[Any],
        head_rate: float | None,
        method: Method,
        options: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._save_limit = save_limit
        self._aside: Path | None = None  # where a checkpoint is being written
        self.trained = False  # all steps are made, and everything is logged
        self._head = {id(parameter) for parameter in head_parameters}
        self._head_rate = head_rate
        self._method = method
        self._options = dict(options) if method.name == "slicefine" else options_of(method, options)
        if method.after_step is not None:
            self.add_callback(_AfterStep(method.after_step))
        self._record = record
        for callback in (record, Continued(self)):
            self.add_callback(callback)
        self._know_epochs()
        # reading a loss waits for a GPU, so there it is read when the loss is logged; a move checks the slices anyway
        self.check_every = 1 if self.args.device.type == "cpu" else max(1, int(self.args.logging_steps))
        self._bad: Any = None
        self._skips = any(m.settings.on_nonfinite == "skip" for m in movers_of(cast(nn.Module, self.model)))

    def create_optimizer(self, model: Any = None) -> Any:
        """As transformers', then the head's parameters go into groups with their own rate."""
        fresh = self.optimizer is None
        if fresh and self._method.optimizer is not None:
            rate, decay = self.args.learning_rate, self.args.weight_decay
            self.optimizer = self._method.optimizer(cast(nn.Module, self.model), self._options, rate, decay)
        try:
            optimizer = super().create_optimizer(model)
        except ImportError as error:
            name = getattr(self.args.optim, "value", self.args.optim)
            raise ConfigError(f"training.optimizer={name!r}: {error}") from error
        if fresh and self._head_rate is not None:
            _regroup(optimizer, dict.fromkeys(self._head, self._head_rate))
        if fresh and self._method.groups is not None:
            factor, rate, model = self._method.groups, self.args.learning_rate, cast(nn.Module, self.model)
            rates = {id(p): factor(name, self._options) * rate for name, p in model.named_parameters()}
            _regroup(optimizer, {id_: own for id_, own in rates.items() if own != rate and id_ not in self._head})
        return optimizer

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', plus the method's penalty while training."""
        found = super().compute_loss(*args, **kwargs)
        model = cast(nn.Module, self.model)
        if self._method.penalty is None or not model.training:
            return found
        penalty = self._method.penalty(model, self.state.global_step / max(1, self.state.max_steps))
        if self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None:
            penalty = penalty / self.current_gradient_accumulation_steps  # the Trainer will not divide it
        return (found[0] + penalty, *found[1:]) if isinstance(found, tuple) else found + penalty

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As transformers', which refuses tensors that a method's layers share unless each is named once."""
        if state_dict is None and self._method.saves == "tensors":
            seen: set[Any] = set()
            whole = cast(nn.Module, self.model).state_dict()
            parts = {name: (t.data_ptr(), t.shape, t.stride()) for name, t in whole.items()}
            state_dict = {n: t for n, t in whole.items() if not (parts[n] in seen or seen.add(parts[n]))}  # type: ignore[func-returns-value]
        super()._save(output_dir, state_dict)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; raises `NumericalError` at a loss that is not finite (on a GPU: when it is logged)."""
        loss = super().training_step(*args, **kwargs)
        bad = ~torch.isfinite(loss)
        self._bad = bad if self._bad is None else self._bad | bad
        step = self.state.global_step + 1
        if not self._skips and step % self.check_every == 0 and bool(self._bad):
            found = f"step {step}: the loss is {float(loss)}"
            if self.check_every > 1:
                found = f"steps {step - self.check_every + 1} to {step}: a loss is not finite"
            raise NumericalError(f"{found}. {_REMEDY}")
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', which would take one more step when the resumed run has made all of them already."""
        patience = [callback for callback in self.callback_handler.callbacks if isinstance(callback, Patience)]
        if self.state.global_step >= self.state.max_steps > 0 or any(callback.over for callback in patience):
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """As transformers', of all parts of a run that was resumed."""
        self.trained = True
        began = start_time - self._record.seconds_before
        return super()._finalize_training(trial, num_train_samples, began)  # type: ignore[no-untyped-call]

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of the last step, unless it is there."""
        found = self._place()
        if not found.is_dir():
            self._save_checkpoint(self.model_wrapped, None)
        return found

    def keep_last_checkpoints(self) -> None:
        """After a run: of the best checkpoint and a single last one, the best one is kept."""
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self._save_limit == 1:
            remove_checkpoints(self._place().parent, {Path(best).name})

    def _place(self) -> Path:
        return Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)  # type: ignore[no-untyped-call]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As transformers', into a folder beside, which takes the checkpoint's name when it is whole."""
        if self.args.world_size > 1:
            super()._save_checkpoint(model, trial)
            return
        place = self._place()
        best = place.with_name(f"checkpoint-{self.state.best_global_step}")
        with atomic_folder(place) as aside:
            self._aside = aside
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = None
            if best == place or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            inner = aside / place.name
            self.state.save_to_json(str(inner / "trainer_state.json"))
            for path in list(inner.iterdir()):
                path.rename(aside / path.name)
            inner.rmdir()
        remove_checkpoints(place.parent, {place.name, best.name}, self._save_limit)

    def _know_epochs(self) -> None:
        """Checkpoints know an epoch's order for every method."""
        if not any(isinstance(callback, SliceFineCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(SliceFineCallback())
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SliceFineCallback):
                callback.any_model = True

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; raises `NumericalError` before a model that is no longer sound is saved."""
        found = super().evaluation_loop(*args, **kwargs)
        loss = (found.metrics or {}).get(f"{kwargs.get('metric_key_prefix', 'eval')}_loss", 0.0)
        if math.isnan(loss):
            raise NumericalError(f"evaluation after step {self.state.global_step}: the loss is {loss}. {_REMEDY}")
        return found


def _regroup(optimizer: Any, rates: dict[int, float]) -> None:
    """Move parameters into groups of their own rate.

    Args:
        optimizer: changed in place.
        rates: of parameters, by ``id``.
    """
    for group in list(optimizer.param_groups):
        settings = {name: value for name, value in group.items() if name != "params"}
        for rate in sorted({rates[id(p)] for p in group["params"] if id(p) in rates}):
            own = [p for p in group["params"] if rates.get(id(p)) == rate]
            group["params"] = [p for p in group["params"] if rates.get(id(p)) != rate]
            optimizer.add_param_group({**settings, "params": own, "lr": rate})


class _AfterStep(TrainerCallback):  # type: ignore[misc]
    """Calls what a method does after each optimizer step, while gradients are still there."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The Trainer's count is of the steps before this one."""
        self.work(model, state.global_step + 1, state.max_steps)


def check_weights(model: Any, step: int) -> None:
    """Raise `NumericalError` if a trained weight is not finite; no loss follows the last step to show it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(parameter.isfinite().all()):
            raise NumericalError(f"step {step}: {name} is no longer finite. {_REMEDY}")
