"""Slices beside a weight that must not be written: visited lines in two packed blocks, and the product with them.

Quantised weights cannot hold single trained rows or columns, and some weights are shared with other processes. There
the layer computes ``y = W x + D x``, where only the visited lines of ``D`` exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import UnsupportedError
from .functional import Active, check_content, parameter_gradient
from .geometry import Slice

__all__ = ["PackedDelta"]


# lines made under inference_mode could not be trained with afterwards
_plain = torch.inference_mode(False)


class _Lines:
    """Lines of one axis, in the order in which they were first written."""

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots: dict[int, int] = {}  # line of the matrix -> line of `values`
        self.runs: list[tuple[int, int, int]] = []  # neighbours in both: first line, first slot, how many
        self.index = torch.empty(0, dtype=torch.int64, device=device)
        self.values = torch.empty(0, length, dtype=dtype, device=device)

    @_plain
    def add(self, lines: list[int]) -> None:
        new = [line for line in lines if line not in self.slots]
        if new:
            for line in new:
                first, slot, count = self.runs[-1] if self.runs else (-1, 0, 0)
                if count and first + count == line:
                    self.runs[-1] = (first, slot, count + 1)
                else:
                    self.runs.append((line, len(self.slots), 1))
                self.slots[line] = len(self.slots)
            self.index = torch.cat([self.index, torch.tensor(new, device=self.index.device)])
            self.values = torch.cat([self.values, self.values.new_zeros(len(new), self.values.shape[1])])

    def places(self, lines: list[int]) -> Tensor:
        return torch.tensor([self.slots[line] for line in lines], device=self.index.device)


class _PassInput(torch.autograd.Function):
    """The input; its backward adds ``dY D`` to the gradient that the layer itself sends, in the memory of that one.

    On its own ``dY D`` would be a matrix of zeros with few lines in it, made and then added whole: as much time as
    the products with those lines.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: PackedDelta, products: dict[str, Tensor], shared: bool) -> Tensor:
        ctx.delta, ctx.products, ctx.shared = delta, products, shared
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.shared or not grad.is_contiguous():
            grad = grad.clone(memory_format=torch.contiguous_format)
        ctx.delta._add_input_gradient(grad, ctx.products)
        ctx.products.clear()
        return grad, None, None, None


class _AddProduct(torch.autograd.Function):
    """``y + x D.T`` in y's own storage: nothing saves a linear layer's output, and a copy would cost what a row costs.

    Nothing is kept: backward reads the lines that are there then, which are the forward's, or the layer's guard of its
    content raises first (design decision 5). The input's gradient is finished by `_PassInput`, which autograd calls
    afterwards, since ``x`` comes from there.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, delta: PackedDelta, products: dict[str, Tensor]) -> Tensor:
        ctx.delta, ctx.products = delta, products
        result = y.data
        delta._add_into(result, x)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.needs_input_grad[1]:
            ctx.products |= ctx.delta._line_products(grad)
        return grad, None, None, None


class _MultiplySum(torch.autograd.Function):
    """``x (W + D).T + b`` for a weight ``W`` that is made for each use in any case, as dequantised ones are.

    Lines added to it cost what their entries cost; products with them cost as many passes over inputs and outputs.
    The active slice's gradient is formed here, too: each autograd function more takes time at every layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, parameter: Tensor | None, what: _Sum) -> Tensor:
        ctx.what, active = what, what.active
        weight = what.delta._sum_into(what.dense())
        kept = None
        if active is not None:
            ctx.content = None if active.owner is None else active.owner.content
            kept = x.index_select(-1, active.lines) if active.axis == "column" else x
        ctx.save_for_backward(kept, weight if what.keeps and ctx.needs_input_grad[0] else None)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(weight.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept, weight), what = ctx.saved_tensors, ctx.what
        to_input = to_bias = to_slice = None
        if what.active is not None:
            parameter, lines, axis, owner, fixed = what.active
            check_content(owner, ctx.content)
            to_slice = parameter_gradient(grad, kept, lines, axis, parameter.shape, parameter.dtype, fixed)
        if ctx.needs_input_grad[0]:
            to_input = torch.matmul(grad, what.delta._sum_into(what.dense()) if weight is None else weight)
        if ctx.needs_input_grad[1]:
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return to_input, to_bias, to_slice, None


class _Sum(NamedTuple):
    delta: PackedDelta
    dense: Callable[[], Tensor]
    keeps: bool
    active: Active | None


def _add_matmul(y: Tensor, x: Tensor, lines: Tensor) -> None:
    """``y += x @ lines`` in one pass where types and memory allow."""
    if y.dtype == x.dtype and y.is_contiguous():
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), lines)
    else:
        y += torch.matmul(x, lines)


def _narrower(x: torch.dtype, values: torch.dtype) -> torch.dtype:
    """What to multiply in: inputs may be wider than a quantised layer's compute dtype, or values than inputs."""
    return values if values.itemsize < x.itemsize else x


class PackedDelta:
    """A matrix of zeros of which only the lines that were written exist: the trained part of a weight, beside it.

    It is read and written block by block, like a dense matrix (`slicefine.functional`), and bit for bit. An entry
    where a row and a column cross belongs to the one that was written last and is zero in the other, so that the
    product counts it once. Memory: ``visited rows x in + visited columns x out`` entries.

    Args:
        shape: ``(rows, columns)`` of the matrix.
        dtype: of the values.
        device: where they live.

    Example:
        >>> delta = PackedDelta((4, 3), torch.float32, torch.device("cpu"))
        >>> delta.write(Slice("row", 1, 1), torch.ones(1, 3))
        >>> delta.add_to_layer(lambda x: torch.zeros(2, 4), torch.ones(2, 3))[0]
        tensor([0., 3., 0., 0.])
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape = torch.Size(shape)
        self.dtype, self.device = dtype, device
        self.version = 0  # of the content and of where it lies; writes through `view` do not count
        self.clear()

    @_plain
    def clear(self) -> None:
        """Forget all lines: the matrix is zero again."""
        rows, columns = self.shape
        self._axes = {
            "row": _Lines(columns, self.dtype, self.device),
            "column": _Lines(rows, self.dtype, self.device),
        }
        self.version += 1

    def read(self, block: Slice) -> Tensor:
        """Copy of a block's values as lines."""
        own, other = self._of(block)
        values = torch.zeros(block.width, own.values.shape[1], dtype=self.dtype, device=self.device)
        lines = list(block.indices())
        there = [i for i, line in enumerate(lines) if line in own.slots]
        if there:
            values[there] = own.values[own.places([lines[i] for i in there])]
        values[:, other.index] += other.values.narrow(1, block.start, block.width).t()
        return values

    @_plain
    def write(self, block: Slice, values: Tensor) -> None:
        """Overwrite a block's entries with ``values`` (lines), converted to the matrix' dtype."""
        own, other = self._of(block)
        lines = list(block.indices())
        own.add(lines)
        own.values[own.places(lines)] = values.to(own.values)
        other.values.narrow(1, block.start, block.width).zero_()
        self.version += 1

    def view(self, block: Slice) -> Tensor | None:
        """View of a block's lines that may be written until the next `write`; None if they do not lie together."""
        self.write(block, self.read(block))  # from now on its crossings belong to it
        own, _ = self._of(block)
        slots = [own.slots[line] for line in block.indices()]
        if slots != list(range(slots[0], slots[0] + block.width)):
            return None
        return own.values.narrow(0, slots[0], block.width)

    def add_to_layer(self, layer: Callable[[Tensor], Tensor], x: Tensor, shared: bool = False) -> Tensor:
        """``layer(x) + x D.T`` for inputs ``(..., columns)`` and outputs ``(..., rows)``; nothing of D's size is made.

        The sums take the memory of the layer's output, and of the gradient that it sends to its input (except inside
        a compiled graph). Gradients do not flow to the lines: a layer's active block has a gradient of its own.

        Args:
            layer: computes the output; called once.
            x: its input.
            shared: whether others hold the gradient that the layer sends, as module hooks do: it is copied then.
        """
        if not torch.compiler.is_compiling():
            products: dict[str, Tensor] = {}
            if torch.is_grad_enabled() and x.requires_grad:
                x = _PassInput.apply(x, self, products, shared)  # type: ignore[no-untyped-call]
            result: Tensor = _AddProduct.apply(layer(x), x, self, products)  # type: ignore[no-untyped-call]
            return result
        y = layer(x)
        row, column = self._axes["row"], self._axes["column"]
        x = x.to(_narrower(x.dtype, self.dtype))
        if row.slots:
            y = y.index_add(-1, row.index, torch.nn.functional.linear(x, row.values.to(x.dtype)).to(y.dtype))
        if column.slots:
            y = y + torch.matmul(x.index_select(-1, column.index), column.values.to(x.dtype)).to(y.dtype)
        return y

    def multiply_sum(
        self,
        dense: Callable[[], Tensor],
        x: Tensor,
        bias: Tensor | None = None,
        active: Active | None = None,
        keeps: bool = False,
    ) -> Tensor:
        """``x (W + D).T + b``, as `add_to_layer`, for a weight that is made for each use in any case.

        Args:
            dense: makes ``W``, ``(rows, columns)``, in a new tensor, of a precision in which ``W + D`` keeps ``D``.
            x: the input, ``(..., columns)``.
            bias: ``(rows,)``, of any precision; it may want a gradient.
            active: a slice whose parameter gets its gradient with the backward; None: no slice does.
            keeps: keep the sum for backward; else it is made once more there.

        Raises:
            ContentError: in backward, if the lines are not the forward's (`slicefine.functional.track_slice`).
        """
        parameter = None if active is None else active.parameter
        what = _Sum(self, dense, keeps, active)
        result: Tensor = _MultiplySum.apply(x, bias, parameter, what)  # type: ignore[no-untyped-call]
        return result

    @torch.no_grad()
    def _add_into(self, y: Tensor, x: Tensor) -> None:
        row, column = self._axes["row"], self._axes["column"]
        x = x.to(_narrower(x.dtype, self.dtype))
        if row.slots:
            y.index_add_(-1, row.index, torch.nn.functional.linear(x, row.values.to(x.dtype)).to(y.dtype))
        if column.slots:
            _add_matmul(y, x.index_select(-1, column.index), column.values.to(x.dtype))

    def _line_products(self, grad: Tensor) -> dict[str, Tensor]:
        """What is left of an output's gradient for the input's: its part at the rows, its products with the columns."""
        row, column = self._axes["row"], self._axes["column"]
        grad = grad.to(_narrower(grad.dtype, self.dtype))
        made = {"row": grad.index_select(-1, row.index)} if row.slots else {}
        if column.slots:
            made["column"] = torch.nn.functional.linear(grad, column.values.to(grad.dtype))
        return made

    def _add_input_gradient(self, result: Tensor, products: dict[str, Tensor]) -> None:
        """Add ``dY D`` to an input's gradient; ``products``: see `_line_products`, or nothing, if no dY came."""
        row, column = self._axes["row"], self._axes["column"]
        if "row" in products:
            _add_matmul(result, products["row"], row.values.to(products["row"].dtype))
        if "column" in products:
            result.index_add_(-1, column.index, products["column"].to(result.dtype))

    @property
    def empty(self) -> bool:
        """Whether no line was written yet."""
        return not any(lines.slots for lines in self._axes.values())

    def numel(self) -> int:
        """How many values there are beside the weight."""
        return sum(lines.values.numel() for lines in self._axes.values())

    def count_nonzero(self) -> int:
        """How many entries are not zero; a crossing counts once."""
        return sum(int(lines.values.count_nonzero()) for lines in self._axes.values())

    @torch.no_grad()
    def add_to(self, weight: Tensor) -> None:
        """Add the lines to a dense ``(rows, columns)`` weight in place; rounding makes this final."""
        self._sum_into(weight)

    def _sum_into(self, weight: Tensor) -> Tensor:
        row, column = self._axes["row"], self._axes["column"]
        if row.slots:
            weight.index_add_(0, row.index, row.values.to(weight.dtype))
        for first, slot, count in column.runs:  # twice as fast as index_add_ where lines are short pieces
            weight.narrow(1, first, count).add_(column.values.narrow(0, slot, count).t().to(weight.dtype))
        return weight

    @_plain
    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Put the lines through ``fn``: to another device or dtype, as ``nn.Module.to`` does with parameters."""
        for lines in self._axes.values():
            lines.values = fn(lines.values)
            lines.index = lines.index.to(lines.values.device)
            self.dtype, self.device = lines.values.dtype, lines.values.device
        self.version += 1

    def tensors(self) -> list[Tensor]:
        """The packed lines, rows then columns."""
        return [lines.values for lines in self._axes.values()]

    def _of(self, block: Slice) -> tuple[_Lines, _Lines]:
        if block.axis == "entries":
            raise UnsupportedError(
                "a random mask has no lines to keep beside a weight: it trains a dense weight in place only."
            )
        return self._axes[block.axis], self._axes["column" if block.axis == "row" else "row"]
