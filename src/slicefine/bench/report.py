"""The results of a benchmark as a table on the screen, a JSON file and a picture."""

from __future__ import annotations

import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..durable import replacing, write_file
from ..units import size
from .measure import ShapeResult
from .settings import BenchSettings

__all__ = ["draw", "environment", "print_result", "write_json"]


def print_result(result: ShapeResult, settings: BenchSettings, console: Console) -> None:
    """Print one shape's table, with the floor's distance from itself below."""
    shape = result.shape
    batch = (
        f"{shape.batch} x {shape.length} tokens" if shape.items[1] == "tokens" else f"{shape.batch} {shape.items[1]}"
    )
    flags = [f"{settings.loop} loop"] + [
        name for name in ("checkpointing", "reentrant", "compiled", "lm_head", "keep_memory") if getattr(settings, name)
    ]
    table = Table(
        title=f"{shape.name}: {shape.layers} layers, width {shape.width}, batch {batch}, {settings.dtype}, "
        f"{settings.device}, {settings.rounds} rounds, {', '.join(flags)}"
    )
    table.add_column("method", no_wrap=True)
    for column in ("/ floor", "quartiles", "fwd s", "bwd s", f"{shape.items[1]}/s", "kept MiB", "active", "file"):
        table.add_column(column, justify="right", no_wrap=True)
    peak = any(row.peak is not None for row in result.rows)
    for column in ("peak MiB",) if peak else ():
        table.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        cells = [row.method, f"{row.ratio:.3f}", f"{row.low:.3f}-{row.high:.3f}", f"{row.forward:.3f}"]
        cells += [f"{row.backward:.3f}", f"{row.per_second:,.0f}", f"{row.saved / 2**20:,.1f}", f"{row.trainable:,}"]
        cells += [size(row.file)]
        if peak:
            cells.append("" if row.peak is None else f"{row.peak / 2**20:,.0f}")
        table.add_row(*cells)
    console.print(table)
    title = "beside a step (swap: slices off and on; of the others, merge and unmerge)"
    extras = Table("method", "move ms", "save ms", "load ms", "swap ms", title=title)
    for row in (row for row in result.rows if row.extras):
        cells = [f"{1e3 * row.extras[k]:,.1f}" if k in row.extras else "" for k in ("move", "save", "load", "switch")]
        extras.add_row(row.method, *cells)
    if extras.row_count:
        console.print(extras)
    if settings.suite == "figure4":
        console.print(_figure4(result))
    for name, reason in result.skipped.items():
        console.print(f"{name}: not measured. {reason}")
    console.print(f"the floor differs from itself by up to {result.noise:.1%} (quartiles): less than that is noise")


_FIGURE4_ROWS = 1000  # training images of a task of VTAB-1k, the paper's data for this figure
_FIGURE4_EPOCHS = 10


def _figure4(result: ShapeResult) -> Table:
    """The four panels of the paper's Figure 4: total time, throughput, peak memory and model size.

    Peak memory is all of it: weights, what the method adds, optimizer state, and what a step takes on top.
    """
    steps = _FIGURE4_EPOCHS * math.ceil(_FIGURE4_ROWS / result.shape.batch)
    title = f"Figure 4's panels: {_FIGURE4_EPOCHS} epochs of {_FIGURE4_ROWS:,} rows are {steps} steps"
    table = Table("method", title=title)
    for column in ("total s", "steps/s", "peak MiB", "weights MiB", "added MiB", "file"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        whole = None if row.peak is None else row.weights + row.added + row.state + row.peak
        peak = "" if whole is None else f"{whole / 2**20:,.0f}"
        cells = [f"{steps * row.step:,.1f}", f"{1 / row.step:.3g}", peak, f"{row.weights / 2**20:,.1f}"]
        table.add_row(row.method, *cells, f"{row.added / 2**20:,.2f}", size(row.file))
    return table


def environment(settings: BenchSettings) -> dict[str, Any]:
    """Versions and device of a measurement."""
    packages = ("torch", "transformers", "peft", "slicefine")
    device = torch.cuda.get_device_name() if settings.device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def write_json(path: Path, results: list[ShapeResult], settings: BenchSettings, command: str, date: str) -> None:
    """Write everything that was measured."""
    record = {
        "command": command,
        "date": date,
        "environment": environment(settings),
        "settings": vars(settings),
        "results": [result.to_dict() for result in results],
    }
    write_file(path, json.dumps(record, indent=1) + "\n")


def draw(path: Path, results: list[ShapeResult]) -> None:
    """Draw step time (with quartiles) and kept activations of every method to a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    most = max(len(result.rows) for result in results)
    figure = Figure(figsize=(11, (1.2 + 0.32 * most) * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, result in enumerate(results):
        times, kept = (figure.add_subplot(len(results), 2, 2 * number + i) for i in (1, 2))
        rows = result.rows[::-1]
        names = [row.method for row in rows]
        errors = [[row.ratio - row.low for row in rows], [row.high - row.ratio for row in rows]]
        times.barh(names, [row.ratio for row in rows], xerr=errors, color="tab:blue")
        times.axvline(1.0, color="grey", linewidth=0.8)
        times.set(title=result.shape.name, xlabel="step time / floor (median, quartiles)")
        kept.barh(names, [row.saved / 2**20 for row in rows], color="tab:orange")
        kept.set(xlabel="activations kept for backward (MiB)", yticklabels=[])
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
