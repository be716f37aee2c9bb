"""From settings to a Trainer that is ready to go: data, model, method, arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..errors import ConfigError
from ..tasks import Loaded, Prepared, Task, get_task
from ..tasks.general import General, general_of
from ..tasks.sources import load_splits
from .continuing import Patience, Record, SaveEvery
from .methods import make_trainable, new_parameters, planned_steps, to_device
from .screen import Screen
from .settings import TrainSettings
from .trainer import SliceTrainer

__all__ = ["Session", "build", "compute_with", "main_metric", "measure", "open_task"]


@dataclass
class Session:
    """Everything that a run works with.

    Attributes:
        settings: the recipe.
        task: the task, which knows the classes.
        loaded: base model and processor.
        model: the model to train.
        prepared: the data sets.
        record: step times and moves.
        general: general texts, and what the base foretells of them; None where the recipe has none.
    """

    settings: TrainSettings
    task: Task
    loaded: Loaded
    model: Any
    prepared: Prepared
    record: Record
    general: General | None = None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, as the Trainer counts them."""
        return planned_steps(self.settings, len(self.prepared.splits["train"]))

    def trainer(self, folder: str, screen: Screen | None = None) -> SliceTrainer:
        """The Trainer; its checkpoints go to ``folder``."""
        splits, settings = self.prepared.splits, self.settings
        callbacks: list[Any] = []
        if settings.training.early_stopping is not None:
            callbacks.append(Patience(settings.training.early_stopping))
        if settings.training.save_steps is not None:
            callbacks.append(SaveEvery(settings.training.save_steps))
        arguments = _arguments(self, folder)
        _check_reports(arguments.report_to)
        trainer = SliceTrainer(
            model=self.model,
            args=arguments,
            data_collator=self.prepared.collator,
            train_dataset=splits.get("train"),
            eval_dataset=splits.get("validation"),
            processing_class=self.loaded.processor,
            compute_metrics=compute_with(self.task),
            preprocess_logits_for_metrics=self.prepared.preprocess_logits,
            callbacks=callbacks,
            record=self.record,
            save_limit=settings.training.save_limit,
            head_parameters=new_parameters(self.model, self.loaded),
            head_rate=settings.training.head_learning_rate,
            method=settings.chosen_method,
            options=settings.method.options,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if screen is not None:
            trainer.add_callback(screen)
        return trainer


def open_task(settings: TrainSettings) -> tuple[Task, dict[str, Any]]:
    """The task and its checked raw splits.

    Raises:
        ConfigError: for an unknown task or metric.
        DataError: if the data is missing, empty, or not what the task needs.
    """
    task = get_task(settings.task, settings.model, settings.data)
    return task, load_splits(settings.data, check=task.read)


def build(settings: TrainSettings, general: bool = False, checkpoint: Path | None = None) -> Session:
    """Load data and model and apply the method.

    Args:
        settings: the recipe.
        general: measure the base on general text first, if the recipe names some; a plan does without.
        checkpoint: of the run to go on with.

    Raises:
        ConfigError: if a setting does not fit.
        DataError: if the data cannot be used, or there is no train set.
    """
    task, splits = open_task(settings)
    if "train" not in splits:
        raise ConfigError(
            f"data.path={settings.data.path!r} has the sets {', '.join(splits)} but no train set; name its file or "
            "split with data.train."
        )
    set_seed(settings.training.seed)  # the new head is drawn here
    loaded = task.load()
    prepared = task.prepare(splits, loaded)
    found = None
    if general and settings.task.general is not None:  # on the base: some methods change its outputs at once
        to_device(loaded)
        found = general_of(loaded.model, loaded.processor, settings.task)
    model = make_trainable(loaded, task, settings, prepared, checkpoint)
    return Session(settings, task, loaded, model, prepared, Record(), found)


def main_metric(task: Task, settings: TrainSettings) -> tuple[str, bool]:
    """Name of the metric that picks the best checkpoint, and whether more is better."""
    name = settings.task.metric or next(iter(task.metrics))
    return name, name not in task.minimise


def compute_with(task: Task) -> Callable[[Any], dict[str, float]]:
    """The task's metrics as the Trainer calls them."""
    return lambda result: task.compute(result.predictions, result.label_ids)


def measure(trainer: Any, task: Task, rows: Any) -> dict[str, float]:
    """All metrics of a task, and the loss, on a prepared data set."""
    found = trainer.predict(rows, metric_key_prefix="x").metrics
    return {name: float(found[f"x_{name}"]) for name in (*task.metrics, "loss") if f"x_{name}" in found}


def _check_reports(names: Any) -> None:
    """Each integration raises at construction if its package is missing; the Trainer would pass that on as it is."""
    try:
        for callback in get_reporting_integration_callbacks(names):  # type: ignore[no-untyped-call]
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"training.report_to={names!r}: {error}") from error


def _arguments(session: Session, folder: str) -> TrainingArguments:
    settings, training = session.settings, session.settings.training
    every = training.evaluate if "validation" in session.prepared.splits else "no"
    if every == "no" and training.early_stopping is not None:
        raise ConfigError("training.early_stopping needs a validation set; set data.validation_fraction.")
    metric, more = main_metric(session.task, settings)
    optional = dict(session.prepared.trainer_args)
    known = {field.name for field in fields(TrainingArguments)}  # transformers renames some during version 5
    if training.group_by_length and optional.get("remove_unused_columns", True):
        by_name = "train_sampling_strategy" in known
        optional |= {"train_sampling_strategy": "group_by_length"} if by_name else {"group_by_length": True}
    if training.evaluate == "steps":
        optional |= {"eval_steps": training.evaluate_steps, "save_steps": training.evaluate_steps}
    if training.gradient_checkpointing:
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        optional |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    try:
        return TrainingArguments(
            output_dir=folder,
            num_train_epochs=training.epochs,
            max_steps=training.max_steps or -1,
            per_device_train_batch_size=training.batch_size,
            per_device_eval_batch_size=training.eval_batch_size or 4 * training.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=training.schedule,
            warmup_steps=math.ceil(training.warmup_ratio * session.total_steps),
            optim=training.optimizer,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            gradient_accumulation_steps=training.gradient_accumulation,
            bf16=training.bf16,
            use_cpu=not torch.accelerator.is_available(),
            seed=training.seed,
            eval_strategy=every,
            save_strategy=training.evaluate if every == "no" else every,
            load_best_model_at_end=training.load_best and every != "no",
            metric_for_best_model=f"eval_{metric}",
            greater_is_better=more,
            logging_steps=training.logging_steps,
            logging_nan_inf_filter=False,
            report_to=training.report_to or "none",
            label_names=["labels"],
            dataloader_pin_memory=torch.accelerator.is_available(),
            dataloader_num_workers=training.workers,
            disable_tqdm=True,
            **optional,
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"training: {error}") from error
