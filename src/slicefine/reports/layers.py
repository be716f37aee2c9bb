"""A map of all layers as SVG: each weight a box, its trained rows and columns in it, darker where they went further."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..files.adapter import Adapter, LayerFile
from ..files.distance import Distance
from ..geometry import AXES, Slice
from .elements import Html, text

__all__ = ["LAYERS_AT_MOST", "MARKS_AT_MOST", "LayerMap", "layer_map"]

MARKS_AT_MOST = 2000  # rectangles of slices on a map
LAYERS_AT_MOST = 1000
_COLOURS = ("addc30", "5ec962", "28ae80", "21918c", "2c728e", "3b528b", "472d7b", "440154")  # viridis, dark is much
_BOX, _GAP, _HEAD, _LETTER = (84.0, 40.0), 12.0, 12.0, 6.0


class _Mark(NamedTuple):
    """Lines of a layer from one share of its size to another, their value, and what a pointer shows."""

    axis: str
    start: float
    end: float
    value: float
    words: str


class _Scale(NamedTuple):
    """The value that is darkest, what values mean, and the words at both ends of the legend."""

    most: float
    words: str
    low: str
    high: str


@dataclass(frozen=True)
class LayerMap:
    """The picture and what its caption needs.

    Attributes:
        svg: the element, with title and description.
        caption: one or more sentences.
    """

    svg: Html
    caption: str


def layer_map(adapter: Adapter, distances: dict[str, dict[Slice, Distance]] | None, prefix: str) -> LayerMap:
    """Draw every layer with the slices that at least one optimizer step trained.

    Boxes of one row belong to one block, boxes of one column to one kind of layer. They are equally large whatever
    the weights' shapes. Beyond `MARKS_AT_MOST` slices, neighbours fall together into equal parts of their layer.

    Args:
        adapter: the slices.
        distances: colour them by the relative change; None colours them by the order of their visits.
        prefix: of every id in the picture.
    """
    names = list(adapter.layers)[:LAYERS_AT_MOST]
    marks = {name: _marks(adapter.layers[name], None if distances is None else distances[name]) for name in names}
    joined = sum(map(len, marks.values())) > MARKS_AT_MOST
    if joined:
        parts = max(1, MARKS_AT_MOST // len(names))
        marks = {name: _binned(own, parts) for name, own in marks.items()}
    svg = _draw(adapter, marks, _scale(marks, distances is not None), prefix)
    return LayerMap(svg, _caption(adapter, joined, distances is not None))


def _scale(marks: dict[str, list[_Mark]], measured: bool) -> _Scale:
    """Darkest where the largest value is, or at the 95th percentile where single ones are far beyond it."""
    values = sorted(mark.value for own in marks.values() for mark in own if math.isfinite(mark.value)) or [0.0]
    if not measured:
        return _Scale(values[-1] or 1.0, "order of the visits", "1", f"{values[-1]:.0f}")
    usual = values[int(0.95 * (len(values) - 1))]
    if values[-1] <= 2 * usual or usual == 0:
        return _Scale(values[-1] or 1.0, "relative change of the values", "0%", f"{values[-1]:.1%}")
    return _Scale(usual, "relative change of the values", "0%", f"{usual:.1%} or more")


def _marks(layer: LayerFile, distances: dict[Slice, Distance] | None) -> list[_Mark]:
    """A layer's slices that were trained; of one that was visited twice the later visit counts."""
    found = {}
    for number, visit in enumerate(layer.visits, start=1):
        if visit.last_step < visit.first_step:
            continue  # outside a window of blocks
        block = visit.slice
        value = float(number) if distances is None else distances[block].relative
        size = 1 if block.axis == "entries" else layer.shape[AXES.index(block.axis)]
        start, width = (0, 1) if block.axis == "entries" else (block.start, block.width)
        where = f"{block.width} entries" if block.axis == "entries" else f"{block.axis}s {start} to {start + width - 1}"
        how_far = "" if distances is None else f", changed by {value:.2%}"
        words = f"{where}, steps {visit.first_step} to {visit.last_step}{how_far}"
        found[block] = _Mark(block.axis, start / size, (start + width) / size, value, words)
    return list(found.values())


def _binned(marks: list[_Mark], parts: int) -> list[_Mark]:
    """Equal parts of the layer instead of slices, each with the largest value of the slices that reach into it."""
    axes = list(dict.fromkeys(mark.axis for mark in marks))
    count = max(1, parts // max(1, len(axes)))
    largest: dict[tuple[str, int], float] = {}
    for mark in marks:
        for part in range(math.floor(mark.start * count + 1e-9), min(count, math.ceil(mark.end * count - 1e-9))):
            largest[mark.axis, part] = max(mark.value, largest.get((mark.axis, part), 0.0))
    return [_Mark(axis, n / count, (n + 1) / count, value, "") for (axis, n), value in largest.items()]


def _place(name: str) -> tuple[str, str]:
    """Row and column of a layer on the map: its block, and what it is within it.

    >>> _place("bert.encoder.layer.3.output.dense")
    ('bert.encoder.layer.3', 'output.dense')
    """
    parts = name.split(".")
    first = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: first + 1]), ".".join(parts[first + 1 :])


def _draw(adapter: Adapter, marks: dict[str, list[_Mark]], scale: _Scale, prefix: str) -> Html:
    places = {name: _place(name) for name in marks}
    rows = sorted({row for row, _ in places.values()}, key=_natural)
    columns = list(dict.fromkeys(column for _, column in places.values()))
    labels = _short(rows)
    left = 8 + _LETTER * max(map(len, labels))
    top = 8 + _HEAD * max(1, max(len(column.split(".")) for column in columns))
    step = (_BOX[0] + _GAP, _BOX[1] + _GAP)
    width = max(left + step[0] * len(columns), left + 300)
    height = top + step[1] * len(rows) + 40
    title, words = "What was trained in each layer", _described(adapter, marks, scale)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="map" role="img" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" aria-labelledby="{prefix}-title {prefix}-text">'
        f'<title id="{prefix}-title">{title}</title><desc id="{prefix}-text">{text(words)}</desc>'
    ]
    for at, column in enumerate(columns):
        out.append(_heading(column, left + at * step[0], top))
    for at, label in enumerate(labels):
        out.append(f'<text x="0" y="{top + at * step[1] + _BOX[1] / 2 + 4:g}">{text(label)}</text>')
    for name, own in marks.items():
        row, column = places[name]
        x, y = left + columns.index(column) * step[0], top + rows.index(row) * step[1]
        out.append(_box(name, adapter.layers[name], own, scale.most, (x, y)))
    out.append(_legend(left, height - 28, scale, prefix))
    return Html("".join(out) + "</svg>")


def _box(name: str, layer: LayerFile, marks: list[_Mark], most: float, at: tuple[float, float]) -> str:
    x, y = at
    rows, columns = layer.shape
    words = f"{name}, {rows} x {columns}"
    shapes = [f'<rect class="layer" width="{_BOX[0]:g}" height="{_BOX[1]:g}"/>']
    for mark in marks:
        side = _BOX[1] if mark.axis == "row" else _BOX[0]
        start, length = mark.start * side, max(1.0, (mark.end - mark.start) * side)
        start = min(start, side - length)
        box = f'y="{start:.4g}" width="{_BOX[0]:g}" height="{length:.4g}"'
        if mark.axis != "row":
            box = f'x="{start:.4g}" width="{length:.4g}" height="{_BOX[1]:g}"'
        inside = f"<title>{text(mark.words)}</title>" if mark.words else ""
        shapes.append(f'<rect {box} fill="#{_colour(mark.value / most)}">{inside}</rect>')
    return f'<g transform="translate({x:g} {y:g})"><title>{text(words)}</title>{"".join(shapes)}</g>'


def _heading(column: str, x: float, top: float) -> str:
    """A kind of layer, one part of its name per line."""
    parts = [part if len(part) <= 14 else f"{part[:13]}…" for part in column.split(".")]
    first = top - 6 - _HEAD * (len(parts) - 1)
    lines = [f'<tspan x="{x:g}" y="{first + _HEAD * n:g}">{text(part)}</tspan>' for n, part in enumerate(parts)]
    return f"<text>{''.join(lines)}</text>"


def _legend(x: float, y: float, scale: _Scale, prefix: str) -> str:
    stops = "".join(f'<stop offset="{n / 7:.3f}" stop-color="#{colour}"/>' for n, colour in enumerate(_COLOURS))
    start = x + _LETTER * len(scale.low) + 10
    return (
        f'<defs><linearGradient id="{prefix}-scale">{stops}</linearGradient></defs>'
        f'<text x="{x:g}" y="{y + 10:g}">{scale.low}</text>'
        f'<rect x="{start:g}" y="{y:g}" width="120" height="12" fill="url(#{prefix}-scale)"/>'
        f'<text x="{start + 128:g}" y="{y + 10:g}">{scale.high}: {scale.words}</text>'
    )


def _described(adapter: Adapter, marks: dict[str, list[_Mark]], scale: _Scale) -> str:
    slices = sum(map(len, marks.values()))
    where = max(marks, key=lambda name: max((mark.value for mark in marks[name]), default=-1.0))
    largest = max((mark.value for mark in marks[where]), default=0.0)
    furthest = f"; the largest, {largest:.1%}, is in {where}" if scale.low == "0%" else ""
    return f"{len(adapter.layers)} layers with {slices} marks, coloured by {scale.words}{furthest}."


def _caption(adapter: Adapter, joined: bool, measured: bool) -> str:
    meaning = "the norm of their change relative to that of the base's values" if measured else "the order of visits"
    sentences = [
        f"Each box is one layer's weight, not to scale; its trained rows and columns are coloured by {meaning}."
    ]
    if joined:
        sentences.append(
            f"There are more than {MARKS_AT_MOST:,} slices: a mark stands for its part of the layer, with the largest "
            "value in it."
        )
    if len(adapter.layers) > LAYERS_AT_MOST:
        sentences.append(f"Of {len(adapter.layers):,} layers the first {LAYERS_AT_MOST:,} are drawn.")
    if any(visit.slice.axis == "entries" for layer in adapter.layers.values() for visit in layer.visits):
        sentences.append("Single entries lie all over their layer, which has the colour of the last ones drawn.")
    return " ".join(sentences)


def _colour(share: float) -> str:
    """A share of the largest value as six hexadecimal digits; what is infinite is as dark as the largest."""
    place = min(1.0, max(0.0, share)) * (len(_COLOURS) - 1)
    low = min(int(place), len(_COLOURS) - 2)
    ends = [[int(colour[at : at + 2], 16) for at in (0, 2, 4)] for colour in _COLOURS[low : low + 2]]
    return "".join(f"{round(a + (b - a) * (place - low)):02x}" for a, b in zip(*ends, strict=True))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _short(rows: list[str]) -> list[str]:
    """The rows' names without the leading parts that all of them share, and never without the last two."""
    parts = [row.split(".") for row in rows]
    common = 0
    while all(len(own) > common + 2 for own in parts) and len({own[common] for own in parts}) == 1:
        common += 1
    return [" ".join(own[common:]) for own in parts]
