"""Task energy of a model on a data set: explained variance, the numbers called k_task, and tangent kernels.

Lemma 2.5, Corollary 2.6, Theorem 2.4's energy ratio and Remark B.1; Figures 5 and 6. Features are pooled per example.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..analysis.collect import POOLS, features
from ..analysis.features import (
    components_for,
    explained_variance,
    kernel_check,
    kernel_pair,
    label_energy,
    label_share,
    separating_dimension,
    task_energy_ratio,
    task_rank,
)
from ..charts import Chart, Line, Panel
from ..errors import ConfigError, DataError
from ..geometry import Slice
from .common import Opened, Result, StudySettings, block_names, open_model
from .task_kernels import Kernels, alignment_chart, measure_kernels, readout_of

__all__ = ["Settings", "compare_curves", "study"]

_SHOWN = 6  # curves per panel
_EXAMPLES = 8  # Figure 5's


@dataclass
class Settings(StudySettings):
    """Which features to look at, and how closely.

    Args:
        pool: how positions become one row per example: mean, first or last.
        tau: shares of the variance, for k_task(tau).
        blocks: blocks to look at, counted from 0; None takes all.
        separating_samples: examples at most for the separating dimension, a linear programme; 0 leaves it out.
        kernel_samples: examples at most for tangent kernels, one backward per output and slice; 0 leaves them out.
        r: rank of the slices whose tangent kernels are looked at.
        compare: JSON files that this study wrote before: draw their curves together instead of measuring.
    """

    pool: str = "mean"
    tau: list[float] = field(default_factory=lambda: [0.5, 0.8, 0.9, 0.95])
    blocks: list[int] | None = None
    separating_samples: int = 96
    kernel_samples: int = 24
    r: int = 4
    compare: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in POOLS[:3]:
            raise ConfigError(f"pool={self.pool!r}: expected one of {', '.join(POOLS[:3])}; labels are per example.")
        if not self.tau or not all(0 < tau <= 1 for tau in self.tau):
            raise ConfigError(f"tau={self.tau!r}: expected at least one number, each in (0, 1].")
        for name, least in (("separating_samples", 2), ("kernel_samples", 4)):
            if getattr(self, name) < least and getattr(self, name) != 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be at least {least}; 0 leaves it out.")
        if self.r < 1:
            raise ConfigError(f"r={self.r!r} must be at least 1.")


def study(settings: Settings) -> Result:
    """Measure every block, and the tangent kernels of the readout and of slices in the middle.

    Raises:
        ConfigError: for a setting that does not fit the model.
        DataError: for data that cannot be used, or fewer than two examples.
        NumericalError: for NaN, infinite or constant features.
    """
    if settings.compare:
        return compare_curves(settings.compare)
    opened = open_model(settings)
    names = _blocks(opened, settings)
    hidden = features(opened.model, opened.batches, names, settings.pool)
    labels, notes = _labels(opened)
    blocks = [_block(name, hidden[name], labels, settings) for name in names]
    kernels, more = _kernels(opened, names, hidden, settings)
    examples = len(hidden[names[0]])
    numbers = {
        "data": settings.data.path,
        "examples": examples,
        "blocks": blocks,
        "kernels": None if kernels is None else kernels.as_dict(),
    }
    charts = [_curves_chart(blocks), _kernel_chart(hidden)]
    if kernels is not None:
        charts.append(alignment_chart(kernels))
    title = f"task energy of {settings.model.path} on {examples} rows of {settings.data.path}"
    notes = [*_explained(settings, examples), *notes, *more]
    return Result("energy", title, _columns(settings), [_row(own) for own in blocks], numbers, charts, notes)


def compare_curves(files: Sequence[str]) -> Result:
    """Figure 6: the last block's curves of several earlier results in one picture.

    Args:
        files: JSON files of this study.

    Raises:
        DataError: for a file that is not such a result.
    """
    found = {}
    for name in files:
        try:
            numbers = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))["numbers"]
            own = numbers["blocks"][-1]
            label = Path(numbers["data"]).name
            found[f"{label} ({name})" if label in found else label] = own | {"examples": numbers["examples"]}
            curve, k_task = own["curve"], own["k_task"]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"compare: {name!r} is no result of `slicefine analyze energy` ({type(error).__name__}: {error}). Give "
                "the energy.json files that it wrote."
            ) from error
        if not isinstance(curve, list) or not isinstance(k_task, dict):
            raise DataError(f"compare: {name!r} has no curve and no k_task; give the energy.json files.")
    lines = [Line(label, _places(len(own["curve"])), own["curve"]) for label, own in found.items()]
    words = "; ".join(f"{label}: {own['curve'][0]:.3f} in the first" for label, own in found.items())
    panel = Panel("last block", lines, "components k", "cumulative explained variance", log_x=True)
    taus = list(dict.fromkeys(tau for own in found.values() for tau in own["k_task"]))
    rows = [
        [label, str(own["examples"]), *(str(own["k_task"].get(tau, "-")) for tau in taus)]
        for label, own in found.items()
    ]
    columns = ["data", "examples", *(f"k_task({tau})" for tau in taus)]
    chart = Chart("energy_compared", "Explained variance of several data sets (Figure 6)", [panel], f"{words}.")
    note = "n examples have at most n - 1 components: compare curves of equally many examples only."
    return Result("energy_compared", "explained variance of the last block", columns, rows, found, [chart], [note])


def _blocks(opened: Opened, settings: Settings) -> list[str]:
    names = block_names(opened.model)
    if settings.blocks is None:
        return names
    if not settings.blocks or not all(0 <= number < len(names) for number in settings.blocks):
        raise ConfigError(f"blocks={settings.blocks!r}: the model has blocks 0 to {len(names) - 1}.")
    return [names[number] for number in sorted(set(settings.blocks))]


def _labels(opened: Opened) -> tuple[Tensor | None, list[str]]:
    """Class numbers or targets; None where each position has its own label."""
    if not len(opened.labels):
        return None, ["Labels are tokens here, not one per example: what depends on labels is left out."]
    if len(torch.unique(opened.labels)) < 2:
        return None, ["All labels are the same: what depends on labels is left out."]
    if opened.labels.is_floating_point():
        return opened.labels, ["A regression has one target: rank(Sigma_task) is 1, and there is nothing to separate."]
    return opened.labels, []


def _block(name: str, rows: Tensor, labels: Tensor | None, settings: Settings) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    result: dict[str, Any] = {
        "name": name,
        "curve": explained_variance(rows).tolist(),
        "null_curve": explained_variance(noise).tolist(),
        "k_task": {str(tau): components_for(rows, tau) for tau in settings.tau},
        "null_k_task": {str(tau): components_for(noise, tau) for tau in settings.tau},
        "kernel_check": asdict(kernel_check(rows)),
    }
    if labels is not None:
        order = torch.randperm(len(labels), generator=generator)
        result |= _with_labels(rows, noise, labels, labels[order], settings)
    return result


def _with_labels(rows: Tensor, noise: Tensor, labels: Tensor, permuted: Tensor, settings: Settings) -> dict[str, Any]:
    rank = task_rank(rows, labels)
    energy = label_energy(rows, labels)
    k = {str(tau): components_for(rows, tau) for tau in settings.tau}
    result = {
        "task_rank": rank,
        "permuted_task_rank": task_rank(rows, permuted),
        "energy_ratio": task_energy_ratio(rows, rank),
        "null_energy_ratio": task_energy_ratio(noise, rank),
        "label_share": label_share(rows, labels),
        "permuted_label_share": label_share(rows, permuted),
        "label_curve": energy.tolist(),
        "label_energy_in_k_task": {tau: float(energy[count - 1]) for tau, count in k.items()},
        "components_for_label_energy": {str(tau): int((energy < tau - 1e-12).sum()) + 1 for tau in settings.tau},
    }
    if settings.separating_samples and not labels.is_floating_point():
        few = slice(settings.separating_samples)
        for key, points, classes in (
            ("separating_dimension", rows, labels),
            ("permuted_separating_dimension", rows, permuted),
            ("null_separating_dimension", noise, labels),
        ):
            alike = len(torch.unique(classes[few])) < 2  # few examples may all be of one class
            result[key] = None if alike else separating_dimension(points[few], classes[few])
    return result


def _kernels(
    opened: Opened, names: Sequence[str], hidden: dict[str, Tensor], settings: Settings
) -> tuple[Kernels | None, list[str]]:
    """Remark B.1 for the readout, and for slices of the first and the last layer of the middle block."""
    if not settings.kernel_samples:
        return None, []
    if len(hidden[names[0]]) < 4:
        return None, ["Tangent kernels are left out: they are compared on four examples at least."]
    if not len(opened.labels):
        return None, ["Tangent kernels are left out: the outputs are a vocabulary at every position."]
    readout = readout_of(opened)
    if readout is None:
        return None, ["Tangent kernels are left out: no linear layer gives the logits as they are."]
    block = names[len(names) // 2]
    layers = [layer for layer in opened.layers if layer.startswith(f"{block}.")]
    picked = list(dict.fromkeys([*layers[:1], *layers[-1:]]))
    slices = [(layer, _slice(opened, layer, axis, settings)) for layer in picked for axis in ("row", "column")]
    found = measure_kernels(
        opened, readout, block, hidden[block], slices, min(settings.kernel_samples, len(hidden[block])), settings.seed
    )
    return found, _kernel_notes(found)


def _slice(opened: Opened, layer: str, axis: str, settings: Settings) -> Slice:
    """A slice in a random place."""
    module = opened.model.get_submodule(layer)
    rows, columns = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
    lines = rows if axis == "row" else columns
    r = min(settings.r, lines)
    generator = torch.Generator().manual_seed(settings.seed)
    return Slice(axis, int(torch.randint(lines - r + 1, (1,), generator=generator)), r)


def _kernel_notes(found: Kernels) -> list[str]:
    notes = [
        f"Remark B.1, {found.readout} on {found.examples} rows: its tangent kernel differs from that of its inputs by "
        f"{found.readout_difference:.1e} of its norm; from that of its centred inputs, as the Remark writes it, by "
        f"{found.centred_difference:.2g}."
    ]
    for item in found.alignments:
        if item.unbiased is None or item.null is None:
            notes.append(f"{item.name}: the tangent kernel is zero or constant.")
        elif item.features != found.readout or item.name == "readout":
            notes.append(
                f"{item.name}: unbiased CKA {item.unbiased:.3f} with features of {item.features}; random ones "
                f"{item.null:.3f}."
            )
    return notes


def _explained(settings: Settings, examples: int) -> list[str]:
    return [
        f"k_task(tau) knows nothing of the labels and is at most n - 1 = {examples - 1}; null: Gaussian features.",
        "rank(Sigma_task) counts classes, whatever they mean. separating: fewest components that separate the classes "
        f"of {min(examples, settings.separating_samples)} rows (in brackets: permuted labels). E: Theorem 2.4's ratio "
        "at k = rank(Sigma_task), of features that are not centred (null).",
        "label share: of the features' variance, what the labels explain (permuted). The last column: which share of "
        "that lies in the k_task components of the largest tau below 1.",
    ]


def _columns(settings: Settings) -> list[str]:
    taus = ", ".join(f"{tau:g}" for tau in settings.tau)
    return ["block", f"k_task({taus})", "null", "rank", "separating", "E (null)", "label share", "in k_task"]


def _row(own: dict[str, Any]) -> list[str]:
    first = [".".join(own["name"].split(".")[-2:]), _joined(own["k_task"]), _joined(own["null_k_task"])]
    if "task_rank" not in own:
        return [*first, *["-"] * 5]
    separating = "-"
    if "separating_dimension" in own:
        cells = [own[key] for key in ("separating_dimension", "permuted_separating_dimension")]
        separating = "{} ({})".format(*("none" if cell is None else cell for cell in cells))
    held = own["label_energy_in_k_task"]
    largest = max((tau for tau in held if float(tau) < 1), key=float, default=next(iter(held)))
    return [
        *first,
        str(own["task_rank"]),
        separating,
        f"{own['energy_ratio']:.3f} ({own['null_energy_ratio']:.3f})",
        f"{own['label_share']:.3f} ({own['permuted_label_share']:.3f})",
        f"{held[largest]:.3f}",
    ]


def _joined(values: dict[str, int]) -> str:
    return " ".join(map(str, values.values()))


def _curves_chart(blocks: Sequence[dict[str, Any]]) -> Chart:
    """Figure 6's curve for some blocks, beside what the labels explain."""
    shown = _spread(blocks, _SHOWN)
    panels = []
    for key, title in (("curve", "cumulative explained variance"), ("label_curve", "what the labels explain")):
        lines = [Line(own["name"], _places(len(own[key])), own[key]) for own in shown if key in own]
        if lines and key == "curve":
            lines.append(Line("random features", _places(len(shown[-1]["null_curve"])), shown[-1]["null_curve"]))
        if lines:
            panels.append(Panel(title, lines, "components k", "share", log_x=True))
    words = "; ".join(f"{own['name']}: {_joined(own['k_task'])}" for own in shown)
    return Chart("energy_curves", "Share of the first k components (Figure 6)", panels, f"k_task(tau) of {words}.")


def _kernel_chart(hidden: dict[str, Tensor]) -> Chart:
    """Figure 5: K, P P^T and their difference for the first, a middle and the last block."""
    panels = []
    for name, rows in _spread(list(hidden.items()), 3):
        kernel, rebuilt = kernel_pair(rows[:_EXAMPLES])
        difference = (kernel - rebuilt).abs()
        for title, matrix in (("K", kernel), ("P P^T", rebuilt), ("|K - P P^T|", difference)):
            panels.append(Panel(f"{name}: {title}", x_label="example", y_label="example", matrix=matrix.tolist()))
    words = "Each row of panels has two equal kernels and a difference that is rounding."
    return Chart("energy_kernels", "Centred kernels and principal components (Figure 5)", panels, words, across=3)


def _places(count: int) -> list[int]:
    return list(range(1, count + 1))


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many items, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
