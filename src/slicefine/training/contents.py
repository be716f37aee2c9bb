"""What an adapter file holds: read from its own tensors, the base is not needed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import AdapterFileError
from ..files.adapter import WEIGHTS, find_adapter, open_weights, read_config
from ..files.distance import Distance
from ..geometry import Slice, line_count
from ..journal import Visit, read_table
from ..pace import check_progress
from ..units import size
from .counts import layer_kind

__all__ = ["Contents", "LayerContents", "print_contents", "print_layers", "read_contents"]

_MARK = ".slicefine_"


@dataclass(frozen=True)
class LayerContents:
    """One layer's part of a file.

    Attributes:
        name: the layer.
        visits: where its slice was, and when.
        rows, columns: how many distinct ones were trained.
        values: numbers stored.
    """

    name: str
    visits: list[Visit]
    rows: int
    columns: int
    values: int


@dataclass(frozen=True)
class Contents:
    """An adapter folder.

    Attributes:
        folder: where it is.
        config: its ``adapter_config.json``.
        layers: SliceFine layers, in the order of the file.
        others: other tensors, such as a head: name and number of values.
        file_bytes: size of the weight file.
    """

    folder: Path
    config: dict[str, Any]
    layers: list[LayerContents]
    others: dict[str, int]
    file_bytes: int


def read_contents(folder: str | Path) -> Contents:
    """Read an adapter folder.

    Raises:
        AdapterFileError: if a file is missing or corrupt.

    Example:
        >>> read_contents("runs/demo/adapter").layers[0].visits  # doctest: +SKIP
        [Visit(slice=Slice(axis='row', start=0, width=5), first_step=1, last_step=53), ...]
    """
    path = find_adapter(folder)
    config = read_config(path)
    weights = path / WEIGHTS
    layers: dict[str, dict[str, Any]] = {}
    others: dict[str, int] = {}
    with open_weights(path) as file:
        for key in sorted(file.keys()):
            name, mark, kind = key.rpartition(_MARK)
            count = math.prod(file.get_slice(key).get_shape())
            if not mark:
                others[key] = count
                continue
            layer = layers.setdefault(name.removeprefix("base_model.model."), {"values": 0})
            if kind == "journal":
                layer["visits"] = read_table(file.get_tensor(key))
            else:
                layer["values"] += count
    return Contents(path, config, [_layer(weights, n, p) for n, p in layers.items()], others, weights.stat().st_size)


def print_contents(contents: Contents, console: Console | None = None) -> None:
    """Print an adapter's layers and totals."""
    console = console or Console()
    if contents.layers:
        table = Table(title=f"{contents.folder}: what was trained")
        for column in ("layers", "number", "visits", "rows", "columns", "values each"):
            table.add_column(column, justify="left" if column == "layers" else "right", overflow="fold")
        kinds = Counter(
            # a layer outside a window of blocks waits: such a visit has no steps
            (
                layer_kind(layer.name),
                sum(v.last_step >= v.first_step for v in layer.visits),
                layer.rows,
                layer.columns,
                layer.values,
            )
            for layer in contents.layers
        )
        for (kind, *numbers, values), count in kinds.items():
            table.add_row(kind, str(count), *(str(number) for number in numbers), f"{values:,}")
        console.print(table)
    if contents.config.get("progress"):
        console.print(_progress(contents))
    facts = Table(show_header=False)
    config = contents.config
    facts.add_row("method", str(config.get("peft_type")))
    facts.add_row("base", str(config.get("base_model_name_or_path")))
    for key in ("mode", "r", "moves", "interval", "window"):
        if config.get(key) is not None:
            facts.add_row("moves planned" if key == "moves" else key, str(config[key]))
    if config.get("additive"):
        facts.add_row("slices hold", "differences beside the weights")
    facts.add_row("layers", str(len(contents.layers)))
    if contents.layers:
        facts.add_row("steps per visit", ", ".join(_steps(contents.layers)))
    facts.add_row("values in slices", f"{sum(layer.values for layer in contents.layers):,}")
    facts.add_row("other values (head)", f"{sum(contents.others.values()):,} in {len(contents.others)} tensors")
    facts.add_row("file size", size(contents.file_bytes))
    console.print(facts)


def print_layers(
    contents: Contents, distances: dict[str, dict[Slice, Distance]] | None = None, console: Console | None = None
) -> None:
    """Print every layer's positions, and how far each went.

    Args:
        contents: what `read_contents` gave.
        distances: of every layer's slices from the base; None leaves them out.
        console: where to print.
    """
    table = Table(title="positions of each layer")
    for column in ("layer", "position", "slice", "steps", "change", "relative"):
        table.add_column(column, justify="left" if column in ("layer", "slice") else "right", overflow="fold")
    for layer in contents.layers:
        for number, visit in enumerate(layer.visits, start=1):
            if visit.last_step < visit.first_step:
                continue  # outside a window of blocks
            found = None if distances is None else distances.get(layer.name, {}).get(visit.slice)
            how_far = ("", "") if found is None else (f"{found.change:.3g}", f"{found.relative:.1%}")
            steps = f"{visit.first_step}-{visit.last_step}"
            table.add_row(layer.name if number == 1 else "", str(number), _named(visit.slice), steps, *how_far)
    (console or Console()).print(table)


def _named(block: Slice) -> str:
    if block.axis == "entries":
        return f"{block.width:,} entries"
    return f"{block.axis}s {block.start}-{block.start + block.width - 1}"


def _progress(contents: Contents) -> Table:
    """Loss and metrics at the end of each position, and their change from the one before."""
    progress = check_progress(contents.config.get("progress"), str(contents.folder))
    found = dict.fromkeys(name for entry in progress for name in entry)
    scores = [name for name in found if name not in ("step", "loss", "eval_loss")]
    names = [name for name in ("loss", *scores[:1]) if name in found]  # the others are in adapter_config.json
    table = Table(title="at the end of each position")
    for column in ("position", "steps", *(text for name in names for text in (name, "change"))):
        table.add_column(column, justify="right", overflow="fold")
    steps = _steps(contents.layers)
    last: dict[str, float] = {}
    for number, entry in enumerate(progress[: len(steps)]):
        cells = []
        for name in names:
            value = entry.get(name)
            cells.append("" if value is None else f"{value:.4f}")
            cells.append(f"{value - last[name]:+.4f}" if value is not None and name in last else "")
        last |= entry
        table.add_row(str(number + 1), steps[number], *cells)
    return table


def _layer(path: Path, name: str, part: dict[str, Any]) -> LayerContents:
    if "visits" not in part:
        raise AdapterFileError(f"{path}: layer {name} has values but no journal; the file is incomplete.")
    slices = [visit.slice for visit in part["visits"]]
    rows, columns = line_count(slices, "row"), line_count(slices, "column")
    return LayerContents(name, part["visits"], rows, columns, part["values"])


def _steps(layers: list[LayerContents]) -> list[str]:
    """First and last step of every visit, over all layers: under a window of blocks, some train and others wait."""
    visits = zip(*(layer.visits for layer in layers), strict=False)
    return [f"{all_[0].first_step}-{max(v.last_step for v in all_)}" for all_ in visits]
