"""All pictures, as PNG or SVG: charts, a run's curves, an adapter's slices. matplotlib is used only here."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .charts import Chart, Panel, run_chart
from .durable import replacing, write_file
from .files.adapter import Adapter
from .files.distance import Distance
from .geometry import Slice

__all__ = ["draw_layers", "draw_run", "save_chart", "svg"]

_FONTS = "'DejaVu Sans', Verdana, sans-serif"  # equally wide
_MANY = 2000  # points or bars of a line that an SVG holds as single shapes


def save_chart(chart: Chart, folder: Path) -> list[Path]:
    """Write a chart as ``NAME.png``, and what it shows as ``NAME.json`` beside it.

    Returns:
        The two files.
    """
    picture, data = folder / f"{chart.name}.png", folder / f"{chart.name}.json"
    with replacing(picture) as part:
        _figure(chart).savefig(part, dpi=110, metadata={"Title": chart.title, "Description": chart.alternative})
    write_file(data, json.dumps(chart.as_dict(), indent=1) + "\n")
    return [picture, data]


def svg(chart: Chart, prefix: str = "") -> str:
    """A chart as an SVG element for a page, with its title and alternative text inside.

    Text stays text and has the page's colour; dollar signs are no formulas. What has many parts becomes a picture.

    Args:
        chart: the chart.
        prefix: of every id in it: different for each picture of a page; empty takes the chart's name.

    Example:
        >>> '<title id="p-title">One &amp; all</title>' in svg(Chart("one", "One & all", [], "Nothing."), "p")
        True
    """
    import warnings

    from matplotlib import rc_context

    aside = io.StringIO()
    plain: dict[str, None] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.hashsalt": chart.name, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the reader's browser has its own fonts
        figure = _figure(_literal(chart))
        figure.savefig(aside, format="svg", metadata=plain, transparent=True, dpi=110)
    return _labelled(aside.getvalue(), chart, prefix or chart.name)


def _literal(chart: Chart) -> Chart:
    """The same chart, in which no text is read as a formula."""

    def escaped(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("$", r"\$")
        if isinstance(value, dict):
            return {escaped(name): item for name, item in value.items()}
        return [escaped(item) for item in value] if isinstance(value, (list, tuple)) else value

    def with_text(part: Any) -> Any:
        styled = {field.name: getattr(part, field.name) for field in fields(part) if field.name != "style"}
        return replace(part, **{name: escaped(value) for name, value in styled.items()})

    panels = [with_text(replace(panel, lines=[with_text(line) for line in panel.lines])) for panel in chart.panels]
    return replace(chart, title=escaped(chart.title), panels=panels)


def _labelled(document: str, chart: Chart, prefix: str) -> str:
    """The SVG element alone: ids prefixed, style on itself instead of on the page, title and description inside."""
    from xml.etree import ElementTree as Xml

    space, link = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
    Xml.register_namespace("", space[1:-1])
    Xml.register_namespace("xlink", link[1:-5])
    root = Xml.fromstring(document)
    targets = set(re.findall(r'(?:href="#|url\(#)([^")]+)', document))
    for element in list(root.iter()):
        for sheet in element.findall(f"{space}style"):  # it would hold for the whole page
            element.remove(sheet)
        own = element.attrib
        if own.get("id") not in targets:
            own.pop("id", None)
        for name, value in own.items():
            if name == "id":
                own[name] = f"{prefix}-{value}"
            elif name == "style":  # the fonts are on the root, once
                own[name] = re.sub(r"font-family: [^;]+(; |$)", "", value)
            elif name == link and value.startswith("#"):
                own[name] = f"#{prefix}-{value[1:]}"
            elif value.startswith("url(#"):
                own[name] = f"url(#{prefix}-{value[5:]}"
    root.set("style", f"stroke-linejoin: round; stroke-linecap: butt; font-family: {_FONTS}")
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}-title {prefix}-text")
    for place, (tag, name, words) in enumerate((("title", "title", chart.title), ("desc", "text", chart.alternative))):
        element = Xml.Element(f"{space}{tag}", {"id": f"{prefix}-{name}"})
        element.text = words
        root.insert(place, element)
    return Xml.tostring(root, encoding="unicode")


def _figure(chart: Chart) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(chart.panels)
    across = chart.across or max(1, min(count, 4))
    down = max(1, math.ceil(count / across))
    figure = Figure(figsize=(max(6.5, 4.2 * across), 3.4 * down + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(chart.title, fontsize=11)
    axes = figure.subplots(down, across, squeeze=False)
    for place, panel in zip(axes.flat, chart.panels, strict=False):
        if panel.matrix is not None:
            _heat(figure, place, panel)
        else:
            _lines(place, panel)
    for place in axes.flat[count:]:
        place.axis("off")
    return figure


def _lines(axes: Any, panel: Panel) -> None:
    named = any(isinstance(x, str) for line in panel.lines for x in line.x)
    bars = [line for line in panel.lines if line.style == "bars"]
    for number, line in enumerate(panel.lines):
        color = f"C{number % 10}"
        x: Sequence[float] = list(range(len(line.x))) if named else [float(value) for value in line.x]
        if line.style == "bars":
            width = 0.8 / len(bars)
            places = [value + (bars.index(line) - (len(bars) - 1) / 2) * width for value in x]
            shown = {"label": line.label or None, "color": color, "rasterized": len(x) > _MANY}
            axes.bar(places, line.y, width, yerr=line.error, capsize=2, **shown)
        elif line.style == "step":
            axes.step(x, line.y, where="mid", label=line.label or None, color=color)
        else:
            if named and len(panel.lines) > 1:  # beside each other, so that no point hides another
                x = [value + 0.6 * ((number + 0.5) / len(panel.lines) - 0.5) for value in x]
            marker = {"points": "o", "line": "." if len(x) <= 40 else ""}[line.style]
            drawn: dict[str, Any] = {"linestyle": "" if line.style == "points" else "-", "marker": marker}
            drawn |= {"color": color, "rasterized": line.style == "points" and len(x) > _MANY}
            axes.errorbar(x, line.y, yerr=line.error, label=line.label or None, capsize=2, markersize=4, **drawn)
    if named:
        names = [str(value) for value in panel.lines[0].x]
        long = max(map(len, names)) * len(names) > 45
        axes.set_xticks(range(len(names)), names, rotation=45 if long else 0, ha="right" if long else "center")
    _decorate(axes, panel)


def _decorate(axes: Any, panel: Panel) -> None:
    for mark in panel.marks:
        axes.axvline(mark, color="grey", linewidth=0.7, linestyle=":")
    for name, level in panel.levels.items():
        axes.axhline(level, color="black", linewidth=0.8, linestyle="--", label=name or None)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    axes.set_title(panel.title, fontsize=9)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    if any(line.label for line in panel.lines) or any(panel.levels):
        axes.legend(fontsize=7)


def _heat(figure: Any, axes: Any, panel: Panel) -> None:
    assert panel.matrix is not None
    image = axes.imshow([list(row) for row in panel.matrix], aspect="auto", interpolation="nearest", cmap="viridis")
    if panel.row_names:
        axes.set_yticks(range(len(panel.row_names)), panel.row_names, fontsize=6)
    if panel.column_names:
        axes.set_xticks(range(len(panel.column_names)), panel.column_names, fontsize=7, rotation=45, ha="right")
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    axes.set_title(panel.title, fontsize=9)
    figure.colorbar(image, ax=axes, label=panel.scale)


def draw_run(path: Path, history: list[dict[str, Any]], moves: list[int], metric: str, before: float | None) -> None:
    """Draw a run to a PNG file: loss and validation metric over the steps, with the moves.

    Args:
        path: the file.
        history: the Trainer's log.
        moves: steps after which the slices moved.
        metric: name of the main metric.
        before: its value before training.
    """
    with replacing(path) as part:
        _figure(run_chart(history, moves, metric, before)).savefig(part, dpi=120)


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
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
