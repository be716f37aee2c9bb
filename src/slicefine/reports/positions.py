"""What each position of the slices gained: losses and metrics from the adapter's notes and from the run's log."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..charts import Chart, Line, Panel
from ..pace import check_progress
from .content import Run
from .elements import clean

__all__ = ["Position", "gain_chart", "gains", "positions"]


_NAMED = 20  # positions that an axis names one by one


@dataclass(frozen=True)
class Position:
    """One position: everything between two moves.

    Attributes:
        first, last: its optimizer steps.
        values: what was measured in it by name, such as ``loss`` (the last one logged), ``mean loss`` and a metric.
    """

    first: int
    last: int
    values: dict[str, float]


def positions(run: Run) -> list[Position]:
    """A run's positions in order; none for a run without slices.

    The loss and the metrics at the end of each come from the adapter's notes where it has any, else from the log; the
    mean loss comes from the log. Notes of steps that a restored checkpoint took back are not in the adapter.

    Raises:
        AdapterFileError: if the adapter's notes make no sense.
    """
    if run.contents is None or not run.contents.layers:
        return []
    notes = check_progress(run.contents.config.get("progress"), str(run.contents.folder))
    found = []
    for number, (first, last) in enumerate(_spans(run)):
        noted = notes[number] if number < len(notes) else {}
        values = {name: value for name, value in noted.items() if name in ("loss", f"eval_{_metric(run, notes)}")}
        values = {clean(name.removeprefix("eval_")): value for name, value in values.items()}
        found.append(Position(first, last, {**_logged(run, first, last), **values}))
    return found


def gains(found: list[Position], name: str) -> list[float]:
    """The change of a value at each position from the last one before it that has it; NaN where there is none.

    Example:
        >>> gains([Position(1, 5, {"loss": 2.0}), Position(6, 9, {}), Position(10, 12, {"loss": 1.5})], "loss")
        [nan, nan, -0.5]
    """
    changes, before = [], math.nan
    for position in found:
        value = position.values.get(name, math.nan)
        changes.append(value - before)
        before = before if math.isnan(value) else value
    return changes


def gain_chart(found: list[Position]) -> Chart | None:
    """Bars of what changed at each move; None if there is nothing to compare."""
    names = dict.fromkeys(name for position in found for name in position.values)
    panels, words = [], []
    for name in names:
        changes = gains(found, name)
        known = [(number, change) for number, change in enumerate(changes, start=1) if math.isfinite(change)]
        if known:
            numbers: Any = [number for number, _ in known]
            numbers = list(map(str, numbers)) if len(known) <= _NAMED else numbers
            line = Line("", numbers, [change for _, change in known], style="bars")
            panels.append(Panel(f"change of {name}", [line], "position", f"change of {name}", levels={"": 0.0}))
            words.append(f"{name}: {', '.join(f'{change:+.3g}' for _, change in known[:12])}")
    if not panels:
        return None
    words = [f"{text} and more" if len(found) > 13 else text for text in words]
    return Chart("gains", "Change at each position from the one before", panels, f"{'; '.join(words)}.")


def _spans(run: Run) -> list[tuple[int, int]]:
    """First and last step of each position: as the run says, or over all layers of the adapter's journals."""
    if run.metrics is not None:
        ends = [*run.moves, int(run.metrics.get("steps", 0))]
        return list(zip([1, *(step + 1 for step in ends)], ends, strict=False))
    assert run.contents is not None
    visits = zip(*(layer.visits for layer in run.contents.layers), strict=False)
    return [(own[0].first_step, max(visit.last_step for visit in own)) for own in visits]


def _metric(run: Run, notes: list[dict[str, float]]) -> str:
    """The main metric: the run's, or the first one that the adapter noted."""
    if run.metrics is not None:
        return str(run.metrics["metric"])
    names = [name for note in notes for name in note if name.startswith("eval_") and name != "eval_loss"]
    return names[0].removeprefix("eval_") if names else ""


def _logged(run: Run, first: int, last: int) -> dict[str, float]:
    if run.metrics is None:
        return {}
    entries: list[dict[str, Any]] = [e for e in run.metrics["history"] if first <= e.get("step", 0) <= last]
    metric = str(run.metrics["metric"])
    losses = [float(entry["loss"]) for entry in entries if "loss" in entry]
    scores = [float(entry[f"eval_{metric}"]) for entry in entries if f"eval_{metric}" in entry]
    found = {"loss": losses[-1:], "mean loss": [sum(losses) / len(losses)] if losses else [], metric: scores[-1:]}
    return {name: values[0] for name, values in found.items() if values}
