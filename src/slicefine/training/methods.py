"""Make a loaded model trainable, by SliceFine or any other method of the registry."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..methods import Base, Method, find, options_of
from ..targets import linear_names
from ..tasks.base import Loaded, Prepared, Task
from .counts import bias_entries
from .settings import SliceSettings, TrainSettings

__all__ = [
    "ENERGY_BATCHES",
    "make_trainable",
    "measured_positions",
    "new_parameters",
    "open_base",
    "planned_steps",
    "tensor_counts",
    "to_device",
    "train_batches",
    "typical_batches",
]

ENERGY_BATCHES = 8  # with 64, 97% of the first nine blocks are the same (docs/results/accuracy.md)


def make_trainable(
    loaded: Loaded, task: Task, settings: TrainSettings, prepared: Prepared, checkpoint: Path | None = None
) -> Any:
    """The model to train; it shares the weights of ``loaded.model``.

    Args:
        loaded: base model and processor.
        task: the task.
        settings: the recipe.
        prepared: the data sets.
        checkpoint: of the run to go on with, whose measured positions are kept; another machine could find others.

    Raises:
        ConfigError: if no layer matches, or the method does not fit the task.
        UnsupportedError: if the model lacks what the method trains.
    """
    method = settings.chosen_method
    if method.name == "slicefine":
        kept = _kept_positions(checkpoint) if settings.slice.measured else None
        positions = measured_positions(loaded, settings, prepared) if kept is None else kept
        options = _slice_options(loaded, settings, positions)
    else:
        options = options_of(method, settings.method.options)
    steps = planned_steps(settings, len(prepared.splits["train"]))
    try:
        return method.build(open_base(loaded, task, settings, steps), options)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"slice.target_modules={settings.slice.target_modules!r}: {error} The linear layers of this model are "
            f"called {', '.join(linear_names(loaded.model)[:20])}."
        ) from error


def open_base(loaded: Loaded, task: Task, settings: TrainSettings, steps: int) -> Base:
    """What a method of the registry is given."""
    chosen = settings.slice
    return Base(
        model=loaded.model,
        head=tuple(loaded.new_modules),
        target_modules=chosen.target_modules,
        exclude_modules=chosen.exclude_modules,
        layers_to_transform=chosen.layers_to_transform,
        task_type=task.peft_task_type,
        steps=steps,
        seed=settings.training.seed,
    )


def planned_steps(settings: TrainSettings, rows: int) -> int:
    """Optimizer steps of a run over so many rows, as the Trainer counts them."""
    training = settings.training
    if training.max_steps is not None:
        return training.max_steps
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    devices = processes if processes > 1 else max(1, torch.cuda.device_count())
    batches = math.ceil(rows / (training.batch_size * devices))
    return math.ceil(training.epochs * max(1, math.ceil(batches / training.gradient_accumulation)))


def train_batches(loaded: Loaded, settings: TrainSettings, prepared: Prepared, count: int) -> Iterator[dict[str, Any]]:
    """Random batches of the train set, on the device that the run will use; the model is put there, too."""
    rows, size = prepared.splits["train"], settings.training.batch_size
    picked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.training.seed)).tolist()
    groups = [picked[at : at + size] for at in range(0, min(len(picked), count * size), size)]
    return _collated(loaded, prepared, groups)


def typical_batches(
    loaded: Loaded, settings: TrainSettings, prepared: Prepared, count: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Batches as the run will make them, from the shorter to the longer ones, and the largest of all.

    They stand for equal shares of an epoch's batches, so that their mean cost is about an epoch's mean.
    """
    rows, size = prepared.splits["train"], settings.training.batch_size
    generator = torch.Generator().manual_seed(settings.training.seed)
    texts = "input_ids" in rows.column_names
    lengths = [len(ids) for ids in rows["input_ids"]] if texts else [1] * len(rows)
    if texts and settings.training.group_by_length:
        from transformers.trainer_pt_utils import LengthGroupedSampler

        together = size * settings.training.gradient_accumulation  # as Trainer groups them
        order = list(LengthGroupedSampler(together, lengths=lengths, generator=generator))
    else:
        order = torch.randperm(len(rows), generator=generator).tolist()
    groups = [order[at : at + size] for at in range(0, len(order), size)]
    groups.sort(key=lambda group: len(group) * max(lengths[i] for i in group))
    count = min(count, len(groups))
    chosen = [groups[int((i + 0.5) * len(groups) / count)] for i in range(count)]
    *typical, largest = _collated(loaded, prepared, [*chosen, groups[-1]])
    return typical, largest


def to_device(loaded: Loaded) -> torch.device:
    """Put the model where the run will be."""
    from accelerate import PartialState

    device: torch.device = PartialState(cpu=not torch.accelerator.is_available()).device
    loaded.model.to(device)
    return device


def _collated(loaded: Loaded, prepared: Prepared, groups: list[list[int]]) -> Iterator[dict[str, Any]]:
    from accelerate.utils import send_to_device

    device = to_device(loaded)
    rows = prepared.splits["train"]
    for group in groups:
        yield send_to_device(dict(prepared.collator([rows[i] for i in group])), device)


def new_parameters(model: Any, loaded: Loaded) -> list[Any]:
    """Trainable parameters of the new modules (the head), for their own learning rate."""
    chosen = []
    for name, parameter in model.named_parameters():
        plain = name.replace("modules_to_save.default.", "").removeprefix("base_model.model.")
        if parameter.requires_grad and any(plain.startswith(f"{module}.") for module in loaded.new_modules):
            chosen.append(parameter)
    return chosen


def tensor_counts(model: Any, loaded: Loaded, method: Method) -> dict[str, int]:
    """Entries: trained now (padding does not count), of which in the head, in the base, and added to it."""
    from ..mover import movers_of

    head = sum(p.numel() for p in new_parameters(model, loaded))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    movers = movers_of(model)
    copies = sum(p.numel() for n, p in model.named_parameters() if "modules_to_save" in n or "slicefine_" in n)
    added = sum(p.numel() for p in model.parameters()) - copies - loaded.entries
    if method.additions == "0":  # what stands beside the base while it trains takes the place of entries there
        added = 0
    if movers:
        trained = sum(mover.active_entries() for mover in movers) + bias_entries(model) + head
    return {"trainable": trained, "head": head, "total": loaded.entries, "added": added}


def measured_positions(loaded: Loaded, settings: TrainSettings, prepared: Prepared) -> Any:
    """The settings' positions; starts by energy or importance are measured on a few training batches."""
    chosen = settings.slice
    if not chosen.measured:
        return chosen.positions
    by_energy = chosen.positions == "energy"
    if chosen.mode == "random_mask" or (by_energy and not _ordered_axes(chosen)):
        return "sweep"  # masks are drawn
    from accelerate.utils import broadcast_object_list

    batches = train_batches(loaded, settings, prepared, ENERGY_BATCHES)
    if by_energy:
        positions = _by_energy(loaded.model, batches, chosen)
    else:
        from .importance import positions_by_importance

        positions = positions_by_importance(loaded, settings, prepared, lambda name: _ranks(chosen, name))
    first: dict[str, dict[str, list[int]]] = broadcast_object_list([positions])[0]  # the same in every process
    return first


def _kept_positions(checkpoint: Path | None) -> Any:
    """Positions in the adapter of a checkpoint; None if there are none."""
    file = None if checkpoint is None else checkpoint / "adapter_config.json"
    return json.loads(file.read_text()).get("positions") if file is not None and file.is_file() else None


def _by_energy(model: Any, batches: Iterator[dict[str, Any]], chosen: SliceSettings) -> dict[str, dict[str, list[int]]]:
    from ..energy import energy_positions

    return energy_positions(
        model,
        batches,
        r=lambda name: _ranks(chosen, name)[1],
        r_row=lambda name: _ranks(chosen, name)[0],
        target_modules=chosen.target_modules or "all-linear",
        # an interval's number of moves is not known here
        # and with others to keep out of, all positions are needed to choose from
        visits=None if chosen.interval is not None or chosen.moves is None or chosen.reserve else chosen.moves + 1,
        axes=_ordered_axes(chosen),
    )


def _ordered_axes(chosen: SliceSettings) -> list[str]:
    """Orientations that the run trains and positions=energy orders."""
    trained = ["row", "column"] if chosen.mode == "alternate" else [chosen.mode]
    return [axis for axis in trained if axis == "column" or chosen.row_order == "gradient"]


def _ranks(chosen: SliceSettings, name: str) -> tuple[int, int]:
    """Rank of a layer's row and column slices."""
    from peft.utils.other import get_pattern_key

    own = chosen.rank_pattern.get(get_pattern_key(list(chosen.rank_pattern), name))
    if own is not None:
        return own, own
    return (
        chosen.r if chosen.r_row is None else chosen.r_row,
        chosen.r if chosen.r_column is None else chosen.r_column,
    )


def _slice_options(loaded: Loaded, settings: TrainSettings, positions: Any) -> dict[str, Any]:
    """The slice's settings as the method's options; positions are known by now."""
    chosen = {name: getattr(settings.slice, name) for name in find("slicefine").options}
    return {**chosen, "positions": positions, "reserve": settings.slice.reserve or None}
