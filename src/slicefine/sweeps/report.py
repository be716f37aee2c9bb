"""A sweep from recipe to files: runs, an index, tables, the comparison and the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..charts import plain
from ..errors import ConfigError
from ..peft.stopping import Interrupted, raising_on_sigterm
from ..plots import save_chart
from .results import Difference, Entry, Summary, differences, row_averages, summaries, sweep_chart, table_entries
from .run import run_sweep
from .settings import SweepSettings, cells, runs_of, search_seed

__all__ = ["as_search", "sweep"]


def sweep(settings: SweepSettings, console: Console | None = None) -> list[Summary]:
    """Make the runs that are missing, print the table, and write index and figure (of a search alone: search.json).

    Returns:
        One summary per cell that has a run.

    Raises:
        ConfigError: for a setting that is wrong.
        Interrupted: by SIGTERM; as after Ctrl-C, finished runs are kept, and a note says how to go on.
    """
    console = console or Console(width=None if Console().is_terminal else 140)
    if settings.search_only:
        settings = as_search(settings)
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
    try:
        with raising_on_sigterm():
            outcomes = run_sweep(settings, folder, console)
    except (KeyboardInterrupt, Interrupted) as stop:
        from ..training.run import this_command

        same = this_command("sweep", "reproduce")
        stop.add_note(f"Finished runs are kept in {folder}. Go on with {'the same call' if same is None else same}.")
        raise
    if not outcomes:
        raise ConfigError(
            f"no run that counts has succeeded yet; {folder / 'runs'} has the runs that were made, failed ones with "
            "their error. The same command goes on with the rest, as far as limit and seconds allow."
        )
    found = summaries(settings, outcomes)
    metric = outcomes[0]["metric"]
    for table in _tables(settings, found, metric):
        console.print(table)
    compared: dict[str, list[Difference]] = {}
    for axis, label in settings.references():
        rows = differences(outcomes, axis, label, split=settings.split)
        compared.setdefault(axis, []).extend(rows)
        if rows:
            console.print(_comparison(axis, label, rows, settings.view.points))
    missing = len(cells(settings)) * len(settings.seeds) - sum(len(item.values) for item in found)
    if missing and not settings.search_only:
        console.print(f"{missing} runs are missing: the same command goes on with them.")
    _write(settings, folder, found, outcomes, compared, metric)
    console.print(f"written to {folder}", highlight=False)
    return found


def as_search(settings: SweepSettings) -> SweepSettings:
    """The sweep as its search alone: one seed on validation, by the metric that chooses."""
    seed = search_seed(settings)
    view = replace(settings.view, metrics={}, apart=False)
    title = f"{settings.title}: search, validation, seed {seed}"
    return replace(settings, title=title, split="validation", seeds=[seed], view=view)


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
        entries = table_entries(here, view, rows, columns or "")
        heads = list(dict.fromkeys(head for row in entries.values() for head in row))
        for head in heads:
            table.add_column(head or metric, justify="right")
        for name in ("average", "rank", "trained") if view.averages else ():
            table.add_column(name, justify="right")
        total = row_averages(entries) if view.averages else {}
        for label, row in entries.items():
            more = _averages(total.get(label), row, view.points) if view.averages else []
            table.add_row(label, *(_shown(row.get(head), view.points) for head in heads), *more)
        result.append(table)
    return result


def _shown(entry: Entry | None, points: bool) -> str:
    if entry is None:
        return "-"
    if points:  # as tables of papers have it; the deviation is the first number's
        return "/".join(f"{100 * number:.1f}" for number in entry.numbers) + f" ±{100 * entry.deviation:.1f}"
    tuned = entry.summary.tuned.values()
    rate = "".join(f" [{value:g}]" for value in tuned if isinstance(value, (int, float)))
    return "/".join(f"{number:.3f}" for number in entry.numbers) + f" ± {entry.deviation:.3f}{rate}"


def _averages(found: tuple[float, float] | None, row: Mapping[str, Entry], points: bool) -> list[str]:
    """Average, mean rank, and trained entries of a row; dashes where a column is missing."""
    entries = f"{max(entry.summary.trainable for entry in row.values()):,}"
    if found is None:
        return ["-", "-", entries]
    return [f"{100 * found[0]:.2f}" if points else f"{found[0]:.4f}", f"{found[1]:.1f}", entries]


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
    if settings.search_only:  # what the runs that count have written stays
        write_json(folder / "search.json", plain(index))
        return
    write_json(folder / "index.json", plain(index))
    save_chart(sweep_chart(settings, found, "figure", metric), folder)
