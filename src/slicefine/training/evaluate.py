"""`evaluate` and `merge`: what is done with the results of a run."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainingArguments

from ..errors import AdapterFileError, ConfigError, DataError
from ..files.adapter import CONFIG, find_adapter, read_adapter, read_config
from ..files.merge import merge_files, missing_modules
from ..files.writing import atomic_folder, check_target
from ..methods.base import merge_layers
from ..tasks import Prepared
from ..tasks.settings import DataSettings
from ..tasks.sources import load_splits
from .bases import open_base
from .report import environment, write_json
from .session import compute_with, measure
from .trained import RUN_FILE, Trained, load_trained, read_run

__all__ = ["check_output", "evaluate", "merge", "publish_metrics"]

_SPLITS = ("train", "validation", "test")


def evaluate(
    adapter: str,
    *,
    split: str = "validation",
    path: str | None = None,
    name: str | None = None,
    file: str | None = None,
    limit: int | None = None,
    model: str | None = None,
    batch_size: int = 32,
    output: str | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> dict[str, float]:
    """All metrics of a trained adapter on one split.

    Args:
        adapter: the folder that `train` wrote.
        split: train, validation or test.
        path, name, file, limit: the data, where it differs from the training run's.
        model: the base, if it is elsewhere than in training.
        batch_size: rows per batch.
        output: file for the metrics.
        trust_remote_code: run code that comes with the base; an adapter's own files cannot say so.
        console: where to print.

    Raises:
        AdapterFileError: if the adapter is missing or corrupt.
        ConfigError: if a setting is wrong, or the file for the metrics cannot be written.
        DataError: if the data has no such split, or cannot be used.

    Example:
        >>> evaluate("runs/demo/adapter", split="test")["accuracy"]  # doctest: +SKIP
        0.72
    """
    if split not in _SPLITS:
        raise ConfigError(f"data.split={split!r} is unknown; expected one of {', '.join(_SPLITS)}.")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size!r} must be at least 1.")
    check_output(output)
    trained = load_trained(Path(adapter), model, trust_remote_code)
    data = _data(trained.data, split, path, name, file, limit)
    splits = load_splits(data)
    if split not in splits:
        raise DataError(f"data.path={data.path!r} has the sets {', '.join(splits)}, but no {split} set.")
    chosen = {split: splits[split]}
    trained.task.read(chosen)
    prepared = trained.task.prepare(chosen, trained.loaded)
    metrics = _predict(trained, prepared, split, batch_size)
    title = f"{split} set of {data.path}, {len(chosen[split]):,} rows"
    publish_metrics(metrics, title, {"adapter": adapter, "split": split}, output, console)
    return metrics


def check_output(output: str | None) -> None:
    """Raise `ConfigError` if metrics could not be written there."""
    if output is not None and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise ConfigError(f"output={output!r} is no file in an existing folder. Give a file name for the metrics.")


def publish_metrics(
    metrics: dict[str, float], title: str, facts: dict[str, Any], output: str | None, console: Console | None = None
) -> None:
    """Print metrics, and write them with facts about them if ``output`` names a file."""
    _print(metrics, title, console or Console())
    if output is None:
        return
    write_json(Path(output), {**facts, "metrics": metrics, **environment()})


def merge(
    adapter: str, output: str, model: str | None = None, overwrite: bool = False, trust_remote_code: bool = False
) -> Path:
    """Write a plain Hugging Face checkpoint: the base with the adapter's values in its weights, and the tokenizer.

    Slices without a new head are written into a copy of the base's own files, in little memory. Anything else that
    `train` wrote is loaded, merged and saved.

    Args:
        adapter: the adapter's folder.
        output: folder of the checkpoint.
        model: the base, if it is elsewhere than in training.
        overwrite: replace what is in that folder.
        trust_remote_code: run code that comes with the base; an adapter's own files cannot say so.

    Raises:
        AdapterFileError: if the adapter is missing or corrupt.
        ConfigError: if the output folder is not empty or cannot be written.
    """
    on_disk = _merge_files(adapter, output, model, overwrite)
    if on_disk is not None:
        return on_disk
    run = read_run(Path(adapter))
    base = Path(model or run["model"]["path"]).expanduser()  # a name on the hub is no folder
    target = check_target(output, [run["folder"], *([base] if base.is_dir() else [])], overwrite)
    trained = load_trained(Path(adapter), model, trust_remote_code)
    whole: Any = trained.model.merge_and_unload() if run["adapter"] else merge_layers(trained.model)
    with atomic_folder(target) as aside:
        whole.save_pretrained(aside)
        trained.loaded.processor.save_pretrained(aside)
    return target


def _merge_files(adapter: str, output: str, model: str | None, overwrite: bool) -> Path | None:
    """Merge file by file; None where the adapter is no slices, or where only `train`'s own run file knows the model."""
    folder = find_adapter(adapter)
    if not (folder / CONFIG).is_file() or read_config(folder).get("peft_type") != "SLICEFINE":
        return None
    content = read_adapter(folder)
    from_run = (folder / RUN_FILE).is_file()
    try:
        base = open_base(content, model)
    except AdapterFileError:  # a base in another format than safetensors
        if from_run:
            return None
        raise
    with base:
        if from_run and missing_modules(content, base):
            return None
        target = check_target(output, [folder, base.folder], overwrite)
        rounded = merge_files(content, base, target)
    if rounded:
        warnings.warn(
            f"SliceFine: trained in higher precision than the base's files have; values were rounded to {rounded[0]}.",
            UserWarning,
            stacklevel=3,
        )
    return target


def _predict(trained: Trained, prepared: Prepared, split: str, batch_size: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_eval_batch_size=batch_size,
            report_to="none",
            label_names=["labels"],
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.accelerator.is_available(),
            **prepared.trainer_args,
        )
        trainer = Trainer(
            model=trained.model,
            args=arguments,
            data_collator=prepared.collator,
            compute_metrics=compute_with(trained.task),
            preprocess_logits_for_metrics=prepared.preprocess_logits,
        )
        return measure(trainer, trained.task, prepared.splits[split])


def _data(
    data: DataSettings, split: str, path: str | None, name: str | None, file: str | None, limit: int | None
) -> DataSettings:
    if path is not None and path != data.path:
        data = replace(data, path=path, name=name, revision=None, train=None, validation=None, test=None)
        if Path(path).is_file():  # one file: it is the split
            whole = Path(path).resolve()
            data, file = replace(data, path=str(whole.parent)), whole.name
    changes: dict[str, Any] = {f"limit_{split}": limit}
    if file is not None:
        changes[split] = file
    return replace(data, **changes)


def _print(metrics: dict[str, float], title: str, console: Console) -> None:
    table = Table(title=title, show_header=False, min_width=min(len(title), console.width))
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)
