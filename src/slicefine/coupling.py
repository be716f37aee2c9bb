"""Slices that follow a model's structure: whole attention heads, and the same hidden units on both sides of a layer.

A row of ``up_proj`` and the column of ``down_proj`` with the same number belong to one hidden unit; what a head of
``v_proj`` gives, the same head's columns of ``o_proj`` take. Coupled slices train both sides of the same units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from .errors import ConfigError
from .geometry import AXES
from .schedule import Positions, Schedule, own_starts, widened
from .weights import is_linear, kind_of
from .window import block_numbers

__all__ = ["Fit", "check_coupled", "fitted", "structure"]

_HEAD_SIZES = ("head_dim", "attention_head_size")  # what attention modules of transformers and PyTorch call it
_OUTPUTS = {"o_proj", "out_proj", "c_proj", "dense", "wo", "out_lin", "proj"}  # projections that heads flow into
_VALUES = {"v_proj", "value", "v_lin", "wv"}

Shape = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """What the structure asks of a layer's slices.

    Attributes:
        axis: orientation that a coupled layer keeps; None leaves it to the run's mode.
        partner: the coupled layer whose columns go with these rows; of that layer itself, its own name.
        group: columns per row of the other side: heads that share one key and value head.
        rows, columns: slices have a multiple of so many: whole heads.
    """

    axis: str | None = None
    partner: str = ""
    group: int = 1
    rows: int = 1
    columns: int = 1


def structure(model: nn.Module, whole_heads: bool, coupled: bool) -> dict[str, Fit]:
    """What the structure of a model asks of its layers, by name; layers of which it asks nothing are left out.

    Args:
        model: before its layers are wrapped.
        whole_heads: slices of attention's projections are whole heads.
        coupled: hidden units of feed-forward layers, and heads of values and outputs, train on both sides at a time.

    Raises:
        ConfigError: if nothing of that kind is found in the model.
    """
    result: dict[str, Fit] = {}
    if whole_heads:
        result = {name: Fit(rows=rows, columns=columns) for name, (rows, columns) in _heads(model).items()}
        if not result:
            raise ConfigError(
                f"whole_heads: no attention module of this {type(model).__name__} tells its head size "
                f"({' or '.join(_HEAD_SIZES)}); leave it out, and choose a rank that is a multiple of the head size."
            )
    if coupled:
        pairs = list(_pairs(model))
        if not pairs:
            raise ConfigError(
                f"coupled: no two layers of this {type(model).__name__} share hidden units (a feed-forward layer's two "
                "sides, or value and output projections); leave it out."
            )
        for up, down, group, head in pairs:
            rows, columns = result.get(up, Fit()), result.get(down, Fit())
            result[up] = replace(rows, axis="row", partner=down, group=group, rows=max(rows.rows, head))
            size = max(columns.columns, head)
            result[down] = replace(columns, axis="column", partner=down, group=group, columns=size)
    return result


def fitted(schedule: Schedule, fit: Fit | None, layer: str, shape: Shape) -> Schedule:
    """The schedule of one layer as the structure asks for it.

    Args:
        schedule: of the run, with ranks in rows and columns.
        fit: see `structure`; None asks for nothing.
        layer: the layer's name.
        shape: ``(rows, columns)`` of its weight.

    Raises:
        ConfigError: for a random mask, which has no units or heads.

    Example:
        >>> fitted(Schedule("row", row_rank=5), Fit(rows=8), "q_proj", (64, 64)).row_rank
        8
    """
    if fit is None:
        return schedule
    if schedule.mode == "random_mask":
        raise ConfigError("mode='random_mask' draws single entries; whole_heads= and coupled= are for slices.")
    row, column = (-(-rank // size) * size for rank, size in _sizes(schedule, fit))
    if fit.axis is None:
        fits = replace(schedule, row_rank=row, column_rank=column)
        return replace(fits, positions=_starts(fits, fit, layer))
    if callable(schedule.positions):
        raise ConfigError("coupled: a positions function goes where it likes; name an order or give starts.")
    head = max(fit.rows, fit.columns)
    rank = min(-(-schedule.row_rank // head) * head, shape[0] if fit.axis == "row" else shape[1] // fit.group)
    one = replace(schedule, mode=fit.axis, row_rank=rank, column_rank=rank, order_of=f"{fit.partner}row")
    measured = one.positions.get(fit.partner, {}).get("column") if isinstance(one.positions, Mapping) else None
    if isinstance(one.positions, Mapping):
        fits_in = measured is not None and all(start % (head * fit.group) == 0 for start in measured)
        own = [start // fit.group for start in measured or ()] if fits_in else []
        one = replace(one, positions={layer: {fit.axis: own}} if own else "sweep")
    return widened(one, fit.group, layer) if fit.axis == "column" and fit.group > 1 else one


def _sizes(schedule: Schedule, fit: Fit) -> tuple[tuple[int, int], tuple[int, int]]:
    return (schedule.row_rank, fit.rows), (schedule.column_rank, fit.columns)


def _starts(schedule: Schedule, fit: Fit, layer: str) -> Positions:
    """Measured or given starts that begin a head; else a sweep."""
    if callable(schedule.positions) or isinstance(schedule.positions, str):
        return schedule.positions
    if not isinstance(schedule.positions, Mapping):
        used = {schedule.axis(0), schedule.axis(1)}
        size = max(fit.rows if "row" in used else 1, fit.columns if "column" in used else 1)
        if any(int(start) % size for start in schedule.positions):
            raise ConfigError(
                f"whole_heads: {layer}: positions={schedule.positions}: give starts of heads, multiples of {size}."
            )
        return schedule.positions
    own = schedule.positions.get(layer, {})
    kept = {a: s for a, s in own.items() if all(start % (fit.rows if a == "row" else fit.columns) == 0 for start in s)}
    return {**schedule.positions, layer: kept}


def _shapes(model: nn.Module) -> dict[str, Shape]:
    """Shapes of all linear weights by layer name, whatever the layer."""
    result = {}
    for full_name, module in model.named_modules():
        name = full_name.replace(".base_layer", "")  # another adapter may be there
        kind = kind_of(module) if name and is_linear(module) else None
        if kind is not None:
            result[name] = kind.shape(module)
    return result


def _attentions(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Attention modules and their head size."""
    for name, module in model.named_modules():
        sizes = [size for size in (getattr(module, a, None) for a in _HEAD_SIZES) if type(size) is int and size > 0]
        if sizes and not name.endswith(".base_layer"):
            yield name.replace(".base_layer", ""), sizes[0]


def _heads(model: nn.Module) -> dict[str, tuple[int, int]]:
    """``{layer: (rows, columns) per head}`` of attention's projections."""
    shapes = _shapes(model)
    result: dict[str, tuple[int, int]] = {}
    for attention, size in _attentions(model):
        for name in _inputs(shapes, attention):
            if shapes[name][0] % size == 0:
                result[name] = (size, 1)
        output = _output(shapes, attention)
        if output is not None and shapes[output][1] % size == 0:
            result[output] = (1, size)
    return result


def _inputs(shapes: Mapping[str, Shape], attention: str) -> list[str]:
    inside = [name for name in shapes if name == attention or name.startswith(f"{attention}.")]
    return [name for name in inside if name.rpartition(".")[2] not in _OUTPUTS]


def _output(shapes: Mapping[str, Shape], attention: str) -> str | None:
    """The projection that an attention module's heads flow into: its own, or one beside it (BERT's)."""
    beside = attention.rpartition(".")[0]
    for place in (attention, *([beside] if "att" in beside.rpartition(".")[2] else [])):
        for name in shapes:
            if name.startswith(f"{place}.") and name.rpartition(".")[2] in _OUTPUTS:
                return name
    return None


def _pairs(model: nn.Module) -> Iterator[tuple[str, str, int, int]]:
    """``(layer with rows, layer with columns, columns per row, rows at least)`` of what shares hidden units.

    Where several heads share one key and value head, only whole heads have the same units on both sides.
    """
    shapes = _shapes(model)
    for attention, size in _attentions(model):
        output = _output(shapes, attention)
        for name in _inputs(shapes, attention) if output is not None else ():
            if name.rpartition(".")[2] in _VALUES and output is not None:
                group, rest = divmod(shapes[output][1], shapes[name][0])
                if rest == 0:
                    yield name, output, group, size if group > 1 else 1
    if not any(part.isdigit() for name in shapes for part in name.split(".")):
        return
    blocks: dict[int, dict[str, Shape]] = {}
    for name, block in block_numbers(shapes).items():
        if not any("att" in part or "qkv" in part for part in name.split(".")):  # their sizes may agree by accident
            blocks.setdefault(block, {})[name] = shapes[name]
    for layers in blocks.values():
        order = list(layers)
        for place, name in enumerate(order):
            rows, columns = layers[name]
            fits = [at for at, down in enumerate(order) if layers[down] == (columns, rows) and columns < rows]
            if fits:  # each expert has its own: the nearest in the same module, as a rule the next one
                nearest = max(fits, key=lambda at: (_shared(name, order[at]), at > place, -abs(at - place)))
                yield name, order[nearest], 1, 1


def _shared(first: str, second: str) -> int:
    """How many leading parts two names have in common."""
    parts = list(zip(first.split("."), second.split("."), strict=False))
    return next((i for i, (a, b) in enumerate(parts) if a != b), len(parts))


def check_coupled(schedules: Mapping[str, tuple[Schedule, Shape]], asked: Mapping[str, Fit]) -> None:
    """Raise `ConfigError` unless both sides of coupled layers go to the same units, in the same order.

    Args:
        schedules: of each layer that trains, as it is for this layer, with the shape of its weight.
        asked: see `structure`.
    """
    for up, fit in asked.items():
        down = fit.partner
        if fit.axis != "row" or up not in schedules or down not in schedules:
            continue
        sides = [(*schedules[name], axis, name) for name, axis in ((up, "row"), (down, "column"))]
        rows, columns = (
            (min(plan.rank(axis), shape[AXES.index(axis)]), [int(s) for s in own_starts(plan, axis, shape, name)])
            for plan, shape, axis, name in sides
        )
        if columns != (rows[0] * fit.group, [start * fit.group for start in rows[1]]):
            raise ConfigError(
                f"coupled: {up} and {down} would train different units: rank_pattern=, reserve= or positions= names "
                "one of them only. Name both sides alike, or leave coupled out."
            )
