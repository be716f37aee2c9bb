"""The protocol of a task and the registry that finds it by name.

Adding a task is one file in this folder: a class with the methods of `Task`, decorated with `register`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from .settings import DataSettings, ModelSettings, TaskSettings

__all__ = ["Loaded", "Metric", "Prepared", "Task", "get_task", "register", "task_names"]

# (predictions as the model gives them, labels) -> a number
Metric = Callable[[NDArray[Any], NDArray[Any]], float]


@dataclass
class Loaded:
    """A model with what prepares its inputs.

    Attributes:
        model: a transformers model.
        processor: its tokenizer or image processor, saved beside the adapter.
        new_modules: names of modules that the checkpoint had no weights for (a new head); trained and saved whole.
        entries: of the model's parameters, before any method adds some.
    """

    model: Any
    processor: Any
    new_modules: list[str] = field(default_factory=list)
    entries: int = 0

    def __post_init__(self) -> None:
        self.entries = sum(parameter.numel() for parameter in self.model.parameters())


@dataclass
class Prepared:
    """Data sets as transformers' Trainer takes them.

    Attributes:
        splits: ``{"train": ..., "validation": ..., "test": ...}``; the last two may be missing.
        collator: makes a batch.
        trainer_args: settings of ``TrainingArguments`` that the task needs.
        preprocess_logits: reduces the model's output before it is gathered for the metrics.
    """

    splits: dict[str, Any]
    collator: Any
    trainer_args: dict[str, Any] = field(default_factory=dict)
    preprocess_logits: Callable[[Any, Any], Any] | None = None


class Task(Protocol):
    """What training needs to know of a task. Settings are given once, at construction.

    Attributes:
        name: how recipes call it.
        peft_task_type: PEFT's name of the model class, or None for the plain one.
        metrics: the metrics that can be chosen, by name; the first one is the default.
        minimise: metrics of which less is better.
    """

    name: str
    peft_task_type: str | None
    metrics: Mapping[str, Metric]
    minimise: frozenset[str]

    def __init__(self, task: TaskSettings, model: ModelSettings, data: DataSettings) -> None: ...

    def read(self, splits: dict[str, Any]) -> None:
        """Check columns and labels of the raw splits, and learn the classes from them."""

    def load(self) -> Loaded:
        """Load model and processor; `read` comes first when training, `restore` when evaluating."""

    def prepare(self, splits: dict[str, Any], loaded: Loaded) -> Prepared:
        """Turn raw splits into what the Trainer takes."""

    def compute(self, outputs: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
        """All metrics of the task."""

    def state(self) -> dict[str, Any]:
        """What `restore` needs in another process (the class names)."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""


_TASKS: dict[str, type[Task]] = {}


def register(task: type[Any]) -> type[Any]:
    """Class decorator: make a task known by its ``name``."""
    _TASKS[task.name] = task
    return task


def task_names() -> list[str]:
    """Names of all tasks; every module of this folder is looked at."""
    package = importlib.import_module(__package__ or "slicefine.tasks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return sorted(_TASKS)


def get_task(task: TaskSettings, model: ModelSettings, data: DataSettings) -> Task:
    """Build the task that the settings name.

    Raises:
        ConfigError: if the task or its metric is unknown.

    Example:
        >>> get_task(TaskSettings("text-regression"), ModelSettings(), DataSettings()).peft_task_type
        'SEQ_CLS'
    """
    names = task_names()
    if task.name not in _TASKS:
        raise ConfigError(f"task.name={task.name!r} is unknown; expected one of {', '.join(names)}.")
    kind = _TASKS[task.name]
    if task.metric is not None and task.metric not in kind.metrics:
        raise ConfigError(
            f"task.metric={task.metric!r} is unknown for {task.name}; expected one of {', '.join(kind.metrics)}."
        )
    return kind(task, model, data)


def as_numbers(values: Any) -> NDArray[Any]:
    """The first array of what the Trainer gathered (some models return a tuple)."""
    return np.asarray(values[0] if isinstance(values, tuple) else values)
