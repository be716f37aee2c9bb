"""How far fine-tuned models went from their base: predictions, features, weights and kernels (Appendix C.2, C.3)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from ..analysis.collect import POOLS, features, slice_jacobian, slice_values
from ..analysis.kernels import kernel_alignment, kernel_distance, ntk
from ..analysis.shift import debiased_cka, linear_cka, prediction_shift, relative_change
from ..errors import AdapterFileError, ConfigError, DataError, NumericalError
from ..geometry import Slice
from ..tasks.settings import DataSettings
from .common import Result
from .pairs import Pair, open_pair, pair_names, run_folders
from .shift_report import Shift, shift_charts, shift_notes, shift_row

__all__ = ["Settings", "measure_shift", "study"]

_IGNORED = -100
_MANY_OUTPUTS = 100  # an NTK of more outputs (a vocabulary) would take a backward pass for each


@dataclass
class Settings:
    """Which models to compare with which base, and on what.

    Args:
        adapters: folders that `slicefine train` wrote, with commas between them.
        base: what to compare with instead of each adapter's own base: another run, such as a warm-started one, or a
            folder in Hugging Face layout, or a hub id.
        model: the adapters' own base, if it is elsewhere than in training.
        data: the rows; None takes each run's own data set.
        split: train, validation or test.
        samples: rows at most, drawn with the seed.
        batch_size: rows per batch.
        pool: how positions become one feature row: mean, first, last, or tokens (each is a row).
        ntk_rows: rows for the neural tangent kernel, one backward pass each per class and layer; 0 leaves it out.
        ntk_layers: the linear layers whose weights are the kernel's parameters; None takes the last one of the head,
            and those of the middle block.
        device: cpu, cuda, ...; None takes an accelerator if there is one.
        seed: of the draw.
        output: folder for JSON and pictures; None prints only.
    """

    adapters: str | list[str]
    base: str | None = None
    model: str | None = None
    data: DataSettings | None = None
    split: str = "validation"
    samples: int = 256
    batch_size: int = 16
    pool: str = "mean"
    ntk_rows: int = 16
    ntk_layers: list[str] | None = None
    device: str | None = None
    seed: int = 0
    output: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 4), ("batch_size", 1), ("ntk_rows", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be at least {least}.")
        if self.split not in ("train", "validation", "test"):
            raise ConfigError(f"split={self.split!r} is unknown; expected train, validation or test.")
        if self.pool not in POOLS:
            raise ConfigError(f"pool={self.pool!r} is unknown; expected one of {', '.join(POOLS)}.")


def study(settings: Settings) -> Result:
    """Compare every adapter with its base, or with one base.

    Raises:
        AdapterFileError: if an adapter is missing, corrupt, or belongs to another base.
        ConfigError: for a setting that is wrong, or a base of another architecture.
        DataError: if the data cannot be used.
        NumericalError: for a model that gives NaN.
    """
    folders = run_folders(settings.adapters)
    both = list(zip(pair_names(folders), folders, strict=True))
    shown = track(both, "adapters", transient=True, disable=not sys.stderr.isatty())
    found = [measure_shift(open_pair(name, folder, settings), settings) for name, folder in shown]
    return Result(
        name="shift",
        title=f"Shift from {settings.base or 'each adapter' + chr(39) + 's own base'}, {settings.split} set",
        columns=["adapter", "metric", "base", "tuned", "KL", "CKA, last", "CKA, least", "weights", "NTK", "alignment"],
        rows=[shift_row(each) for each in found],
        numbers={"adapters": [asdict(each) for each in found]},
        charts=shift_charts(found),
        notes=shift_notes(found),
    )


def measure_shift(pair: Pair, settings: Settings) -> Shift:
    """Everything that `study` says of one adapter."""
    notes: list[str] = []
    outputs = _predictions(pair)
    cka, debiased, shuffled = _representations(pair, settings.pool, settings.seed)
    result = Shift(
        pair.name,
        pair.metric,
        *outputs,
        own_head=pair.own_head,
        blocks=pair.blocks,
        cka=cka,
        debiased=debiased,
        shuffled=shuffled,
        layers={
            name: relative_change(pair.tuned.get_submodule(name).weight, pair.base.get_submodule(name).weight)
            for name in pair.layers
        },
        slices=_slices(pair, settings.model, notes),
        notes=notes,
    )
    _add_kernels(result, pair, settings)
    return result


# -- predictions ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _predictions(pair: Pair) -> tuple[float | None, float | None, float | None]:
    """Score, the base's score, and the divergence, in one pass over the batches for both models."""
    total, count = 0.0, 0
    kept: list[list[Tensor]] = [[], []]
    for batch, labels in zip(pair.batches, pair.labels, strict=True):
        both = [model(**batch).logits.float().cpu() for model in (pair.tuned, pair.base)]
        if both[0].dim() == 3:
            predicts = labels[:, 1:] != _IGNORED  # the last position predicts nothing that is known
            both = [logits[:, :-1][predicts] for logits in both]
        else:
            for own, logits in zip(kept, both, strict=True):
                own.append(logits)
        if both[0].shape[-1] > 1 and len(both[0]):
            total, count = total + prediction_shift(*both) * len(both[0]), count + len(both[0])
    divergence = total / count if count else None
    if not kept[0]:
        return None, None, divergence
    targets = torch.cat(pair.labels).numpy()
    tuned, base = (
        float(pair.task.compute(torch.cat(own).numpy(), targets)[pair.metric]) if own else None for own in kept
    )
    return tuned, base if pair.own_head else None, divergence


# -- representations --------------------------------------------------------------------------------------------------


def _representations(pair: Pair, pool: str, seed: int) -> tuple[list[float], list[float], list[float]]:
    """Linear CKA of each block, debiased, and with shuffled rows."""
    tuned, base = (features(model, pair.batches, pair.blocks, pool) for model in (pair.tuned, pair.base))
    cka, debiased, shuffled = [], [], []
    for name in pair.blocks:
        rows = len(tuned[name])
        if rows < 4:
            raise DataError(f"{pair.name}: {rows} rows are too few to compare representations; give at least 4.")
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        cka.append(linear_cka(tuned[name], base[name]))
        debiased.append(_debiased(tuned[name], base[name]))
        shuffled.append(linear_cka(tuned[name][order], base[name]))
    return cka, debiased, shuffled


def _debiased(features: Tensor, base_features: Tensor) -> float:
    try:
        return debiased_cka(features, base_features)
    except NumericalError:  # too few rows for an estimate
        return float("nan")


# -- weights ----------------------------------------------------------------------------------------------------------


def _slices(pair: Pair, model: str | None, notes: list[str]) -> dict[str, list[float]]:
    """Relative change of each trained slice; empty for other methods."""
    if not pair.is_slices:
        return {}
    from ..files.adapter import read_adapter
    from ..files.distance import distances
    from ..training.bases import open_base

    adapter = read_adapter(pair.folder)
    try:
        with open_base(adapter, model) as base:
            found = distances(adapter, base)
    except AdapterFileError as error:  # a base in another format than safetensors
        notes.append(f"{pair.name}: change of single slices left out: {error}")
        return {}
    return {name: [each.relative for each in blocks.values()] for name, blocks in found.items()}


# -- kernels ----------------------------------------------------------------------------------------------------------


def _add_kernels(result: Shift, pair: Pair, settings: Settings) -> None:
    """The empirical NTK of the same parameters in both models, traced over the logits (Remark B.1)."""
    if settings.ntk_rows == 0:
        return
    with torch.no_grad():
        logits = pair.tuned(**_rows(pair, 1)[0]).logits
    if logits.dim() != 2 or logits.shape[1] > _MANY_OUTPUTS:
        result.notes.append(f"{pair.name}: no neural tangent kernel of {logits.shape[-1]:,} outputs per position.")
        return
    layers = settings.ntk_layers or _kernel_layers(pair)
    rows = _rows(pair, settings.ntk_rows)
    before, after = (_kernel(model, rows, layers) for model in (pair.base, pair.tuned))
    result.ntk_layers = list(layers)
    result.ntk_distance, result.ntk_alignment = kernel_distance(before, after), kernel_alignment(before, after)


def _kernel_layers(pair: Pair) -> list[str]:
    """The last linear layer of the head, and those of the middle block."""
    middle = f"{pair.blocks[len(pair.blocks) // 2]}."
    heads = [
        name
        for head in pair.heads
        for name, module in pair.tuned.named_modules()
        if (name == head or name.startswith(f"{head}.")) and isinstance(module, nn.Linear)
    ]
    return [*heads[-1:], *(name for name in pair.layers if name.startswith(middle))]


def _kernel(model: Any, rows: Sequence[dict[str, Tensor]], layers: Sequence[str]) -> Tensor:
    """K[i, j] = sum over classes and parameters, layer by layer and class by class, so that little is held at once."""
    kernel = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for layer in layers:
        columns = slice_values(model, layer, Slice("row", 0, 1)).shape[1]
        size = model.get_submodule(layer).weight.numel() // columns
        jacobians = [slice_jacobian(model, row, layer, Slice("row", 0, size)).cpu() for row in rows]
        for number in range(len(jacobians[0])):
            kernel += ntk([jacobian[number : number + 1] for jacobian in jacobians], trace=True)
    return kernel


def _rows(pair: Pair, count: int) -> list[dict[str, Tensor]]:
    """The first rows as batches of their own."""
    singles = [
        {name: value[i : i + 1] for name, value in batch.items()}
        for batch in pair.batches
        for i in range(len(next(iter(batch.values()))))
    ]
    return singles[:count]
