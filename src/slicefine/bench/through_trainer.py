"""The same workload through transformers' Trainer, whose own work per step then counts as well."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .shapes import step_loss
from .workload import Workload, now

__all__ = ["TrainerWorkload"]

_STEPS = 3  # of one call of `Trainer.train`; the first is not timed, because it follows the set-up


class TrainerWorkload(Workload):
    """As `Workload`; a step is the mean of several inside one call of ``Trainer.train``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.trained:  # Trainer wants something to optimize, also for the floor; nothing uses it
            self.model.register_parameter("bench_idle", nn.Parameter(torch.zeros(1, device=self.device)))
        self._clock = _Clock()
        arguments = TrainingArguments(
            output_dir=tempfile.gettempdir(),  # nothing is saved
            max_steps=_STEPS,
            per_device_train_batch_size=1,
            learning_rate=1e-5,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=self.device.type == "cpu",
            dataloader_pin_memory=False,
        )
        batch = self.batch
        self._trainer = _Trainer(
            model=self.model,
            args=arguments,
            train_dataset=[batch] * _STEPS,  # type: ignore[arg-type]
            data_collator=lambda rows: rows[0],
            callbacks=[self._clock],
            # the method's own, so that every method steps with the same, in its fastest form
            optimizers=(self.optimizer, None),
        )
        self._trainer.remove_callback(PrinterCallback)
        self._trainer.remove_callback(ProgressCallback)

    def step(self) -> tuple[float, float, float]:
        """Mean seconds of a step, all of it in the second place: Trainer does not tell the parts."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a run of three steps moves no slice
            self._trainer.train()
        return 0.0, self._clock.seconds / (_STEPS - 1), 0.0


class _Trainer(Trainer):  # type: ignore[misc]
    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The workload's loss: models without a head have none of their own."""
        return step_loss(model, inputs)


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds from the end of the first step to the end of the last one."""

    def __init__(self) -> None:
        self._began = 0.0
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        seconds = now()
        if state.global_step == 1:
            self._began = seconds
        self.seconds = seconds - self._began
