"""Spectral balance of a model's weights: Lemma 2.1 and Figure 2, beside what untrained matrices give.

The weights are read from safetensors one matrix at a time; the model itself is never built.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..analysis.spectra import NULLS, SpectralBalance, null_weight, spectral_balance
from ..charts import Chart, Line, Panel
from ..errors import ConfigError, NumericalError
from ..files.checkpoint import Checkpoint, kind_of, model_folder
from ..targets import matches
from .common import Result

__all__ = ["STATISTICS", "Settings", "study"]

STATISTICS = ("energy_ratio", "decay_difference", "variance", "relative_variance")
_AXES = ("row", "column")
_TRAINED = "trained"
_MOST_DRAWN = 6


@dataclass
class Settings:
    """Which weights to look at.

    Args:
        model: folder, hub id, or "minilm" for the packaged model; its weights must be safetensors.
        revision: branch, tag or commit on the hub.
        groups: groups of neighbouring rows, and of neighbouring columns, per matrix.
        target_modules: the layers to look at: "all-linear", names, or a regular expression.
        limit: layers at most, spread evenly over the model; None takes all.
        layers: layers to draw; empty takes one from the middle of the model per kind of layer.
        nulls: what to compare with: gaussian, shuffled (entries), shuffled_lines (whole rows and columns).
        seed: of the nulls.
        output: folder for JSON and pictures; None prints only.
    """

    model: str = "minilm"
    revision: str | None = None
    groups: int = 8
    target_modules: str | list[str] = "all-linear"
    limit: int | None = None
    layers: list[str] = field(default_factory=list)
    nulls: list[str] = field(default_factory=lambda: list(NULLS))
    seed: int = 0
    output: str | None = None

    def __post_init__(self) -> None:
        if self.groups < 2:
            raise ConfigError(f"groups={self.groups!r} must be at least 2; one group has nothing to be compared with.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit!r} must be at least 1; leave it out for all layers.")
        for kind in self.nulls:
            if kind not in NULLS:
                raise ConfigError(f"nulls: {kind!r} is unknown; expected some of {', '.join(NULLS)}.")


@dataclass
class _Measured:
    """One matrix: ``found[axis][what]``, where what is ``"trained"`` or a null."""

    name: str
    kind: str
    shape: tuple[int, int]
    found: dict[str, dict[str, SpectralBalance]]
    notes: list[str]


def study(settings: Settings) -> Result:
    """Measure every chosen matrix and its nulls, for row and for column groups.

    Raises:
        ConfigError: if no layer matches.
        AdapterFileError: if there are no safetensors weights, or they cannot be read.
        NumericalError: for NaN or infinite weights; it names the tensor.
    """
    folder = _folder(settings)
    with Checkpoint(folder) as base:
        names, excluded = base.linear_layers()
        chosen = _chosen(names, settings, folder)
        drawn = _drawn(chosen, settings)
        measured = []
        with _workers() as workers:
            for name in _progress(chosen):
                weight = _weight(base, name)
                measured.append(_measure(name, weight, settings, name in drawn, workers))
    return _result(measured, excluded, drawn, settings)


def _folder(settings: Settings) -> Path:
    if settings.model != "minilm":
        return model_folder(settings.model, settings.revision)
    from ..tasks.minilm import minilm_folder

    return minilm_folder()


def _chosen(names: list[str], settings: Settings, folder: Path) -> list[str]:
    matching = [name for name in names if matches(name, settings.target_modules)]
    if not matching:
        some = ", ".join(names[:5]) or "none"
        raise ConfigError(
            f"target_modules={settings.target_modules!r} matches none of the linear layers in {folder}; they are "
            f"called {some}."
        )
    if settings.limit is None or settings.limit >= len(matching):
        return matching
    return [matching[int((i + 0.5) * len(matching) / settings.limit)] for i in range(settings.limit)]


def _drawn(chosen: Sequence[str], settings: Settings) -> list[str]:
    if settings.layers:
        found = [name for name in chosen if matches(name, settings.layers)]
        if not found:
            raise ConfigError(
                f"layers={settings.layers!r} names none of the layers looked at: {', '.join(chosen[:5])}."
            )
        return found[:_MOST_DRAWN]
    kinds = _by_kind(chosen, kind_of)
    return [names[len(names) // 2] for names in kinds.values()][:_MOST_DRAWN]


def _weight(base: Checkpoint, name: str) -> Tensor:
    weight = base.matrix(name)
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise NumericalError(
            f"{base.folder}: tensor {f'{name}.weight'!r} has {bad:,} NaN or infinite values; it has no spectrum."
        )
    return weight


@contextmanager
def _workers() -> Iterator[Executor]:
    """One thread per variant of a weight: groups are too small to share one, and threads that wait for others spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max_workers=before) as workers:
            yield workers
    finally:
        torch.set_num_threads(before)


def _measure(name: str, weight: Tensor, settings: Settings, keep: bool, workers: Executor) -> _Measured:
    rows, columns = weight.shape
    result = _Measured(name, kind_of(name), (rows, columns), {}, [])
    groups = {axis: min(settings.groups, lines) for axis, lines in zip(_AXES, (rows, columns), strict=True)}
    for axis, count in groups.items():
        if count < settings.groups:
            said = f"{count} groups" if count > 1 else "left out"
            result.notes.append(f"{name} has {count} {axis}{'s' * (count > 1)}: {said}")
    seed = settings.seed + zlib.crc32(name.encode())  # the same null whichever other layers are looked at
    chosen = {axis: count for axis, count in groups.items() if count > 1}
    kinds = [_TRAINED, *settings.nulls]
    variants = dict(zip(kinds, workers.map(lambda kind: _balances(weight, kind, seed, chosen), kinds), strict=True))
    for axis in chosen:
        found = {kind: own[axis] for kind, own in variants.items() if axis in own}
        if len(found) == len(kinds):
            result.found[axis] = found if keep else {kind: _without_spectra(own) for kind, own in found.items()}
        else:
            result.notes.append(f"{name} has a group of zero {axis}s (or its null has): left out")
    return result


def _balances(weight: Tensor, kind: str, seed: int, groups: dict[str, int]) -> dict[str, SpectralBalance]:
    """Row and column groups of a weight or a null of it; an axis with a group of zeros is not there."""
    matrix = weight if kind == _TRAINED else null_weight(weight, kind, seed)
    found = {}
    for axis, count in groups.items():
        with suppress(NumericalError):  # the values are finite, so a group is zero
            found[axis] = spectral_balance(matrix, count, axis)
    return found


def _without_spectra(found: SpectralBalance) -> SpectralBalance:
    return SpectralBalance(found.axis, torch.empty(0), *(getattr(found, name) for name in STATISTICS))


def _result(measured: list[_Measured], excluded: list[str], drawn: list[str], settings: Settings) -> Result:
    if not any(layer.found for layer in measured):
        raise ConfigError("spectra: none of the chosen layers has two groups with values; choose others.")
    layers = [
        {"name": layer.name, "kind": layer.kind, "shape": list(layer.shape), "balance": _numbers(layer)}
        for layer in measured
    ]
    columns = ["layers (rows x columns)", "weights", *(name.replace("_", " ") for name in STATISTICS)]
    charts = [_spectra_chart([layer for layer in measured if layer.name in drawn]), _balance_chart(measured)]
    return Result(
        name="spectra",
        title=f"spectral balance of {len(measured)} layers of {settings.model}: median (worst)",
        columns=columns,
        rows=[row for group in _by_kind(measured, _kind_and_shape).values() for row in _rows(group)],
        numbers={"layers": layers, "excluded": excluded, "verdict": _verdict(measured)},
        charts=[chart for chart in charts if chart.panels],
        notes=_notes(measured, excluded, settings),
    )


def _numbers(layer: _Measured) -> dict[str, Any]:
    return {
        axis: {what: {name: getattr(found, name) for name in STATISTICS} for what, found in own.items()}
        for axis, own in layer.found.items()
    }


def _rows(layers: Sequence[_Measured]) -> list[list[str]]:
    rows = []
    for axis in _AXES:
        found = [layer.found[axis] for layer in layers if axis in layer.found]
        if found:
            what = f"{layers[0].kind}\n{len(found)} of {' x '.join(map(str, layers[0].shape))}, {axis}s"
            rows.append([what, "\n".join(found[0]), *(_cell(found, name) for name in STATISTICS)])
    return rows


def _cell(found: Sequence[dict[str, SpectralBalance]], name: str) -> str:
    """Median and worst of the trained weights; below them, the median of each null."""
    trained, *nulls = ([getattr(own[what], name) for own in found] for what in found[0])
    return "\n".join([f"{median(trained):.3g} ({max(trained):.3g})", *(f"{median(values):.3g}" for values in nulls)])


def _verdict(measured: Sequence[_Measured]) -> dict[str, Any]:
    """Counts over layers and axes, for each kind of weight."""
    cases = [own for layer in measured for own in layer.found.values()]
    return {
        what: {
            "cases": len(cases),
            "energy_ratio_median": median(own[what].energy_ratio for own in cases),
            "energy_ratio_below_1.1": sum(own[what].energy_ratio < 1.1 for own in cases),
            "decay_difference_median": median(own[what].decay_difference for own in cases),
            "decay_difference_below_0.1": sum(own[what].decay_difference < 0.1 for own in cases),
        }
        for what in cases[0]
    }


def _notes(measured: Sequence[_Measured], excluded: Sequence[str], settings: Settings) -> list[str]:
    notes = [] if settings.nulls else ["Without nulls no figure says whether training made it."]
    for what, counts in _verdict(measured).items():
        notes.append(
            f"{what}: energy ratio below 1.1 (the Lemma's 'about 1') in {counts['energy_ratio_below_1.1']} of "
            f"{counts['cases']} cases, median {counts['energy_ratio_median']:.3g}; decay difference below 0.1 (the "
            f"Lemma's small rho) in {counts['decay_difference_below_0.1']}, median "
            f"{counts['decay_difference_median']:.3g}."
        )
    notes.append(
        "variance is what Figure 2 calls rho: it goes with the fourth power of the weights' scale, so a small one says "
        "little; relative variance has no units."
    )
    own = [note for layer in measured for note in layer.notes]
    if own:
        notes.append("; ".join(own[:5]) + (f"; and {len(own) - 5} more" if len(own) > 5 else "") + ".")
    if excluded:
        notes.append(
            f"Left out by name, as embeddings or heads over the vocabulary: {', '.join(excluded[:5])}"
            f"{', ...' if len(excluded) > 5 else ''}."
        )
    return notes


def _spectra_chart(layers: Sequence[_Measured]) -> Chart:
    """Figure 2: every group's eigenvalues, one column of panels per layer."""
    panels = [_spectra_panel(layer, axis) for axis in _AXES for layer in layers if axis in layer.found]
    words = [f"{panel.title}: from {panel.lines[-1].y[0]:.3g} to {panel.lines[-1].y[-1]:.3g}" for panel in panels]
    return Chart(
        "spectra_groups",
        "Eigenvalues of W_g W_g^T, one curve per group (Figure 2)",
        panels,
        f"Falling curves that lie close together. Last group of {'; '.join(words)}.",
        across=max(1, len(layers)),
    )


def _spectra_panel(layer: _Measured, axis: str) -> Panel:
    trained, *nulls = layer.found[axis].items()
    places = list(range(1, trained[1].eigenvalues.shape[1] + 1))
    lines = [Line(f"{what}, mean of groups", places, found.eigenvalues.mean(0).tolist()) for what, found in nulls[:1]]
    for number, values in enumerate(trained[1].eigenvalues.tolist()):
        # a logarithmic axis has no zero
        shown = [value if value > 0 else float("nan") for value in values]
        lines.append(Line("groups" if number == 0 else "", places, shown))
    return Panel(f"{layer.name}: {axis}s", lines, "eigenvalue number", "eigenvalue", log_y=True)


def _balance_chart(layers: Sequence[_Measured]) -> Chart:
    """Every layer's ratio and relative variance, trained and null."""
    panels = []
    for name in ("energy_ratio", "relative_variance"):
        for axis in _AXES:
            own = [(number, layer.found[axis]) for number, layer in enumerate(layers, 1) if axis in layer.found]
            if not own:
                continue
            at = [number for number, _ in own]
            lines = [
                Line(what, at, [getattr(found[what], name) for _, found in own], style="points") for what in own[0][1]
            ]
            title = name.replace("_", " ")
            panels.append(Panel(f"groups of {axis}s", lines, "layer, lowest first", title, log_y=True))
    words = "; ".join(
        f"{panel.y_label}, {panel.title}: " + ", ".join(f"{line.label} {median(line.y):.3g}" for line in panel.lines)
        for panel in panels
    )
    return Chart("spectra_balance", "Balance of each layer beside its nulls", panels, f"Medians. {words}.", across=2)


def _kind_and_shape(layer: _Measured) -> tuple[str, tuple[int, int]]:
    return layer.kind, layer.shape


def _by_kind(items: Iterable[Any], key: Any) -> dict[Any, list[Any]]:
    result: dict[Any, list[Any]] = {}
    for item in items:
        result.setdefault(key(item), []).append(item)
    return result


def _progress(names: list[str]) -> Iterable[str]:
    quiet = not sys.stderr.isatty()
    return track(names, "spectra", console=Console(stderr=True), transient=True, disable=quiet)
