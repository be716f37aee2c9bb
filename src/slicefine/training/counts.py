"""How many entries a run touched: integers from the journal, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..geometry import Slice, entry_indices, touched
from ..journal import Visit
from ..schedule import slices_of_others
from ..state import AdapterState

__all__ = ["bias_entries", "layer_kind", "layer_touched", "model_touched", "touched_entries"]


def touched_entries(slices: Sequence[Slice], shape: tuple[int, int], others: Sequence[Slice] = ()) -> int:
    """Distinct entries of a matrix that the slices cover and others do not; a crossing counts once.

    Args:
        slices: rows, columns or draws of entries.
        shape: ``(rows, columns)`` of the matrix.
        others: rows and columns that belong to other runs.

    Example:
        >>> touched_entries([Slice("row", 0, 2), Slice("column", 0, 1)], (4, 10))
        22
        >>> touched_entries([Slice("row", 0, 2)], (4, 10), [Slice("column", 3, 1)])
        18
    """
    own, taken = list(slices), list(others)
    sizes = {}
    for axis, size in (("row", shape[0]), ("column", shape[1])):
        mine, theirs = set(touched(own, axis)), set(touched(taken, axis))
        free = size - len(theirs)
        sizes[axis] = (len(mine - theirs), free)  # lines of ours, and all lines, that are nobody else's
    (rows, all_rows), (columns, all_columns) = sizes["row"], sizes["column"]
    lines = rows * all_columns + columns * all_rows - rows * columns
    draws = [entry_indices(s, shape) for s in own if s.axis == "entries"]
    return lines + (int(torch.unique(torch.cat(draws)).numel()) if draws else 0)


def layer_touched(state: AdapterState, visits: Sequence[Visit], shape: tuple[int, int]) -> int:
    """Distinct entries of one layer that visits with at least one step train."""
    others = slices_of_others(state.schedule, shape, state.layer_name)
    return touched_entries([v.slice for v in visits if v.last_step >= v.first_step], shape, others)


def bias_entries(model: Any) -> int:
    """Entries of the biases that are trained whole beside the slices."""
    from ..mover import movers_of

    states = [layer.states[mover.name] for mover in movers_of(model) for layer in mover.layers.values()]
    return sum(biases.entries() for biases in {state.biases for state in states if state.biases is not None})


def model_touched(model: Any) -> int:
    """Distinct entries of all layers that at least one optimizer step trained, from the journals, and biases."""
    from ..mover import movers_of

    total = bias_entries(model)
    for mover in movers_of(model):
        for layer in mover.layers.values():
            state = layer.states[mover.name]
            total += layer_touched(state, state.journal.visits, layer.shape)
    return total


def layer_kind(name: str) -> str:
    """A layer's name with its numbers replaced, so that the layers of all blocks fall together.

    Example:
        >>> layer_kind("model.layers.11.mlp.up_proj")
        'model.layers.*.mlp.up_proj'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
