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
from .geometry import AXES, Slice, covered

__all__ = ["Journal", "Visit", "history_count", "kept_counts", "read_table", "split_history", "visit_table"]


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
        self.taken_back: list[Visit] = []  # by `undo`: nothing else says that their slices changed again
        self.loaded = False  # from a file, since when nobody asked for everything: a receiver may hold another run's
        self._originals: dict[Slice, Tensor] = {}
        self._trained: dict[Slice, Tensor] = {}
        # of the last visits: the whole block's values as lines, or, from a file, those of entries trained before (1-D)
        self._before: deque[Tensor] = deque(maxlen=history)

    @property
    def active(self) -> Slice:
        """The slice that is, or was last, in training."""
        return self.visits[-1].slice

    @property
    def reach(self) -> int:
        """How many of the last visits can be undone at most."""
        return self._before.maxlen or 0

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

    def renew(self, weight: Matrix) -> None:
        """Take what the first slice replaced from the weight again, as long as no step changed it.

        For whoever gets other weights after the slice was made: ranks to which DDP broadcasts those of rank 0.
        """
        if len(self.visits) == 1 and self.step == 0:
            block = self.visits[0].slice
            self._originals[block] = kept = read_block(weight, block).to("cpu", copy=True)
            self._before.clear()
            self._before.append(kept)

    def count_step(self) -> None:
        """Note that one optimizer step trained the active slice."""
        block, first, last = self.visits[-1]
        self.visits[-1] = Visit(block, first, last + 1)

    def check_undo(self, moves: int = 1) -> None:
        """Raise `UnsupportedError` unless the last ``moves`` visits can be taken back; see `undo`."""
        if not self.applied:
            raise UnsupportedError("undo: the slices are not in the weight now; activate the adapter first.")
        if len(self.visits) == 1:
            raise UnsupportedError("undo: no slice has moved yet, and the first visit has nothing before it.")
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
        self._write_before(weight)
        last = self.visits.pop()
        self.taken_back.append(last)
        self._before.pop()
        if last.slice not in self.slices():
            self._originals.pop(last.slice)
        now = self.visits[-1]
        fresh = now.last_step < now.first_step
        if fresh and self._before and self._before[-1].dim() == 1:  # it may get steps, and a file has nothing of it
            self._before[-1] = read_block(weight, now.slice).cpu()

    def check_restart(self) -> None:
        """Raise `UnsupportedError` unless the current visit can begin again; see `restart`."""
        if not self.applied:
            raise UnsupportedError("restart: the slices are not in the weight now; activate the adapter first.")
        if not self._before:
            raise UnsupportedError(
                "restart: the history does not hold the values from before this visit (history=0, or visits were "
                "undone as far as it reaches). Raise `history` before training."
            )

    def restart(self, weight: Matrix) -> None:
        """Take back what the current visit trained: the weight reads as it did when it began, and it has no steps.

        Raises:
            UnsupportedError: as `undo`.
        """
        self.check_restart()
        last = self.visits[-1]
        self._before[-1] = self._write_before(weight)
        self.taken_back.append(last)
        self.visits[-1] = Visit(last.slice, last.first_step, last.first_step - 1)

    def _write_before(self, weight: Matrix) -> Tensor:
        """Write what stood in the last visit's slice before that visit."""
        last, before = self.visits[-1], self._before[-1]
        if before.dim() == 1:
            earlier = list(dict.fromkeys(visit.slice for visit in self.visits[:-1]))
            before = self._whole(last, before, earlier, weight).cpu()
        write_block(weight, last.slice, before)
        return before

    def _whole(self, visit: Visit, packed: Tensor, earlier: list[Slice], weight: Matrix) -> Tensor:
        """A block's values from before a visit: `history`'s, and the originals where nothing was trained before."""
        if visit.last_step < visit.first_step:
            return read_block(weight, visit.slice)  # no step changed anything
        values = self._originals[visit.slice].clone()
        values[covered(visit.slice, earlier, (weight.shape[0], weight.shape[1]))] = packed.cpu().to(values.dtype)
        return values

    # -- swapping -------------------------------------------------------------------------------------------------

    def apply(self, weight: Matrix) -> None:
        """Write the trained values into the weight and keep what stood there."""
        if self.applied:
            return
        for block, values in self._trained.items():
            self._originals[block] = read_block(weight, block).cpu()
            write_block(weight, block, values)
        if self._before and self._originals:  # some of a file's came in the master's precision
            dtype = self._originals[self.active].dtype
            self._before = deque((values.to(dtype) for values in self._before), self.reach)
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
            earlier = [other for other, _ in result]
            delta[covered(block, earlier, (weight.shape[0], weight.shape[1])).to(delta.device)] = 0
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

    def history(self, shape: tuple[int, int]) -> list[Tensor | None]:
        """For each visit what `undo` needs beside the originals: values, from before it, of entries trained earlier.

        1-D each, line by line; empty for a visit without steps; None where the history does not reach.

        Args:
            shape: of the matrix.
        """
        result: list[Tensor | None] = [None] * len(self.visits)
        first = len(self.visits) - len(self._before)
        for i, before in enumerate(self._before, start=first):
            block, first_step, last_step = self.visits[i]
            if last_step < first_step:
                result[i] = before.new_empty(0)
            elif before.dim() == 1:
                result[i] = before
            else:
                earlier = dict.fromkeys(visit.slice for visit in self.visits[:i])
                result[i] = before[covered(block, earlier, shape)]
        return result

    def trained(self, weight: Matrix) -> list[tuple[Slice, Tensor]]:
        """``(slice, trained values)`` of every visited slice, from wherever they are now."""
        if self._trained:
            return list(self._trained.items())
        return [(block, read_block(weight, block)) for block in self._originals]

    def load(self, table: Tensor, trained: dict[Slice, Tensor], before: Tensor | None = None) -> None:
        """Replace the content of a reverted journal; call `apply` next.

        Args:
            table: the visits, see `visit_table`.
            trained: what stands in each visited slice, in the order of first visit.
            before: what `history` gave, in one piece.

        Raises:
            AdapterFileError: if the table's shape or a value in it makes no sense.
        """
        self.visits = read_table(table)
        self._trained = dict(trained)
        self._originals.clear()
        self._before.clear()
        self.applied = False
        self.loaded = True
        for part in reversed(split_history(table, before)):
            if part is None or len(self._before) == self.reach:  # the oldest are those to do without
                break
            self._before.appendleft(part.cpu())
        last = self.visits[-1]
        if self._before and last.last_step < last.first_step:  # it may still get steps
            self._before[-1] = self._trained[last.slice].cpu()


def visit_table(visits: Sequence[Visit], kept: Sequence[int] | None = None) -> Tensor:
    """Visits as an int64 tensor ``(visits, 6)``: axis, start, width, first step, last step, values in the history.

    Args:
        visits: in the order in which they were made.
        kept: number of values that the history holds for each, -1 where it does not reach; None: nowhere.
    """
    kept = [-1] * len(visits) if kept is None else kept
    rows = [
        [AXES.index(v.slice.axis), *v.slice[1:], v.first_step, v.last_step, count]
        for v, count in zip(visits, kept, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 6)


def read_table(table: Tensor) -> list[Visit]:
    """Parse a `visit_table` and check it: known axes, positive widths, no step range that ends before it begins.

    Raises:
        AdapterFileError: if its shape or a value in it makes no sense. Five columns, without history, are version 1.
    """
    if table.dim() != 2 or table.shape[1] not in (5, 6) or table.shape[0] < 1 or table.is_floating_point():
        raise AdapterFileError(
            f"journal: expected an integer tensor of shape (visits, 6), got {table.dtype} {tuple(table.shape)}; "
            "the adapter file is corrupt or was not written by slicefine."
        )
    visits: list[Visit] = []
    for entry in table.tolist():
        axis, start, width, first, last, *kept = entry
        bad = axis not in range(len(AXES)) or start < 0 or width < 1 or first < 1 or last < first - 1
        if bad or any(count < -1 for count in kept):
            raise AdapterFileError(f"journal: impossible entry {entry}; the file is corrupt.")
        visits.append(Visit(Slice(AXES[axis], start, width), first, last))
    return visits


def kept_counts(table: Tensor) -> list[int]:
    """For each visit the number of values that the history holds, -1 where it does not reach."""
    return [-1] * table.shape[0] if table.shape[1] == 5 else [int(count) for count in table[:, 5]]


def history_count(visits: Sequence[Visit], number: int, shape: tuple[int, int]) -> int:
    """How many values `Journal.history` holds for visit ``number`` (from 0): entries that earlier visits trained."""
    block, first_step, last_step = visits[number]
    if last_step < first_step:
        return 0
    return int(covered(block, dict.fromkeys(visit.slice for visit in visits[:number]), shape).sum())


def split_history(table: Tensor, before: Tensor | None) -> list[Tensor | None]:
    """`Journal.history` again, from its values in one piece."""
    counts = kept_counts(table)
    parts = iter(torch.split(torch.empty(0, device="cpu") if before is None else before, [c for c in counts if c >= 0]))
    return [None if count < 0 else next(parts) for count in counts]
