"""What a slice, or a whole backbone, starts from when it is not the pretrained values (paper, Appendix D.2)."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from .errors import ConfigError
from .geometry import Slice, line_length

__all__ = ["START_VALUES", "initial_block", "initial_matrix", "standard_deviation"]

START_VALUES = ("pretrained", "zero", "xavier", "kaiming", "lecun")


def standard_deviation(kind: str, shape: tuple[int, int]) -> float:
    """Standard deviation of the normal distribution that an initialiser draws a matrix from.

    Xavier (Glorot & Bengio 2010): sqrt(2 / (in + out)). Kaiming (He et al. 2015): sqrt(2 / in). LeCun (1998):
    sqrt(1 / in).

    Args:
        kind: ``"zero"``, ``"xavier"``, ``"kaiming"`` or ``"lecun"``.
        shape: ``(out, in)`` of the whole matrix.

    Raises:
        ConfigError: for another kind.

    Example:
        >>> standard_deviation("lecun", (8, 4))
        0.5
    """
    out, inputs = shape
    variances = {"zero": 0.0, "xavier": 2 / (inputs + out), "kaiming": 2 / inputs, "lecun": 1 / inputs}
    if kind not in variances:
        raise ConfigError(f"{kind!r} draws no values; expected one of {', '.join(variances)}.")
    return math.sqrt(variances[kind])


def initial_block(kind: str, block: Slice, shape: tuple[int, int], layer: str = "", seed: int = 0) -> Tensor:
    """New values of a row or column slice, as lines in fp32 on the CPU; the same in every process.

    Args:
        kind: ``"zero"``, ``"xavier"``, ``"kaiming"`` or ``"lecun"``: with the fans of the whole matrix.
        block: a row or column slice.
        shape: ``(rows, columns)`` of the matrix.
        layer: the layer's name; each layer and place draws its own numbers.
        seed: of the draw.

    Example:
        >>> initial_block("xavier", Slice("row", 0, 1), (2, 3)).shape
        torch.Size([1, 3])
    """
    number = zlib.crc32(f"{seed}/{layer}/{block.axis}/{block.start}".encode())
    drawn = torch.randn(
        block.width, line_length(block.axis, shape), generator=torch.Generator().manual_seed(number), device="cpu"
    )
    return drawn * standard_deviation(kind, shape)


def initial_matrix(kind: str, shape: tuple[int, int], name: str = "", seed: int = 0) -> Tensor:
    """New values of a whole matrix, ``(out, in)`` in fp32 on the CPU; each name draws its own numbers."""
    drawn = torch.randn(
        shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode())), device="cpu"
    )
    return drawn * standard_deviation(kind, shape)
