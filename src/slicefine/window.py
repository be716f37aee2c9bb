"""Which blocks of a model train: a moving window of consecutive ones, so that backward stops at its lower edge.

A layer outside the window attaches no slice to the graph. Where nothing below the window needs a gradient, autograd
neither differentiates the blocks there nor keeps their activations, which a frozen model under gradients has to do
for all layers. Pure functions of (visit, number of blocks, seed); block 0 is the lowest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .errors import ConfigError
from .geometry import block_count, block_start

__all__ = ["DWELLS", "ORDERS", "Place", "Window", "block_numbers", "block_paths", "make_window", "places"]

ORDERS = ("top-down", "bottom-up", "random", "fixed")
DWELLS = ("uniform", "top-heavy")
_CONTAINER = 0.6  # an index that more than this share of the layers have tells no blocks apart


@dataclass(frozen=True)
class Window:
    """A group of consecutive blocks that moves together with the slices: visit by visit.

    Attributes:
        size: blocks in the window: a number, or (a float) a share of all blocks.
        order: ``"top-down"``, ``"bottom-up"``, ``"random"`` (seeded, all windows before one repeats) or ``"fixed"``
            (the top window stays). The lowest window is moved up so that it keeps its full size.
        dwell: how many visits in a row a window gets: ``"uniform"`` (one), ``"top-heavy"`` (as many as there are
            windows for the top one, one less for each below it), or numbers, the top window's first.
        seed: of the random order.

    Raises:
        ConfigError: for a size, order or dwell that is unknown or out of range.

    Example:
        >>> [Window(0.5).at(visit, 6) for visit in range(3)]
        [range(3, 6), range(0, 3), range(3, 6)]
    """

    size: int | float
    order: str = "top-down"
    dwell: str | tuple[int, ...] = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        share = isinstance(self.size, float)
        if isinstance(self.size, bool) or not isinstance(self.size, (int, float)) or not self.size > 0:
            raise ConfigError(f"window={self.size!r} must be a number of blocks (3) or a share of them (0.5).")
        if share and self.size > 1:
            raise ConfigError(f"window={self.size!r} is a share and must lie in (0, 1]; a number of blocks is an int.")
        if self.order not in ORDERS:
            raise ConfigError(f"window_order={self.order!r} is unknown; expected one of {', '.join(ORDERS)}.")
        if isinstance(self.dwell, str):
            if self.dwell not in DWELLS:
                raise ConfigError(
                    f"window_dwell={self.dwell!r} is unknown; expected one of {', '.join(DWELLS)}, or one number of "
                    "visits per window."
                )
        elif not self.dwell or not all(type(visits) is int and visits > 0 for visits in self.dwell):
            raise ConfigError(f"window_dwell={self.dwell!r}: every window needs a number of visits of at least 1.")

    def width(self, count: int) -> int:
        """Blocks in a window of a model that has ``count``."""
        size = max(1, round(self.size * count)) if isinstance(self.size, float) else self.size
        return min(size, count)

    def windows(self, count: int) -> list[range]:
        """The distinct windows of a model with ``count`` blocks, the top one first."""
        width = self.width(count)
        starts = [block_start(i, count, width) for i in range(block_count(count, width))]
        return [range(count - start - width, count - start) for start in starts][: 1 if self.order == "fixed" else None]

    def check(self, count: int) -> None:
        """Raise `ConfigError` unless ``dwell`` names one number per window of a model with ``count`` blocks."""
        number = len(self.windows(count))
        if not isinstance(self.dwell, str) and len(self.dwell) != number:
            raise ConfigError(
                f"window_dwell={self.dwell!r} has {len(self.dwell)} numbers, but {count} blocks make {number} windows "
                f"of {self.width(count)}; give one number per window, the top one's first."
            )

    def at(self, visit: int, count: int) -> range:
        """The blocks that train at a visit (0 is the first)."""
        windows = self.windows(count)
        visits = self._visits(len(windows))
        cycle, place = divmod(visit, sum(visits))
        for number in self._sequence(len(windows), cycle):
            place -= visits[number]
            if place < 0:
                break
        return windows[number]

    def cycle(self, count: int) -> int:
        """Visits after which the windows begin again."""
        return sum(self._visits(len(self.windows(count))))

    def _visits(self, number: int) -> Sequence[int]:
        if self.dwell == "uniform":
            return [1] * number
        return range(number, 0, -1) if isinstance(self.dwell, str) else self.dwell

    def _sequence(self, number: int, cycle: int) -> Sequence[int]:
        if self.order == "random":
            generator = torch.Generator().manual_seed((self.seed << 20) + cycle)
            order: list[int] = torch.randperm(number, generator=generator, device="cpu").tolist()
            return order
        return range(number - 1, -1, -1) if self.order == "bottom-up" else range(number)


def make_window(size: int | float | None, order: str, dwell: str | Sequence[int], seed: int) -> Window | None:
    """The window that flat settings ask for; None without a size."""
    if size is not None:
        return Window(size, order, dwell if isinstance(dwell, str) else tuple(dwell), seed)
    if order != "top-down" or dwell != "uniform":
        raise ConfigError("window_order and window_dwell need window=: how many blocks train at a time.")
    return None


@dataclass(frozen=True)
class Place:
    """Where one layer stands: block number ``block`` of ``count``, under a window.

    Example:
        >>> place = Place(Window(1), block=0, count=2)
        >>> [place.trains(visit) for visit in range(4)], place.turn(3)
        ([False, True, False, True], 1)
    """

    window: Window
    block: int
    count: int

    def trains(self, visit: int) -> bool:
        """Whether the layer is in the window at a visit."""
        return self.block in self.window.at(visit, self.count)

    def below(self, visit: int) -> bool:
        """Whether the layer lies below the window at a visit."""
        return self.block < self.window.at(visit, self.count).start

    def turn(self, visit: int) -> int:
        """How many visits before this one had the layer in the window: the number of the layer's own position."""
        return sum(self.trains(earlier) for earlier in range(visit))


def block_numbers(names: Iterable[str]) -> dict[str, int]:
    """The block of each layer, by a number in its name, counted in the order in which the names come.

    It is the outermost number that tells layers apart: one of which a single value holds most of the layers belongs
    to a container (``Sequential(encoder, head)``), and the next one counts. A layer without a number belongs to the
    block before it (a head), or to the first one (an embedding's projection).

    Raises:
        ConfigError: if no name has a number: then there is nothing to move a window over.

    Example:
        >>> block_numbers(["project", "layer.0.up", "layer.0.down", "layer.1.up", "head"])
        {'project': 0, 'layer.0.up': 0, 'layer.0.down': 0, 'layer.1.up': 1, 'head': 1}
    """
    return _blocks(list(names))[0]


def block_paths(names: Iterable[str]) -> list[str]:
    """Full names of the modules that hold one block each, in the order in which they come.

    Raises:
        ConfigError: if no name has a number.

    Example:
        >>> block_paths(["project", "layer.0.up", "layer.0.down", "layer.1.up", "head"])
        ['layer.0', 'layer.1']
    """
    return _blocks(list(names))[1]


def _blocks(names: list[str]) -> tuple[dict[str, int], list[str]]:
    """Number of each layer's block, and the paths of the blocks."""
    parts = {name: name.split(".") for name in names}
    # the paths up to a number, outermost first
    paths = {name: [tuple(p[: i + 1]) for i, part in enumerate(p) if part.isdigit()] for name, p in parts.items()}
    if not any(paths.values()):
        raise ConfigError(
            f"window: none of the layers ({', '.join(names[:3])}, ...) has a number in its name, so the model has no "
            "blocks to move a window over; leave window out."
        )
    members = Counter(path for own in paths.values() for path in own)
    siblings = Counter(path[:-1] for own in paths.values() for path in own)
    found: dict[tuple[str, ...], int] = {}
    result: dict[str, int] = {}
    for name in names:
        telling = [path for path in paths[name] if members[path] <= _CONTAINER * siblings[path[:-1]]]
        path = next(iter(telling or paths[name]), None)
        if path is not None:
            found.setdefault(path, len(found))
        result[name] = max(0, len(found) - 1) if path is None else found[path]
    return result, [".".join(path) for path in found]


def places(window: Window, names: Iterable[str]) -> dict[str, Place]:
    """Where each layer stands under a window.

    Raises:
        ConfigError: if the names have no numbers, or the window's dwell does not fit their number of blocks.
    """
    numbers = block_numbers(names)
    count = max(numbers.values()) + 1
    window.check(count)
    return {name: Place(window, number, count) for name, number in numbers.items()}
