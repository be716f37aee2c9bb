"""What a layer keeps for each adapter, beside its parameter."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .biases import Biases
from .errors import AdapterFileError
from .geometry import Slice
from .journal import Journal
from .schedule import Schedule
from .window import Place
from .zero import is_spread

__all__ = [
    "AdapterState",
    "Frozen",
    "SampledEntry",
    "base_sample",
    "new_stamp",
    "read_sample",
    "same_base",
    "version_of",
]

_STAMPS = itertools.count(1)


def new_stamp() -> int:
    """A number that no weight's content had before in this process."""
    return next(_STAMPS)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; tensors made under ``torch.inference_mode`` do not count.

    Of what ZeRO's stage 3 spreads the pieces count, which all processes write at the same time, with numbers of their
    own: from the spreading on it is another version everywhere.
    """
    if is_spread(tensor):
        pieces = cast(Tensor, cast(Any, tensor).ds_tensor)
        return -1 - pieces._version
    return 0 if tensor.is_inference() else tensor._version


class SampledEntry(NamedTuple):
    """One value of a base model's weight; a few of them tell it from other models."""

    row: int
    column: int
    value: float


def base_sample(values: Tensor, block: Slice, fixed: Tensor | None = None, count: int = 8) -> list[SampledEntry]:
    """A few of a block's values, evenly spread, to six digits.

    Args:
        values: of the block, as lines; a row or column slice.
        block: where it is.
        fixed: entries that belong to others, who may have changed them; as lines.
        count: how many at most.

    Example:
        >>> base_sample(torch.arange(6.0).view(2, 3), Slice("row", 4, 2), count=2)
        [SampledEntry(row=4, column=0, value=0.0), SampledEntry(row=5, column=0, value=3.0)]
    """
    free = torch.ones_like(values, dtype=torch.bool) if fixed is None else ~fixed.to(values.device)
    places = free.nonzero()[:: max(1, int(free.sum()) // count)][:count]
    found = []
    for line, place in places.tolist():
        at = (block.start + line, place) if block.axis == "row" else (place, block.start + line)
        found.append(SampledEntry(*at, float(f"{float(values[line, place]):.6g}")))
    return found


def read_sample(facts: Mapping[str, Any], shape: tuple[int, int], layer: str) -> list[SampledEntry]:
    """What a file says of the base's values under one layer.

    Raises:
        AdapterFileError: if that makes no sense for a weight of ``shape``.
    """
    found = []
    try:
        for entry in facts.get("sample", ()):
            row, column, value = entry
            found.append(SampledEntry(int(row), int(column), float(value)))
    except (TypeError, ValueError, OverflowError) as error:
        raise AdapterFileError(f"{layer}: the file's sample of the base's weight is corrupt ({error}).") from error
    if not all(0 <= entry.row < shape[0] and 0 <= entry.column < shape[1] for entry in found):
        raise AdapterFileError(
            f"{layer}: the file's sample of the base's weight lies outside {shape}; it is corrupt, or of another base."
        )
    return found


def same_base(sample: Sequence[SampledEntry], found: Sequence[float]) -> bool:
    """Whether values are those of a sample, whatever their precision (bfloat16's rounding is let pass)."""
    scale = max((abs(entry.value) for entry in sample), default=0.0)
    return all(abs(entry.value - value) <= 0.01 * scale for entry, value in zip(sample, found, strict=True))


class Frozen(NamedTuple):
    """What is known of a weight with its originals in place: its `fingerprint`, and the precision that it was of.

    The fingerprint is None where none can be: of weights that others spread over processes, and of those that slices
    lie beside.
    """

    fingerprint: Tensor | None
    dtype: torch.dtype


class AdapterState:
    """State of one adapter on one layer, beside its parameter: schedule, journal, index, and what is in sync."""

    def __init__(self, schedule: Schedule, layer_name: str, history: int) -> None:
        self.schedule = schedule
        self.layer_name = layer_name
        self.journal = Journal(history)
        self.index = torch.empty(0, dtype=torch.int64, device="cpu")
        self.fixed: Tensor | None = (
            None  # entries of the parameter that belong to others (`SliceLayer.fixed_lines`), padded
        )
        self.crossings = 0  # how many those are
        self.others: list[Slice] | None = None  # where other runs train (`slices_of_others`)
        self.axis = ""  # of the active slice; asking the journal would recompile a compiled forward at each move
        self.stamp = new_stamp()
        # the parameter whose values the weight has, and its version; an identity number could be another's by now
        self.synced: tuple[weakref.ref[Tensor], int] | None = None
        self.base_version: tuple[weakref.ref[Tensor], int] | None = None  # the same of the base weight at that time
        self.views: tuple[Any, ...] = ()  # see `SliceLayer.write_views`
        self.previous: Tensor | None = None  # values before the next optimizer step, kept while an update is rewarmed
        self.file_cache: tuple[Any, dict[str, Tensor]] | None = None  # what a file gets, until the next write
        self.staged: dict[str, Tensor] = {}  # tensors of a file that were handed over but not installed yet
        self.layout: dict[str, tuple[int, ...]] = {}  # shapes that a file is known to bring
        self.sample: list[SampledEntry] = []  # of the base that a file's slices were trained on
        self.place: Place | None = None  # under a window of blocks; None: the layer always trains
        self.idle = False  # outside the window now: the forward attaches no slice
        self.below = False  # idle, and below the window: no gradient should come here
        self.mover: Any = None  # keeps the mover alive as long as the layer (see `slicefine.mover`)
        self.copied = False  # of another layer's state: DDP never brings it weights of its own
        self.deferred = False  # the base weight had no values yet (meta device) when the adapter was created
        self.biases: Biases | None = None  # trained whole beside the slices; one object for all layers of an adapter
        self.again: list[Slice] = []  # slices that were visited before another base weight came; empty: the first

    def forget(self) -> None:
        """Drop what was staged of a file, and what was announced of it."""
        self.staged, self.layout, self.sample = {}, {}, []

    def __getstate__(self) -> dict[str, Any]:
        # a view would be pickled with all of the weight under it; a copy has other parameters
        return self.__dict__ | {
            "views": (),
            "file_cache": None,
            "synced": None,
            "base_version": None,
            "copied": True,
        }

    def holds(self, parameter: Tensor) -> bool:
        """Whether the weight holds the values of a parameter that no engine spreads, as they are now."""
        if self.synced is None or self.synced[0]() is not parameter:
            return False
        return self.synced[1] == (0 if parameter.is_inference() else parameter._version)

    def mark_synced(self, parameter: Tensor) -> None:
        """Note that the weight holds the parameter's values as they are now."""
        self.synced = (weakref.ref(parameter), version_of(parameter))
        self.stamp = new_stamp()
        self.file_cache = None
