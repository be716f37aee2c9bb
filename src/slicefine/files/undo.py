"""Take positions out of an adapter's file: its last visits, or any single one. The base model is not needed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..functional import read_block, write_block
from ..geometry import Slice, covered
from ..journal import Visit
from ..pace import check_progress
from .adapter import Adapter, LayerFile

__all__ = ["drop", "undo"]


def undo(adapter: Adapter, moves: int = 1) -> Adapter:
    """The adapter as it was before its last visits, bit for bit; a head stays as it is.

    Args:
        adapter: the slices.
        moves: how many visits to take back.

    Raises:
        ConfigError: if that would leave nothing.
        UnsupportedError: if entries of those visits were trained before and the history does not reach so far.
    """
    if moves < 1:
        raise ConfigError(f"undo: moves={moves} must be at least 1.")
    count = _visits(adapter)
    if moves >= count > 1:
        raise ConfigError(
            f"undo: {adapter.folder} has {count} visits, and the first one stays, so at most {count - 1} can be taken "
            f"back; got moves={moves}."
        )
    for _ in range(moves):
        adapter = drop(adapter, _visits(adapter) - 1)
    return adapter


def drop(adapter: Adapter, visit: int) -> Adapter:
    """The adapter without one visit: what only that visit trained has the value from before it.

    Entries of later visits, too, keep their values: the later visits built on them. A last visit that was only entered,
    without a step, goes with it.

    Args:
        adapter: the slices.
        visit: its number, counted from 0.

    Raises:
        ConfigError: if there is no such visit, or no other one.
        UnsupportedError: if entries of that visit were trained before and the history does not reach so far.
    """
    count = _visits(adapter)
    if count < 2:
        raise ConfigError(f"undo: {adapter.folder} has one visit, and without it nothing is left; delete the adapter.")
    if not 0 <= visit < count:
        raise ConfigError(f"undo: {adapter.folder} has {count} visits; there is no number {visit + 1}.")
    if visit < count - 1 and not any(_stepped(layer.visits[-1]) for layer in adapter.layers.values()):
        adapter = drop(adapter, count - 1)  # it was only entered, and would hold what the visit to drop trained
    progress = check_progress(adapter.config.get("progress"), str(adapter.folder))
    config = dict(adapter.config)
    if progress:
        config["progress"] = [entry for i, entry in enumerate(progress) if i != visit]
    layers = {name: _without(name, layer, visit) for name, layer in adapter.layers.items()}
    return replace(adapter, config=config, layers=layers)


def _stepped(visit: Visit) -> bool:
    return visit.last_step >= visit.first_step


def _visits(adapter: Adapter) -> int:
    counts = {len(layer.visits) for layer in adapter.layers.values()}
    if len(counts) != 1:
        raise UnsupportedError(
            f"undo: the layers of {adapter.folder} were visited {min(counts)} to {max(counts)} times, as in a composed "
            "adapter; take positions out of its parts and compose them again."
        )
    return counts.pop()


def _without(name: str, layer: LayerFile, number: int) -> LayerFile:
    """One layer without one of its visits."""
    waited = _waited(name, layer.visits, number)
    visits, shape = list(layer.visits), layer.shape
    for later in waited:  # at the position before it from now on
        visits[later] = visits[later]._replace(slice=visits[number - 1].slice)
    layer = replace(layer, visits=visits)
    block, first_step, last_step = visits[number]
    matrix = torch.zeros(shape, dtype=torch.promote_types(layer.dtype, torch.float32))
    for own, lines in layer.values.items():
        write_block(matrix, own, lines)
    # entries of the block that fall back to what an earlier visit trained: their values from before this one
    waiting = torch.zeros(shape, dtype=torch.bool)
    history = list(layer.before)
    given, trained = history[number], last_step >= first_step
    earlier = covered(block, dict.fromkeys(visit.slice for visit in visits[:number]), shape)
    if trained and bool(earlier.any()):
        write_block(waiting, block, earlier)
    fallback = torch.zeros_like(matrix)
    if given is not None and given.numel():
        lines = read_block(fallback, block)
        lines[earlier] = given.to(lines.dtype)
        write_block(fallback, block, lines)
    for later in range(number + 1 + len(waited), len(visits)):
        history[later] = _rebased(layer, later, number, waiting, None if given is None else fallback)
    if bool(waiting.any()):  # no later visit holds them
        if given is None:
            raise UnsupportedError(
                f"undo: {name}: visit {number + 1} of {len(visits)} trained {int(waiting.sum()):,} entries that "
                "earlier visits had trained, and the file does not hold their values from before (its history holds "
                f"the last {_reach(layer)} visits). Raise history= before training to undo more."
            )
        matrix[waiting] = fallback[waiting]
    rest = [visit for i, visit in enumerate(visits) if i != number]
    values = {own: read_block(matrix, own) for own in dict.fromkeys(visit.slice for visit in rest)}
    before = [kept for i, kept in enumerate(history) if i != number]
    return replace(layer, visits=rest, values=values, before=before)


def _waited(name: str, visits: list[Visit], number: int) -> range:
    """The visits after a trained one through which the layer only waited there, outside a window of blocks."""
    end = number + 1
    trained = visits[number].last_step >= visits[number].first_step
    while trained and end < len(visits):
        block, first_step, last_step = visits[end]
        if block != visits[number].slice or last_step >= first_step:
            break
        end += 1
    if number == 0 and end > 1:
        raise UnsupportedError(
            f"undo: {name}: after its first visit the layer waited there, outside the window of blocks, so that visit "
            "cannot be taken out alone."
        )
    return range(number + 1, end)


def _rebased(layer: LayerFile, later: int, number: int, waiting: Tensor, fallback: Tensor | None) -> Tensor | None:
    """A later visit's history without what the dropped visit trained; it takes over the entries that wait in it."""
    visits, shape, kept = layer.visits, layer.shape, layer.before[later]
    block, first_step, last_step = visits[later]
    mine = read_block(waiting, block)
    if bool(mine.any()):
        write_block(waiting, block, torch.zeros_like(mine))
    if kept is None or last_step < first_step:
        return kept
    earlier = [visit.slice for visit in visits[:later]]
    old = covered(block, dict.fromkeys(earlier), shape)
    lines = torch.zeros(old.shape, dtype=kept.dtype)
    lines[old] = kept
    if bool(mine.any()):
        if fallback is None:
            return None
        lines[mine] = read_block(fallback, block)[mine].to(lines.dtype)
    return lines[covered(block, dict.fromkeys(_others(earlier, number)), shape)]


def _others(slices: list[Slice], number: int) -> list[Slice]:
    return [block for i, block in enumerate(slices) if i != number]


def _reach(layer: LayerFile) -> int:
    return sum(kept is not None for kept in layer.before)
