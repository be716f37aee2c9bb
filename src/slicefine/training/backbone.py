"""A run on a changed backbone: the pretrained weights are pruned or drawn anew, and kept beside the adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..analysis.backbone import prune, reinitialise
from ..files.writing import atomic_folder
from ..geometry import Slice
from ..mover import movers_of
from ..tasks.base import Loaded, Prepared, Task
from .continuing import Record
from .forecast import planned_slices
from .methods import make_trainable, measured_positions
from .plan import moves_of
from .session import Session, open_task
from .settings import BackboneSettings, TrainSettings

__all__ = ["BASE", "change_backbone", "with_changed_backbone"]

BASE = "base"


def with_changed_backbone(settings: TrainSettings, output: Path, resumed: bool = False) -> TrainSettings:
    """Write the changed model below ``output`` and return the settings of a run on it.

    From there on it is an ordinary run: saving, reloading, merging and undoing know the base by its folder. A resumed
    run takes the folder that is there.

    Args:
        settings: with ``backbone.prune`` or ``backbone.reinitialise``; others are returned as they are.
        output: the run's folder.
        resumed: go on with what an interrupted run wrote.
    """
    if not settings.backbone.changed:
        return settings
    folder = output / BASE
    positions_file = folder / "positions.json"
    if not (resumed and positions_file.is_file()):
        with atomic_folder(folder) as aside:
            _write(settings, aside)

    model = replace(settings.model, path=str(folder), revision=None, tokenizer=None)
    positions = json.loads(positions_file.read_text())
    chosen = replace(settings.slice, positions=positions)
    return replace(settings, model=model, slice=chosen, backbone=BackboneSettings())


def change_backbone(model: Any, settings: BackboneSettings, frozen: list[str], keep: dict[str, list[Slice]]) -> None:
    """Draw new weights, then prune, in place.

    Args:
        model: with pretrained weights.
        settings: what to do.
        frozen: names of the parameters that are the backbone; only those of two dimensions or more are changed.
        keep: slices that will be trained, by layer name, in the layers' own layout: ``(out, in)``.
    """
    parameters = dict(model.named_parameters())
    weights = {name: parameters[name].detach().cpu() for name in frozen if parameters[name].dim() >= 2}
    if settings.reinitialise is not None:
        weights = reinitialise(weights, settings.reinitialise, settings.seed)
    if settings.prune > 0:
        weights = prune(weights, settings.prune, _in_storage(model, keep))
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def _write(settings: TrainSettings, folder: Path) -> None:

    task, splits = open_task(settings)
    set_seed(settings.training.seed)
    loaded = task.load()
    prepared = task.prepare(splits, loaded)
    positions = measured_positions(loaded, settings, prepared)
    if settings.method.name == "slicefine":
        settings = replace(settings, slice=replace(settings.slice, positions=positions))
        keep = _planned(loaded, task, settings, prepared)
    else:
        keep = {}
    new = tuple(f"{module}." for module in loaded.new_modules)
    frozen = [name for name, _ in loaded.model.named_parameters() if not name.startswith(new or "\0")]
    change_backbone(loaded.model, settings.backbone, frozen, keep)
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    (folder / "positions.json").write_text(json.dumps(positions))


def _planned(loaded: Loaded, task: Task, settings: TrainSettings, prepared: Prepared) -> dict[str, list[Slice]]:
    """Every slice that the run will train, by layer; the model is unwrapped again."""
    model = make_trainable(loaded, task, settings, prepared)
    moves = moves_of(model, Session(settings, task, loaded, model, prepared, Record()).total_steps)
    (mover,) = movers_of(model)
    found = {
        layer.states[mover.name].layer_name: [visit.slice for visit in planned_slices(layer, mover.name, len(moves))]
        for layer in mover.layers.values()
    }
    loaded.model = model.unload()
    return found


def _in_storage(model: Any, keep: dict[str, list[Slice]]) -> dict[str, list[Slice]]:
    """Slices by parameter name; Conv1D stores its weight transposed."""
    other = {"row": "column", "column": "row", "entries": "entries"}
    return {
        f"{name}.weight": [
            block if isinstance(model.get_submodule(name), torch.nn.Linear) else block._replace(axis=other[block.axis])
            for block in blocks
        ]
        for name, blocks in keep.items()
    }
