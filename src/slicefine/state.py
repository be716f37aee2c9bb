"""What a layer keeps for each adapter, and the modules through which its tensors enter and leave state dicts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .journal import Journal
from .schedule import Schedule
from .window import Place

__all__ = ["BESIDE", "ORIGINALS", "AdapterState", "AdapterTensors", "base_sample", "new_stamp", "same_base"]

# one more kind of tensor, for state dicts that hold whole weights; never in an adapter file
ORIGINALS = "originals"  # what the slices in the weight replaced
BESIDE = "beside"  # empty: says that the slices are differences beside the weight
_STAMPS = itertools.count(1)


def new_stamp() -> int:
    """A number that no weight's content had before in this process."""
    return next(_STAMPS)


def base_sample(values: Tensor, count: int = 8) -> list[float]:
    """A few of a block's values, evenly spread, to six digits: enough to tell one base model from another.

    Example:
        >>> base_sample(torch.arange(32.0).view(4, 8), count=4)
        [0.0, 8.0, 16.0, 24.0]
    """
    flat = values.reshape(-1).double()
    return [float(f"{value:.6g}") for value in flat[:: max(1, flat.numel() // count)][:count].tolist()]


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
        self.sample: list[float] = []  # of the base that a file's slices were trained on, see `base_sample`
        self.place: Place | None = None  # under a window of blocks; None: the layer always trains
        self.idle = False  # outside the window now: the forward attaches no slice
        self.below = False  # idle, and below the window: no gradient should come here
        self.mover: Any = None  # keeps the mover alive as long as the layer (see `slicefine.mover`)
        self.deferred = False  # the base weight had no values yet (meta device) when the adapter was created

    def forget(self) -> None:
        """Drop what was staged of a file, and what was announced of it."""
        self.staged, self.layout, self.sample = {}, {}, []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"views": ()}  # a view would be pickled with all of the weight under it

    def mark_synced(self, parameter: Tensor) -> None:
        """Note that the weight holds the parameter's values as they are now."""
        self.synced = (id(parameter), parameter._version)
        self.stamp = new_stamp()


class AdapterTensors(nn.Module):
    """Input and output of one kind of file tensor; shapes follow the run, so nothing is stored here."""

    def __init__(self, owner: Any, kind: str) -> None:
        super().__init__()
        object.__setattr__(self, "_owner", owner)  # not a child module: the owner contains this one
        self._kind = kind

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name in list(self._owner.states):
            tensor = self._owner.state_tensor(name, self._kind)
            if tensor is not None:
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in list(self._owner.states):
            if prefix + name in state_dict:
                self._owner.stage(name, self._kind, state_dict[prefix + name])

    def __getattr__(self, name: str) -> Any:
        owner = self.__dict__.get("_owner")
        if owner is not None and name in owner.states:
            return owner.state_tensor(name, self._kind)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in getattr(self.__dict__.get("_owner"), "states", {}):
            self._owner.stage(name, self._kind, value)
        else:
            super().__setattr__(name, value)
