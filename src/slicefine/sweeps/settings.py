"""What a sweep's recipe says, and the runs that follow from it: pure functions of the recipe."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..errors import ConfigError, nearest
from ..training.settings import TrainSettings

__all__ = [
    "Cell",
    "Run",
    "SweepSettings",
    "ViewSettings",
    "cells",
    "extended",
    "final_run",
    "merged",
    "runs_of",
    "search_run",
    "search_seed",
    "train_settings",
]

_LISTED = "slicefine train --help_all lists them."
Labels = tuple[tuple[str, str], ...]  # axis -> label, in the order of the recipe


@dataclass
class ViewSettings:
    """How results are laid out; each is the name of an axis.

    Args:
        rows: one table row per label.
        columns: one table column per label.
        pages: one table, and one panel of the figure, per label.
        x: horizontal axis of the figure; None is columns.
        lines: one line per label; None is rows.
        log_x: logarithmic horizontal axis, for numeric labels.
        reference: compare with these labels of an axis, run by run: {axis: label or list of labels}.
        metrics: numbers of a column, where it has other ones than its task's main metric: {label: [metric, ...]}.
        apart: give each of these numbers a column of its own.
        averages: add the mean over all numbers of a row, and the mean of its ranks.
        points: show hundredths as points, with two digits.
    """

    rows: str | None = None
    columns: str | None = None
    pages: str | None = None
    x: str | None = None
    lines: str | None = None
    log_x: bool = False
    reference: dict[str, str | list[str]] = field(default_factory=dict)
    metrics: dict[str, list[str]] = field(default_factory=dict)
    apart: bool = False
    averages: bool = False
    points: bool = False


@dataclass
class SweepSettings:
    """A sweep: what all runs share, what varies, and what is tuned.

    Args:
        title: of table and figure.
        claim: what the paper says there, in a sentence.
        base: a training recipe that all runs share.
        vary: axes of the grid: {setting: [values]}, or {name: {label: {setting: value}}}; settings in dotted notation.
        tune: {setting: [values]}: chosen by the validation metric of one run each, among equal ones by the least loss.
        tune_seed: of the runs that choose; None is the first of seeds, whose chosen run then counts as a result, too.
        extend: how many values may be tried beyond an end of a tuned list, while the best one is at that end.
        final: {setting: value} for the runs that count, on top of the rest: the test set, which the search never reads.
        split: the set whose metrics are shown and compared: validation, or test.
        tune_per: axes whose labels are tuned apart; others take what was best for their first label. None: every cell.
        seeds: of the runs.
        view: how results are laid out.
        output: folder for results; a sweep goes on with what it finds there.
        workers: runs at a time, each with its own device where there are several.
        seconds: start no new run after so many seconds; None: no limit.
        keep: keep each run's own folder with its adapter, below folders/.
        dry_run: list the runs and stop.
        only: {axis: [labels]}: these labels alone.
        change: {setting: value} for all runs, in dotted notation, on top of the base.
        limit: at most so many runs, for a smoke test.
        search_only: make the runs that choose and show what they measured on validation; none that counts.
    """

    title: str = "sweep"
    claim: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    vary: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, list[Any]] = field(default_factory=dict)
    tune_per: list[str] | None = None
    tune_seed: int | None = None
    extend: int = 0
    final: dict[str, Any] = field(default_factory=dict)
    split: str = "validation"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    view: ViewSettings = field(default_factory=ViewSettings)
    output: str | None = None
    workers: int = 1
    seconds: float | None = None
    keep: bool = False
    dry_run: bool = False
    only: dict[str, list[str]] = field(default_factory=dict)
    change: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    search_only: bool = False

    def __post_init__(self) -> None:
        for name in ("base", "vary", "tune", "final", "only", "change"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"{name}: expected a mapping of settings, got {getattr(self, name)!r:.100}.")
        for name, values in self.tune.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(f"tune: {name!r} needs a list of values, got {values!r:.100}.")
        if self.search_only and not self.tune:
            raise ConfigError("search_only=true: the sweep tunes nothing, so that there is no search.")
        if not self.seeds:
            raise ConfigError("seeds=[]: a sweep needs at least one seed.")
        if self.split not in ("validation", "test"):
            raise ConfigError(f"split={self.split!r} is unknown; expected validation or test.")
        if self.split == "test" and (self.tune_seed is None or self.tune_seed in self.seeds):
            raise ConfigError(
                f"split=test with tune_seed={self.tune_seed}: the runs that choose must not be those that count; give "
                "tune_seed a seed that is not among seeds."
            )
        if self.extend < 0:
            raise ConfigError(f"extend={self.extend} must not be negative.")
        if self.workers < 1:
            raise ConfigError(f"workers={self.workers} must be at least 1.")
        if not self.vary:
            raise ConfigError("vary={}: name at least one axis, {setting: [values]} (a sweep comes as --config FILE).")
        named = set(self.vary)
        view = [self.view.rows, self.view.columns, self.view.pages, self.view.x, self.view.lines]
        for where, axes in (("view", view), ("tune_per", self.tune_per or []), ("only", self.only)):
            for axis in axes:
                if axis is not None and axis not in named:
                    raise ConfigError(f"{where}: {axis!r} is no axis of the sweep; those are {', '.join(named)}.")
        for axis, label in self.references():
            if label not in dict(_axis(axis, self.vary.get(axis, []))):
                raise ConfigError(f"view.reference: axis {axis!r} has no label {label!r}.")

    def references(self) -> list[tuple[str, str]]:
        """Axis and label of every comparison."""
        given = self.view.reference.items()
        return [(axis, one) for axis, labels in given for one in ([labels] if isinstance(labels, str) else labels)]


@dataclass(frozen=True)
class Cell:
    """One point of the grid: the labels of its axes, and the settings that they stand for."""

    labels: Labels
    changes: tuple[tuple[str, Any], ...] = field(compare=False)

    def label(self, axis: str | None) -> str:
        """The label of an axis; empty for None."""
        return dict(self.labels).get(axis or "", "")


@dataclass(frozen=True)
class Run:
    """One training run of a sweep.

    Attributes:
        cell: where in the grid.
        seed: training.seed.
        tuned: values of the tuned settings.
        recipe: the whole training recipe as nested plain data.
    """

    cell: Cell
    seed: int
    tuned: tuple[tuple[str, Any], ...]
    recipe: dict[str, Any]

    @property
    def key(self) -> str:
        """Name of its result file: readable, and different for every recipe."""
        words = [label for _, label in self.cell.labels] + [f"{value}" for _, value in self.tuned] + [f"s{self.seed}"]
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(words))[:80]
        digest = hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()[:8]
        return f"{readable}_{digest}"


def cells(settings: SweepSettings) -> list[Cell]:
    """All points of the grid, in the order of the recipe.

    Raises:
        ConfigError: for an axis without labels.

    Example:
        >>> found = cells(SweepSettings(vary={"slice.r": [1, 5], "mode": {"rows": {"slice.mode": "row"}}}))
        >>> [cell.labels for cell in found]
        [(('slice.r', '1'), ('mode', 'rows')), (('slice.r', '5'), ('mode', 'rows'))]
    """
    axes = []
    for name, values in settings.vary.items():
        labelled = _axis(name, values)
        wanted = settings.only.get(name)
        chosen = [(label, changes) for label, changes in labelled if wanted is None or label in wanted]
        if not chosen:
            known = ", ".join(label for label, _ in labelled)
            raise ConfigError(f"vary: axis {name!r} has none of the labels asked for; it has {known or 'none at all'}.")
        axes.append([(name, label, changes) for label, changes in chosen])
    return [
        Cell(
            tuple((name, label) for name, label, _ in point),
            tuple(item for _, _, changes in point for item in changes.items()),
        )
        for point in itertools.product(*axes)
    ]


def search_seed(settings: SweepSettings) -> int:
    """The seed of the runs that choose."""
    return settings.seeds[0] if settings.tune_seed is None else settings.tune_seed


def search_run(settings: SweepSettings, cell: Cell, seed: int, tuned: tuple[tuple[str, Any], ...]) -> Run:
    """The run of a cell and seed with some values of the tuned settings."""
    changes = {**settings.change, **dict(cell.changes), **dict(tuned), "training.seed": seed}
    return Run(cell, seed, tuned, merged(settings.base, changes))


def runs_of(settings: SweepSettings, cell: Cell, seed: int, lists: dict[str, list[Any]] | None = None) -> list[Run]:
    """The runs of a cell and seed: one per combination of the tuned settings, or of other lists in their place."""
    names = list(settings.tune)
    points = itertools.product(*(lists or settings.tune).values())
    return [search_run(settings, cell, seed, tuple(zip(names, values, strict=True))) for values in points]


def final_run(settings: SweepSettings, cell: Cell, seed: int, tuned: tuple[tuple[str, Any], ...]) -> Run:
    """The run of a cell and seed that counts, with the values that tuning chose."""
    changes = {**settings.change, **dict(cell.changes), **dict(tuned), **settings.final, "training.seed": seed}
    return Run(cell, seed, tuned, merged(settings.base, changes))


def extended(values: list[Any], best: Any) -> list[Any]:
    """A tuned list with one more value beyond the end where the best one is, in the list's own ratio there.

    Example:
        >>> extended([0.3, 1.0, 3.0], 3.0)
        [0.3, 1.0, 3.0, 9.0]
        >>> extended([0.3, 1.0, 3.0], 1.0)
        [0.3, 1.0, 3.0]
    """
    numeric = all(isinstance(value, int | float) and value > 0 for value in values)
    if not numeric or len(values) < 2 or values != sorted(set(values)):
        return values
    if best == values[0]:
        return [float(f"{values[0] ** 2 / values[1]:.3g}"), *values]
    return [*values, float(f"{values[-1] ** 2 / values[-2]:.3g}")] if best == values[-1] else values


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with settings in dotted notation put in; the base is left alone. A mapping's value is merged, too.

    Example:
        >>> merged({"slice": {"r": 5}}, {"slice.mode": "row", "training": {"epochs": 1}})
        {'slice': {'r': 5, 'mode': 'row'}, 'training': {'epochs': 1}}
    """
    result: dict[str, Any] = copy.deepcopy(dict(base))
    for path, value in changes.items():
        for name, leaf in _leaves(path, value):
            place = result
            *parents, last = name.split(".")
            for parent in parents:
                place = place.setdefault(parent, {})
                if not isinstance(place, dict):
                    raise ConfigError(f"{name!r}: {parent!r} is a value there and has no settings inside.")
            place[last] = copy.deepcopy(leaf)
    return result


def train_settings(recipe: Mapping[str, Any]) -> TrainSettings:
    """A recipe as checked settings.

    Raises:
        ConfigError: for an unknown setting, or a value that is wrong.
    """
    from jsonargparse import ArgumentError

    parser = _parser()
    try:
        parsed = parser.parse_object(dict(recipe))
        make = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
        return TrainSettings(**make(parsed).as_dict())
    except (ArgumentError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        names = [action.dest for action in parser._actions]
        known = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
        unknown = next(_unknown(recipe, known), None)
        reason: object = error
        if unknown is not None:
            reason = f"there is no setting {unknown}; {nearest(unknown, known, _LISTED)}"
        raise ConfigError(f"a run's recipe is wrong: {reason}") from error


def _unknown(recipe: Mapping[str, Any], known: Sequence[str], path: str = "") -> Iterator[str]:
    """Names in a recipe, in dotted notation, that are no setting and no group of settings."""
    for key, value in recipe.items():
        name = f"{path}{key}"
        if name in known:
            continue
        if not any(other.startswith(f"{name}.") for other in known):
            yield name
        elif isinstance(value, Mapping):
            yield from _unknown(value, known, f"{name}.")


@cache
def _parser() -> Any:
    """Made once: it takes longer than reading a recipe with it."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainSettings)
    return parser


def _axis(name: str, values: Any) -> list[tuple[str, dict[str, Any]]]:
    """Labels of an axis with the settings that they stand for."""
    if isinstance(values, Mapping):
        for label, changes in values.items():
            if not isinstance(changes, Mapping):
                raise ConfigError(f"vary: {name!r} label {label!r}: expected {{setting: value}}, got {changes!r}.")
        return [(str(label), dict(changes)) for label, changes in values.items()]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"vary: axis {name!r} needs a list of values, or {{label: {{setting: value}}}}.")
    return [(str(value), {name: value}) for value in values]


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    # positions and patterns are themselves mappings, by layer name
    whole = path.split(".")[-1] in ("positions", "rank_pattern", "config")
    if isinstance(value, Mapping) and not whole:
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    else:
        yield path, value
