"""Results of a sweep as numbers, tables and a chart: means and spreads over seeds, paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..charts import Chart, Line, Panel
from .run import Outcome
from .settings import SweepSettings, cells

__all__ = ["Difference", "Summary", "differences", "spread", "summaries", "sweep_chart"]


@dataclass(frozen=True)
class Summary:
    """The runs of one cell.

    Attributes:
        labels: of its axes.
        values: the validation metric of each seed.
        tuned: what tuning chose.
        trainable, changed: entries in training at a time, and over the whole run.
        seconds: training time, mean.
        file: bytes of the adapter, mean.
    """

    labels: dict[str, str]
    values: list[float]
    tuned: dict[str, Any]
    trainable: int
    changed: int
    seconds: float
    file: float

    @property
    def mean(self) -> float:
        """Of the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation of the seeds; 0 for one."""
        return spread(self.values)


@dataclass(frozen=True)
class Difference:
    """One label against the reference, run by run with everything else equal.

    Attributes:
        label: of the axis.
        count: pairs.
        mean: of label minus reference.
        low, high: 95% bootstrap interval of the mean.
        least, most: of single pairs.
    """

    label: str
    count: int
    mean: float
    low: float
    high: float
    least: float
    most: float


def summaries(settings: SweepSettings, outcomes: Sequence[Outcome]) -> list[Summary]:
    """One summary per cell that has a run, in the order of the grid."""
    result = []
    for cell in cells(settings):
        own = [outcome for outcome in outcomes if outcome["labels"] == dict(cell.labels)]
        if own:
            counts = own[0]["counts"]
            result.append(
                Summary(
                    dict(cell.labels),
                    [outcome["value"] for outcome in sorted(own, key=lambda outcome: outcome["seed"])],
                    own[0]["tuned"],
                    counts["trainable"],
                    counts["changed"],
                    statistics.fmean(outcome["train_seconds"] for outcome in own),
                    statistics.fmean(outcome["file_bytes"] for outcome in own),
                )
            )
    return result


def spread(values: Sequence[float]) -> float:
    """Standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def differences(outcomes: Sequence[Outcome], axis: str, reference: str, draws: int = 10_000) -> list[Difference]:
    """Compare every label of an axis with one of them, over all runs that are otherwise the same.

    Args:
        outcomes: of a sweep.
        axis: its name.
        reference: the label to compare with.
        draws: bootstrap samples of the pairs.

    Returns:
        One per other label that has a pair, in the order in which they come.
    """
    base = {_others(outcome, axis): outcome["value"] for outcome in outcomes if outcome["labels"][axis] == reference}
    pairs: dict[str, list[float]] = {}
    for outcome in outcomes:
        label, rest = outcome["labels"][axis], _others(outcome, axis)
        if label != reference and rest in base:
            pairs.setdefault(label, []).append(outcome["value"] - base[rest])
    return [_difference(label, values, draws) for label, values in pairs.items()]


def _others(outcome: Outcome, axis: str) -> tuple[Any, ...]:
    return (*((name, label) for name, label in outcome["labels"].items() if name != axis), outcome["seed"])


def _difference(label: str, values: list[float], draws: int) -> Difference:
    drawn = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    bounds = torch.quantile(drawn[picks].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64))
    mean = statistics.fmean(values)
    return Difference(label, len(values), mean, float(bounds[0]), float(bounds[1]), min(values), max(values))


def sweep_chart(settings: SweepSettings, found: Sequence[Summary], name: str, metric: str = "metric") -> Chart:
    """The figure: one panel per page, one line per label of ``view.lines``, the metric over ``view.x``."""
    view = settings.view
    x_axis, line_axis = view.x or view.columns or next(iter(settings.vary), ""), view.lines or view.rows
    pages = list(dict.fromkeys(item.labels.get(view.pages or "", "") for item in found))
    panels = []
    for page in pages:
        here = [item for item in found if item.labels.get(view.pages or "", "") == page]
        lines = []
        for label in dict.fromkeys(item.labels.get(line_axis or "", "") for item in here):
            own = [item for item in here if item.labels.get(line_axis or "", "") == label]
            own = _averaged(own, x_axis)
            places = [_number(item.labels[x_axis]) for item in own]
            numeric = all(place is not None for place in places) and len(places) > 1
            x: Any = places if numeric else [item.labels[x_axis] for item in own]
            style = "line" if numeric else "points" if line_axis else "bars"
            lines.append(Line(label, x, [item.mean for item in own], [item.deviation for item in own], style))
        panels.append(Panel(page, lines, x_axis, f"validation {metric}", log_x=view.log_x))
    words = "; ".join(
        f"{' '.join(item.labels.values())}: {item.mean:.3f} (deviation {item.deviation:.3f}, {len(item.values)} seeds)"
        for item in found[:60]
    )
    return Chart(name, settings.title, panels, words)


def _averaged(found: list[Summary], axis: str) -> list[Summary]:
    """One summary per label of the axis: what differs in other axes is pooled."""
    result = []
    for label in dict.fromkeys(item.labels[axis] for item in found):
        own = [item for item in found if item.labels[axis] == label]
        values = [value for item in own for value in item.values]
        result.append(Summary({axis: label}, values, {}, own[0].trainable, own[0].changed, 0.0, 0.0))
    return result


def _number(label: str) -> float | None:
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
