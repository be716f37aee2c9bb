"""RoCoFT: the first rows, or columns, of every weight are trained; the rest is frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import read_block, write_block
from ..geometry import Slice, line_length
from .base import Base, Method, Options, numbers, wrap_layers
from .dense import DenseLayer, check_choice

__all__ = ["METHODS", "FirstLines"]


class FirstLines(DenseLayer):
    """A dense layer whose first rows or columns are a parameter of their own.

    The two parts of the weight are used where they lie: no step puts a whole weight together.

    Args:
        base: a dense layer; its own copy of these lines is not used.
        block: rows or columns from 0 on.
        bias: train the layer's bias, too.
    """

    def __init__(self, base: nn.Module, block: Slice, bias: bool) -> None:
        super().__init__(base)
        self.block = block
        self.lines = nn.Parameter(read_block(self.weight, block))  # (r, length of a line)
        if bias and self.bias is not None:
            self.bias.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``."""
        r, weight, bias = self.block.width, self.weight, self.bias
        if self.block.axis == "column":
            return F.linear(x[..., :r], self.lines.t()) + F.linear(x[..., r:], weight[:, r:], bias)
        above, below = (None, None) if bias is None else (bias[:r], bias[r:])
        return torch.cat([F.linear(x, self.lines, above), F.linear(x, weight[r:], below)], dim=-1)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Write the lines into the weight."""
        write_block(self.weight, self.block, self.lines)
        return self.base


def _blocks(base: Base, options: Options) -> dict[str, tuple[Slice, tuple[int, int]]]:
    check_choice("rocoft", options, "axis", ("row", "column"))
    check_choice("rocoft", options, "bias", (False, True))
    block, found = Slice(options["axis"], 0, int(options["r"])), {}
    for name, rows, columns in numbers(base):
        block.check((rows, columns), f"method.options.r, {name}")
        found[name] = (block, (rows, columns))
    return found


def _build(base: Base, options: Options) -> nn.Module:
    blocks = _blocks(base, options)
    return wrap_layers(base, list(blocks), lambda name, layer: FirstLines(layer, blocks[name][0], options["bias"]))


def _count(base: Base, options: Options) -> int:
    total = 0
    for name, (block, shape) in _blocks(base, options).items():
        has_bias = options["bias"] and base.model.get_submodule(name).bias is not None
        total += block.width * line_length(block.axis, shape) + (shape[0] if has_bias else 0)
    return total


METHODS = (
    Method(
        name="rocoft",
        title="RoCoFT",
        source="Kowsher et al. 2024 (arXiv 2410.10075), compared with the authors' layers",
        formula="r x inputs per weight (rows), or r x outputs (columns)",
        build=_build,
        count=_count,
        differs="the authors' code trains the layers' biases, too, which their parameter counts leave out: bias=true",
        options={"r": 3, "axis": "row", "bias": False},
        learning_rate=1e-3,
        additions="0",
    ),
)
