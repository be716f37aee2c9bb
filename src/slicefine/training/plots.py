"""The picture of a run: loss and metric over the steps, moves marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw_run"]


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
