"""Whether "most" and "least important" slices differ in this model, and whether criteria agree (Section 4, Fig. 3c)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from ..analysis.collect import gradients
from ..analysis.importance import slice_scores, wanda_scores
from ..analysis.rankings import gini, most_to_least, rank_correlation, top_overlap
from ..analysis.spectra import null_weight
from ..charts import Chart, Line, Panel
from ..energy import input_energy
from ..errors import ConfigError, NumericalError
from ..training.counts import layer_kind
from ..weights import matrix_of
from .common import Opened, Result, StudySettings, open_model

__all__ = ["CRITERIA", "Importance", "Settings", "block_scores", "layer_importance", "study"]

CRITERIA = ("wanda", "magnitude", "energy", "gradient")
_AXES = ("row", "column")


@dataclass
class Settings(StudySettings):
    """Which model and data to look at, and how positions are scored.

    Args:
        model: the pretrained model.
        data: the data set.
        task: the task.
        target_modules: the layers to look at: "all-linear", names, or a regular expression.
        split: the rows to look at: train or validation; test data is for last looks.
        samples: rows at most, drawn with the seed.
        batch_size: rows per batch.
        device: cpu, cuda, ...; None takes an accelerator if there is one.
        seed: of the draw.
        output: folder for JSON and pictures; None prints only.
        r: slice rank: rows or columns per position.
        share: of the positions that count as the top ones when criteria are compared.
        head_steps: steps that train a new head, and nothing else, before gradients are taken; with 0 they are those of
            random numbers in the head.
        layers: layers to draw; empty takes one of each kind from the middle of the model, three at most.
    """

    r: int = 12
    share: float = 0.25
    head_steps: int = 50
    layers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise ConfigError(f"r={self.r!r} must be at least 1.")
        if not 0 < self.share < 1:
            raise ConfigError(f"share={self.share!r} must lie between 0 and 1.")
        if self.head_steps < 0:
            raise ConfigError(f"head_steps={self.head_steps!r} must be at least 0.")


@dataclass
class Importance:
    """One layer's positions along one axis.

    Attributes:
        layer: its name.
        axis: row or column.
        starts: of the positions.
        scores: by criterion, one number per position.
        ratio: highest by lowest score, by criterion; infinite where a position scores zero.
        gini: by criterion.
        shuffled: ratio of Wanda's scores for the same entries in a random order and equal inputs: what chance gives.
        correlation: Spearman's, of Wanda's scores with each other criterion; NaN where a score has no order.
        overlap: of the top positions by Wanda with those of each other criterion.
        chance: the overlap of a random choice.
    """

    layer: str
    axis: str
    starts: list[int]
    scores: dict[str, list[float]]
    ratio: dict[str, float]
    gini: dict[str, float]
    shuffled: float
    correlation: dict[str, float]
    overlap: dict[str, float]
    chance: float


def block_scores(
    weight: Tensor, energy: Tensor, gradient: Tensor, r: int, axis: str
) -> tuple[list[int], dict[str, Tensor]]:
    """Every criterion's score of each position.

    ``wanda``: the sum of |W_ij| ||X_j||_2; ``magnitude``: ||W_M||_F; ``energy``: the summed mean square of the inputs
    that the columns read (rows read all of them, and have no such score); ``gradient``: ||grad_M L||_F.

    Args:
        weight: ``(rows, columns)``.
        energy: mean square of each input feature, ``(columns,)``.
        gradient: of the weight.
        r: slice rank.
        axis: ``"row"`` or ``"column"``.

    Returns:
        Starts, and fp64 scores by criterion.

    Raises:
        ConfigError: if the shapes do not fit, or for an unknown axis.
        NumericalError: for NaN or infinite values.

    Example:
        >>> weight = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
        >>> starts, scores = block_scores(weight, torch.tensor([4.0, 1.0]), 2 * weight, 1, "column")
        >>> starts, {name: score.tolist() for name, score in scores.items()}["wanda"]
        ([0, 1], [14.0, 1.0])
    """
    starts, wanda = slice_scores(wanda_scores(weight, energy.sqrt()), r, axis)
    if gradient.shape != weight.shape:
        raise ConfigError(
            f"block_scores: a weight {tuple(weight.shape)} and a gradient {tuple(gradient.shape)} differ."
        )
    squares = {"magnitude": weight.detach().cpu().double().square(), "gradient": gradient.cpu().double().square()}
    found = {"wanda": wanda} | {name: slice_scores(each, r, axis)[1].sqrt() for name, each in squares.items()}
    if axis == "column":
        found["energy"] = slice_scores(energy.cpu().double()[None], r, axis)[1]
    if not all(bool(torch.isfinite(score).all()) for score in found.values()):
        raise NumericalError("block_scores: the weight, its inputs or its gradient have NaN or infinite values.")
    return starts, {name: found[name] for name in CRITERIA if name in found}


def layer_importance(
    layer: str, weight: Tensor, energy: Tensor, gradient: Tensor, axis: str, settings: Settings
) -> Importance:
    """Everything that `study` says of one layer and axis.

    Raises:
        NumericalError: for NaN or infinite values, naming the layer.
    """
    try:
        starts, scores = block_scores(weight, energy, gradient, settings.r, axis)
    except NumericalError as error:
        raise NumericalError(f"layer {layer!r}: {error}") from error
    flat = torch.ones(weight.shape[1], dtype=torch.float64)
    chance = slice_scores(wanda_scores(null_weight(weight, "shuffled", settings.seed), flat), settings.r, axis)[1]
    overlaps = {name: top_overlap(scores["wanda"], other, settings.share) for name, other in _others(scores)}
    some = {name: score for name, score in scores.items() if float(score.amax()) > 0}  # a dead layer has no gradient
    return Importance(
        layer,
        axis,
        starts,
        {name: score.tolist() for name, score in scores.items()},
        ratio={name: most_to_least(score) for name, score in some.items()},
        gini={name: gini(score) for name, score in some.items()},
        shuffled=most_to_least(chance) if float(chance.amax()) > 0 else math.nan,
        correlation={name: rank_correlation(scores["wanda"], other) for name, other in _others(scores)},
        overlap={name: found for name, (found, _) in overlaps.items()},
        chance=next(random for _, random in overlaps.values()),
    )


def study(settings: Settings) -> Result:
    """Score every position of every chosen layer by each criterion, for rows and for columns.

    Raises:
        ConfigError: for a setting that is wrong, or if no layer matches.
        DataError: if the data cannot be used.
        NumericalError: for NaN or infinite values.
    """
    opened = open_model(settings)
    energy = input_energy(opened.model, opened.batches, opened.layers)
    layers = [name for name in opened.layers if name in energy]
    fitted = _fit_head(opened, settings.head_steps)
    slopes = gradients(opened.model, opened.batches, layers)
    found = []
    for name in track(layers, "layers", transient=True, disable=not sys.stderr.isatty()):
        weight = matrix_of(opened.model.get_submodule(name)).cpu()
        found += [layer_importance(name, weight, energy[name], slopes[name], axis, settings) for axis in _AXES]
    return Result(
        name="importance",
        title=f"Importance of positions of {settings.r} lines, median over layers",
        columns=["layers", "axis", "number", "most/least", "shuffled", "Gini", *_columns()],
        rows=_table(found),
        numbers={"layers": [asdict(each) for each in found], "share": settings.share, "head_steps": fitted},
        charts=[_chart(found, axis, settings.layers) for axis in _AXES],
        notes=_notes(found, settings, fitted, [name for name in opened.layers if name not in energy]),
    )


def _others(scores: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(name, score) for name, score in scores.items() if name != "wanda"]


def _fit_head(opened: Opened, steps: int) -> int:
    """Train what the checkpoint had no weights for, so that gradients are of a head that fits; the steps taken."""
    model = opened.model
    if model.get_output_embeddings() is not None:  # a language model's head is pretrained
        return 0
    prefix = f"{model.base_model_prefix}."
    head = [parameter for name, parameter in model.named_parameters() if not name.startswith(prefix)]
    if not head or steps == 0:
        return 0
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for parameter in head:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(head, lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        model(**opened.batches[step % len(opened.batches)]).loss.backward()
        optimizer.step()
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
        parameter.grad = None
    return steps


# -- what is shown ----------------------------------------------------------------------------------------------------


def _columns() -> list[str]:
    return ["~norm", "~energy", "~gradient", "top"]


def _table(found: Sequence[Importance]) -> list[list[str]]:
    groups: dict[tuple[str, str], list[Importance]] = {}
    for each in found:
        groups.setdefault((layer_kind(each.layer), each.axis), []).append(each)
    rows = []
    for (kind, axis), own in groups.items():
        row = [kind.rpartition("*.")[2], axis, str(len(own)), _median(each.ratio.get("wanda") for each in own)]
        row += [_median(each.shuffled for each in own), _median((each.gini.get("wanda") for each in own), ".3f")]
        row += [_median((each.correlation.get(name) for each in own), "+.2f") for name in CRITERIA[1:]]
        row.append(_median((each.overlap["gradient"] for each in own), ".0%"))
        rows.append(row)
    return rows


def _median(values: Any, form: str = ".2f") -> str:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return format(median(known), form) if known else "-"


def _notes(found: Sequence[Importance], settings: Settings, fitted: int, unreached: Sequence[str]) -> list[str]:
    notes = [
        "most/least, Gini: of Wanda's scores, summed over each position; shuffled: the same entries in a random order "
        "under equal inputs. ~: Spearman's correlation of Wanda's scores with the weight's norm, the input energy "
        f"(which rows lack) and the gradient's norm. top: how much of the top {settings.share:.0%} is the top of the "
        "gradients, too; a random choice would share as much as that."
    ]
    for axis in _AXES:
        own = [each for each in found if each.axis == axis and "wanda" in each.ratio]
        weak = sum(each.ratio["wanda"] < 1.5 for each in own)
        notes.append(
            f"{axis}s: in {weak} of {len(own)} layers the most important position scores less than 1.5 times the least."
        )
    if fitted:
        notes.append(f"Gradients after {fitted} steps that trained the head alone, on the same rows.")
    else:
        notes.append("Gradients of the model as it was loaded; a new head is random.")
    if unreached:
        notes.append(f"Left out, since no batch reaches them: {', '.join(unreached)}.")
    return notes


def _chart(found: Sequence[Importance], axis: str, wanted: Sequence[str]) -> Chart:
    """Scores in falling order, as multiples of their mean, for a few layers."""
    own = {each.layer: each for each in found if each.axis == axis}
    odd = [name for name in wanted if name not in own]
    if odd:
        raise ConfigError(f"layers: {odd[0]!r} was not measured; choose among {', '.join(list(own)[:20])}.")
    chosen = list(wanted) or _middle(list(own))
    panels = []
    for name in chosen:
        lines = []
        for criterion, scores in own[name].scores.items():
            mean = sum(scores) / len(scores)
            if mean > 0:
                values = sorted((score / mean for score in scores), reverse=True)
                lines.append(Line(criterion, [100 * i / len(values) for i in range(len(values))], values))
        panels.append(Panel(name, lines, f"{axis} positions (%), highest first", "score / mean", levels={"equal": 1.0}))
    words = "; ".join(f"{name}: {own[name].ratio.get('wanda', math.nan):.3g}" for name in chosen)
    title = f"Importance of {axis} positions"
    return Chart(f"importance_{axis}s", title, panels, f"Highest by lowest score of Wanda. {words}.", across=3)


def _middle(layers: Sequence[str]) -> list[str]:
    """One layer of each kind that several layers have, from the middle of the model, three at most."""
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kinds.setdefault(layer_kind(name), []).append(name)
    many = [own for own in kinds.values() if len(own) > 1] or list(kinds.values())
    spread = many if len(many) <= 3 else [many[0], many[len(many) // 2], many[-1]]
    return [own[len(own) // 2] for own in spread]
