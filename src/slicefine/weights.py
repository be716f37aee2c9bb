"""Which layers SliceFine trains, and the weight of each as a matrix: ``(rows, columns)`` = (output units, inputs)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .errors import ConfigError
from .quantised import format_of

__all__ = [
    "is_hidden",
    "is_transposed",
    "lies_beside",
    "matrix_of",
    "shape_of",
    "supports",
    "trains",
    "value_dtype",
]


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer keeps its weight as ``(in, out)``: transformers' ``Conv1D``."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def supports(layer: nn.Module) -> bool:
    """Whether a layer is a dense linear map with a floating-point matrix that can be trained in place."""
    weight = getattr(layer, "weight", None)
    linear = (isinstance(layer, nn.Linear) and not is_hidden(layer)) or is_transposed(layer)
    # a parametrised weight (weight norm, pruning) is computed anew by each forward: it is not a parameter
    plain = linear and isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.dim() == 2
    return plain and format_of(layer) is None


def trains(layer: nn.Module) -> bool:
    """Whether slices of a layer can be trained: in its weight (`supports`), or beside a quantised one."""
    return supports(layer) or (format_of(layer) is not None and not is_hidden(layer))


def lies_beside(layer: nn.Module, additive: bool | None, where: str) -> bool:
    """Whether slices lie beside a layer's weight rather than in it: where it is quantised, and where one asks for it.

    Args:
        layer: one that `trains`.
        additive: what the user asked for; None leaves it to the layer.
        where: the layer's name, for messages.

    Raises:
        ConfigError: for ``additive=False`` over a quantised weight, which cannot hold single trained lines.
    """
    known = format_of(layer)
    if known is not None and additive is False:
        raise ConfigError(
            f"{where}: additive=False writes slices into the weight, and this one is quantised ({known.name}). Leave "
            "additive out (None), so that slices lie beside it, or load the model without quantisation."
        )
    return known is not None if additive is None else additive


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """``(rows, columns)`` = (output units, inputs) of a layer that `trains`; a packed weight has another shape."""
    if format_of(layer) is not None:
        return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
    shape = matrix_of(layer).shape
    return shape[0], shape[1]


def value_dtype(layer: nn.Module) -> torch.dtype:
    """The precision of a layer's trained values: its weight's, or what a quantised layer computes in."""
    known = format_of(layer)
    dtype: torch.dtype = layer.weight.dtype if known is None else known.dtype(layer)  # type: ignore[assignment, union-attr]
    return dtype


def matrix_of(layer: nn.Module) -> Tensor:
    """A supported layer's weight as ``(out, in)``, sharing its storage."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator, union-attr]
    return weight.t() if is_transposed(layer) else weight


def is_hidden(layer: nn.Module) -> bool:
    """Whether a layer's weight is used without a call of the layer: the output projection in nn.MultiheadAttention."""
    return isinstance(layer, NonDynamicallyQuantizableLinear)
