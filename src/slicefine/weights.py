"""Which layers SliceFine trains, and the weight of each as a matrix: ``(rows, columns)`` = (output units, inputs)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

__all__ = ["is_hidden", "is_transposed", "matrix_of", "supports"]


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
