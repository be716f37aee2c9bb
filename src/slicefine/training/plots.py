"""Pictures: a run's loss and metric over the steps, and where an adapter's slices are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..files.adapter import Adapter
from ..files.distance import Distance
from ..geometry import Slice

__all__ = ["draw_layers", "draw_run"]


def draw_run(path: Path, history: list[dict[str, Any]], moves: list[int], metric: str, before: float | None) -> None:
    """Draw a run to a PNG file.

    Args:
        path: the file.
        history: the Trainer's log.
        moves: steps after which the slices moved.
        metric: name of the main metric.
        before: its value before training.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    key = f"eval_{metric}"
    values = [(entry["step"], entry[key]) for entry in history if key in entry]
    if before is not None:
        values.insert(0, (0, before))
    if losses:
        axes.plot(*zip(*losses, strict=True), color="tab:blue", label="train loss")
    for number, step in enumerate(moves):
        axes.axvline(step, color="grey", linewidth=0.8, linestyle=":", label="move" if number == 0 else None)
    axes.set(xlabel="optimizer step", ylabel="train loss")
    handles, names = axes.get_legend_handles_labels()
    if values:
        right = axes.twinx()
        right.plot(*zip(*values, strict=True), color="tab:orange", marker="o", label=f"validation {metric}")
        right.set_ylabel(f"validation {metric}")
        more, more_names = right.get_legend_handles_labels()
        handles, names = handles + more, names + more_names
    if handles:
        axes.legend(handles, names, loc="center right")
    figure.savefig(path, dpi=120)


def draw_layers(path: Path, adapter: Adapter, distances: dict[str, dict[Slice, Distance]] | None = None) -> None:
    """Draw every layer's weight as a rectangle with its trained rows and columns in it, to a PNG file.

    Args:
        path: the file.
        adapter: the slices.
        distances: colour them by the relative change; None colours them by the order of their visits.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    across = min(8, len(adapter.layers))
    down = math.ceil(len(adapter.layers) / across)
    figure = Figure(figsize=(2 * across + 1, 1.9 * down + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    colors = colormaps["viridis"]
    found = [d.relative for blocks in (distances or {}).values() for d in blocks.values() if math.isfinite(d.relative)]
    most = (
        max((len(layer.values) for layer in adapter.layers.values()), default=1)
        if distances is None
        else max(found, default=1.0)
    )
    scale = Normalize(0, most or 1)
    panels = figure.subplots(down, across, squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for panel, (name, layer) in zip(panels.flat, adapter.layers.items(), strict=False):
        rows, columns = layer.shape
        panel.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
        panel.add_patch(Rectangle((0, 0), columns, rows, facecolor="whitesmoke", edgecolor="grey"))
        for number, block in enumerate(layer.values, start=1):
            color = colors(scale(number if distances is None else distances[name][block].relative))
            if block.axis == "row":
                panel.add_patch(Rectangle((0, block.start), columns, block.width, facecolor=color))
            elif block.axis == "column":
                panel.add_patch(Rectangle((block.start, 0), block.width, rows, facecolor=color))
        panel.set_title(name.removeprefix("model.").replace(".", " ").strip(), fontsize=6, wrap=True)
    label = "order of visits" if distances is None else "change / norm of the original values"
    figure.colorbar(ScalarMappable(scale, colors), ax=panels, label=label, shrink=0.6)
    figure.savefig(path, dpi=120)
