"""Which layers SliceFine trains, and the weight of each as a matrix: ``(rows, columns)`` = (output units, inputs)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .errors import ConfigError, UnsupportedError
from .geometry import Slice
from .quantised import format_of, place_of
from .zero import full_shape, look_at

__all__ = [
    "TRAINABLE",
    "Stack",
    "WeightKind",
    "is_hidden",
    "is_linear",
    "is_transposed",
    "kind_of",
    "lies_beside",
    "lines_of",
    "matrix_of",
    "refuse_offloaded",
    "supports",
    "trains",
    "value_dtype",
]

TRAINABLE = "linear (nn.Linear, Conv1D, quantised), nn.MultiheadAttention, nn.Embedding and convolution"
_OUTPUTS = {"transposed": 1, "stack": 1, "stack transposed": 2}  # the dimension of output units, if not the first
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class WeightKind:
    """How a layer holds the matrix that slices are taken from.

    Attributes:
        layout: ``"linear"`` (out, in); ``"transposed"`` (in, out); ``"quantised"``: linear, in a format that cannot
            hold single trained lines; ``"hidden"``: linear, but used without a call of the layer; ``"embedding"``
            (tokens, features); ``"convolution"`` (out, in, kernel...); ``"packed"``: several projections one above the
            other; ``"stack"`` (experts, out, in) and ``"stack transposed"`` (experts, in, out).
        parameter: the weight's name in the layer.
        unit: columns that belong to one input feature: a convolution's kernel, or one per expert. Ranks of column
            slices count input features.
    """

    layout: str
    parameter: str = "weight"
    unit: int = 1

    @property
    def called(self) -> bool:
        """Whether the layer's output is its input times the matrix, so that a slice's gradient follows from both."""
        return self.layout in ("linear", "transposed", "quantised")

    @property
    def stacked(self) -> bool:
        """Whether the matrix is spread over experts."""
        return self.layout.startswith("stack")

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a matrix or, of experts, as ``(rows, features, experts)``; it shares the weight's storage."""
        return _matrix(weight, self.layout)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """``(rows, columns)`` of a layer's matrix; a quantised weight has another shape."""
        if self.layout == "quantised":
            return int(cast(int, layer.out_features)), int(cast(int, layer.in_features))
        sizes = list(full_shape(look_at(layer, self.parameter)))
        rows = sizes.pop(_OUTPUTS.get(self.layout, 0))
        return rows, torch.Size(sizes).numel()

    def like_weight(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """A ``(rows, columns)`` matrix in the weight's own shape."""
        if self.layout == "transposed":
            return matrix.t().contiguous()
        if self.layout == "convolution":
            return matrix.reshape(weight.shape)
        if not self.stacked:
            return matrix
        whole = matrix.reshape(len(matrix), -1, self.unit)  # rows, features, experts
        return whole.permute(2, 0, 1).contiguous() if self.layout == "stack" else whole.permute(2, 1, 0).contiguous()


def _matrix(weight: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return weight.t()
    if layout == "convolution":
        return weight.flatten(1)
    if layout == "stack":
        return weight.permute(1, 2, 0)
    return weight.permute(2, 1, 0) if layout == "stack transposed" else weight


def lines_of(weight: Tensor, index: Tensor, axis: str, layout: str, unit: int) -> Tensor:
    """A slice's lines out of a tensor shaped like a layer's weight, such as its gradient.

    Args:
        weight: shaped like the layer's weight.
        index: the slice's rows, columns or flat entries, int64.
        axis: ``"row"``, ``"column"`` or ``"entries"``.
        layout, unit: see `WeightKind`.
    """
    matrix = _matrix(weight, layout)
    if axis == "row":
        return matrix.index_select(0, index).flatten(1)
    if axis == "entries":
        return matrix.reshape(-1).index_select(0, index).unsqueeze(0)
    if matrix.dim() == 2:
        return matrix.index_select(1, index).t()
    return matrix.index_select(1, index[::unit] // unit).permute(1, 2, 0).flatten(0, 1)


class Stack:
    """The matrix of a weight stacked over experts, read and written block by block; see `WeightKind`.

    Column ``feature * experts + expert`` is that input feature of that expert, so that a row slice has the same output
    units of all experts, and a column slice the same input features.

    Args:
        stack: ``(rows, features, experts)``, sharing the weight's storage.
    """

    def __init__(self, stack: Tensor) -> None:
        self._stack = stack
        rows, features, self.experts = stack.shape
        self.shape = torch.Size((rows, features * self.experts))
        self.dtype, self.device = stack.dtype, stack.device

    def view(self, block: Slice) -> Tensor:
        """The block's place in the weight, as ``(width, features, experts)`` or ``(features, experts, rows)``.

        Raises:
            UnsupportedError: for a random mask.
        """
        if block.axis == "row":
            return self._stack.narrow(0, block.start, block.width)
        if block.axis == "entries":
            raise UnsupportedError(
                "mode='random_mask' draws entries of a matrix that lies in one piece; experts and channels_last "
                "convolutions have slices only."
            )
        first, count = block.start // self.experts, block.width // self.experts
        return self._stack.narrow(1, first, count).permute(1, 2, 0)

    def __getitem__(self, at: tuple[Tensor, Tensor]) -> Tensor:
        """Single entries, by their rows and columns."""
        rows, columns = at
        return self._stack[rows, columns // self.experts, columns % self.experts]

    def read(self, block: Slice) -> Tensor:
        """Copy of a block's values as lines."""
        start = 1 if block.axis == "row" else 0
        return self.view(block).clone(memory_format=torch.contiguous_format).flatten(start, start + 1)

    def write(self, block: Slice, values: Tensor) -> None:
        """Overwrite a block with ``values`` (lines), converted to the weight's dtype."""
        view = self.view(block)
        view.copy_(values.reshape(view.shape))


def kind_of(layer: nn.Module, parameter: str | None = None) -> WeightKind | None:
    """How a layer holds its weight; None if it has none that can be trained.

    Args:
        layer: any module.
        parameter: name of one of its parameters with two or three dimensions; None means the layer's own weight.

    Example:
        >>> kind_of(nn.Conv2d(3, 8, 3))
        WeightKind(layout='convolution', parameter='weight', unit=9)
    """
    if parameter is not None:
        return _kind_of_parameter(layer, parameter)
    if format_of(layer) is not None:
        return None if is_hidden(layer) else WeightKind("quantised")
    if not _is_plain(getattr(layer, "weight", None)) and not isinstance(layer, nn.MultiheadAttention):
        return None
    if is_transposed(layer):
        return WeightKind("transposed")
    if isinstance(layer, nn.Linear):
        return WeightKind("hidden" if is_hidden(layer) else "linear")
    if isinstance(layer, _CONVOLUTIONS):
        return WeightKind("convolution", unit=layer.weight[0, 0].numel())
    if isinstance(layer, nn.Embedding):
        # the two options look at all of the weight, or change it, in each forward
        return None if layer.max_norm is not None or layer.scale_grad_by_freq else WeightKind("embedding")
    if isinstance(layer, nn.MultiheadAttention) and _is_plain(layer.in_proj_weight):
        return WeightKind("packed", "in_proj_weight")
    return None


def _kind_of_parameter(layer: nn.Module, parameter: str) -> WeightKind | None:
    weight = layer._parameters.get(parameter)
    if not _is_plain(weight) or weight is None:
        return None
    own = kind_of(layer)
    if own is None and isinstance(layer, nn.Embedding):
        return None  # its options look at all of the weight, or change it, in each forward
    if own is not None and own.parameter == parameter:
        return own
    if len(full_shape(weight)) == 3:
        # transformers says so where its experts multiply from the other side
        layout = "stack transposed" if getattr(layer, "is_transposed", False) else "stack"
        return WeightKind(layout, parameter, unit=full_shape(weight)[0])
    return WeightKind("packed", parameter) if len(full_shape(weight)) == 2 else None


def _is_plain(weight: object) -> bool:
    # a parametrised weight (weight norm, pruning) is computed anew by each forward: it is not a parameter
    if not isinstance(weight, nn.Parameter) or nn.parameter.is_lazy(weight):
        return False
    return weight.is_floating_point() and len(full_shape(weight)) >= 2


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer keeps its weight as ``(in, out)``: transformers' ``Conv1D``."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def supports(layer: nn.Module) -> bool:
    """Whether a layer is a dense linear map with a floating-point matrix that can be trained in place."""
    kind = kind_of(layer)
    return kind is not None and kind.layout in ("linear", "transposed")


def trains(layer: nn.Module) -> bool:
    """Whether slices of a linear layer can be trained: in its weight (`supports`), or beside a quantised one."""
    kind = kind_of(layer)
    return kind is not None and kind.called


def is_linear(layer: nn.Module) -> bool:
    """Whether ``"all-linear"`` means a layer: as `trains`, and attention's packed and output projections."""
    kind = kind_of(layer)
    return kind is not None and (kind.called or kind.layout in ("hidden", "packed"))


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


def value_dtype(layer: nn.Module) -> torch.dtype:
    """The precision of a layer's trained values: its weight's, or what a quantised layer computes in."""
    known = format_of(layer)
    return place_of(layer).dtype if known is None else known.dtype(layer)


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
