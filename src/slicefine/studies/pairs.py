"""A fine-tuned model beside its base, as two plain models on the same rows: what `analyze shift` compares."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..files.adapter import find_adapter
from ..targets import match_layers
from ..tasks.base import Loaded, get_task
from ..tasks.settings import Columns, DataSettings, ModelSettings, TaskSettings
from .common import block_names, draw_batches, find_device

__all__ = ["Pair", "open_pair", "pair_names", "run_folders"]


@dataclass
class Pair:
    """A fine-tuned model and its base, in evaluation mode, on the device.

    Attributes:
        name: of the adapter in tables.
        folder: of the adapter.
        tuned: the model with its trained weights, without any wrapper.
        base: what it is compared with, likewise.
        own_head: whether the base has a head for these outputs. One without gets a copy of the tuned model's: a new
            head is random numbers, and comparing with those says nothing.
        heads: names of the modules that are new or trained whole.
        layers: names of the linear layers outside the heads.
        blocks: names of the modules that hold one block each.
        task: it knows the metrics.
        metric: the task's main metric.
        labels: of each batch, on the CPU.
        batches: rows without labels, on the device.
        is_slices: whether the folder holds a SliceFine adapter.
    """

    name: str
    folder: Path
    tuned: Any
    base: Any
    own_head: bool
    heads: list[str]
    layers: list[str]
    blocks: list[str]
    task: Any
    metric: str
    labels: list[torch.Tensor]
    batches: list[dict[str, torch.Tensor]]
    is_slices: bool


def run_folders(adapters: str | Sequence[str]) -> list[str]:
    """Folders from a list, or from names with commas between them.

    Raises:
        ConfigError: if there is none.

    Example:
        >>> run_folders("runs/a, runs/b")
        ['runs/a', 'runs/b']
    """
    parts = adapters.split(",") if isinstance(adapters, str) else list(adapters)
    found = [part.strip() for part in parts if part.strip()]
    if not found:
        raise ConfigError(f"adapters={adapters!r} names no folder; give those that `slicefine train` wrote.")
    return found


def pair_names(folders: Sequence[str]) -> list[str]:
    """Short names for tables: the run's folder, or the whole path where that is not unique.

    Example:
        >>> pair_names(["runs/a/adapter", "runs/b"]), pair_names(["x/run", "y/run"])
        (['a', 'b'], ['x/run', 'y/run'])
    """
    paths = [Path(folder) for folder in folders]
    short = [path.parent.name if path.name == "adapter" else path.name for path in paths]
    return short if len(set(short)) == len(short) and all(short) else list(folders)


def open_pair(name: str, folder: str, settings: Any) -> Pair:
    """Load a run and its base, and draw rows.

    Args:
        name: of the adapter in tables.
        folder: of the run, or of its adapter.
        settings: `slicefine.studies.shift.Settings`.

    Raises:
        AdapterFileError: if the adapter is missing, corrupt, or belongs to another base.
        ConfigError: if there is no base to compare with, or it is another architecture.
        DataError: if the data cannot be used.
    """
    from ..training.trained import load_trained, read_run

    run = read_run(find_adapter(folder))
    trained = load_trained(Path(folder), settings.model)
    heads, processor = list(trained.loaded.new_modules), trained.loaded.processor
    is_slices = run["adapter"] and trained.model.peft_config["default"].peft_type == "SLICEFINE"
    tuned = trained.model.merge_and_unload() if run["adapter"] else trained.model
    base, own_head = _base(settings, run, processor)
    layers = [layer for layer in match_layers(tuned, "all-linear") if not _inside(layer, heads)]
    _check_alike(settings.base or "base", tuned, base, layers)
    own_head = own_head and _same_outputs(tuned, base, heads)
    for head in () if own_head else heads:
        base.set_submodule(head, copy.deepcopy(tuned.get_submodule(head)))
    device = find_device(settings.device)
    batches = _batches(trained, settings.data or trained.data, settings, device)
    return Pair(
        name=name,
        folder=run["folder"],
        tuned=tuned.to(device).eval(),
        base=base.to(device).eval(),
        own_head=own_head,
        heads=heads,
        layers=layers,
        blocks=block_names(tuned),
        task=trained.task,
        metric=run["task"].get("metric") or next(iter(trained.task.metrics)),
        labels=[batch.pop("labels").cpu() for batch in batches],  # the two models may compute their losses differently
        batches=batches,
        is_slices=is_slices,
    )


def _base(settings: Any, run: dict[str, Any], processor: Any) -> tuple[Any, bool]:
    """The model to compare with, and whether its head comes with it."""
    from ..training.trained import RUN_FILE, load_trained

    own = ModelSettings(**run["model"])
    if settings.base is None:
        if own.config is not None:
            raise ConfigError(
                f"{run['folder']}: trained from random weights, so it has no base; name a run to compare with (--base)."
            )
        loaded, has_head = _pretrained(run, replace(own, path=settings.model or own.path))
        return loaded.model, has_head
    folder = find_adapter(settings.base)
    if (folder / RUN_FILE).is_file() or (folder / "adapter" / RUN_FILE).is_file():
        other = load_trained(folder, settings.model)
        loaded, has_head = other.loaded, True
        model = other.model.merge_and_unload() if hasattr(other.model, "peft_config") else other.model
    else:
        named = replace(own, path=settings.base, config=None, revision=None, tokenizer=None)
        loaded, has_head = _pretrained(run, named)
        model = loaded.model
    vocabularies = [part.get_vocab() for part in (processor, loaded.processor) if hasattr(part, "get_vocab")]
    if len(vocabularies) == 2 and vocabularies[0] != vocabularies[1]:
        raise ConfigError(
            f"base={settings.base!r}: its tokenizer is another one, so its inputs would be other numbers."
        )
    return model, has_head


def _pretrained(run: dict[str, Any], model: ModelSettings) -> tuple[Loaded, bool]:
    """A fresh copy of pretrained weights; a head is its own if the checkpoint is of the same class and size."""
    from transformers import AutoConfig

    from ..tasks.models import resolve_path

    task = get_task(TaskSettings(**run["task"]), model, _run_data(run))
    task.restore(run["state"])
    loaded = task.load()
    assert model.path is not None
    config = AutoConfig.from_pretrained(
        resolve_path(model.path), revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    same_class = type(loaded.model).__name__ in (config.architectures or [])
    same_size = getattr(config, "num_labels", None) == getattr(loaded.model.config, "num_labels", None)
    return loaded, not loaded.new_modules or (same_class and same_size)


def _run_data(run: dict[str, Any]) -> DataSettings:
    return DataSettings(**{**run["data"], "columns": Columns(**run["data"]["columns"])})


def _same_outputs(tuned: Any, base: Any, heads: Sequence[str]) -> bool:
    """Whether the heads of both have the same shapes: as many classes."""
    first, second = (
        {key: value.shape for key, value in model.state_dict().items() if _inside(key, heads)}
        for model in (tuned, base)
    )
    return first == second


def _check_alike(where: str, tuned: Any, base: Any, layers: Sequence[str]) -> None:
    weights = dict(base.named_parameters())
    for layer in layers:
        other, own = weights.get(f"{layer}.weight"), tuned.get_submodule(layer).weight
        if other is None or other.shape != own.shape:
            raise ConfigError(
                f"{where}: layer {layer} is {'missing' if other is None else tuple(other.shape)} in the base, and "
                f"{tuple(own.shape)} in the adapter's model. Give a base of the same architecture."
            )


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _batches(trained: Any, data: DataSettings, settings: Any, device: torch.device) -> list[dict[str, torch.Tensor]]:
    from ..tasks.sources import load_splits

    splits = load_splits(data)
    if settings.split not in splits:
        raise ConfigError(f"split={settings.split!r}: data.path={data.path!r} has {', '.join(splits)}.")
    chosen = {settings.split: splits[settings.split]}
    trained.task.read(chosen)
    prepared = trained.task.prepare(chosen, trained.loaded)
    return draw_batches(prepared, settings, device)
