"""What `analyze winners` shows: a row per kind of layer, the shares of winners, and the maps of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from ..analysis.rankings import rank_correlation
from ..analysis.winners import wilson
from ..charts import Chart, Line, Panel
from .common import Result

if TYPE_CHECKING:
    from .winners import Gain, LayerMap, Settings

__all__ = ["report", "shares"]

_BINS = 64
_STEPS = ("one", "few")
_TESTS: dict[str, Callable[[Gain, str], bool]] = {
    "seen": lambda gain, step: gain.seen[step] > 0,
    "seen, more than the null": lambda gain, step: gain.seen[step] > max(0.0, gain.null_seen[step]),
    "unseen": lambda gain, step: gain.unseen[step] > 0,
    "unseen, more than the null": lambda gain, step: gain.unseen[step] > max(0.0, gain.null_unseen[step]),
    "null, seen": lambda gain, step: gain.null_seen[step] > 0,
    "null, unseen": lambda gain, step: gain.null_unseen[step] > 0,
}


def report(settings: Settings, maps: Sequence[LayerMap], gains: Sequence[Gain], losses: dict[str, float]) -> Result:
    """Table, numbers, charts and notes."""
    found = {mode: shares([gain for gain in gains if gain.mode == mode]) for mode in settings.modes}
    noise = {mode: _noise(maps, mode) for mode in settings.modes}
    related = _correlations(gains)
    return Result(
        name="winners",
        title=f"slices of r={settings.r}: loss lowered, steps of 1/L on {settings.step_rows} rows",
        columns=["layers, slices", "gradient", "one step", "held out", "few steps", "held out", "gain", "held out"],
        rows=_rows(gains),
        numbers={
            "losses": losses,
            "shares": found,
            "gradients": noise,
            "correlations": related,
            "layers": [_layer_numbers(own) for own in maps],
            "slices": [asdict(gain) for gain in gains],
        },
        charts=[_map_chart(maps, settings.modes), *([_gain_chart(gains, settings)] if gains else [])],
        notes=_notes(settings, gains, losses, found, noise, related),
    )


def shares(gains: Sequence[Gain]) -> dict[str, Any]:
    """Share of winners by each test and step, with Wilson's 95% interval; empty for no slices."""
    result: dict[str, Any] = {}
    for step in _STEPS if gains else ():
        for name, test in _TESTS.items():
            count = sum(test(gain, step) for gain in gains)
            result[f"{step}: {name}"] = {
                "count": count,
                "of": len(gains),
                "share": count / len(gains),
                "interval": list(wilson(count, len(gains))),
            }
    return result


def _noise(maps: Sequence[LayerMap], mode: str) -> dict[str, Any]:
    """Over all positions of all layers."""
    norms = torch.cat([own.norms[mode] for own in maps])
    ratios = torch.cat([own.ratios[mode] for own in maps])
    ordered = norms.sort().values
    least, most = float(ordered[int(0.05 * len(norms))]), float(ordered[int(0.95 * (len(norms) - 1))])
    return {
        "positions": len(norms),
        "not zero": float((norms > 0).double().mean()),
        "above the noise": float((ratios > 1).double().mean()),
        "above twice the noise": float((ratios > 2).double().mean()),
        "median ratio": float(ratios.median()),
        "median": float(norms.median()),
        "95% over 5%": most / least if least > 0 else math.inf,
    }


def _layer_numbers(own: LayerMap) -> dict[str, Any]:
    return {
        "layer": own.layer,
        **{
            mode: {
                "norms": own.norms[mode].tolist(),
                "median ratio": float(own.ratios[mode].median()),
                "above the noise": float((own.ratios[mode] > 1).double().mean()),
            }
            for mode in own.norms
        },
    }


def _correlations(gains: Sequence[Gain]) -> dict[str, dict[str, float]]:
    """Spearman's, of the gain in a few steps with what could be known before."""
    result: dict[str, dict[str, float]] = {}
    for mode in dict.fromkeys(gain.mode for gain in gains):
        own = [gain for gain in gains if gain.mode == mode]
        for name in ("gradient", "smoothness", "energy", "weight"):
            pairs = torch.tensor([[gain.seen["few"], getattr(gain, name)] for gain in own], dtype=torch.float64)
            found = rank_correlation(pairs[:, 0], pairs[:, 1]) if len(own) > 2 else math.nan  # two are always in order
            result.setdefault(mode, {})[name] = found
    return result


def _rows(gains: Sequence[Gain]) -> list[list[str]]:
    groups: dict[tuple[str, str], list[Gain]] = {}
    for gain in gains:
        groups.setdefault((gain.kind, gain.mode), []).append(gain)
    rows = [_row(f"{kind}, {mode}s", own) for (kind, mode), own in groups.items()]
    for mode in dict.fromkeys(gain.mode for gain in gains):
        rows.append(_row(f"all, {mode}s", [gain for gain in gains if gain.mode == mode]))
    return rows


def _row(name: str, gains: Sequence[Gain]) -> list[str]:
    counts = shares(gains)
    cells = [f"{counts[f'{step}: {test}']['count']}/{len(gains)}" for step in _STEPS for test in list(_TESTS)[1::2][:2]]
    return [
        name,
        f"{median(gain.gradient for gain in gains):.2e}",
        *cells,
        f"{median(gain.seen['few'] for gain in gains):.2e}",
        f"{median(gain.unseen['few'] for gain in gains):.2e}",
    ]


def _notes(
    settings: Settings,
    gains: Sequence[Gain],
    losses: dict[str, float],
    found: dict[str, Any],
    noise: dict[str, Any],
    related: dict[str, dict[str, float]],
) -> list[str]:
    notes = [
        "A slice counts in the table if its step lowers the loss, and by more than a step of the same length in a "
        "random direction does. Held out: the same step, on rows it has not seen. Gain: median fall of the loss in "
        f"{settings.steps} steps.",
        "Mean loss: " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()) + ".",
    ]
    for mode, own in noise.items():
        notes.append(
            f"{mode}s, all {own['positions']:,} positions: gradient not zero at {own['not zero']:.1%}, above its "
            f"standard error over batches at {own['above the noise']:.1%}, above twice that at "
            f"{own['above twice the noise']:.1%} (about 1 is what no signal gives; median {own['median ratio']:.2f}); "
            f"the 95% quantile of the norms is {own['95% over 5%']:.3g} times the 5% quantile."
        )
        notes += [_share_note(mode, step, found[mode]) for step in _STEPS if found[mode]]
        if mode in related:
            values = ", ".join(f"{name} {value:.2f}" for name, value in related[mode].items())
            notes.append(f"{mode}s, rank correlation of the gain with what is known before: {values}.")
    if gains:
        short = sum(gain.seen["one"] < gain.bound * 0.99 for gain in gains)
        notes.append(
            f"One step fell short of the Lemma's ||g||^2 / 2L by more than 1% at {short} of {len(gains)} slices: L is "
            "estimated from below, at the start only."
        )
    return notes


def _share_note(mode: str, step: str, found: dict[str, Any]) -> str:
    def words(name: str) -> str:
        own = found[f"{step}: {name}"]
        low, high = own["interval"]
        return f"{own['share']:.0%} ({low:.0%} to {high:.0%})"

    return (
        f"{mode}s, {step} step{'s' * (step == 'few')}: {words('seen')} lower the loss and {words('unseen')} that of "
        f"held-out rows; random steps of the same length {words('null, seen')} and {words('null, unseen')} (95% "
        "intervals)."
    )


def _map_chart(maps: Sequence[LayerMap], modes: Sequence[str]) -> Chart:
    panels, words = [], []
    for mode in modes:
        bins = min([_BINS, *(len(own.norms[mode]) for own in maps)])
        rows = [_binned(own.norms[mode], bins) for own in maps]
        title = f"{mode}s: position from first to last, {len(rows[0])} groups"
        names = [own.layer for own in maps] if len(maps) <= 60 else []
        panels.append(
            Panel(title, matrix=rows, row_names=names, x_label="position", scale="log10 of the gradient's norm")
        )
        finite = [(value, own.layer) for row, own in zip(rows, maps, strict=True) for value in row if value == value]
        words.append(f"{mode}s: largest in {max(finite)[1]}, smallest in {min(finite)[1]}" if finite else f"{mode}s: 0")
    text = f"Norms of restricted gradients, layer by position. {'; '.join(words)}."
    return Chart("winners_gradients", "Restricted gradients of every position", panels, text, across=2)


def _binned(norms: torch.Tensor, bins: int) -> list[float]:
    """log10 of root mean squares over equal groups of positions; NaN where they are zero."""
    groups = torch.tensor_split(norms, bins)
    means = [float(group.square().mean().sqrt()) for group in groups]
    return [math.log10(mean) if mean > 0 else math.nan for mean in means]


def _gain_chart(gains: Sequence[Gain], settings: Settings) -> Chart:
    panels, words = [], []
    for mode in settings.modes:
        own = [gain for gain in gains if gain.mode == mode]
        lines = []
        for label, values in (
            ("rows of the steps", [gain.seen["few"] for gain in own]),
            ("held-out rows", [gain.unseen["few"] for gain in own]),
            ("random step", [gain.null_seen["few"] for gain in own]),
        ):
            lines.append(Line(label, list(range(1, len(own) + 1)), sorted(values, reverse=True)))
            words.append(f"{mode}s, {label}: median {median(values):.3g}")
        title = f"{mode}s: {settings.steps} steps"
        panels.append(Panel(title, lines, "slice, by gain", "fall of the loss", levels={"": 0.0}))
    lines = [_points(gains, mode) for mode in settings.modes]
    panels.append(Panel("one step", lines, "gradient's norm", "fall of the loss", log_x=True, log_y=True))
    return Chart("winners_gains", "How far one slice alone lowers the loss", panels, f"{'; '.join(words)}.")


def _points(gains: Sequence[Gain], mode: str) -> Line:
    shown = [gain for gain in gains if gain.mode == mode and gain.seen["one"] > 0 and gain.gradient > 0]
    return Line(f"{mode}s", [g.gradient for g in shown], [g.seen["one"] for g in shown], style="points")
