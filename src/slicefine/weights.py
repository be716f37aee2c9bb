"""Which layers SliceFine trains, and the weight of each as a matrix: ``(rows, columns)`` = (output units, inputs)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .errors import UnsupportedError

__all__ = ["is_hidden", "is_transposed", "matrix_of", "refuse_offloaded", "supports"]


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer keeps its weight as ``(in, out)``: transformers' ``Conv1D``."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def supports(layer: nn.Module) -> bool:
    """Whether a layer is a dense linear map with a floating-point matrix that can be trained in place."""
    weight = getattr(layer, "weight", None)
    linear = (isinstance(layer, nn.Linear) and not is_hidden(layer)) or is_transposed(layer)
    # a parametrised weight (weight norm, pruning) is computed anew by each forward: it is not a parameter
    return linear and isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.dim() == 2


def matrix_of(layer: nn.Module) -> Tensor:
    """A supported layer's weight as ``(out, in)``, sharing its storage."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator, union-attr]
    return weight.t() if is_transposed(layer) else weight


def is_hidden(layer: nn.Module) -> bool:
    """Whether a layer's weight is used without a call of the layer: the output projection in nn.MultiheadAttention."""
    return isinstance(layer, NonDynamicallyQuantizableLinear)


def refuse_offloaded(layer: nn.Module, where: str) -> None:
    """Raise `UnsupportedError` if accelerate keeps a layer's weight elsewhere and brings a copy for each forward.

    What a slice writes into such a copy is gone after the forward.
    """
    hook = getattr(layer, "_hf_hook", None)
    offloaded = any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))
    weight = getattr(layer, "weight", None)
    if offloaded and isinstance(weight, Tensor) and weight.is_meta:
        raise UnsupportedError(
            f"{where}: its weight is offloaded (a device_map with 'cpu' or 'disk', cpu_offload, disk_offload), so a "
            "slice of it cannot be trained or applied in place. Load the model without offloading, leave the layer out "
            "of target_modules, or merge the adapter into the base's files first (slicefine merge)."
        )
