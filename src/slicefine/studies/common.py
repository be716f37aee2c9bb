"""What every study shares: model and data opened from a recipe, and results written as JSON, pictures and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..charts import Chart, plain
from ..errors import ConfigError, DataError
from ..plots import save_chart
from ..targets import match_layers
from ..tasks.base import Prepared
from ..tasks.settings import DataSettings, ModelSettings, TaskSettings
from ..weights import supports
from ..window import block_paths

__all__ = [
    "Opened",
    "Result",
    "StudySettings",
    "block_names",
    "draw_batches",
    "find_device",
    "open_model",
    "publish",
]


@dataclass
class StudySettings:
    """Which model and data a study looks at, and how much of them.

    Args:
        model: the pretrained model.
        data: the data set.
        task: the task.
        target_modules: the layers to look at: "all-linear", names, or a regular expression.
        split: the rows to look at: train or validation; test data is for last looks.
        samples: rows at most, drawn with the seed.
        batch_size: rows per batch.
        device: cpu, cuda, ...; None takes an accelerator if there is one.
        seed: of the draw.
        output: folder for JSON and pictures; None prints only.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    task: TaskSettings = field(default_factory=TaskSettings)
    target_modules: str | list[str] = "all-linear"
    split: str = "train"
    samples: int = 256
    batch_size: int = 16
    device: str | None = None
    seed: int = 0
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be at least 1.")
        if self.split not in ("train", "validation"):
            raise ConfigError(f"split={self.split!r}: expected train or validation; test data is for last looks.")


@dataclass
class Opened:
    """A model with some of its data.

    Attributes:
        model: in evaluation mode, on the device.
        batches: the chosen rows, with labels, on the device.
        labels: class numbers or targets of the rows, on the CPU.
        layers: names of the linear layers that were chosen; a new head has nothing pretrained and is not among them.
        class_count: classes of a classification task; None for others.
        new_modules: modules with random weights, which the checkpoint did not have: the head.
    """

    model: Any
    batches: list[dict[str, torch.Tensor]]
    labels: torch.Tensor
    layers: list[str]
    class_count: int | None
    new_modules: list[str] = field(default_factory=list)


@dataclass
class Result:
    """What a study found.

    Attributes:
        name: of its JSON file.
        title: of its table.
        columns: of the table.
        rows: of the table, as they are shown.
        numbers: everything, as plain data.
        charts: the pictures.
        notes: sentences below the table: what the numbers mean, where a premise fails.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: dict[str, Any]
    charts: Sequence[Chart] = ()
    notes: Sequence[str] = ()


def open_model(settings: StudySettings) -> Opened:
    """Load model and rows as `slicefine train` would, without training anything.

    Raises:
        ConfigError: for a setting that is wrong, or if no layer matches.
        DataError: if the data cannot be used.
    """
    from transformers import set_seed

    from ..training.session import open_task

    task, splits = open_task(_as_train(settings))
    if settings.split not in splits:
        raise ConfigError(f"split={settings.split!r}: data.path={settings.data.path!r} has {', '.join(splits)}.")
    set_seed(settings.seed)
    loaded = task.load()
    prepared = task.prepare({settings.split: splits[settings.split]}, loaded)
    device = find_device(settings.device)
    model = loaded.model.to(device).eval()
    batches = draw_batches(prepared, settings, device)
    if "labels" not in batches[0]:
        raise DataError(f"data.path={settings.data.path!r}: rows without labels cannot be studied.")
    labels = batches[0]["labels"]
    joined = torch.cat([batch["labels"].cpu() for batch in batches]) if labels.dim() == 1 else torch.empty(0)
    count = None if joined.is_floating_point() or labels.dim() != 1 else int(model.config.num_labels)
    new = tuple(f"{module}." for module in loaded.new_modules)
    layers = [name for name in match_layers(model, settings.target_modules) if not f"{name}.".startswith(new or "\0")]
    return Opened(model, batches, joined, layers, count, list(loaded.new_modules))


def draw_batches(prepared: Prepared, settings: StudySettings, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """The rows that a study looks at, drawn with its seed, as batches on the device."""
    rows = prepared.splits[settings.split]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    order = order[: settings.samples]
    groups = [order[at : at + settings.batch_size] for at in range(0, len(order), settings.batch_size)]
    collated = [prepared.collator([rows[i] for i in group]) for group in groups]
    return [{name: value.to(device) for name, value in batch.items()} for batch in collated]


def block_names(model: Any) -> list[str]:
    """The modules that hold one block (a transformer's layer) each, lowest first.

    Raises:
        ConfigError: if the model's linear layers are not numbered.
    """
    return block_paths(name for name, module in model.named_modules() if supports(module))


def publish(result: Result, output: str | None, console: Console | None = None, settings: Any = None) -> list[Path]:
    """Print the table and notes; write ``NAME.json`` and every chart (PNG and JSON) where an output folder is given.

    Returns:
        The files.
    """
    from ..training.report import environment, write_json

    console = console or Console(width=None if Console().is_terminal else 120)
    table = Table(title=result.title)
    for number, column in enumerate(result.columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in result.rows:
        table.add_row(*row)
    console.print(table)
    for note in result.notes:
        console.print(note, highlight=False)
    if output is None:
        return []
    folder = Path(output).expanduser()
    files = [folder / f"{result.name}.json"]
    content = {"numbers": result.numbers, "notes": list(result.notes), "settings": settings, **environment()}
    write_json(files[0], plain(content))
    for chart in result.charts:
        files += save_chart(chart, folder)
    console.print(f"written to {folder}", highlight=False)
    return files


def find_device(name: str | None) -> torch.device:
    """The device of that name; for None an accelerator, if there is one.

    Raises:
        ConfigError: if it cannot be used.
    """
    if name is None:
        # a build of torch for GPUs names its accelerator where there is none, too
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _as_train(settings: StudySettings) -> Any:
    from ..training.settings import TrainSettings

    return TrainSettings(model=settings.model, data=settings.data, task=settings.task)
