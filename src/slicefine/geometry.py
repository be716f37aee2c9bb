"""Slices of a matrix as integers: which rows, columns or entries, and where they meet.

A weight matrix has shape ``(rows, columns) = (output units, input features)``; "row" always means
an output unit. A block of values is stored as *lines*: line ``i`` of a row slice is its ``i``-th row
(length ``columns``), line ``i`` of a column slice is its ``i``-th column (length ``rows``).
No function here touches a weight (paper, Section 1, "Terminology").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from .errors import ConfigError

__all__ = [
    "AXES",
    "Slice",
    "block_count",
    "block_start",
    "covered",
    "entry_indices",
    "line_count",
    "line_length",
    "shared_entries",
    "touched",
]

AXES = ("row", "column", "entries")


class Slice(NamedTuple):
    """Contiguous rows or columns of a matrix, or a seeded draw of single entries.

    Attributes:
        axis: ``"row"``, ``"column"`` or ``"entries"`` (Appendix K's unstructured mask).
        start: index of the first row or column; for ``"entries"`` the seed of the draw.
        width: number of rows, columns or entries (the slice rank r).

    Example:
        >>> Slice("row", 4, 2).indices()
        range(4, 6)
    """

    axis: str
    start: int
    width: int

    def indices(self) -> range:
        """Rows or columns that a row or column slice covers."""
        return range(self.start, self.start + self.width)

    def check(self, shape: tuple[int, int], where: str) -> None:
        """Raise `ConfigError` unless the slice lies inside a matrix of ``shape``."""
        if self.axis not in AXES:
            raise ConfigError(f"{where}: unknown axis {self.axis!r}; expected one of {', '.join(AXES)}.")
        size = shape[0] * shape[1] if self.axis == "entries" else shape[AXES.index(self.axis)]
        start = 0 if self.axis == "entries" else self.start
        if self.width < 1 or start < 0 or start + self.width > size:
            raise ConfigError(
                f"{where}: {self.axis} slice of width {self.width} at {self.start} does not fit a matrix of shape "
                f"{tuple(shape)}; choose 0 <= start and start + width <= {size}."
            )


def line_length(axis: str, shape: tuple[int, int]) -> int:
    """Length of one line of a slice: columns for a row, rows for a column, 1 for entries."""
    return {"row": shape[1], "column": shape[0], "entries": 1}[axis]


def block_count(size: int, width: int) -> int:
    """Number of positions that cover ``size`` lines with blocks of ``width`` (the last one clamped).

    Example:
        >>> block_count(10, 4)
        3
    """
    return -(-size // width)


def block_start(block: int, size: int, width: int) -> int:
    """First line of block number ``block``; the last block is clamped so that it keeps its full width.

    Example:
        >>> [block_start(i, 10, 4) for i in range(3)]
        [0, 4, 6]
    """
    return min(block * width, size - width)


def entry_indices(draw: Slice, shape: tuple[int, int]) -> torch.Tensor:
    """Flat row-major indices of an ``"entries"`` slice: a pure function of the draw's seed and the shape.

    Uniform without replacement (Appendix K), sorted, int64, on the CPU.
    """
    total = shape[0] * shape[1]
    generator = torch.Generator().manual_seed(draw.start)
    if draw.width > total // 2:  # the dense draw: cheaper to permute everything
        return torch.randperm(total, generator=generator, device="cpu")[: draw.width].sort().values
    found = torch.empty(0, dtype=torch.int64, device="cpu")
    while found.numel() < draw.width:
        missing = draw.width - found.numel()
        more = torch.randint(total, (missing + missing // 8 + 16,), generator=generator, device="cpu")
        found = torch.unique(torch.cat([found, more]))
    keep = torch.randperm(found.numel(), generator=generator, device="cpu")[: draw.width]
    return found[keep.sort().values]


def touched(slices: list[Slice], axis: str) -> list[int]:
    """Sorted distinct rows (or columns) that the slices of one axis cover."""
    return sorted({i for s in slices if s.axis == axis for i in s.indices()})


def line_count(slices: Iterable[Slice], axis: str) -> int:
    """How many distinct rows (or columns) the slices of one axis cover, without listing them.

    Example:
        >>> line_count([Slice("row", 0, 3), Slice("row", 2, 2), Slice("column", 0, 9)], "row")
        4
    """
    count, reached = 0, 0
    for start, end in sorted((s.start, s.start + s.width) for s in slices if s.axis == axis):
        count += max(0, end - max(start, reached))
        reached = max(reached, end)
    return count


def shared_entries(a: Slice, b: Slice) -> tuple[slice, slice] | None:
    """Part of block ``a`` (as lines, positions along each line) that block ``b`` covers too, or None.

    Row and column blocks of one matrix always cross; blocks of one axis meet only where they overlap.

    Example:
        >>> shared_entries(Slice("row", 2, 2), Slice("column", 5, 1))
        (slice(None, None, None), slice(5, 6, None))
    """
    if a.axis != b.axis:
        return slice(None), slice(b.start, b.start + b.width)
    low, high = max(a.start, b.start), min(a.start + a.width, b.start + b.width)
    return (slice(low - a.start, high - a.start), slice(None)) if low < high else None


def covered(block: Slice, others: Iterable[Slice], shape: tuple[int, int]) -> torch.Tensor:
    """Which entries of a block other slices cover, too: bool, as lines ``(width, line length)``.

    Example:
        >>> covered(Slice("row", 2, 2), [Slice("column", 1, 1)], (4, 3))
        tensor([[False,  True, False],
                [False,  True, False]])
    """
    if block.axis == "entries":
        own = entry_indices(block, shape)
        found = torch.zeros(len(own), dtype=torch.bool, device="cpu")
        for other in others:
            found |= _inside(own, other, shape)
        return found.unsqueeze(0)
    found = torch.zeros(block.width, line_length(block.axis, shape), dtype=torch.bool, device="cpu")
    for other in others:
        if other.axis == "entries":
            indices = entry_indices(other, shape)
            indices = indices[_inside(indices, block, shape)]
            rows, columns = indices // shape[1], indices % shape[1]
            line, place = (rows, columns) if block.axis == "row" else (columns, rows)
            found[line - block.start, place] = True
        else:
            part = shared_entries(block, other)
            if part is not None:
                found[part] = True
    return found


def _inside(indices: torch.Tensor, block: Slice, shape: tuple[int, int]) -> torch.Tensor:
    """Which flat indices lie in a slice."""
    if block.axis == "entries":
        return torch.isin(indices, entry_indices(block, shape))
    line = indices // shape[1] if block.axis == "row" else indices % shape[1]
    return (line >= block.start) & (line < block.start + block.width)
