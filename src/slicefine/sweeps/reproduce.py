"""A table of the paper: run its sweep, and show ours beside the published numbers, and the price of each method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..charts import Chart, Line, Panel, plain
from ..durable import write_file
from ..errors import SliceFineError
from ..plots import save_chart
from .paper import PaperTable
from .report import sweep
from .results import Entry, Summary, row_averages, table_entries
from .settings import cells, final_run, runs_of, train_settings

__all__ = ["beside_the_paper", "markdown", "price_chart", "reproduce"]


def reproduce(table: PaperTable, console: Console | None = None) -> list[Summary]:
    """Make the runs that are missing; print and write the table.

    Returns:
        One summary per cell that has a run; none for a dry run.

    Raises:
        ConfigError: for a setting that is wrong.
    """
    console = console or Console(width=None if Console().is_terminal else 170)
    if table.settings.dry_run:
        print_forecast(table, console)
        return []
    found = sweep(table.settings, console)
    if table.settings.search_only:  # one seed on validation is no table of the paper
        return found
    console.print(beside_the_paper(table, found))
    folder = Path(str(table.settings.output)).expanduser()
    write_file(folder / "table.md", markdown(table, found))
    save_chart(price_chart(table, found), folder)
    from ..training.report import write_json

    write_json(
        folder / "table.json", plain({"paper": table.paper, "source": table.source, "ours": _ours(table, found)})
    )
    return found


def _ours(table: PaperTable, found: Sequence[Summary]) -> list[dict[str, Any]]:
    return [{**asdict(item), "mean": item.mean, "deviation": item.deviation} for item in found]


def _axes(table: PaperTable) -> tuple[str, str]:
    view, axes = table.settings.view, list(table.settings.vary)
    rows = view.rows or axes[0]
    return rows, view.columns or next((axis for axis in axes if axis != rows), "")


def beside_the_paper(table: PaperTable, found: Sequence[Summary]) -> Table:
    """Our average of each row, and the paper's, recomputed from its cells; the models differ, the order may agree."""
    rows, columns = _axes(table)
    ours = row_averages(table_entries(found, table.settings.view, rows, columns))
    result = Table(title=f"averages beside {table.source}")
    for name in (rows, "ours", "our rank", "paper", "paper's rank"):
        result.add_column(name, justify="left" if name == rows else "right")
    both = {row: average for row in ours if (average := table.average(row)) is not None}
    places = {row: place for place, row in enumerate(sorted(both, key=lambda row: -both[row]), start=1)}
    mine = {row: place for place, row in enumerate(sorted(ours, key=lambda row: -ours[row][0]), start=1)}
    for row in sorted(ours, key=lambda row: mine[row]):
        published = ("-", "-") if row not in both else (f"{both[row]:.2f}", str(places[row]))
        result.add_row(row, f"{100 * ours[row][0]:.2f}", str(mine[row]), *published)
    return result


def markdown(table: PaperTable, found: Sequence[Summary]) -> str:
    """The table as Markdown: ours with deviations over seeds, then the price of each method."""
    rows, columns = _axes(table)
    entries = table_entries(found, table.settings.view, rows, columns)
    ours = row_averages(entries)
    heads = list(dict.fromkeys(head for row in entries.values() for head in row))
    names = [rows, *heads, "average", "rank", "trained", "changed", "file MiB"]
    timed = all(item.seconds is not None for item in found)
    names += ["s/run"] if timed else []
    forgetting = any(item.forgotten is not None for item in found)
    names += ["forgotten"] if forgetting else []
    lines = [f"# {table.settings.title}", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for label, row in entries.items():
        own = [item for item in found if item.labels[rows] == label]
        total = ours.get(label)
        ends = ["-", "-"] if total is None else [f"{100 * total[0]:.2f}", f"{total[1]:.1f}"]
        price = [f"{statistics.median(getattr(i, name) for i in own):,.0f}" for name in ("trainable", "changed")]
        file = statistics.fmean(item.file for item in own)
        shown = [_cell(row.get(head)) for head in heads]
        price += [f"{file / 2**20:.2f}"]
        price += [f"{statistics.fmean(i.seconds for i in own if i.seconds is not None):.0f}"] if timed else []
        lost = [item.forgotten for item in own if item.forgotten is not None]
        price += [f"{statistics.fmean(lost):+.3f}" if lost else "-"] if forgetting else []
        lines.append("| " + " | ".join([label, *shown, *ends, *price]) + " |")
    return "\n".join(lines) + "\n"


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    return "/".join(f"{100 * number:.1f}" for number in entry.numbers) + f" ± {100 * entry.deviation:.1f}"


def price_chart(table: PaperTable, found: Sequence[Summary]) -> Chart:
    """Average metric against trained entries, training time, memory and file size: one point per method."""
    rows, columns = _axes(table)
    ours = row_averages(table_entries(found, table.settings.view, rows, columns))
    prices = {"entries trained at a time": "trainable"}
    prices |= {"training time (s)": "seconds"} if all(item.seconds is not None for item in found) else {}
    prices |= {"file (MiB)": "file"}
    prices |= {"peak memory (MiB)": "memory"} if all(item.memory is not None for item in found) else {}
    panels = []
    for title, name in prices.items():
        lines = []
        for label, (average, _) in ours.items():
            own = [getattr(item, name) for item in found if item.labels[rows] == label]
            price = statistics.fmean(own) / (2**20 if name in ("file", "memory") else 1)
            lines.append(Line(label, [max(price, 1e-3)], [100 * average], style="points"))
        panels.append(Panel("", lines, title, "average metric (points)", log_x=True))
    words = "; ".join(f"{label}: {100 * average:.2f}" for label, (average, _) in ours.items())
    return Chart("prices", f"{table.settings.title}: what accuracy costs", panels, words)


def print_forecast(table: PaperTable, console: Console) -> None:
    """The plan of a dry run: runs, and predicted time and memory of each column's task, measured on a few steps."""
    from ..training.screen import quiet_libraries

    settings = table.settings
    grid = cells(settings)
    tuning = len(runs_of(settings, grid[0], 0)) if settings.tune else 0
    counting = 0 if settings.search_only else len(settings.seeds)
    each = tuning + counting
    console.print(f"{settings.title}: {len(grid)} cells, {tuning} runs to choose and {counting} that count")
    _, columns = _axes(table)
    quiet_libraries()
    shown = Table(title="predicted for SliceFine, column r=5; methods beside the layers take up to twice as long")
    for name in (columns, "runs", "steps", "s/step", "hours", "memory MiB"):
        shown.add_column(name, justify="left" if name == columns else "right")
    total = 0.0
    for head in dict.fromkeys(cell.label(columns) for cell in grid):
        own = [cell for cell in grid if cell.label(columns) == head]
        run = final_run(settings, own[0], settings.seeds[0], runs_of(settings, own[0], 0)[0].tuned)
        runs = each * len(own)
        try:
            steps, seconds, memory = _forecast(run.recipe)
        except SliceFineError as error:
            shown.add_row(head, str(runs), f"not at hand: {str(error)[:80]}", "-", "-", "-")
            continue
        hours = runs * steps * seconds / 3600
        total += hours
        shown.add_row(head, str(runs), f"{steps:,}", f"{seconds:.3g}", f"{hours:.2f}", f"{memory / 2**20:,.0f}")
    console.print(shown)
    console.print(f"about {total / settings.workers:.1f} hours with {settings.workers} workers, evaluation not counted")


def _forecast(recipe: dict[str, Any]) -> tuple[int, float, int]:
    from dataclasses import replace

    from ..training.forecast import forecasts
    from ..training.session import build

    settings = train_settings(recipe)
    session = build(replace(settings, method=replace(settings.method, name="full", options={})))
    (found,) = forecasts(session, ["column"], [5], batches=2, rounds=1)
    return session.total_steps, found.seconds, found.memory
