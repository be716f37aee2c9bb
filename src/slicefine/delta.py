"""What an adapter file holds for one layer: finished lines, the active block, and the journal. No index arrays.

::

    <layer>.slicefine_active    float  (lines, line length)  the active block, fp32 master, zero padding in alternate
    <layer>.slicefine_journal   int64  (visits, 6)           axis, start, width, first step, last step, in the history
    <layer>.slicefine_rows      base   (rows, in)            finished rows in ascending order
    <layer>.slicefine_columns   base   (columns, out)        finished columns in ascending order
    <layer>.slicefine_entries   base   (entries,)            finished random-mask draws, one after the other
    <layer>.slicefine_before    base   (values,)             what undoing the last visits needs, see `Journal.history`

Rows, columns and entries follow from the journal, so values need no indices. Absent tensors are empty ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .errors import AdapterFileError
from .functional import Matrix
from .geometry import AXES, Slice, line_count, line_length, touched
from .journal import Journal, Visit, history_count, kept_counts, read_table, visit_table

__all__ = ["Delta", "KINDS", "expected_shapes", "pack", "pack_values", "unpack"]

# the one type that flows: training produces it; saving, merging, exporting and analysing consume it
Delta = dict[str, list[tuple[Slice, Tensor]]]

KINDS = ("journal", "rows", "columns", "entries", "before")
_AXIS = {"rows": "row", "columns": "column", "entries": "entries"}


def pack(journal: Journal, weight: Matrix) -> dict[str, Tensor]:
    """Tensors of a journal, the active block left out (the persistent parameter carries it).

    Args:
        journal: the adapter's journal on this weight.
        weight: the matrix ``(rows, columns)`` that it is or is not applied to.
    """
    shape = (weight.shape[0], weight.shape[1])
    return pack_values(journal.visits, dict(journal.trained(weight)), journal.history(shape))


def pack_values(
    visits: Sequence[Visit], trained: Mapping[Slice, Tensor], history: Sequence[Tensor | None] = ()
) -> dict[str, Tensor]:
    """As `pack`, of the visits, of what stands in each visited slice, in the order of first visit, and the history."""
    active = visits[-1].slice
    lines: dict[str, dict[int, Tensor]] = {"row": {}, "column": {}}
    draws: list[Tensor] = []
    for block, values in trained.items():
        if block == active:
            continue
        if block.axis == "entries":
            draws.append(values.reshape(-1))
        else:
            lines[block.axis].update(zip(block.indices(), values, strict=True))
    for i in active.indices() if active.axis != "entries" else ():
        lines[active.axis].pop(i, None)
    kept = [-1 if part is None else part.numel() for part in history] or None
    tensors = {"journal": visit_table(visits, kept)}
    if kept is not None and max(kept) > 0:
        tensors["before"] = torch.cat([part for part in history if part is not None])
    for kind, axis in (("rows", "row"), ("columns", "column")):
        if lines[axis]:
            tensors[kind] = torch.stack([lines[axis][i] for i in sorted(lines[axis])])
    if draws:
        tensors["entries"] = torch.cat(draws)
    return tensors


def expected_shapes(table: Tensor, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the non-empty tensors that `pack` writes for this journal on a matrix of ``shape``.

    Raises:
        AdapterFileError: if a slice does not fit the matrix (the adapter belongs to another base).
    """
    visits = read_table(table)
    active, slices = visits[-1].slice, list(dict.fromkeys(v.slice for v in visits))
    for block in slices:
        size = shape[0] * shape[1] if block.axis == "entries" else shape[AXES.index(block.axis)]
        if block.width + (block.start if block.axis != "entries" else 0) > size:
            raise AdapterFileError(
                f"journal: {block} lies outside a matrix of shape {shape}; the adapter was trained on another base "
                "model."
            )
    shapes: dict[str, tuple[int, ...]] = {}
    for kind, axis in _AXIS.items():
        finished = [s for s in slices if s.axis == axis and s != active]
        if axis == "entries":
            count = sum(s.width for s in finished)
        else:
            own = [active] if active.axis == axis else []
            count = line_count([*finished, *own], axis) - line_count(own, axis)
        if count:
            shapes[kind] = (count,) if axis == "entries" else (count, line_length(axis, shape))
    kept = sum(count for count in kept_counts(table) if count > 0)
    return shapes | ({"before": (kept,)} if kept else {})


def _check_history(table: Tensor, shape: tuple[int, int], where: str) -> None:
    """Raise `AdapterFileError` unless the history has as many values of each visit as the visits imply."""
    visits = read_table(table)
    for i, count in enumerate(kept_counts(table)):
        if count >= 0 and count != history_count(visits, i, shape):
            raise AdapterFileError(f"{where}: the history of visit {i + 1} has {count} values; the file is corrupt.")


def unpack(tensors: Mapping[str, Tensor], active: Tensor, shape: tuple[int, int], where: str) -> dict[Slice, Tensor]:
    """Trained values of every visited slice, in the order of first visit.

    Args:
        tensors: what `pack` wrote.
        active: the persistent parameter ``(lines, line length)``.
        shape: of the weight.
        where: the layer's name, for messages.

    Raises:
        AdapterFileError: if a tensor is missing, has another shape than the journal implies, or does not fit.
    """
    table = tensors["journal"]
    expected = expected_shapes(table, shape)
    for kind in KINDS[1:]:
        found = tuple(tensors[kind].shape) if kind in tensors else None
        if found != expected.get(kind):
            raise AdapterFileError(
                f"{where}: slicefine_{kind} has shape {found}, but the journal implies {expected.get(kind)}; "
                "the adapter file is incomplete or belongs to another base model."
            )
    slices = list(dict.fromkeys(v.slice for v in read_table(table)))
    current = read_table(table)[-1].slice
    block = (1, current.width) if current.axis == "entries" else (current.width, line_length(current.axis, shape))
    if active.dim() != 2 or active.shape[0] < block[0] or active.shape[1] < block[1]:
        raise AdapterFileError(
            f"{where}: slicefine_active has shape {tuple(active.shape)}, too small for {current}; the file is corrupt."
        )
    _check_history(table, shape, where)  # not before: what is made here has the sizes that were just checked
    lines: dict[str, dict[int, Tensor]] = {"row": {}, "column": {}}
    own = active.detach()[: block[0], : block[1]]
    for kind, axis in (("rows", "row"), ("columns", "column")):
        mine = set(current.indices()) if current.axis == axis else set()
        indices = [i for i in touched([s for s in slices if s != current], axis) if i not in mine]
        lines[axis].update(zip(indices, tensors.get(kind, ()), strict=True))
    result: dict[Slice, Tensor] = {}
    offset = 0
    for item in slices:
        if item == current:
            result[item] = own.clone()
        elif item.axis == "entries":
            result[item] = tensors["entries"][offset : offset + item.width].unsqueeze(0)
            offset += item.width
        else:
            shared = dict(zip(current.indices(), own, strict=True)) if current.axis == item.axis else {}
            result[item] = torch.stack(
                [shared[i].to(active.device) if i in shared else lines[item.axis][i].to(active) for i in item.indices()]
            )
    return result
