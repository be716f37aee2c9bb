"""How many entries a run touched: integers from the journal, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..geometry import Slice, entry_indices, touched

__all__ = ["layer_kind", "model_touched", "touched_entries"]


def touched_entries(slices: Sequence[Slice], shape: tuple[int, int]) -> int:
    """Distinct entries of a matrix that the slices cover; where rows and columns cross, an entry counts once.

    Example:
        >>> touched_entries([Slice("row", 0, 2), Slice("column", 0, 1)], (4, 10))
        22
    """
    rows, columns = len(touched(list(slices), "row")), len(touched(list(slices), "column"))
    lines = rows * shape[1] + columns * shape[0] - rows * columns
    draws = [entry_indices(s, shape) for s in slices if s.axis == "entries"]
    return lines + (int(torch.unique(torch.cat(draws)).numel()) if draws else 0)


def model_touched(model: Any) -> int:
    """Distinct entries of all layers that at least one optimizer step trained, from the journals."""
    from ..mover import movers_of

    total = 0
    for mover in movers_of(model):
        for layer in mover.layers.values():
            visits = layer.states[mover.name].journal.visits
            total += touched_entries([v.slice for v in visits if v.last_step >= v.first_step], layer.shape)
    return total


def layer_kind(name: str) -> str:
    """A layer's name with its numbers replaced, so that the layers of all blocks fall together.

    Example:
        >>> layer_kind("model.layers.11.mlp.up_proj")
        'model.layers.*.mlp.up_proj'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
