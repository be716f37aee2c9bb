"""Where the slice is and when it moves: pure functions of (visit, layer shape, layer name, seed).

Every process that knows the settings and the number of visits made computes the same slice, so nothing
has to be communicated between ranks and resuming needs only the journal (paper, Section 3, Algorithm 1).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import SupportsIndex

import torch

from .errors import ConfigError
from .geometry import AXES, Slice, block_count, block_start, touched
from .initial import START_VALUES

__all__ = [
    "MODES",
    "POLICIES",
    "POSITIONS",
    "Moves",
    "PositionMap",
    "Schedule",
    "check_positions",
    "given_starts",
    "own_starts",
    "slices_of_others",
    "plan_moves",
    "slice_at",
    "widened",
    "wrap_visit",
]

MODES = ("row", "column", "alternate", "random_mask")
POSITIONS = ("sweep", "random", "fixed")
POLICIES = ("reset", "rewarm", "keep")

# visit number, layer name, (rows, columns) -> the slice to train
PositionFunction = Callable[[int, str, tuple[int, int]], Slice]
# layer name -> {"row" or "column": starts in the order of their turn}; a layer or orientation that is left out sweeps
PositionMap = Mapping[str, Mapping[str, Sequence[int]]]
Positions = str | Sequence[int] | PositionMap | PositionFunction


@dataclass(frozen=True)
class Schedule:
    """Settings that decide which slice a layer trains at its n-th visit.

    Attributes:
        mode: ``"row"``, ``"column"``, ``"alternate"`` (a row block first, then a column block, and so on),
            or ``"random_mask"`` (Appendix K).
        row_rank, column_rank: slice rank r of each orientation.
        positions: ``"sweep"`` (index 0, stride = rank, wrap-around), ``"random"`` (seeded, covers everything
            before repeating), ``"fixed"`` (never changes place), a list of starts used in turn, a mapping
            ``{layer name: {"row" or "column": starts}}`` (what it leaves out sweeps), or a function
            ``(visit, layer name, shape) -> Slice``.
        mask_fraction: budget of the random mask as a fraction of the matrix; None means as many entries as a
            row slice of rank ``row_rank`` has.
        seed: seed of random positions and masks.
        reserve: ``{layer name: slices}`` that belong to others: positions keep away from their rows and columns, and
            entries where a row of one crosses a column of the other stay fixed.
        share: ``(i, n)``: this run takes the i-th of n parts of the positions (i from 0), the same for all of n runs.
        share_visits: visits that each of those runs makes at most; None: any number, for one orientation only.
        start_values: what a slice starts from when it is first visited: ``"pretrained"``, or, to study that,
            ``"zero"``, ``"xavier"``, ``"kaiming"`` or ``"lecun"`` (Appendix D.2).
        order_of: whose random order this layer takes; None means its own (`slicefine.coupling`).

    Example:
        >>> schedule = Schedule(mode="alternate", row_rank=5, column_rank=5)
        >>> [slice_at(schedule, visit, (64, 32)).axis for visit in range(3)]
        ['row', 'column', 'row']
    """

    mode: str = "alternate"
    row_rank: int = 12
    column_rank: int = 12
    positions: Positions = "sweep"
    mask_fraction: float | None = None
    seed: int = 0
    reserve: Mapping[str, Sequence[Slice]] = field(default_factory=dict)
    share: tuple[int, int] | None = None
    share_visits: int | None = None
    start_values: str = "pretrained"
    order_of: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode={self.mode!r} is unknown; expected one of {', '.join(MODES)}.")
        for name, rank in (("row", self.row_rank), ("column", self.column_rank)):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ConfigError(f"{name} rank r={rank!r} must be an integer of at least 1.")
        if isinstance(self.positions, str) and self.positions not in POSITIONS:
            raise ConfigError(
                f"positions={self.positions!r} is unknown; expected one of {', '.join(POSITIONS)}, "
                'a list of start indices, {layer: {"row" or "column": starts}}, or a function '
                "(visit, layer name, shape) -> Slice."
            )
        if isinstance(self.positions, Mapping):
            _check_map(self.positions)
        elif not isinstance(self.positions, str) and not callable(self.positions):
            _check_starts(self.positions)
        if self.mask_fraction is not None and not 0.0 < self.mask_fraction <= 1.0:
            raise ConfigError(f"mask_fraction={self.mask_fraction!r} must lie in (0, 1].")
        if self.start_values not in START_VALUES:
            raise ConfigError(
                f"start_values={self.start_values!r} is unknown; expected one of {', '.join(START_VALUES)}."
            )
        if self.start_values != "pretrained" and self.mode == "random_mask":
            raise ConfigError(f"start_values={self.start_values!r} is for slices; a random mask starts pretrained.")
        self._check_others()

    def _check_others(self) -> None:
        """Raise `ConfigError` where positions cannot be kept apart from those of other runs."""
        if not isinstance(self.reserve, Mapping) or not all(
            isinstance(blocks, Sequence) and all(isinstance(block, Slice) for block in blocks)
            for blocks in self.reserve.values()
        ):
            raise ConfigError(f"reserve={self.reserve!r}: expected {{layer name: [Slice(axis, start, width), ...]}}.")
        if self.mode == "random_mask" and (self.reserve or self.share is not None):
            raise ConfigError("mode='random_mask' draws entries all over the matrix; reserve= and share= need slices.")
        if self.share is None:
            return
        number, parts = self.share
        if not (isinstance(number, int) and isinstance(parts, int) and 0 <= number < parts):
            raise ConfigError(f"share={self.share!r}: expected (i, n) with 0 <= i < n: part i of n, counted from 0.")
        if callable(self.positions):
            raise ConfigError("share= divides positions of a list or a named order; a function has to do so by itself.")
        if self.mode == "alternate" and self.share_visits is None:
            raise ConfigError(
                "share= with mode='alternate' needs the number of visits, since rows of one run cross columns of the "
                "others: give moves=, or interval= with total_steps=; or use mode='row' or mode='column'."
            )

    def axis(self, visit: int) -> str:
        """Orientation of a visit: ``"row"``, ``"column"`` or ``"entries"``."""
        if self.mode == "alternate":
            return AXES[visit % 2]
        return "entries" if self.mode == "random_mask" else self.mode

    def rank(self, axis: str) -> int:
        """Configured rank of an orientation, before it is clamped to the matrix."""
        return self.column_rank if axis == "column" else self.row_rank

    def block_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape ``(lines, line length)`` of the one parameter that serves every visit to a matrix."""
        rows, columns = shape
        row = (min(self.row_rank, rows), columns)
        column = (min(self.column_rank, columns), rows)
        if self.mode == "random_mask":
            return (1, self.mask_count(shape))
        if self.mode == "alternate":
            return (max(row[0], column[0]), max(row[1], column[1]))
        return row if self.mode == "row" else column

    def clamped(self, shape: tuple[int, int]) -> tuple[str, int] | None:
        """Axis and size of a matrix of ``shape`` that the rank is too large for; None if it fits."""
        if self.mode == "random_mask":
            return None
        axes = AXES[:2] if self.mode == "alternate" else (self.mode,)
        return next(((a, shape[AXES.index(a)]) for a in axes if self.rank(a) > shape[AXES.index(a)]), None)

    def mask_count(self, shape: tuple[int, int]) -> int:
        """Number of entries of a random mask on a matrix of ``shape``."""
        total = shape[0] * shape[1]
        if self.mask_fraction is None:
            return min(self.row_rank * shape[1], total)
        return max(1, round(self.mask_fraction * total))


def widened(schedule: Schedule, unit: int, layer: str = "") -> Schedule:
    """The schedule of a layer in whose matrix ``unit`` columns belong to one input feature.

    Ranks and starts of columns count features in the settings, and columns in what comes out.

    Example:
        >>> slice_at(widened(Schedule("column", column_rank=2), 9), 1, (8, 27))
        Slice(axis='column', start=9, width=18)
    """
    positions = schedule.positions
    if not isinstance(positions, str) and not callable(positions):
        own = positions.get(layer, {}) if isinstance(positions, Mapping) else dict.fromkeys(AXES[:2], positions)
        positions = {layer: {a: [s * unit if a == "column" else s for s in starts] for a, starts in own.items()}}
    return replace(schedule, column_rank=schedule.column_rank * unit, positions=positions)


def slice_at(schedule: Schedule, visit: int, shape: tuple[int, int], layer: str = "") -> Slice:
    """The slice that a layer trains at its ``visit``-th position (0 is the first).

    Args:
        schedule: the settings.
        visit: how many moves were made before.
        shape: ``(rows, columns)`` of the weight matrix.
        layer: the layer's name, so that random positions differ between layers.

    Raises:
        ConfigError: if a user's list or function gives a slice outside the matrix.

    Example:
        >>> slice_at(Schedule(mode="row", row_rank=4), 2, (10, 8))
        Slice(axis='row', start=6, width=4)
    """
    axis = schedule.axis(visit)
    if axis == "entries":
        draw = 0 if schedule.positions == "fixed" else visit
        return Slice(axis, _seed(schedule.seed, layer, draw), schedule.mask_count(shape))
    if callable(schedule.positions):
        chosen = schedule.positions(visit, layer, shape)
        if not isinstance(chosen, Slice):
            raise ConfigError(
                f"positions function, layer {layer!r}, visit {visit}: it returned {chosen!r}; expected a "
                'slicefine.Slice, for example Slice("row", 0, 5).'
            )
        chosen.check(shape, f"positions function, layer {layer!r}, visit {visit}")
        return chosen
    size = shape[AXES.index(axis)]
    width = min(schedule.rank(axis), size)
    turn = visit // 2 if schedule.mode == "alternate" else visit  # each orientation has its own cycle
    if schedule.share is not None and schedule.share_visits is not None and visit >= schedule.share_visits:
        raise ConfigError(
            f"layer {layer!r}: share= was planned for {schedule.share_visits} visits per run; what comes after them "
            "may belong to another run. Plan more moves in all of them."
        )
    starts = own_starts(schedule, axis, shape, layer)
    cycle, number = divmod(turn, len(starts))
    if schedule.positions == "fixed":
        number = 0
    elif schedule.positions == "random":
        generator = torch.Generator().manual_seed(_seed(schedule.seed, schedule.order_of or layer + axis, cycle))
        number = int(torch.randperm(len(starts), generator=generator, device="cpu")[number])
    chosen = Slice(axis, int(starts[number]), width)
    chosen.check(shape, f"positions list, layer {layer!r}, visit {visit}")
    return chosen


def slices_of_others(schedule: Schedule, shape: tuple[int, int], layer: str = "") -> list[Slice]:
    """What is reserved of a layer, and where the other runs of a share will go: entries there must not change.

    Example:
        >>> slices_of_others(Schedule("row", 1, share=(0, 2)), (4, 3))
        [Slice(axis='row', start=1, width=1), Slice(axis='row', start=3, width=1)]
    """
    found = dict.fromkeys(schedule.reserve.get(layer, ()))
    if schedule.share is None:
        return list(found)
    own, parts = schedule.share
    # after one cycle of each orientation the same slices come again
    cycle = 2 * max(len(own_starts(schedule, axis, shape, layer)) + 1 for axis in {schedule.axis(0), schedule.axis(1)})
    planned = schedule.share_visits
    for number in range(parts):
        if number == own:
            continue
        other = replace(schedule, share=(number, parts))
        if planned is not None:
            found |= dict.fromkeys(slice_at(other, visit, shape, layer) for visit in range(min(planned, cycle)))
        else:  # one orientation: everything of theirs
            axis = schedule.axis(0)
            width = min(schedule.rank(axis), shape[AXES.index(axis)])
            found |= dict.fromkeys(Slice(axis, start, width) for start in own_starts(other, axis, shape, layer))
    return list(found)


def own_starts(schedule: Schedule, axis: str, shape: tuple[int, int], layer: str = "") -> Sequence[int]:
    """Starts of one orientation in the order of their turn: this run's part of them, away from reserved lines.

    Raises:
        ConfigError: if none is left.
    """
    size = shape[AXES.index(axis)]
    width = min(schedule.rank(axis), size)
    starts = given_starts(schedule, axis, layer)
    if starts is None:
        starts = [block_start(block, size, width) for block in range(block_count(size, width))]
    if schedule.share is None and not schedule.reserve:
        return starts
    taken = set(touched(list(schedule.reserve.get(layer, ())), axis))
    free = [start for start in starts if taken.isdisjoint(range(int(start), int(start) + width))]
    number, parts = (0, 1) if schedule.share is None else schedule.share
    if len(free) <= number:
        raise ConfigError(
            f"layer {layer!r}: reserve= leaves {len(free)} of {len(starts)} positions of {width} {axis}s, too few for "
            f"part {number} of {parts}. Lower the rank, or leave the layer out (exclude_modules)."
        )
    return free[number::parts]


def given_starts(schedule: Schedule, axis: str, layer: str = "") -> Sequence[int] | None:
    """The user's own starts of one orientation of a layer; None where a named order or a function decides."""
    positions = schedule.positions
    if isinstance(positions, str) or callable(positions):
        return None
    return positions.get(layer, {}).get(axis) if isinstance(positions, Mapping) else positions


def check_positions(schedule: Schedule, shape: tuple[int, int], layer: str = "") -> None:
    """Raise `ConfigError` if a start in the user's list lies outside the matrix: at once, not when its turn comes."""
    for block in schedule.reserve.get(layer, ()):
        block.check(shape, f"reserve, layer {layer!r}")
    for axis in {schedule.axis(0), schedule.axis(1)} - {"entries"} if not callable(schedule.positions) else ():
        width = min(schedule.rank(axis), shape[AXES.index(axis)])
        for start in given_starts(schedule, axis, layer) or ():
            Slice(axis, int(start), width).check(shape, f"positions list, layer {layer!r}")
        own_starts(schedule, axis, shape, layer)


def wrap_visit(schedule: Schedule, shape: tuple[int, int], layer: str = "") -> int | None:
    """First visit at which a sweep returns to lines that it trained before; None if it never does."""
    if schedule.positions not in ("sweep", "random") or schedule.mode == "random_mask":
        return None
    axes = AXES[:2] if schedule.mode == "alternate" else (schedule.mode,)
    counts = {axis: len(own_starts(schedule, axis, shape, layer)) for axis in axes}
    if schedule.mode == "alternate":
        return min(2 * counts["row"], 2 * counts["column"] + 1)
    return counts[schedule.mode]


@dataclass(frozen=True)
class Moves:
    """When to move: after steps ``interval``, ``2 * interval``, ... at most ``limit`` times (None: no limit)."""

    interval: int | None
    limit: int | None = None

    def due(self, step: int, made: int) -> bool:
        """Whether a move follows optimizer step number ``step`` (1 is the first), ``made`` moves after the start."""
        if self.interval is None or step < 1 or step % self.interval:
            return False
        return self.limit is None or made < self.limit


def plan_moves(moves: int, total_steps: int, minimum: int = 50) -> Moves:
    """Spread ``moves`` evenly over a run, fewer if a position would get less than ``minimum`` steps.

    The paper's fixed N=500 gives no move at all on tasks of a few hundred steps; a number of moves adapts.

    Example:
        >>> plan_moves(8, 900)
        Moves(interval=100, limit=8)
        >>> plan_moves(8, 200)
        Moves(interval=50, limit=3)
    """
    positions = max(1, min(moves + 1, total_steps // max(1, minimum)))
    if positions == 1:
        return Moves(None, 0)
    return Moves(total_steps // positions, positions - 1)


def _check_map(positions: PositionMap) -> None:
    for layer, orders in positions.items():
        if not isinstance(orders, Mapping) or not set(orders) <= set(AXES):
            raise ConfigError(f'positions[{layer!r}]={orders!r}: expected {{"row" or "column": start indices}}.')
        for starts in orders.values():
            _check_starts(starts)


def _check_starts(starts: object) -> None:
    if not isinstance(starts, Sequence) or not all(isinstance(start, SupportsIndex) for start in starts):
        raise ConfigError(f"positions={starts!r}: expected a name, a function, or a list of integer start indices.")
    if len(starts) == 0:
        raise ConfigError("positions=[] is an empty list; give at least one start index.")


def _seed(seed: int, layer: str, number: int) -> int:
    """A 63-bit seed from a run's seed, a layer's name and a counter (stable across processes)."""
    low = zlib.crc32(f"{seed}/{layer}/{number}".encode())
    high = zlib.crc32(f"{number}/{layer}/{seed}".encode()[::-1])
    return (high << 31 ^ low) & (2**63 - 1)
