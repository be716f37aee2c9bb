"""How far an adapter's slices went from the base that they were trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..geometry import Slice
from .adapter import Adapter
from .checkpoint import Checkpoint, replaced

__all__ = ["Distance", "distances"]


@dataclass(frozen=True)
class Distance:
    """How far one slice moved.

    Attributes:
        change: Frobenius norm of trained minus original values.
        original: Frobenius norm of the original values.
    """

    change: float
    original: float

    @property
    def relative(self) -> float:
        """Change as a share of the original values' norm; infinite where those are all zero."""
        if self.original == 0:
            return math.inf if self.change else 0.0
        return self.change / self.original


def distances(adapter: Adapter, base: Checkpoint) -> dict[str, dict[Slice, Distance]]:
    """The distance of every visited slice of every layer; crossings count in both slices.

    Raises:
        AdapterFileError: if the base is not the adapter's.
    """
    result = {}
    for name, layer in adapter.layers.items():
        plain, start = base.originals(name, layer), replaced(base, name, layer)
        result[name] = {
            block: Distance(
                float(torch.linalg.vector_norm(values.double() - start[block].double())),
                float(torch.linalg.vector_norm(plain[block].double())),
            )
            for block, values in layer.values.items()
        }
    return result
