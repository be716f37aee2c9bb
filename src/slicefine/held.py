"""A layer whose weight slices are taken from: which weight, its matrix wherever it lies, and the slices' parameters."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .errors import UnsupportedError
from .functional import (
    Matrix,
)
from .packed import PackedDelta
from .quantised import Requantised, format_of, place_of, prepare, release, requantise
from .sharded import ShardedMatrix, is_sharded, is_whole, put_whole, sharded_parameter, whole
from .state import AdapterState, Frozen
from .weights import TRAINABLE, Stack, kind_of, lies_beside, value_dtype
from .zero import check_spread, full_shape, has_master, is_spread, look_at, put_master

__all__ = ["HeldWeight"]


class HeldWeight(nn.Module):
    """A base layer with the weight that its slices are taken from, and one parameter per adapter.

    The weight may be one of several parameters, lie in another module, be spread over processes, or be quantised; all
    that is known here, and `dense` gives the matrix to read from and write to.
    """

    base_layer: nn.Module

    def _hold(self, base_layer: nn.Module, additive: bool | None = None, parameter_name: str | None = None) -> None:
        innermost: nn.Module = base_layer
        while isinstance(innermost, HeldWeight):  # another of the layer's parameters has slices
            innermost = innermost.base_layer
        for name, found in innermost.named_parameters(recurse=False):
            check_spread(found, f"{type(innermost).__name__}.{name}")
        kind = kind_of(innermost, parameter_name)
        additive = kind is not None and lies_beside(innermost, additive, type(innermost).__name__)
        if kind is None or (additive and not kind.called):
            raise UnsupportedError(
                f"SliceFine trains the weight of {'linear' if additive else TRAINABLE} layers"
                f"{' beside it (additive=True)' if additive else ''}, not {type(innermost)}"
                f"{'' if parameter_name is None else f', parameter {parameter_name!r}'}. Leave it out of "
                f"target_{'modules' if parameter_name is None else 'parameters'}."
            )
        self.kind = kind
        self.base_layer = base_layer
        self.base_weight.requires_grad_(False)
        prepare(base_layer)
        place = self.base_weight.device
        self.packed = PackedDelta(kind.shape(innermost), value_dtype(base_layer), place) if additive else None
        self.states: dict[str, AdapterState] = {}
        self._order: list[str] = []  # adapters in the order of their last application
        self.requested: list[str] | None = None  # adapters to apply as soon as a weight that is on its way is here
        self.arriving: dict[str, Tensor] = {}  # what the slices in that weight replaced, by adapter
        self.frozen: Frozen | None = None  # of the originals, since the first optimizer step
        self.slicefine_active = nn.ParameterDict()

    # -- the weight -----------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """How many layers with other parameters' slices lie between: a later adapter may put one there."""
        depth, layer = 0, self.base_layer
        while isinstance(layer, HeldWeight):
            depth, layer = depth + 1, layer.base_layer
        return depth

    @property
    def _owner(self) -> nn.Module:
        """The layer that has the weight: others of its parameters may have slices, too, in layers between."""
        layer: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]  # a short way: every forward asks
        while isinstance(layer, HeldWeight):
            layer = layer.base_layer
        return layer

    @property
    def base_weight(self) -> Tensor:
        """The base layer's own parameter (of some quantised formats: the tensor that says where they are)."""
        layer, kind = self._owner, self.kind
        return place_of(layer) if kind.layout == "quantised" else cast(Tensor, look_at(layer, kind.parameter))

    def dense(self) -> Matrix:
        """What slices are read from and written to: the weight as ``(out, in)``, or what lies beside it.

        The weight is detached from autograd's version counter.

        Writes through it go unseen by autograd on purpose: after `disable`, `enable` the content is back, bit for
        bit, and a backward may go on; `content` is what guards it.
        """
        return self._base_matrix() if self.packed is None else self.packed

    def _base_matrix(self) -> Matrix:
        stored = sharded_parameter(self._owner, self.kind.parameter)
        if stored is not None:
            self.check_spread(stored)
            return ShardedMatrix(stored, self.base_weight, self.transposed)
        weight = self.base_weight.data
        if self.kind.layout == "convolution" and not weight.is_contiguous():  # channels_last: flattened it is a copy
            return Stack(weight.view(*weight.shape[:2], -1))
        matrix = self.kind.matrix(weight)
        return Stack(matrix) if self.kind.stacked else matrix

    def check_spread(self, stored: Tensor | None = None) -> None:
        """Raise `UnsupportedError` for a weight that cannot be trained where an engine spreads it over processes.

        Args:
            stored: the weight, if it is known.
        """
        weight = self.base_weight if stored is None else stored
        if not is_sharded(weight):
            return
        check_spread(weight, self.label)
        looked_at = is_spread(weight) and not (self.kind.called or self.kind.layout == "embedding")
        if looked_at or self.kind.layout == "convolution" or self.kind.stacked:
            raise UnsupportedError(
                f"{self.label}: weights of convolutions and experts cannot be trained where FSDP2 or ZeRO stage 3 "
                "spreads them over processes, nor can those of packed attention at stage 3. Leave them out of the "
                "targets, or use DDP or ZeRO stage 2."
            )

    def parameter(self, name: str, shown: Tensor | None = None) -> Tensor:
        """Adapter ``name``'s parameter as optimizers hold it: under FSDP2 the sharded one, whatever forward sees."""
        shown = self.slicefine_active[name] if shown is None else shown
        stored = None if is_whole(shown) else sharded_parameter(self.slicefine_active, name)
        return shown if stored is None else stored

    def values(self, name: str) -> Tensor:
        """The values of adapter ``name``'s parameter: its own storage, or, if it is sharded, a gathered copy."""
        return whole([self.parameter(name)])[0]

    def room(self, name: str) -> torch.Size:
        """The shape of adapter ``name``'s parameter, whatever of it is here."""
        return full_shape(self.parameter(name))

    def put(self, name: str, values: Tensor, rounded: bool = False) -> None:
        """Overwrite adapter ``name``'s parameter, or this process's part of it.

        Args:
            name: the adapter.
            values: all of them.
            rounded: they are the parameter's (`values`), under which a master may hold more (`put_master`).
        """
        parameter = self.parameter(name)
        if is_sharded(parameter):
            put_whole(parameter, self.slicefine_active[name], values)
        elif values.data_ptr() != parameter.data_ptr():
            parameter.data.copy_(values)
        if has_master(parameter):
            put_master(parameter, values, rounded)

    @property
    def transposed(self) -> bool:
        """Whether the base keeps its weight as ``(in, out)``."""
        return self.kind.layout == "transposed"

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)`` = (output units, input features)."""
        return self.kind.shape(self._owner) if self.packed is None else (self.packed.shape[0], self.packed.shape[1])

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return cast("Tensor | None", getattr(self.base_layer, "bias", None))

    @property
    def in_features(self) -> int:
        """Input features, as ``nn.Linear`` names them."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Output units, as ``nn.Linear`` names them."""
        return self.shape[0]

    @property
    def applied(self) -> list[str]:
        """Adapters whose values the dense weight holds, in the order of application."""
        return [name for name in self._order if name in self.states and self.states[name].journal.applied]

    @property
    def content(self) -> int:
        """A number that names what the dense weight holds; equal numbers mean equal content."""
        applied = self.applied
        if len(applied) == 1:
            return self.states[applied[0]].stamp
        return hash(tuple([self.states[name].stamp for name in applied]))

    @property
    def label(self) -> str:
        """The layer's name, for messages."""
        return next((state.layer_name for state in self.states.values()), type(self.base_layer).__name__)

    def forget_frozen(self) -> None:
        """Whatever the weight holds now counts as the base's from the next optimizer step on (`slicefine.guards`)."""
        self.frozen = None
        for state in self.states.values():
            if state.mover is not None:
                state.mover.watching = False

    def fold(self, write: bool = True) -> Requantised | None:
        """Add what lies beside the weight to it; rounding makes this final.

        Args:
            write: False leaves everything as it is and only measures what that would cost.

        Returns:
            What a quantised weight lost in it; None for others.

        Raises:
            UnsupportedError: if the weight's format cannot be quantised anew, or if the weight is sharded.
        """
        if self.packed is None or self.packed.empty:
            return None
        lost = requantise(self.base_layer, self.packed, write) if self.quantised else None
        if write:
            if lost is None:
                base = self._base_matrix()
                if not isinstance(base, Tensor):
                    raise UnsupportedError(
                        f"{self.label}: its weight is spread over processes, so what lies beside it cannot be added to "
                        "it. Save the slices, load them in one process, and merge there."
                    )
                self.packed.add_to(base)
            self.packed.clear()
        return lost

    @property
    def quantised(self) -> bool:
        """Whether the base layer's weight is quantised."""
        return self.packed is not None and format_of(self.base_layer) is not None

    def check_fold(self) -> None:
        """Raise `UnsupportedError` if `fold` cannot write to the weight."""
        known = None if self.packed is None else format_of(self.base_layer)
        if known is not None:
            known.check(self.base_layer)

    def unwrapped(self) -> nn.Module:
        """The base layer, for a model that is to do without slices; see `apply_only` and `fold` for what it holds."""
        release(self.base_layer)
        return self.base_layer
