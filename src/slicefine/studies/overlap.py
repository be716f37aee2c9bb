"""Overlap of slices with the task subspace: Lemma D.1's premise and bound, spans of slices, adapters, pruning.

Theorem 2.4 (equation 5), Lemma D.1, Corollaries D.2 and D.3. The premise is measured at the layer's own output and at
the logits; the first has closed forms that say where it cannot hold.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch
from rich.progress import track
from torch import Tensor

from ..analysis.collect import features, logits_of
from ..analysis.features import components_for, task_rank
from ..analysis.kernels import ntk
from ..analysis.spans import Span, directions, joint_rank, span
from ..errors import ConfigError, DataError
from ..geometry import Slice
from .common import Opened, Result, StudySettings, open_model
from .overlap_cases import Case, examples_of, layer_cases, logit_cases, reaches, single_rows
from .overlap_pruning import Pruned, measure_pruning
from .replay import Replay

__all__ = ["Joint", "Measured", "Settings", "measure", "study"]

_MANY_OUTPUTS = 100  # a vocabulary would take a backward pass for each


@dataclass
class Settings(StudySettings):
    """Which model, data, slices and adapters.

    Args:
        model: the pretrained model, or a trained one.
        data: the data set.
        task: the task.
        target_modules: the layers to look at: "all-linear", names, or a regular expression.
        split: the rows to look at: train or validation; test data is for last looks.
        samples: rows for features and logits at most, drawn with the seed.
        batch_size: rows per batch.
        device: cpu, cuda, ...; None takes an accelerator if there is one.
        seed: of the draws of rows, positions and adapters.
        output: folder for JSON and pictures; None prints only.
        r: slice rank: neighbouring rows or columns.
        k: directions of a layer's task subspace; None takes rank(Sigma_task) of the labels, or where there are no
            classes as many as hold tau of the variance.
        logit_k: directions of the logits' task subspace; None takes one less than there are classes: all that differ
            between classes. Each example's logits are centred first, for what they have in common changes no loss.
        tau: share of the variance for k_task(tau) and r*(p, tau).
        examples: rows whose Jacobians are taken.
        positions: random positions per layer and kind of slice.
        limit: layers whose Jacobians are taken at most, spread over the model; None takes all.
        lora_rank: of the adapter that slices are compared with.
        shares: shares of weights to prune; empty leaves pruning out.
        prune_rows: rows for the features of pruned models.
        head_steps: AdamW steps on a new head alone; 0 leaves it random.
        head_rate: their learning rate.
    """

    samples: int = 256
    r: int = 1
    k: int | None = None
    logit_k: int | None = None
    tau: float = 0.9
    examples: int = 6
    positions: int = 2
    limit: int | None = 8
    lora_rank: int = 1
    shares: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    prune_rows: int = 64
    head_steps: int = 200
    head_rate: float = 0.003

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("r", "examples", "positions", "lora_rank", "prune_rows", "k", "logit_k", "limit")
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value!r} must be at least 1.")
        if not 0 < self.tau <= 1:
            raise ConfigError(f"tau={self.tau!r} must lie in (0, 1].")
        if self.head_steps < 0 or not self.head_rate > 0:
            raise ConfigError(
                f"head_steps={self.head_steps!r} and head_rate={self.head_rate!r}: expected >= 0 and > 0."
            )
        for share in self.shares:
            if not 0 <= share <= 1:
                raise ConfigError(f"shares: {share!r} must lie in [0, 1].")


@dataclass
class Joint:
    """A row and a column slice of one layer together.

    Attributes:
        layer: its name.
        k: k_task(tau) of the layer's outputs.
        row: rank of the row slice's Jacobian at the layer's output, over the positions of one example.
        column: the same for the column slice.
        both: the same for both together.
        outputs: the largest possible one: positions times outputs.
        change: rank of a change of the weight in both slices.
    """

    layer: str
    k: int
    row: int
    column: int
    both: int
    outputs: int
    change: int


@dataclass
class Measured:
    """Everything that the study found.

    Attributes:
        cases: slices and adapters at single examples.
        spans: by what is trained: the span of the first m, m = 1, 2, ... (equation 5).
        joints: row and column slices together.
        pruned: blocks at each share of pruned weights.
        classes: number of logits; None where they were left out.
        k: directions of the layers' task subspaces.
        layers: whose Jacobians were taken.
    """

    cases: list[Case]
    spans: dict[str, list[Span]]
    joints: list[Joint]
    pruned: list[Pruned]
    classes: int | None
    k: int
    layers: list[str]


def study(settings: Settings) -> Result:
    """Measure overlap, spans, adapters and pruning.

    Raises:
        ConfigError: for a setting that is wrong, or if no layer matches.
        DataError: if the data cannot be used.
        NumericalError: for NaN or infinite weights.
    """
    from .overlap_report import report

    return report(settings, measure(open_model(settings), settings))


def measure(opened: Opened, settings: Settings) -> Measured:
    """All numbers of `study`, of a model that is open."""
    opened.model.float()
    if opened.new_modules and settings.head_steps:
        Replay(opened.model, opened.batches).fit(opened.new_modules, settings.head_steps, settings.head_rate)
    layers = opened.layers
    if settings.limit is not None and settings.limit < len(layers):
        layers = [layers[int((i + 0.5) * len(layers) / settings.limit)] for i in range(settings.limit)]
    outputs = features(opened.model, opened.batches, layers)
    k = settings.k or _task_directions(opened, outputs[layers[-1]], settings)
    basis, classes = _logit_subspace(opened, settings)
    rows = single_rows(opened.batches, settings.examples)
    result = Measured([], {}, [], [], classes, k, layers)
    kernels: dict[str, list[Tensor]] = {}
    for layer in track(layers, "layers", transient=True, disable=not sys.stderr.isatty()):
        _add_layer(result, kernels, opened, layer, rows, outputs[layer], basis, settings)
    result.spans = {what: _spans(own, settings.seed) for what, own in kernels.items()}
    if settings.shares:
        chosen = opened.batches[: max(1, settings.prune_rows // settings.batch_size)]
        result.pruned = measure_pruning(opened, chosen, sorted(settings.shares), k, settings.tau)
    return result


def _task_directions(opened: Opened, outputs: Tensor, settings: Settings) -> int:
    if opened.class_count is None or opened.class_count < 2:
        return components_for(outputs, settings.tau)
    if len(torch.unique(opened.labels)) < 2:
        raise DataError("overlap: all rows have the same label, so there is no task; raise samples, or give k.")
    return task_rank(outputs, opened.labels)


def _logit_subspace(opened: Opened, settings: Settings) -> tuple[Tensor | None, int | None]:
    """U_k of the logits and their number; nothing for a language model."""
    with torch.no_grad():
        first = opened.model(**single_rows(opened.batches, 1)[0]).logits
    if first.dim() != 2 or first.shape[1] > _MANY_OUTPUTS:
        return None, None
    logits = logits_of(opened.model, opened.batches)
    classes = logits.shape[1]
    if classes > 1:
        logits = logits - logits.mean(1, keepdim=True)
    most = min(max(1, classes - 1), len(logits))
    k = settings.logit_k or most
    if k > most:
        raise ConfigError(f"logit_k={k} must lie between 1 and {most}: {classes} logits of {len(logits)} rows.")
    return directions(logits, k), classes


def _add_layer(
    result: Measured,
    kernels: dict[str, list[Tensor]],
    opened: Opened,
    layer: str,
    rows: list[dict[str, Tensor]],
    outputs: Tensor,
    basis: Tensor | None,
    settings: Settings,
) -> None:
    examples = examples_of(opened, rows, layer)
    shape = (outputs.shape[1], examples[0].inputs.shape[1])
    own = reaches(layer, shape, settings.r, settings.positions, settings.lora_rank, settings.seed)
    subspace = directions(outputs, min(result.k, *outputs.shape))
    result.cases += layer_cases(own, examples, subspace)
    result.joints.append(_joint(layer, shape, examples[0].inputs, outputs, settings))
    if basis is None:
        return
    cases, parts, whole = logit_cases(opened, own, examples, basis)
    result.cases += cases
    for reach, jacobians in zip(own, parts, strict=True):
        kernels.setdefault(reach.what, []).append(ntk(jacobians))
    kernels.setdefault("whole layers", []).append(ntk(whole))


def _joint(layer: str, shape: tuple[int, int], inputs: Tensor, outputs: Tensor, settings: Settings) -> Joint:
    r = min(settings.r, *shape)
    row, column = Slice("row", 0, r), Slice("column", 0, r)
    ranks = joint_rank(inputs, row, column, shape[0])
    generator = torch.Generator().manual_seed(settings.seed)
    change = torch.zeros(shape, dtype=torch.float64)
    change[:r] = torch.randn(r, shape[1], generator=generator, dtype=torch.float64)
    change[:, :r] = torch.randn(shape[0], r, generator=generator, dtype=torch.float64)
    reached = int(torch.linalg.matrix_rank(change))
    return Joint(layer, components_for(outputs, settings.tau), *ranks, len(inputs) * shape[0], reached)


def _spans(kernels: list[Tensor], seed: int) -> list[Span]:
    """Of the first m slices in a random order."""
    order = torch.randperm(len(kernels), generator=torch.Generator().manual_seed(seed)).tolist()
    found, total = [], torch.zeros_like(kernels[0])
    for number in order:
        total = total + kernels[number]
        found.append(span(total))
    return found
