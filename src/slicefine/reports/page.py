"""The page of one or several runs: summary, curves, what was trained, gain per move, analyses, comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from importlib import resources

from ..charts import Chart, Line, Panel, run_chart
from ..plots import svg
from .content import Run, Study
from .elements import Html, bullets, details, figure, join, page, paragraph, section, table, text
from .facts import comparison, facts, headlines, measured, settings_text
from .layers import layer_map
from .positions import gain_chart, gains, positions

__all__ = ["make_page"]

_MARKS = 200  # moves that a chart shows
_ACROSS = 3  # panels beside each other that can be read at the page's width
_ROWS = 100  # positions that a table shows


def make_page(runs: Sequence[Run], study: Study | None = None) -> Html:
    """The whole page as text.

    Args:
        runs: of different names.
        study: analyses that belong to none of them.
    """
    from .. import __version__

    names = ", ".join(run.name for run in runs)
    parts = [(f"run-{number}", run.name, _run(run, f"run-{number}")) for number, run in enumerate(runs, start=1)]
    if sum(run.method != "analysis" for run in runs) > 1:
        parts.insert(0, ("comparison", "Comparison", _comparison([run for run in runs if run.method != "analysis"])))
    if study is not None and study.charts:
        parts.append(("analysis", "Analysis", _study(study, "analysis")))
    today = datetime.now().strftime("%Y-%m-%d")
    links = "".join(f'<li><a href="#{anchor}">{text(title)}</a></li>' for anchor, title, _ in parts)
    navigation = Html(f'<nav aria-label="Contents"><ul>{links}</ul></nav>') if len(parts) > 1 else Html("")
    noun = "run" if len(runs) == 1 else "runs"
    header = join([Html("<h1>Fine-tuning report</h1>"), paragraph(f"{len(runs)} {noun}, {today}"), navigation])
    main = join(section(title, 2, content, anchor) for anchor, title, content in parts)
    footer = paragraph(f"Written by slicefine {__version__} on {today}. The page needs no network and no scripts.")
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    return page(f"Fine-tuning report: {names}", style, header, main, footer)


def _run(run: Run, prefix: str) -> Html:
    if run.method == "analysis":
        return _study(run.study, prefix)
    parts = [_summary(run)]
    if run.metrics is not None:
        parts.append(section("Loss and metric", 3, _curves(run, prefix)))
    else:
        parts.append(paragraph("There is no metrics.json here: curves, times and memory are unknown.", "note"))
    if run.adapter is not None:
        parts.append(section("What was trained", 3, _map(run, prefix)))
        parts.append(section("Gain per move", 3, _gains(run, prefix)))
    else:
        words = f"Method {run.method} has no slices: there is no map of them, and no gain per move."
        parts.append(paragraph(words, "note"))
    if run.study.charts:
        parts.append(section("Analysis", 3, _study(run.study, prefix)))
    return join(parts)


def _summary(run: Run) -> Html:
    boxes = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}{f'<small>{text(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in headlines(run)
    )
    columns, rows = measured(run)
    parts = [Html(f'<dl class="tiles">{boxes}</dl>'), table("The run", [], facts(run), "facts")]
    if rows:
        parts.append(table("All metrics", columns, rows))
    parts.append(details("Settings", settings_text(run)))
    return section("Summary", 3, join(parts))


def _curves(run: Run, prefix: str) -> Html:
    assert run.metrics is not None
    moves, metric = run.moves, run.metrics["metric"]
    chart = run_chart(run.metrics["history"], moves, metric, run.before)
    if not chart.panels:
        return paragraph("Nothing was logged in this run: it was shorter than training.logging_steps.", "note")
    caption = f"Train loss as logged, and validation {metric}."
    if moves:
        every = math.ceil(len(moves) / _MARKS)
        chart = replace(chart, panels=[replace(panel, marks=moves[::every]) for panel in chart.panels])
        caption += " Dotted lines: the slices moved." + (f" Every {every}th move is drawn." if every > 1 else "")
    else:
        chart = replace(chart, title="Loss and metric")
    return figure(svg(chart, f"{prefix}-curves"), caption)


def _map(run: Run, prefix: str) -> Html:
    assert run.adapter is not None
    drawn = layer_map(run.adapter, run.distances, f"{prefix}-map")
    parts = [figure(drawn.svg, drawn.caption)]
    if run.missing:
        parts.append(paragraph(f"How far each slice went is not known: {run.missing}", "note"))
    if run.adapter.others:
        values = sum(tensor.numel() for tensor in run.adapter.others.values())
        parts.append(paragraph(f"Beside the slices a head of {values:,} values was trained; it is not drawn.", "note"))
    return join(parts)


def _gains(run: Run, prefix: str) -> Html:
    found = positions(run)
    if len(found) < 2:
        return paragraph("The slices stayed at one position, so there is no gain of a move to show.", "note")
    parts = []
    chart = gain_chart(found)
    if chart is not None:
        caption = (
            "Each bar: a value at the end of a position (mean loss: over the position) minus that of the last one "
            "before it that has it. The learning rate and a head change, too; a gain is not the position's alone."
        )
        parts.append(figure(svg(chart, f"{prefix}-gains"), caption))
    names = list(dict.fromkeys(name for position in found for name in position.values))
    changes = {name: gains(found, name) for name in names}
    rows = []
    for number, position in enumerate(found[:_ROWS], start=1):
        pairs = [(position.values.get(name, math.nan), changes[name][number - 1]) for name in names]
        cells = [words for value, change in pairs for words in (_shown(value, ".4f"), _shown(change, "+.4f"))]
        rows.append([str(number), f"{position.first}-{position.last}", *cells])
    columns = ["position", "steps", *(title for name in names for title in (name, "change"))]
    parts.append(table("At the end of each position", columns, rows))
    if len(found) > _ROWS:
        parts.append(paragraph(f"The first {_ROWS} of {len(found):,} positions are listed.", "note"))
    return join(parts)


def _study(study: Study, prefix: str) -> Html:
    figures = []
    for number, chart in enumerate(study.charts, start=1):
        across = max(1, min(_ACROSS, chart.across or _ACROSS, len(chart.panels)))
        drawn = svg(replace(chart, across=across), f"{prefix}-study-{number}")
        figures.append(figure(drawn, chart.alternative or chart.title))
    return join([*figures, bullets(study.notes)])


def _comparison(runs: list[Run]) -> Html:
    parts = [table("Runs side by side; metrics after training", *comparison(runs), "wide")]
    chart = _overlay(runs)
    if chart is not None:
        parts.append(figure(svg(chart, "comparison-curves"), "Train loss as logged, and validation metrics, by run."))
    return join(parts)


def _overlay(runs: list[Run]) -> Chart | None:
    """The curves of all runs in common axes, a panel per metric; None where no run has any."""
    lines: dict[str, list[Line]] = {}
    for run in runs:
        if run.metrics is None:
            continue
        for panel in run_chart(run.metrics["history"], [], run.metrics["metric"], run.before).panels:
            (line,) = panel.lines
            label = run.name if len(run.name) <= 40 else f"…{run.name[-39:]}"
            lines.setdefault(panel.title, []).append(replace(line, label=label))
    if not lines:
        return None
    panels = [Panel(title, own, "optimizer step", title) for title, own in lines.items()]
    words = "; ".join(
        f"{panel.title}: {', '.join(f'{line.label} ends at {line.y[-1]:.4g}' for line in panel.lines)}"
        for panel in panels
    )
    return Chart("comparison", "Loss and metric of all runs", panels, f"{words}.")


def _shown(value: float, style: str) -> str:
    return format(value, style) if math.isfinite(value) else ""
