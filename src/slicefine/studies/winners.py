"""Winning slices: gradients at every position, and how far a slice alone lowers the loss (Definitions 2.2 and 2.3).

A winner in the paper's sense needs a gradient that is not zero and a step that lowers the loss. Both are nearly always
there, so each is shown beside what would be there anyway: the gradient's own noise over batches, a step of the same
length in a random direction, and the loss on rows that the step has not seen.
"""

from __future__ import annotations

import sys
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..analysis.collect import gradients, slice_values
from ..analysis.winners import GradientNoise, descend, random_step, slice_gradients, step_decrease
from ..energy import input_energy
from ..errors import ConfigError, DataError, NumericalError
from ..files.checkpoint import kind_of
from ..geometry import Slice
from .common import Opened, Result, StudySettings, open_model
from .replay import Replay

__all__ = ["STEPS", "Gain", "LayerMap", "Settings", "measure", "study"]

STEPS = ("one", "few")
_AXES = ("row", "column")


@dataclass
class Settings(StudySettings):
    """Which model, data and slices.

    Half of the rows is for gradients and for fitting a new head, the other half is held out. The head is fitted first,
    alone, for otherwise every gradient would come through random numbers.

    Args:
        model: the pretrained model, or a trained one.
        data: the data set.
        task: the task.
        target_modules: the layers to look at: "all-linear", names, or a regular expression.
        split: the rows to look at: train or validation; test data is for last looks.
        samples: rows at most, drawn with the seed.
        batch_size: rows per batch.
        device: cpu, cuda, ...; None takes an accelerator if there is one.
        seed: of the draws of rows, positions and directions.
        output: folder for JSON and pictures; None prints only.
        r: slice rank: neighbouring rows or columns.
        modes: row, column, or both.
        positions: random positions per layer and mode where steps are taken.
        limit: layers where steps are taken at most, spread over the model; None takes all.
        step_rows: rows on which steps are taken, and as many held-out ones; gradients use half of samples.
        steps: of plain gradient descent with rate 1/L, for the decrease in a few steps.
        head_steps: AdamW steps on a new head alone; 0 leaves it random.
        head_rate: their learning rate.
        iterations: of the power method for L at most.
    """

    samples: int = 256
    r: int = 1
    modes: list[str] = field(default_factory=lambda: list(_AXES))
    positions: int = 2
    limit: int | None = 8
    step_rows: int = 24
    steps: int = 5
    head_steps: int = 200
    head_rate: float = 0.003
    iterations: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"r": 1, "positions": 1, "step_rows": 1, "steps": 1, "head_steps": 0, "iterations": 1}
        if self.limit is not None:
            least["limit"] = 1
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be at least {smallest}.")
        if not self.modes or any(mode not in _AXES for mode in self.modes):
            raise ConfigError(f"modes={self.modes!r}: expected row, column, or both.")
        if not self.head_rate > 0:
            raise ConfigError(f"head_rate={self.head_rate!r} must be above zero.")


@dataclass
class LayerMap:
    """Gradients of every position of one layer.

    Attributes:
        layer: its name.
        norms: ||grad_M L|| of each start, by mode.
        ratios: the same over its standard error across batches.
    """

    layer: str
    norms: dict[str, torch.Tensor]
    ratios: dict[str, torch.Tensor]


@dataclass
class Gain:
    """What steps on one slice alone do to the loss.

    Attributes:
        layer: its name.
        kind: of the layer within its block.
        mode: row or column.
        start: of the slice.
        gradient: ||grad_M L|| on the rows of the steps.
        smoothness: L, see `analysis.winners.Decrease`.
        bound: the Lemma's decrease of one step.
        energy: mean square input that the slice sees, summed over its features.
        weight: norm of the slice.
        seen: loss at the start minus loss after one and after a few steps, on the rows of the steps.
        unseen: the same steps on held-out rows.
        null_seen: the decrease after a random step of the same length.
        null_unseen: the same on held-out rows.
    """

    layer: str
    kind: str
    mode: str
    start: int
    gradient: float
    smoothness: float
    bound: float
    energy: float
    weight: float
    seen: dict[str, float] = field(default_factory=dict)
    unseen: dict[str, float] = field(default_factory=dict)
    null_seen: dict[str, float] = field(default_factory=dict)
    null_unseen: dict[str, float] = field(default_factory=dict)


@dataclass
class _Losses:
    """Loss on the rows of the steps and on held-out ones, with their values at the start."""

    seen: Replay
    unseen: Replay
    starts: tuple[float, float]


def study(settings: Settings) -> Result:
    """Fit a new head, map all gradients, and take steps at random positions.

    Raises:
        ConfigError: for a setting that is wrong, or if no layer matches.
        DataError: if the data cannot be used, or gives fewer than four batches.
        NumericalError: if losses or gradients are not finite.
    """
    from .winners_report import report

    return report(settings, *measure(open_model(settings), settings))


def measure(opened: Opened, settings: Settings) -> tuple[list[LayerMap], list[Gain], dict[str, float]]:
    """Maps of all layers, steps at the chosen ones, and the mean losses before and after the head was fitted."""
    opened.model.float()
    half = len(opened.batches) // 2
    if half < 2:
        raise DataError(
            f"{len(opened.batches)} batches are too few: half of them is held out, and a spread takes two. Lower "
            "batch_size, or raise samples."
        )
    own, other = opened.batches[:half], opened.batches[half:]
    losses = _fit(opened, own, other, settings)
    maps = _maps(opened, own, settings)
    rows = [_first_rows(part, settings.step_rows) for part in (own, other)]
    energy = input_energy(opened.model, _inputs(rows[0]), opened.layers)
    seen, unseen = (Replay(opened.model, part) for part in rows)
    pair = _Losses(seen, unseen, (seen.loss(), unseen.loss()))
    losses |= {"rows of the steps": pair.starts[0], "held-out rows of the steps": pair.starts[1]}
    alive = [own.layer for own in maps if any(bool((norms > 0).any()) for norms in own.norms.values())]
    shown = track(_positions(opened, alive, settings), "slices", transient=True, disable=not sys.stderr.isatty())
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        gains = [_gain(opened, layer, block, pair, energy, settings) for layer, block in shown]
    return maps, gains, losses


def _fit(opened: Opened, own: list[Any], other: list[Any], settings: Settings) -> dict[str, float]:
    """Train a new head; mean losses before and after."""
    both = Replay(opened.model, own), Replay(opened.model, other, keep=0)
    found = {"before the head": both[0].loss(), "held out, before the head": both[1].loss()}
    if opened.new_modules and settings.head_steps:
        both[0].fit(opened.new_modules, settings.head_steps, settings.head_rate)
        found |= {"after the head": both[0].loss(), "held out, after the head": both[1].loss()}
    return found


def _maps(opened: Opened, batches: list[Any], settings: Settings) -> list[LayerMap]:
    noises = {layer: GradientNoise() for layer in opened.layers}
    for batch in track(batches, "gradients", transient=True, disable=not sys.stderr.isatty()):
        for layer, gradient in gradients(opened.model, [batch], opened.layers).items():
            if not bool(torch.isfinite(gradient).all()):
                raise NumericalError(f"layer {layer!r}: the gradient of its weight has NaN or infinite values.")
            noises[layer].add(gradient)
    return [_layer_map(layer, noise, settings) for layer, noise in noises.items()]


def _layer_map(layer: str, noise: GradientNoise, settings: Settings) -> LayerMap:
    norms, ratios = {}, {}
    for mode in settings.modes:
        width = min(settings.r, noise.mean().shape[_AXES.index(mode)])
        norms[mode] = slice_gradients(noise.mean(), width, mode)
        ratios[mode] = noise.ratios(width, mode)
    return LayerMap(layer, norms, ratios)


def _positions(opened: Opened, layers: list[str], settings: Settings) -> list[tuple[str, Slice]]:
    """Random positions of some of the layers; the same ones whichever other layers are looked at."""
    if settings.limit is not None and settings.limit < len(layers):
        layers = [layers[int((i + 0.5) * len(layers) / settings.limit)] for i in range(settings.limit)]
    found = []
    for layer in layers:
        generator = torch.Generator().manual_seed(settings.seed + zlib.crc32(layer.encode()))
        module = opened.model.get_submodule(layer)
        shape = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.t().shape
        for mode in settings.modes:
            size = shape[_AXES.index(mode)]
            width = min(settings.r, size)
            starts = torch.randperm(size - width + 1, generator=generator)[: settings.positions]
            found += [(layer, Slice(mode, start, width)) for start in starts.tolist()]
    return found


def _gain(
    opened: Opened, layer: str, block: Slice, losses: _Losses, energy: dict[str, torch.Tensor], settings: Settings
) -> Gain:
    values = slice_values(opened.model, layer, block)
    own, other = (part.of_slice(layer, block) for part in (losses.seen, losses.unseen))
    found = step_decrease(own, values, settings.iterations, tolerance=0.02, seed=settings.seed)
    inputs = energy[layer][list(block.indices())] if block.axis == "column" else energy[layer]
    gain = Gain(
        layer,
        kind_of(layer),
        block.axis,
        block.start,
        found.gradient,
        found.smoothness,
        found.bound,
        float(inputs.sum()),
        float(torch.linalg.vector_norm(values)),
    )
    rate = 1 / found.smoothness if found.smoothness else 0.0
    path = descend(own, values, rate, settings.steps)
    for name, after in zip(STEPS, (path[0], path[-1]), strict=True):
        length = float(torch.linalg.vector_norm((after - values).double()))
        null = random_step(values, length, settings.seed + zlib.crc32(f"{layer} {block} {name}".encode()))
        with torch.no_grad():
            gain.seen[name], gain.null_seen[name] = (losses.starts[0] - float(own(at)) for at in (after, null))
            gain.unseen[name], gain.null_unseen[name] = (losses.starts[1] - float(other(at)) for at in (after, null))
    return gain


def _first_rows(batches: list[dict[str, torch.Tensor]], count: int) -> list[dict[str, torch.Tensor]]:
    """The first rows of the batches, whole batches as far as possible."""
    found = []
    for batch in batches:
        if count > 0:
            found.append({name: value[:count] for name, value in batch.items()})
            count -= len(found[-1]["labels"])
    return found


def _inputs(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
