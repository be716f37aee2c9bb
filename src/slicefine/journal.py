"""The journal of one adapter on one weight: what was trained, when, and what stood there before.

It is the single source for saving, disabling, unloading bit for bit and undoing. Merging is reversed by
overwriting with originals, never by subtracting, because ``(a + b) - b`` is not ``a`` in floating point.
All methods take the weight as a plain ``(rows, columns)`` tensor; the journal never sees a module.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import AdapterFileError, UnsupportedError
from .functional import Matrix, read_block, write_block
from .geometry import AXES, Slice, entry_indices, shared_entries

__all__ = ["Journal", "Visit", "read_table", "visit_table"]


class Visit(NamedTuple):
    """One stay of the slice at one position: optimizer steps ``first_step`` to ``last_step`` (1 is the first)."""

    slice: Slice
    first_step: int
    last_step: int


class Journal:
    """Visited slices of one weight, with the values that they replaced or that they will bring back.

    While *applied*, the weight holds the trained values and the journal the originals (on the CPU). While not
    applied it is the other way round. Originals are taken slice by slice in the order of first visit, each right
    before its slice is first written, so writing them back in reverse order restores every entry bit for bit, even
    where row and column blocks cross.

    Args:
        history: how many before-values of recent moves are kept for `undo`.
    """

    def __init__(self, history: int = 8) -> None:
        self.visits: list[Visit] = []
        self.applied = False
        self._originals: dict[Slice, Tensor] = {}
        self._trained: dict[Slice, Tensor] = {}
        self._before: deque[Tensor] = deque(maxlen=history)

    @property
    def active(self) -> Slice:
        """The slice that is, or was last, in training."""
        return self.visits[-1].slice

    @property
    def step(self) -> int:
        """Optimizer steps made so far."""
        return self.visits[-1].last_step if self.visits else 0

    def slices(self) -> list[Slice]:
        """Distinct visited slices in the order of first visit."""
        return list(dict.fromkeys(visit.slice for visit in self.visits))

    # -- moving ---------------------------------------------------------------------------------------------------

    def begin(self, weight: Matrix, block: Slice, step: int | None = None) -> Tensor:
        """Start a visit to ``block`` on an applied journal; returns the block's current values.

        Args:
            weight: the matrix.
            block: the slice to visit; the active one again, if the layer only waits.
            step: optimizer steps made so far, where other layers made more of them than this one.
        """
        step = self.step if step is None else step
        values = read_block(weight, block)
        kept = values.to("cpu", copy=True)
        self._originals.setdefault(block, kept)
        self._before.append(kept)
        self.visits.append(Visit(block, step + 1, step))
        self.applied = True
        return values

    def count_step(self) -> None:
        """Note that one optimizer step trained the active slice."""
        block, first, last = self.visits[-1]
        self.visits[-1] = Visit(block, first, last + 1)

    def check_undo(self, moves: int = 1) -> None:
        """Raise `UnsupportedError` unless the last ``moves`` visits can be taken back; see `undo`."""
        if not self.applied:
            raise UnsupportedError("undo: the slices are not in the weight now; activate the adapter first.")
        if moves > min(len(self.visits) - 1, len(self._before)):
            raise UnsupportedError(
                f"undo: the history holds the values from before the last {len(self._before)} of {len(self.visits)} "
                "visits only, and the first visit has nothing before it. Raise `history` before training to undo more."
            )

    def undo(self, weight: Matrix) -> None:
        """Take back the last visit: the weight reads as it did when that visit began.

        Raises:
            UnsupportedError: if the history no longer holds the values from before that visit, or if the journal is
                not applied (then the weight holds the originals, which an undo must not touch).
        """
        self.check_undo()
        last = self.visits.pop()
        write_block(weight, last.slice, self._before.pop())
        if last.slice not in self.slices():
            self._originals.pop(last.slice)

    # -- swapping -------------------------------------------------------------------------------------------------

    def apply(self, weight: Matrix) -> None:
        """Write the trained values into the weight and keep what stood there."""
        if self.applied:
            return
        for block, values in self._trained.items():
            self._originals[block] = read_block(weight, block).cpu()
            write_block(weight, block, values)
        self._trained.clear()
        self.applied = True

    def revert(self, weight: Matrix) -> None:
        """Restore the originals bit for bit and keep the trained values."""
        if not self.applied:
            return
        if not self._trained:  # after `add` the weight holds other adapters' sums: keep our own values
            self._trained = {block: read_block(weight, block) for block in self._originals}
        for block in reversed(self._originals):
            write_block(weight, block, self._originals[block])
        self._originals.clear()
        self.applied = False

    def original(self) -> Tensor:
        """What the first visited slice replaced; of an applied journal."""
        return self._originals[self.visits[0].slice]

    def deltas(self, weight: Matrix) -> list[tuple[Slice, Tensor]]:
        """``(slice, trained - original)`` of a reverted journal; each entry counted once, in its first slice.

        Args:
            weight: the matrix with the originals in place.
        """
        result: list[tuple[Slice, Tensor]] = []
        for block, values in self._trained.items():
            delta = values.to(weight.device) - read_block(weight, block).to(values.dtype)
            for earlier, _ in result:
                _clear_shared(delta, block, earlier, weight)
            result.append((block, delta))
        return result

    def add(self, weight: Matrix, deltas: list[tuple[Slice, Tensor]], scale: float = 1.0) -> None:
        """Apply as a sum on top of what the weight holds (several adapters active at once)."""
        for block, delta in deltas:
            current = read_block(weight, block)
            self._originals[block] = current.cpu()
            write_block(weight, block, current.to(delta.dtype) + scale * delta)
        self.applied = True

    # -- files ----------------------------------------------------------------------------------------------------

    def table(self) -> Tensor:
        """The visits as an int64 tensor ``(visits, 5)``: axis, start, width, first step, last step."""
        return visit_table(self.visits)

    def trained(self, weight: Matrix) -> list[tuple[Slice, Tensor]]:
        """``(slice, trained values)`` of every visited slice, from wherever they are now."""
        if self._trained:
            return list(self._trained.items())
        return [(block, read_block(weight, block)) for block in self._originals]

    def load(self, table: Tensor, trained: dict[Slice, Tensor]) -> None:
        """Replace the content of a reverted journal; call `apply` next.

        Raises:
            AdapterFileError: if the table's shape or a value in it makes no sense.
        """
        self.visits = read_table(table)
        self._trained = dict(trained)
        self._originals.clear()
        self._before.clear()
        self.applied = False


def visit_table(visits: Sequence[Visit]) -> Tensor:
    """Visits as an int64 tensor ``(visits, 5)``: axis, start, width, first step, last step."""
    rows = [[AXES.index(v.slice.axis), *v.slice[1:], v.first_step, v.last_step] for v in visits]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)


def read_table(table: Tensor) -> list[Visit]:
    """Parse `Journal.table` and check it: known axes, positive widths, no step range that ends before it begins."""
    if table.dim() != 2 or table.shape[1] != 5 or table.shape[0] < 1 or table.is_floating_point():
        raise AdapterFileError(
            f"journal: expected an integer tensor of shape (visits, 5), got {table.dtype} {tuple(table.shape)}; "
            "the adapter file is corrupt or was not written by slicefine."
        )
    visits: list[Visit] = []
    for entry in table.tolist():
        axis, start, width, first, last = entry
        if axis not in range(len(AXES)) or start < 0 or width < 1 or first < 1 or last < first - 1:
            raise AdapterFileError(f"journal: impossible entry {entry}; the file is corrupt.")
        visits.append(Visit(Slice(AXES[axis], start, width), first, last))
    return visits


def _clear_shared(delta: Tensor, block: Slice, earlier: Slice, weight: Matrix) -> None:
    """Zero the part of ``delta`` that an earlier slice already counts."""
    shape = (weight.shape[0], weight.shape[1])
    if block.axis == "entries":
        indices = entry_indices(block, shape)
        delta[0, _covers(earlier, indices, shape).to(delta.device)] = 0
    elif earlier.axis == "entries":
        indices = entry_indices(earlier, shape)
        indices = indices[_covers(block, indices, shape)].to(delta.device)
        line, place = indices // shape[1], indices % shape[1]
        if block.axis == "column":
            line, place = place, line
        delta[line - block.start, place] = 0
    else:
        part = shared_entries(block, earlier)
        if part is not None:
            delta[part] = 0


def _covers(block: Slice, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """Which flat indices lie in a slice."""
    if block.axis == "entries":
        return torch.isin(indices, entry_indices(block, shape))
    line = indices // shape[1] if block.axis == "row" else indices % shape[1]
    return (line >= block.start) & (line < block.start + block.width)
