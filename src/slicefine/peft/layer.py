"""The PEFT face of a sliced layer: PEFT's names and promises over `slicefine.layer.SliceLayer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..functional import write_block
from ..layer import SliceLayer
from ..quantised import Requantised, place_of
from ..schedule import Schedule

__all__ = ["ParamWrapper", "SliceFineLinear"]


# PEFT's "all-linear" finds layers that have adapters already by "Linear" in the name of their class
class SliceFineLinear(SliceLayer, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with SliceFine adapters, as PEFT's machinery expects it.

    The dense weight holds the active adapters' values and nothing else: disabled, unloaded or with another adapter
    active, the base weights read as the originals. Merging therefore changes no weight; it only stops training.
    Beside a quantised weight, too: only `merge_and_unload` writes to it, since quantising anew cannot be undone.
    """

    adapter_layer_names = ("slicefine_active",)
    other_param_names = ("states",)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        additive: bool | None = None,
        parameter_name: str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self._init_slices(base_layer, additive, parameter_name)
        self.lost: Requantised | None = None  # when a quantised weight took the slices in
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []

    def update_layer(
        self, adapter_name: str, schedule: Schedule, layer_name: str, history: int, init_weights: bool, inference: bool
    ) -> None:
        """Create an adapter; ``init_weights=False`` perturbs its first slice."""
        self.add_slice(adapter_name, schedule, layer_name, history)
        if not init_weights and not self.slicefine_active[adapter_name].is_meta:
            with torch.no_grad():
                block = self.block(adapter_name)
                block.add_(torch.randn_like(block) * 0.1 * block.std().clamp(min=0.05))
                self.slicefine_active[adapter_name].add_(0)  # a visible write: the journal takes the values over
            self.settle(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference)

    def _refresh(self) -> None:
        """Make the dense weight hold what PEFT's flags ask for."""
        if self.merged:
            self.apply_only(self.merged_adapters)
        else:
            self.apply_only([] if self.disable_adapters else self.active_adapters)
        self.follow_biases()

    def follow_biases(self) -> None:
        """Biases that an adapter trains beside its slices are applied, and want gradients, as the slices do."""
        asked = self.merged_adapters if self.merged else [] if self.disable_adapters else self.active_adapters
        for name, state in self.states.items():
            if state.biases is not None:
                trains = not self.merged and self.slicefine_active[name].requires_grad
                state.biases.follow(name in asked, name in asked and trains)

    # -- PEFT's switches ------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self._refresh()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self.follow_biases()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled and self.merged:
            self.unmerge()
        self._refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.states:
            self.apply_only([name for name in self.applied if name != adapter_name])
            biases = self.states[adapter_name].biases
            if biases is not None:
                biases.follow(applied=False, trains=False)
        super().delete_adapter(adapter_name)
        self._refresh()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight (they are: this fixes which ones, and stops training them)."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.states]
        for name in names if safe_merge else ():
            self.settle(name)
            values = [v for _, v in self.states[name].journal.trained(self.dense())] + [self.block(name)]
            biases = self.states[name].biases
            values += [] if biases is None else biases.values().values()
            if not all(bool(v.isfinite().all()) for v in values):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )  # PEFT's own words
        self.merged_adapters.extend(names)
        if names:
            self._refresh()

    def unmerge(self) -> None:
        """Take merged adapters out again; the originals return bit for bit."""
        if not self.merged:
            import warnings

            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        self._refresh()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with trained values (``merge``) or with its original weights, bit for bit."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        # an active adapter that was not asked for leaves with the wrapper
        self.apply_only(self.merged_adapters if merge else [])
        for name, state in self.states.items():
            if state.biases is not None:
                state.biases.follow(merge and name in self.merged_adapters, trains=False)
        self.lost = self.fold()
        self.unwrapped()
        if isinstance(self.base_layer, SliceFineLinear):
            return self.base_layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        for name, child in self.base_layer.named_children():
            if isinstance(child, SliceFineLinear):  # an attention module's own projection, whose path PEFT has lost
                plain = child.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
                setattr(self.base_layer, name, plain)
        return self.base_layer

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Dense ``trained - original`` of one adapter, shaped like the base layer's weight."""
        self.settle(adapter)
        with self.reverted() as weight:
            delta = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
            for block, values in self.deltas(adapter, weight):
                from ..functional import read_block

                write_block(delta, block, read_block(delta, block) + values)
        return self.kind.like_weight(delta, self.base_weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.kind.called

    # -- PEFT's casts and moves -----------------------------------------------------------------------------------

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """To the device only: the fp32 master over a half-precision base is on purpose (bf16 drops small updates)."""
        parameter = self.slicefine_active[adapter_name]
        target = device if device is not None else place_of(self.get_base_layer()).device
        if not parameter.is_meta and parameter.device != target:
            self.slicefine_active[adapter_name] = parameter.to(target)
        self.settle(adapter_name)

    def _trained(self, names: list[str]) -> list[str]:
        return [] if self.merged_adapters else super()._trained(names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs and kwargs.pop("adapter_names", None) is not None:
            raise UnsupportedError(
                "SliceFine: one batch with several adapters (adapter_names=...) is not possible, since all adapters "
                "share the dense weight. Run one batch per adapter with set_adapter, which is cheap."
            )
        if self.disable_adapters or (self.merged_adapters and self.packed is None):
            y = self.base_layer(*args, **kwargs)
            if self.kind.layout == "hidden":
                return y
            return self._projection_guarded(self._guarded(y, []))  # backward may come after a switch
        return super().forward(*args, **kwargs)

    def __repr__(self) -> str:
        return "slicefine." + super().__repr__()


class ParamWrapper(SliceFineLinear):
    """A module with slices of one of its parameters (``target_parameters``); PEFT knows such wrappers by this name."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str) -> None:
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name)
        self.parameter_name = parameter_name
