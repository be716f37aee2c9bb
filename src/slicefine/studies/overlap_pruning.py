"""Task energy and overlap of a backbone whose weights are pruned (Corollary D.2)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

import torch
from rich.progress import track
from torch import Tensor

from ..analysis.backbone import prune
from ..analysis.collect import features
from ..analysis.features import components_for, task_energy_ratio
from ..analysis.spans import directions
from ..analysis.winners import layer_overlap
from ..errors import NumericalError
from ..geometry import Slice
from ..window import block_paths
from .common import Opened

__all__ = ["Pruned", "falls", "measure_pruning"]


@dataclass
class Pruned:
    """One block at one share of pruned weights.

    Attributes:
        block: its name.
        share: p.
        energy: E(p), the share of the first k squared singular values, k as without pruning.
        rank: r*(p, tau); None where all examples have the same features.
        layer: the block's last linear layer, where gamma is measured.
        gamma_row: gamma_p of the first rows of it, as many as its own r*(p, tau), and U of as many directions.
        gamma_column: gamma_p of its first column.
    """

    block: str
    share: float
    energy: float
    rank: int | None
    layer: str
    gamma_row: float
    gamma_column: float


def falls(values: Sequence[float | None]) -> int:
    """How often a sequence goes down; None is left out.

    Example:
        >>> falls([3, 4, None, 2, 2])
        1
    """
    known = [value for value in values if value is not None]
    return sum(after < before for before, after in pairwise(known))


def measure_pruning(
    opened: Opened, batches: Sequence[dict[str, Tensor]], shares: Sequence[float], k: int, tau: float
) -> list[Pruned]:
    """Prune all chosen layers together, share by share, and put them back.

    Raises:
        ConfigError: for a share out of range.
        NumericalError: for NaN weights.
    """
    blocks = block_paths(opened.layers)
    last = {block: [name for name in opened.layers if name.startswith(f"{block}.")][-1:] for block in blocks}
    kept = {block: own[0] for block, own in last.items() if own}
    parameters = {name: opened.model.get_submodule(name).weight for name in opened.layers}
    originals = {name: weight.detach().clone() for name, weight in parameters.items()}
    found: list[Pruned] = []
    try:
        for share in track(shares, "pruning", transient=True, disable=not sys.stderr.isatty()):
            pruned = prune({name: weight.cpu() for name, weight in originals.items()}, share)
            _put(parameters, pruned)
            outputs = features(opened.model, batches, [*kept, *kept.values()])
            inputs = features(opened.model, batches, list(kept.values()), side="input")
            found += [
                _pruned(b, share, outputs[b], layer, outputs[layer], inputs[layer], k, tau) for b, layer in kept.items()
            ]
    finally:
        _put(parameters, originals)
    return found


@torch.no_grad()
def _put(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, weight in parameters.items():
        weight.copy_(values[name])


def _pruned(
    block: str, share: float, hidden: Tensor, layer: str, outputs: Tensor, inputs: Tensor, k: int, tau: float
) -> Pruned:
    own = _rank(outputs, tau)
    rows = min(outputs.shape) if own is None else own
    gammas = []
    for part in (Slice("row", 0, rows), Slice("column", 0, 1)):
        basis = directions(outputs, rows if part.axis == "row" else min(k, *outputs.shape))
        gammas.append(mean(layer_overlap(x, part, basis).gamma for x in inputs[:8]))
    energy = task_energy_ratio(hidden, min(k, *hidden.shape)) if bool(hidden.any()) else math.nan
    return Pruned(block, share, energy, _rank(hidden, tau), layer, *gammas)


def _rank(outputs: Tensor, tau: float) -> int | None:
    try:
        return components_for(outputs, tau)
    except NumericalError:  # the features of all examples are the same
        return None
