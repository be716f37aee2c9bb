"""A layer with a moving slice: its forward is the base layer's, its backward forms the active slice's gradient."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import _global_backward_hooks

from .adapters import SliceAdapters
from .errors import UnsupportedError
from .functional import (
    Active,
    guard_content,
    keep_input,
    track_kept,
    track_lookup,
    track_slice,
    track_weight,
)
from .nested import map_nested
from .packed import PackedDelta
from .quantised import dense_product
from .sharded import is_plain, refuse_engine
from .state import AdapterState
from .weights import refuse_offloaded

__all__ = ["SliceLayer"]


class SliceLayer(SliceAdapters):
    """A layer of whose weight one slice per adapter is trained in place.

    The dense weight always holds what the forward needs: the values of the applied adapters, or the originals.
    Forward runs the base layer itself. Of a linear layer or an embedding, backward forms the active slice's gradient
    only; of other kinds (`slicefine.weights`) the weight's gradient exists while this one layer's backward runs.

    Args:
        base_layer: the layer; its weight is frozen here.
        parameter_name: the weight, where the layer has several; None means its own (`slicefine.weights.kind_of`).
        additive: never write to that weight: what slices change lies beside it and is added to the output. Slices
            then hold differences from the base, which start at zero. None: where the weight is quantised.
    """

    def __init__(self, base_layer: nn.Module, additive: bool | None = None, parameter_name: str | None = None) -> None:
        super().__init__()
        self._init_slices(base_layer, additive, parameter_name)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for models that look at it (its dtype, its device), or use it without a call."""
        if self.kind.layout == "hidden":
            return self._tracked_weight()
        if self.kind.layout == "quantised":
            return cast(Tensor, self.base_layer.weight)
        return self._looked_at()

    def _looked_at(self) -> Tensor:
        """The base weight for whoever reads it without a call, as PyTorch's fused transformer layers do."""
        if not torch.compiler.is_compiling() and not self.base_weight.is_meta:
            for name in self.applied:
                if not self._in_sync(name):
                    self.settle(name)
        if self.kind.layout == "quantised":
            return self.base_weight
        return cast(Tensor, getattr(self._owner, self.kind.parameter))  # which DeepSpeed's stage 3 gathers

    def train(self, mode: bool = True) -> SliceLayer:
        """As of any module; what was written into the parameter comes into the weight, for compiled forwards, too."""
        self._looked_at()
        super().train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward; the gradient of the active slice is attached when one is wanted."""
        x: Any = args[0] if args else next(iter(kwargs.values()), None)  # other kinds may take anything, or nothing
        if getattr(x, "is_nested", False) and (self.kind.called or self.kind.layout == "embedding"):
            return map_nested(lambda flat: self.forward(flat), x, self.label)
        if not self.kind.called:
            return self._projection_guarded(self._forward_of_other_kinds(args, kwargs))
        compiling = torch.compiler.is_compiling()
        names = self.applied if compiling else self._checked()
        trained = self._trained(names)
        if not trained:
            return self._guarded(self._output(x, args, kwargs, names, compiling), names)
        state, parameter = self.states[trained[0]], self._shown(trained[0])
        if len(names) > 1:
            return self._refused(self._output(x, args, kwargs, names, compiling), parameter)
        kept = None if compiling else keep_input(parameter, x, state.index, state.axis)
        if kept is not None:
            y = self._output(x, args, kwargs, names, compiling)
            return track_kept(y, kept, state.axis, self, state.fixed)
        active = Active(parameter, state.index, state.axis, None if compiling else self, state.fixed)
        return self._output(x, args, kwargs, names, compiling, active)

    def _output(
        self, x: Tensor, args: Any, kwargs: Any, names: list[str], compiling: bool, active: Active | None = None
    ) -> Tensor:
        """The layer's output on ``x``, its first argument, with the lines beside its weight and a slice's gradient."""
        base: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        packed = self.packed
        if packed is None or not names:
            y = base(*args, **kwargs)
        else:
            alone = not compiling and len(args) + len(kwargs) == 1
            known = dense_product(base, x) if alone and torch.is_grad_enabled() else None
            if known is not None:
                return packed.multiply_sum(lambda: known.factor(base), x, base._parameters["bias"], active, known.keeps)
            y = self._beside(packed, x, args, kwargs)
        return y if active is None else track_slice(y, x, *active)

    def _shown(self, name: str) -> Tensor:
        """What the layer shows of adapter ``name``'s parameter, past the lookups of modules and their dictionaries."""
        parameters: dict[str, Any] = self._modules["slicefine_active"]._parameters  # type: ignore[union-attr]
        # not get(name): DeepSpeed's stage 3 gathers what is asked for this way
        shown: Tensor = parameters[name] if name in parameters else self.slicefine_active[name]
        return shown

    def _beside(self, packed: PackedDelta, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """The base layer's output and the product with the lines beside its weight."""

        def layer(x: Tensor) -> Tensor:
            own = kwargs if args else dict(zip(kwargs, (x, *list(kwargs.values())[1:]), strict=True))
            y: Tensor = self.base_layer(*((x, *args[1:]) if args else ()), **own)
            if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
                raise UnsupportedError(_no_gradient(self))
            return y

        return packed.add_to_layer(layer, x, shared=not torch.compiler.is_compiling() and _hooked(self.base_layer))

    def _trained(self, names: list[str]) -> list[str]:
        """Which of the applied adapters want a gradient now."""
        if not torch.is_grad_enabled():
            return []
        return [name for name in names if not self.states[name].idle and self._shown(name).requires_grad]

    def _guarded(self, y: Any, names: list[str]) -> Any:
        """An output that no slice is attached to: its input gradient still needs the forward's weight."""
        first = y[0] if isinstance(y, tuple) and y else y
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not getattr(first, "requires_grad", False):
            return y
        for name in names:
            if self.states[name].below and self.slicefine_active[name].requires_grad:
                _warn_below(self.states[name])
        guarded = guard_content(first, self)
        return (guarded, *y[1:]) if first is not y else guarded

    def _projection_guarded(self, y: Any) -> Any:
        """Packed attention's output, guarded for its output projection, whose weight is read without a call.

        One that trains has its guard with its gradient (`_tracked`).
        """
        inside = getattr(self.base_layer, "out_proj", None) if self.kind.layout == "packed" else None
        if not isinstance(inside, SliceLayer):
            return y
        names = inside.applied
        return y if inside._trained(names) else inside._guarded(y, names)

    def _refused(self, y: Tensor, parameter: Tensor) -> Tensor:
        refused = _RefuseBackward.apply(y, parameter, self.label)  # type: ignore[no-untyped-call]
        return cast(Tensor, refused)

    def _forward_of_other_kinds(self, args: Any, kwargs: Any) -> Any:
        """As `forward`, of layers whose output is not their input times a matrix."""
        if self.kind.layout == "hidden":  # whoever reads `weight` gets the slice's gradient with it
            return self.base_layer(*args, **kwargs)
        names = self.applied if torch.compiler.is_compiling() else self._checked()
        trained = self._trained(names)
        if not trained:
            return self._guarded(self.base_layer(*args, **kwargs), names)
        if type(self.base_layer) is nn.Embedding and len(names) == 1:
            return self._track_lookup(trained[0], self.base_layer, *args, **kwargs)
        name = f"{'base_layer.' * self.depth}{self.kind.parameter}"
        return functional_call(self.base_layer, {name: self._tracked(names, trained[0])}, args, kwargs)

    def _track_lookup(self, name: str, table: nn.Embedding, input: Tensor) -> Tensor:
        state = self.states[name]
        owner = None if torch.compiler.is_compiling() else self
        y: Tensor = table(input)
        return track_lookup(y, input, self.slicefine_active[name], state.index, state.axis, table, owner, state.fixed)

    def _tracked_weight(self) -> Tensor:
        """The base weight with the active slice's gradient attached, where one is wanted."""
        names = self.applied if torch.compiler.is_compiling() else self._checked()
        trained = self._trained(names)
        return self._tracked(names, trained[0]) if trained else self.base_weight

    def _tracked(self, names: list[str], trained: str) -> Tensor:
        state, parameter = self.states[trained], self.slicefine_active[trained]
        if len(names) > 1:
            return self._refused(self.base_weight, parameter)
        owner = None if torch.compiler.is_compiling() else self
        return track_weight(self.base_weight, parameter, state.index, state.axis, self.kind, owner, state.fixed)

    def __getattr__(self, name: str) -> Any:
        """What this layer has not is the base layer's: models look at their layers' attributes."""
        modules = self.__dict__.get("_modules", {})
        if name in modules:  # what a forward asks for, several times
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in modules:
                raise
            if name == self.__dict__["kind"].parameter and modules["base_layer"] is self._owner:
                return self._looked_at()
            return getattr(modules["base_layer"], name)

    def _checked(self) -> list[str]:
        """The applied adapters, once the weight holds what they ask for."""
        weight = self.base_weight
        if weight.is_meta:
            refuse_offloaded(self.base_layer, self.label)
        elif self.requested is not None:
            self.apply_only(self.requested)
        names = self.applied
        for name in names:
            state, shown = self.states[name], self._shown(name)
            plain = is_plain(shown)
            if torch.is_grad_enabled() and not (plain and self.packed is not None):  # quantised: a buffer
                refuse_engine([shown] if self.packed is not None else [weight, shown], self)
            if state.index.device != weight.device:  # fully_shard moves parameters by themselves
                self.aim(name)
            if state.staged or state.deferred or not ((plain and state.holds(shown)) or self._in_sync(name, shown)):
                self.settle(name)
            state.layout, state.sample = {}, []  # whoever runs the model has finished loading
        return names


def _hooked(module: nn.Module) -> bool:
    """Whether hooks are given the gradient of a module's input, which they may keep."""
    return bool(_global_backward_hooks) or any(inside._backward_hooks for inside in module.modules())


class _RefuseBackward(torch.autograd.Function):
    """Identity whose backward says that several adapters cannot be trained at once."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, parameter: Tensor, label: str) -> Tensor:
        ctx.label = label
        return y.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise UnsupportedError(
            f"{ctx.label}: several SliceFine adapters are active and one of them requires gradients. Their slices "
            "share one dense weight, so train one at a time: set_adapter(name), or set inference_mode on all of them."
        )


def _warn_below(state: AdapterState) -> None:
    """Once per run: a window saves time and memory only where nothing below it needs a gradient."""
    if not state.mover.warned_below:
        state.mover.warned_below = True
        warnings.warn(
            f"SliceFine: a gradient goes on below the window of blocks ({state.layer_name}), so it saves neither "
            "time nor memory. Something below requires one: trained embeddings or biases, modules_to_save, or "
            "inputs after enable_input_require_grads() (gradient checkpointing with use_reentrant=False does without).",
            UserWarning,
            stacklevel=4,
        )


def _no_gradient(layer: SliceLayer) -> str:
    kind = type(layer.base_layer).__name__
    return (
        f"{layer.label}: the base layer ({kind}) passes no gradient to its input, so nothing below it would learn. "
        "Quantise the model in a format that can be trained through (bitsandbytes, torchao weight-only, HQQ), or train "
        "the layers above this one only."
    )
