"""Nested tensors: rows of sequences of unlike lengths, through a layer that treats each row alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import UnsupportedError

__all__ = ["map_nested"]


def map_nested(layer: Callable[[Tensor], Tensor], x: Tensor, label: str) -> Tensor:
    """``layer`` of all rows of a nested tensor at once, nested as ``x`` is.

    PyTorch has few operations for nested tensors; what slices need (`index_select`, sums into rows) are not among them.

    Args:
        layer: takes ``(rows, in)``, or, of an embedding, ``(rows,)``.
        x: nested, of either layout.
        label: the layer's name, for messages.

    Raises:
        UnsupportedError: if another dimension than the second is ragged, or if there are holes between the rows.

    Example:
        >>> x = torch.nested.nested_tensor([torch.ones(1, 2), torch.ones(3, 2)], layout=torch.jagged)
        >>> [tuple(part.shape) for part in map_nested(lambda rows: rows.sum(-1, keepdim=True), x, "").unbind()]
        [(1, 1), (3, 1)]
    """
    if x.layout is torch.strided:
        parts = x.unbind()
        ends = [len(part) for part in parts]
        return torch.nested.as_nested_tensor(list(torch.split(layer(torch.cat(parts)), ends)))
    if x._ragged_idx != 1 or x.lengths() is not None:  # type: ignore[attr-defined, operator]
        raise UnsupportedError(
            f"{label}: the input is a nested tensor whose dimension {x._ragged_idx} is ragged, or whose rows have "  # type: ignore[attr-defined]
            "holes between them; slices are trained where dimension 1 is and rows lie together. Transpose it back, "
            "call contiguous(), or pad it (to_padded_tensor)."
        )
    rows = layer(x.values())
    return torch.nested.nested_tensor_from_jagged(rows, x.offsets())  # type: ignore[attr-defined]
