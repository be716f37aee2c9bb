"""What a picture shows, as plain data: made by studies and reports, drawn by `plots`, written as JSON beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import ConfigError

__all__ = ["Chart", "Line", "Panel", "plain", "run_chart"]

STYLES = ("line", "points", "bars", "step")


@dataclass(frozen=True)
class Line:
    """One series of a panel.

    Attributes:
        label: its name in the legend; empty for none.
        x: positions: numbers, or names (then all lines of the panel have the same).
        y: values, one per position.
        error: half the length of an error bar per value (one standard deviation); None for none.
        style: ``"line"``, ``"points"``, ``"bars"`` or ``"step"``.
    """

    label: str
    x: Sequence[float] | Sequence[str]
    y: Sequence[float]
    error: Sequence[float] | None = None
    style: str = "line"

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ConfigError(f"Line: style={self.style!r} is unknown; expected one of {', '.join(STYLES)}.")
        if len(self.x) != len(self.y) or (self.error is not None and len(self.error) != len(self.y)):
            raise ConfigError(f"Line {self.label!r}: x, y and error need the same length.")


@dataclass(frozen=True)
class Panel:
    """One pair of axes: lines, or a matrix as a heat map.

    Attributes:
        title: above the axes.
        lines: the series.
        x_label, y_label: with units.
        log_x, log_y: logarithmic axes.
        marks: vertical dotted lines, such as the steps after which slices moved.
        levels: horizontal dotted lines by name, such as what chance gives.
        matrix: ``[row][column]`` instead of lines; NaN stays white.
        row_names, column_names: of the matrix; empty for numbers.
        scale: what the colours mean.
    """

    title: str = ""
    lines: Sequence[Line] = ()
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    marks: Sequence[float] = ()
    levels: dict[str, float] = field(default_factory=dict)
    matrix: Sequence[Sequence[float]] | None = None
    row_names: Sequence[str] = ()
    column_names: Sequence[str] = ()
    scale: str = ""


@dataclass(frozen=True)
class Chart:
    """A picture of one or more panels.

    Attributes:
        name: of its files, in lower case with underscores.
        title: one line.
        panels: in reading order.
        alternative: the picture in words, for those who do not see it.
        across: panels per row; None decides.
    """

    name: str
    title: str
    panels: Sequence[Panel]
    alternative: str
    across: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, where a value that is not finite is null.

        Example:
            >>> Chart("one", "One point", [Panel(lines=[Line("a", [1], [float("nan")])])], "A point.").as_dict()["name"]
            'one'
        """
        found: dict[str, Any] = plain(asdict(self))
        return found


def run_chart(
    history: Sequence[dict[str, Any]], moves: Sequence[int], metric: str, before: float | None = None
) -> Chart:
    """A run's train loss and validation metric over its optimizer steps, with the moves marked.

    Args:
        history: the Trainer's log.
        moves: steps after which the slices moved.
        metric: name of the main metric.
        before: its value before training.
    """
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    key = f"eval_{metric}"
    values = [(entry["step"], entry[key]) for entry in history if key in entry]
    if before is not None:
        values.insert(0, (0, before))
    panels = []
    for label, points in (("train loss", losses), (f"validation {metric}", values)):
        if points:
            line = Line("", [step for step, _ in points], [value for _, value in points])
            panels.append(Panel(label, [line], "optimizer step", label, marks=list(moves)))
    words = "; ".join(f"{panel.title} from {panel.lines[0].y[0]:.4g} to {panel.lines[0].y[-1]:.4g}" for panel in panels)
    return Chart("run", "Loss and metric; dotted lines: the slices moved", panels, f"{words}; {len(moves)} moves.")


def plain(value: Any) -> Any:
    """Lists and dictionaries for JSON, in which numbers that are not finite are null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
