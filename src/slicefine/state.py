"""What a layer keeps for each adapter, beside its parameter."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import AdapterFileError
from .geometry import Slice
from .journal import Journal
from .schedule import Schedule
from .window import Place

__all__ = ["NO_SAMPLE", "AdapterState", "BaseSample", "base_sample", "new_stamp", "read_sample", "same_base"]

_STAMPS = itertools.count(1)


def new_stamp() -> int:
    """A number that no weight's content had before in this process."""
    return next(_STAMPS)


class BaseSample(NamedTuple):
    """A few values of a base model's weight, which tell it from other models.

    Attributes:
        slice: where they are from; None where that is not known yet.
        values: see `base_sample`.
    """

    slice: Slice | None
    values: list[float]


NO_SAMPLE = BaseSample(None, [])


def base_sample(values: Tensor, count: int = 8) -> list[float]:
    """A few of a block's values, evenly spread, to six digits: enough to tell one base model from another.

    Example:
        >>> base_sample(torch.arange(32.0).view(4, 8), count=4)
        [0.0, 8.0, 16.0, 24.0]
    """
    flat = values.reshape(-1).double()
    return [float(f"{value:.6g}") for value in flat[:: max(1, flat.numel() // count)][:count].tolist()]


def read_sample(facts: Mapping[str, Any], shape: tuple[int, int], layer: str) -> BaseSample:
    """What a file says of the base's values under one layer.

    Raises:
        AdapterFileError: if that makes no sense for a weight of ``shape``.
    """
    try:
        values = [float(value) for value in facts.get("sample", ())]
        if "sampled" not in facts:  # version 1: of the first visited slice
            return BaseSample(None, values)
        axis, start, width = facts["sampled"]
        block = Slice(str(axis), int(start), int(width))
        block.check(shape, layer)
    except (TypeError, ValueError) as error:
        raise AdapterFileError(
            f"{layer}: what the adapter's file says of the base's weight makes no sense ({error}); it is corrupt."
        ) from error
    return BaseSample(block, values)


def same_base(wanted: Sequence[float], found: Sequence[float]) -> bool:
    """Whether two samples are of one base model, whatever its precision (bfloat16's rounding is let pass)."""
    scale = max(map(abs, wanted), default=0.0)
    return len(wanted) == len(found) and all(abs(a - b) <= 0.01 * scale for a, b in zip(wanted, found, strict=True))


class AdapterState:
    """State of one adapter on one layer, beside its parameter: schedule, journal, index, and what is in sync."""

    def __init__(self, schedule: Schedule, layer_name: str, history: int) -> None:
        self.schedule = schedule
        self.layer_name = layer_name
        self.journal = Journal(history)
        self.index = torch.empty(0, dtype=torch.int64)
        self.axis = ""  # of the active slice; asking the journal would recompile a compiled forward at each move
        self.stamp = new_stamp()
        self.synced: tuple[int, int] | None = None  # identity and version of the parameter whose values the weight has
        self.views: tuple[Any, ...] = ()  # see `SliceLinear.write_views`
        self.previous: Tensor | None = None  # values before the next optimizer step, kept while an update is rewarmed
        self.staged: dict[str, Tensor] = {}  # tensors of a file that were handed over but not installed yet
        self.layout: dict[str, tuple[int, ...]] = {}  # shapes that a file is known to bring
        self.sample = NO_SAMPLE  # of the base that a file's slices were trained on
        self.place: Place | None = None  # under a window of blocks; None: the layer always trains
        self.idle = False  # outside the window now: the forward attaches no slice
        self.below = False  # idle, and below the window: no gradient should come here
        self.mover: Any = None  # keeps the mover alive as long as the layer (see `slicefine.mover`)
        self.deferred = False  # the base weight had no values yet (meta device) when the adapter was created

    def forget(self) -> None:
        """Drop what was staged of a file, and what was announced of it."""
        self.staged, self.layout, self.sample = {}, {}, NO_SAMPLE

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"views": ()}  # a view would be pickled with all of the weight under it

    def mark_synced(self, parameter: Tensor) -> None:
        """Note that the weight holds the parameter's values as they are now."""
        self.synced = (id(parameter), parameter._version)
        self.stamp = new_stamp()
