"""``slicefine plan --rank auto``: the slice rank that Corollary 2.6 suggests, from the recipe's own train rows.

A column slice mixes some of a layer's inputs, a row slice makes some of its outputs: k_task(tau) is that of the
features on that side, positions pooled to their mean per example. It counts directions of variance and knows
nothing of the labels, so numbers that do are printed beside it.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..analysis.collect import features
from ..analysis.features import components_for, label_energy, label_share, task_rank
from ..errors import ConfigError, DataError, NumericalError
from ..files.checkpoint import kind_of
from ..mover import movers_of
from .methods import make_trainable, train_batches
from .report import write_json
from .session import Session, build
from .settings import TrainSettings

__all__ = ["LayerRank", "RankPlan", "plan_ranks", "print_ranks", "rank_plan"]

_SIDES = {"column": ("column",), "row": ("row",), "alternate": ("row", "column")}
_FEATURES = {"row": "output", "column": "input"}


@dataclass(frozen=True)
class LayerRank:
    """One layer and one kind of slice.

    Attributes:
        name: of the layer.
        axis: ``"row"`` or ``"column"``.
        lines: rows or columns of its weight; the rank is at most that.
        k_task: components that hold tau of the features' variance.
        task_rank: rank(Sigma_task); None without labels per example.
        label_share: of the features' variance, what the labels explain.
        label_components: components that hold tau of that; None where the labels explain nothing.
    """

    name: str
    axis: str
    lines: int
    k_task: int
    task_rank: int | None = None
    label_share: float | None = None
    label_components: int | None = None

    @property
    def r(self) -> int:
        """k_task, at most the layer's lines."""
        return min(self.k_task, self.lines)


@dataclass(frozen=True)
class RankPlan:
    """What `plan_ranks` found.

    Attributes:
        tau: the share.
        examples: train rows; k_task is at most one less.
        layers: every layer, once per kind of slice.
        ranks: the median over layers, by kind of slice.
        rank_pattern: one rank per layer; empty unless they were asked for.
    """

    tau: float
    examples: int
    layers: list[LayerRank]
    ranks: dict[str, int]
    rank_pattern: dict[str, int]

    @property
    def settings(self) -> dict[str, Any]:
        """What to set under ``slice`` of a recipe: one r, or two where rows and columns alternate."""
        if len(self.ranks) == 1:
            own: dict[str, Any] = {"r": next(iter(self.ranks.values()))}
        else:
            own = {f"r_{axis}": r for axis, r in self.ranks.items()}
        return own | ({"rank_pattern": self.rank_pattern} if self.rank_pattern else {})


def rank_plan(
    settings: TrainSettings,
    tau: float = 0.9,
    per_layer: bool = False,
    examples: int = 256,
    file: str | None = None,
    console: Console | None = None,
) -> RankPlan:
    """Load the recipe's model and data, find the ranks, print them, and write them as JSON if a file is named.

    Raises:
        ConfigError: for a setting that is wrong, a mode without slices, or a file that cannot be written.
        DataError: for data that cannot be used, or fewer than two rows.
    """
    console = console or Console(quiet=settings.quiet, width=None if Console().is_terminal else 120)
    _check(settings, tau)
    session = build(replace(settings, method=replace(settings.method, name="full")))
    with console.status("measuring features"):
        found = plan_ranks(session, tau, per_layer, examples)
    print_ranks(found, console)
    if file is not None:
        _write(file, found)
        console.print(f"written to {file}", highlight=False, soft_wrap=True)
    return found


def plan_ranks(session: Session, tau: float = 0.9, per_layer: bool = False, examples: int = 256) -> RankPlan:
    """k_task(tau) of every layer that the run would train.

    One r for all is the median over layers; a maximum would follow a single layer. Each layer's own rank is clamped to
    its rows or columns first. Where rows and columns alternate, a layer's own rank is the larger of its two, at most
    the shorter side of its weight: `rank_pattern` has one number for both.

    Args:
        session: a run with a base model that is not wrapped yet (``method.name=full`` leaves it so).
        tau: share of the variance.
        per_layer: give each layer its own rank.
        examples: train rows at most, drawn with the run's seed; n rows have at most n - 1 components.

    Raises:
        ConfigError: for tau outside (0, 1], or a mode without slices.
        DataError: for fewer than two rows.
        NumericalError: for NaN, infinite or constant features; it names the layer.
    """
    settings = session.settings
    _check(settings, tau)
    shapes = _shapes(session)
    count = math.ceil(examples / settings.training.batch_size)
    batches = list(train_batches(session.loaded, settings, session.prepared, count))
    labels = _labels(batches)
    layers = []
    for axis in _SIDES[settings.slice.mode]:
        given = features(session.loaded.model, batches, list(shapes), "mean", _FEATURES[axis])
        for name, shape in shapes.items():
            rows, own = given[name][:examples], None if labels is None else labels[:examples]
            layers.append(_layer(name, axis, shape[axis == "column"], rows, own, tau))
    ranks = {
        axis: math.ceil(median(layer.r for layer in layers if layer.axis == axis))
        for axis in _SIDES[settings.slice.mode]
    }
    return RankPlan(tau, len(rows), layers, ranks, _pattern(layers, shapes) if per_layer else {})


def print_ranks(found: RankPlan, console: Console) -> None:
    """Print the table, what to set, and what it does not say."""
    table = Table(title=f"k_task({found.tau:g}) on {found.examples} train rows: median (least-most)")
    table.add_column("layers", no_wrap=True)
    for column in ("slices", "k_task", "rank(Sigma)", "label share", "label components"):
        table.add_column(column, justify="right")
    for layers in _grouped(found.layers, bool(found.rank_pattern)):
        table.add_row(*_cells(layers))
    console.print(table)
    clamped = [f"{layer.name} to {layer.lines}" for layer in found.layers if layer.r < layer.k_task]
    if clamped:
        console.print(f"clamped to the rows or columns that there are: {', '.join(clamped[:5])}", highlight=False)
    options = [f"--slice.{name} {_value(value)}" for name, value in found.settings.items()]
    console.print(f"suggests {' '.join(options)}", highlight=False, soft_wrap=True)
    console.print(
        "k_task(tau) knows nothing of the labels; see docs/findings.md for how it relates to the rank at which "
        f"accuracy saturates. It is at most n - 1 = {found.examples - 1}. Beside it: rank(Sigma_task), at most the "
        "number of classes; the share of the features' variance that the labels explain; and how many components hold "
        f"{found.tau:g} of that share.",
        highlight=False,
    )


def _check(settings: TrainSettings, tau: float) -> None:
    if not 0 < tau <= 1:
        raise ConfigError(f"tau={tau!r} must lie in (0, 1].")
    if settings.slice.mode not in _SIDES:
        raise ConfigError(
            f"slice.mode={settings.slice.mode!r} has no rows or columns whose features could be looked at; expected "
            f"one of {', '.join(_SIDES)}."
        )


def _shapes(session: Session) -> dict[str, tuple[int, int]]:
    """The layers that the run would train, with their shapes; the model is as before afterwards."""
    own = replace(session.settings.slice, positions="sweep", r=1, r_row=None, r_column=None, rank_pattern={})
    method = replace(session.settings.method, name="slicefine")
    wrapped = make_trainable(
        session.loaded, session.task, replace(session.settings, slice=own, method=method), session.prepared
    )
    try:
        (mover,) = movers_of(wrapped)
        return {name: layer.shape for name, layer in mover.layers.items()}
    finally:
        wrapped.unload()


def _labels(batches: Sequence[dict[str, Any]]) -> Tensor | None:
    """One label per example, or None."""
    if not all("labels" in batch and batch["labels"].dim() == 1 for batch in batches):
        return None
    return torch.cat([batch["labels"].cpu() for batch in batches])


def _layer(name: str, axis: str, lines: int, rows: Tensor, labels: Tensor | None, tau: float) -> LayerRank:
    try:
        k = components_for(rows, tau)
    except NumericalError as error:
        raise NumericalError(f"layer {name!r}, {_FEATURES[axis]}s: {error}") from error
    if labels is None:
        return LayerRank(name, axis, lines, k)
    try:
        components: int | None = int((label_energy(rows, labels) < tau - 1e-12).sum()) + 1
    except DataError:  # all labels are the same
        components = None
    return LayerRank(name, axis, lines, k, task_rank(rows, labels), label_share(rows, labels), components)


def _pattern(layers: Sequence[LayerRank], shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    """One rank per layer; longer names first, as a name also stands for the end of longer ones."""
    both = len({layer.axis for layer in layers}) > 1
    result: dict[str, int] = {}
    for layer in layers:
        most = min(shapes[layer.name]) if both else layer.lines
        result[layer.name] = min(most, max(layer.k_task, result.get(layer.name, 1)))
    return dict(sorted(result.items(), key=lambda item: -len(item[0])))


def _grouped(layers: Sequence[LayerRank], each: bool) -> list[list[LayerRank]]:
    groups: dict[tuple[str, str, int], list[LayerRank]] = {}
    for layer in layers:
        key = layer.name if each else kind_of(layer.name)
        groups.setdefault((key, layer.axis, layer.lines), []).append(layer)
    return list(groups.values())


def _cells(layers: Sequence[LayerRank]) -> list[str]:
    first = layers[0]
    name = first.name if len(layers) == 1 else f"{kind_of(first.name)} ({len(layers)})"
    found = [[getattr(layer, key) for layer in layers] for key in ("task_rank", "label_share", "label_components")]
    rest = ["-" if None in values else _range(values) for values in found]
    return [name, f"{first.axis}s", _range([layer.k_task for layer in layers]), *rest]


def _range(values: Sequence[float]) -> str:
    """``median (least-most)``."""
    shown = [
        f"{value:.2g}" if max(values) < 1 else f"{value:g}" for value in (median(values), min(values), max(values))
    ]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]}-{shown[2]})"


def _value(value: Any) -> str:
    return shlex.quote(json.dumps(value)) if isinstance(value, dict) else str(value)


def _write(file: str, found: RankPlan) -> None:
    path = Path(file).expanduser()
    content = {
        "slice": found.settings,
        "tau": found.tau,
        "examples": found.examples,
        "layers": [asdict(layer) | {"r": layer.r} for layer in found.layers],
    }
    write_json(path, content)
