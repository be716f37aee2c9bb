"""Results of a sweep as numbers, tables and a chart: means and spreads over seeds, paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..charts import Chart, Line, Panel
from ..errors import DataError
from .run import Outcome
from .settings import SweepSettings, ViewSettings, cells

__all__ = [
    "Difference",
    "Entry",
    "Summary",
    "differences",
    "row_averages",
    "spread",
    "summaries",
    "sweep_chart",
    "table_entries",
    "value",
]


@dataclass(frozen=True)
class Summary:
    """The runs of one cell.

    Attributes:
        labels: of its axes.
        values: the main metric of each seed, on the set that counts.
        metrics: all metrics of each seed there, by name.
        tuned: what tuning chose.
        trainable, changed: entries in training at a time, and over the whole run.
        seconds: training time, mean; None unless it is known of every run (an archive leaves out times that were taken
            beside other work).
        file: bytes of the adapter, mean.
        memory: peak bytes of training, mean; None unless a GPU counted each run's own.
        forgotten: how much the loss on general text rose, nats per token, mean; None where it was not measured.
    """

    labels: dict[str, str]
    values: list[float]
    metrics: dict[str, list[float]]
    tuned: dict[str, Any]
    trainable: int
    changed: int
    seconds: float | None
    file: float
    memory: float | None = None
    forgotten: float | None = None

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
        reference: the label that it is compared with.
        count: pairs.
        mean: of label minus reference.
        low, high: 95% bootstrap interval of the mean.
        least, most: of single pairs.
    """

    label: str
    reference: str
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
            own.sort(key=lambda outcome: outcome["seed"])
            values = [value(outcome, settings.split) for outcome in own]
            measured = [outcome["after"][settings.split] for outcome in own]
            result.append(
                Summary(
                    dict(cell.labels),
                    values,
                    {name: [float(found[name]) for found in measured] for name in measured[0]},
                    own[0]["tuned"],
                    counts["trainable"],
                    counts["changed"],
                    _seconds(own),
                    statistics.fmean(outcome["file_bytes"] for outcome in own),
                    _memory(own),
                    _forgotten(own),
                )
            )
    return result


def _seconds(outcomes: Sequence[Outcome]) -> float | None:
    known = [outcome["train_seconds"] for outcome in outcomes if "train_seconds" in outcome]
    return statistics.fmean(known) if len(known) == len(outcomes) else None


def _memory(outcomes: Sequence[Outcome]) -> float | None:
    from ..training.report import ON_GPU

    if any(outcome.get("peak_memory_kind") != ON_GPU for outcome in outcomes):
        return None
    return statistics.fmean(outcome["peak_memory_bytes"] for outcome in outcomes)


def _forgotten(outcomes: Sequence[Outcome]) -> float | None:
    if not all("general" in outcome for outcome in outcomes):
        return None
    return statistics.fmean(outcome["general"]["forgotten"] for outcome in outcomes)


def value(outcome: Outcome, split: str = "validation") -> float:
    """The run's main metric on a set.

    Raises:
        DataError: if the run did not measure it.
    """
    if split not in outcome["after"]:
        raise DataError(f"run {outcome['key']}: it measured no {split} set; set data.{split}, or split.")
    found = outcome["after"][split]
    # what a language model answers in words has an accuracy, and none of the metrics of training
    return float(found[outcome["metric"]] if outcome["metric"] in found else found["accuracy"])


def spread(values: Sequence[float]) -> float:
    """Standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def differences(
    outcomes: Sequence[Outcome], axis: str, reference: str, draws: int = 10_000, split: str = "validation"
) -> list[Difference]:
    """Compare every label of an axis with one of them, over all runs that are otherwise the same.

    Args:
        outcomes: of a sweep.
        axis: its name.
        reference: the label to compare with.
        draws: bootstrap samples of the pairs.
        split: the set whose main metric is compared.

    Returns:
        One per other label that has a pair, in the order in which they come.
    """
    base = {_others(item, axis): value(item, split) for item in outcomes if item["labels"][axis] == reference}
    pairs: dict[str, list[float]] = {}
    for outcome in outcomes:
        label, rest = outcome["labels"][axis], _others(outcome, axis)
        if label != reference and rest in base:
            pairs.setdefault(label, []).append(value(outcome, split) - base[rest])
    return [_difference(label, reference, found, draws) for label, found in pairs.items()]


@dataclass(frozen=True)
class Entry:
    """One cell of a table: its numbers, means over seeds, and the deviation of the first one."""

    numbers: tuple[float, ...]
    deviation: float
    summary: Summary


def table_entries(found: Sequence[Summary], view: ViewSettings, rows: str, columns: str) -> dict[str, dict[str, Entry]]:
    """A table as ``{row: {column: entry}}``, in the order in which labels come.

    Args:
        found: one page of a sweep.
        view: which numbers a column has, and whether they stand apart.
        rows, columns: axes; an empty one has the single label "".
    """
    table: dict[str, dict[str, Entry]] = {}
    for item in found:
        head, row = item.labels.get(columns, ""), table.setdefault(item.labels.get(rows, ""), {})
        names = view.metrics.get(head, [])
        measured = [item.metrics[name] for name in names] or [item.values]
        entries = [Entry((statistics.fmean(own),), spread(own), item) for own in measured]
        if view.apart and names:
            row.update({f"{head} {name}": entry for name, entry in zip(names, entries, strict=True)})
        else:
            row[head] = Entry(tuple(entry.numbers[0] for entry in entries), entries[0].deviation, item)
    return table


def row_averages(table: Mapping[str, Mapping[str, Entry]]) -> dict[str, tuple[float, float]]:
    """Mean over the numbers of a row, and mean of its ranks in them (1 is best; equal ones share a mean rank).

    More must be better in all of them.

    Returns:
        By the row's label; rows that lack a column are left out.
    """
    heads = {head for row in table.values() for head in row}
    whole = {
        label: [number for head in sorted(heads) for number in row[head].numbers]
        for label, row in table.items()
        if row.keys() == heads
    }
    result = {}
    for label, numbers in whole.items():
        ranks = [
            sum(other[place] > number for other in whole.values())
            + (sum(other[place] == number for other in whole.values()) + 1) / 2
            for place, number in enumerate(numbers)
        ]
        result[label] = (statistics.fmean(numbers), statistics.fmean(ranks))
    return result


def _others(outcome: Outcome, axis: str) -> tuple[Any, ...]:
    return (*((name, label) for name, label in outcome["labels"].items() if name != axis), outcome["seed"])


def _difference(label: str, reference: str, values: list[float], draws: int) -> Difference:
    drawn = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    bounds = torch.quantile(drawn[picks].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64))
    mean = statistics.fmean(values)
    return Difference(label, reference, len(values), mean, float(bounds[0]), float(bounds[1]), min(values), max(values))


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
        panels.append(Panel(page, lines, x_axis, f"{settings.split} {metric}", log_x=view.log_x))
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
        pooled = [one for item in own for one in item.values]
        result.append(Summary({axis: label}, pooled, {}, {}, own[0].trainable, own[0].changed, 0.0, 0.0))
    return result


def _number(label: str) -> float | None:
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
