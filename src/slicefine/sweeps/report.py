"""A sweep from recipe to files: runs, an index, tables, the comparison and the figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..charts import plain
from ..errors import ConfigError
from ..plots import save_chart
from .results import Summary, differences, row_averages, summaries, sweep_chart
from .run import run_sweep
from .settings import SweepSettings, cells, runs_of

__all__ = ["sweep"]


def sweep(settings: SweepSettings, console: Console | None = None) -> list[Summary]:
    """Make the runs that are missing, print the table, and write index and figure.

    Returns:
        One summary per cell that has a run.

    Raises:
        ConfigError: for a setting that is wrong.
    """
    console = console or Console(width=None if Console().is_terminal else 140)
    if settings.dry_run:
        _list(settings, console)
        return []
    if settings.output is None:
        raise ConfigError("output: name the folder for results; the sweep goes on with what it finds there.")
    folder = Path(settings.output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={settings.output!r} cannot be written ({error}). Choose another folder.") from error
    outcomes = run_sweep(settings, folder, console)
    if not outcomes:
        raise ConfigError(f"no run of the sweep succeeded; {folder / 'runs'} says why.")
    found = summaries(settings, outcomes)
    metric = outcomes[0]["metric"]
    for table in _tables(settings, found, metric):
        console.print(table)
    compared = {
        axis: differences(outcomes, axis, label, split=settings.split)
        for axis, label in settings.view.reference.items()
    }
    for axis, rows in compared.items():
        console.print(_comparison(axis, settings.view.reference[axis], rows, settings.view.points))
    missing = len(cells(settings)) * len(settings.seeds) - sum(len(item.values) for item in found)
    if missing:
        console.print(f"{missing} runs are missing: the same command goes on with them.")
    _write(settings, folder, found, outcomes, compared, metric)
    console.print(f"written to {folder}", highlight=False)
    return found


def _list(settings: SweepSettings, console: Console) -> None:
    grid = cells(settings)
    for cell in grid:
        labels = ", ".join(f"{axis} {label}" for axis, label in cell.labels)
        console.print(labels or "one cell", highlight=False)
    rates = len(runs_of(settings, grid[0], 0))
    console.print(
        f"{len(grid)} cells, {len(settings.seeds)} seeds"
        + (f", {rates} values of {', '.join(settings.tune)} for the first seed" if settings.tune else "")
    )


def _tables(settings: SweepSettings, found: Sequence[Summary], metric: str) -> list[Table]:
    view = settings.view
    axes = list(settings.vary)
    rows = view.rows or axes[0]
    columns = view.columns or next((axis for axis in axes if axis not in (rows, view.pages)), None)
    result = []
    for page in dict.fromkeys(item.labels.get(view.pages or "", "") for item in found):
        here = [item for item in found if item.labels.get(view.pages or "", "") == page]
        shown = "" if view.averages else f" ({settings.split} {metric})"
        table = Table(title=f"{settings.title}{': ' if page else ''}{page}{shown}")
        table.add_column(rows)
        heads = list(dict.fromkeys(item.labels.get(columns or "", "") for item in here))
        for head in heads:
            table.add_column(head or metric, justify="right")
        for name in ("average", "rank", "trained") if view.averages else ():
            table.add_column(name, justify="right")
        total = row_averages(here, rows, columns or "", view.metrics) if view.averages else {}
        for label in dict.fromkeys(item.labels[rows] for item in here):
            own = [[i for i in here if (i.labels[rows], i.labels.get(columns or "", "")) == (label, h)] for h in heads]
            shown_cells = [
                _shown(found, view.metrics.get(head), view.points) for head, found in zip(heads, own, strict=True)
            ]
            more = _averages(total.get(label), own, view.points) if view.averages else []
            table.add_row(label, *shown_cells, *more)
        result.append(table)
    return result


def _shown(own: Sequence[Summary], metrics: Sequence[str] | None, points: bool) -> str:
    if not own:
        return "-"
    item = own[0]
    if points:  # as tables of papers have it; the deviation is the main metric's
        numbers = [statistics.fmean(item.metrics[name]) for name in metrics] if metrics else [item.mean]
        return "/".join(f"{100 * number:.1f}" for number in numbers) + f" ±{100 * item.deviation:.1f}"
    rate = "".join(f" [{value:g}]" for value in item.tuned.values() if isinstance(value, (int, float)))
    return f"{item.mean:.3f} ± {item.deviation:.3f}{rate}"


def _averages(found: tuple[float, float] | None, own: Sequence[Sequence[Summary]], points: bool) -> list[str]:
    """Average, mean rank, and trained entries of a row; dashes where a column is missing."""
    entries = max(item.trainable for summaries_ in own for item in summaries_)
    if found is None:
        return ["-", "-", f"{entries:,}"]
    return [f"{100 * found[0]:.2f}" if points else f"{found[0]:.4f}", f"{found[1]:.1f}", f"{entries:,}"]


def _comparison(axis: str, reference: str, rows: Sequence[Any], points: bool) -> Table:
    table = Table(title=f"{axis}: difference from {reference}, pairs of runs that are otherwise the same")
    table.add_column(axis)
    for column in ("pairs", "mean", "95% interval", "smallest", "largest"):
        table.add_column(column, justify="right")
    for row in rows:
        mean, low, high, least, most = (
            f"{100 * number:+.2f}" if points else f"{number:+.4f}"
            for number in (row.mean, row.low, row.high, row.least, row.most)
        )
        table.add_row(row.label, str(row.count), mean, f"{low} to {high}", least, most)
    return table


def _write(
    settings: SweepSettings,
    folder: Path,
    found: Sequence[Summary],
    outcomes: Sequence[dict[str, Any]],
    compared: Mapping[str, Sequence[Any]],
    metric: str,
) -> None:
    from ..training.report import environment, write_json

    index = {
        "title": settings.title,
        "claim": settings.claim,
        "metric": metric,
        "cells": [{**asdict(item), "mean": item.mean, "deviation": item.deviation} for item in found],
        "differences": {axis: [asdict(row) for row in rows] for axis, rows in compared.items()},
        "runs": [outcome["key"] for outcome in outcomes],
        "settings": asdict(settings),
        **environment(),
    }
    write_json(folder / "index.json", plain(index))
    save_chart(sweep_chart(settings, found, "figure", metric), folder)
