"""Reading, writing and differentiating one block of a dense weight: tensors only.

Shape legend: ``W`` is ``(out, in)`` = (rows, columns); ``x`` is ``(..., in)``; ``y`` is ``(..., out)``;
a block is ``(lines, line length)``, see `slicefine.geometry`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .errors import ContentError
from .geometry import Slice, entry_indices
from .weights import WeightKind, lines_of

__all__ = [
    "Active",
    "BlockMatrix",
    "Content",
    "Matrix",
    "line_index",
    "read_block",
    "slice_linear",
    "track_lookup",
    "track_slice",
    "track_weight",
    "write_block",
]


class BlockMatrix(Protocol):
    """A matrix that is no plain tensor, read and written block by block; see `slicefine.packed.PackedDelta`."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def read(self, block: Slice) -> Tensor: ...
    def write(self, block: Slice, values: Tensor) -> None: ...


Matrix = Tensor | BlockMatrix  # a dense weight, or what lies beside one


class Content(Protocol):
    """Something that knows which content its weight holds now (a number that never returns by accident)."""

    @property
    def content(self) -> int: ...

    @property
    def label(self) -> str: ...


class Active(NamedTuple):
    """A layer's active slice, in the order in which `track_slice` takes it."""

    parameter: Tensor
    lines: Tensor  # `index` there, which is a method of tuples
    axis: str
    owner: Content | None
    fixed: Tensor | None


def line_index(block: Slice, shape: tuple[int, int]) -> Tensor:
    """Indices of a slice's lines (rows, columns, or flat entries), int64: the data that moves with the slice."""
    if block.axis == "entries":
        return entry_indices(block, shape)
    return torch.arange(block.start, block.start + block.width, device="cpu")


def block_view(weight: Tensor, block: Slice) -> Tensor:
    """View of a row or column slice as lines; writing to it writes to the weight."""
    if block.axis == "row":
        return weight.narrow(0, block.start, block.width)
    return weight.narrow(1, block.start, block.width).t()


def read_block(weight: Matrix, block: Slice, index: Tensor | None = None) -> Tensor:
    """Copy of a slice's values as lines, in the weight's dtype and on its device."""
    if not isinstance(weight, Tensor):
        return weight.read(block)
    if block.axis != "entries":
        return block_view(weight, block).clone(memory_format=torch.contiguous_format)
    rows, columns = _coordinates(weight, block, index)
    return weight[rows, columns].unsqueeze(0)


def write_block(weight: Matrix, block: Slice, values: Tensor, index: Tensor | None = None) -> None:
    """Overwrite a slice's entries in place with ``values`` (lines), converted to the weight's dtype."""
    if not isinstance(weight, Tensor):
        weight.write(block, values)
        return
    if block.axis != "entries":
        block_view(weight, block).copy_(values)
        return
    rows, columns = _coordinates(weight, block, index)
    weight.index_put_((rows, columns), values.to(weight).reshape(-1))


def _coordinates(weight: Tensor, block: Slice, index: Tensor | None) -> tuple[Tensor, Tensor]:
    if index is None:
        index = entry_indices(block, (weight.shape[0], weight.shape[1]))
    index = index.to(weight.device)
    return index // weight.shape[1], index % weight.shape[1]


def check_content(owner: Content | None, content: int | None) -> None:
    """Raise `ContentError` unless the weight still holds what it held when ``content`` was noted."""
    if owner is not None and owner.content != content:
        raise ContentError(
            f"{owner.label}: the weights changed between forward and backward (an optimizer step, a move, or "
            "another adapter became active). Run backward before changing them, or restore the same adapter first."
        )


class _TrackSlice(torch.autograd.Function):
    """Identity on the layer's output whose backward forms the gradient of the active block, and nothing else.

    The forward GEMM and the input gradient stay the base layer's own (design decision 3); a row slice keeps a
    reference to the input, a column slice a copy of its r columns, a random mask a reference to the input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        parameter: Tensor,
        index: Tensor,
        axis: str,
        owner: Content | None,
        fixed: Tensor | None,
    ) -> Tensor:
        ctx.axis, ctx.owner, ctx.shape, ctx.dtype = axis, owner, parameter.shape, parameter.dtype
        ctx.content = None if owner is None else owner.content
        kept = x.index_select(-1, index) if axis == "column" else x
        ctx.save_for_backward(kept, index, fixed)
        # A new tensor over the same storage: an identity output would be a view, and a model that applies an
        # in-place activation to a layer's output could not do so. Nothing saves a linear layer's output.
        return y.view_as(y) if torch.compiler.is_compiling() else y.data

    @staticmethod
    @once_differentiable  # the input gradient's dependence on the slice is not tracked: refuse, do not drop it
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_content(ctx.owner, ctx.content)
        kept, index, fixed = ctx.saved_tensors
        values = parameter_gradient(grad, kept, index, ctx.axis, ctx.shape, ctx.dtype, fixed)
        return grad if ctx.needs_input_grad[0] else None, None, values, None, None, None, None


class _KeepInput(torch.autograd.Function):
    """Identity on the parameter that keeps what its gradient needs of the layer's input, before the layer runs.

    Non-reentrant checkpointing stops its recomputation at the last tensor that was kept: kept after the layer's GEMM,
    as `_TrackSlice` does, the GEMM would be computed once more for nothing.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, x: Tensor, index: Tensor, axis: str) -> Tensor:
        ctx.save_for_backward(x.index_select(-1, index) if axis == "column" else x, index)
        return parameter.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None


class _TrackKept(torch.autograd.Function):
    """`_TrackSlice` with the input kept by `_KeepInput`; it keeps nothing itself."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, kept: Tensor, axis: str, owner: Content | None, fixed: Tensor | None) -> Tensor:
        ctx.axis, ctx.owner, ctx.shape, ctx.dtype, ctx.fixed = axis, owner, kept.shape, kept.dtype, fixed
        ctx.content = None if owner is None else owner.content
        ctx.node = kept.grad_fn
        return y.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_content(ctx.owner, ctx.content)
        kept, index = ctx.node.saved_tensors
        values = parameter_gradient(grad, kept, index, ctx.axis, ctx.shape, ctx.dtype, ctx.fixed)
        return grad if ctx.needs_input_grad[0] else None, values, None, None, None


_saved_tensor_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def keep_input(parameter: Tensor, x: Tensor, index: Tensor, axis: str) -> Tensor | None:
    """Under saved-tensor hooks (checkpointing, offloading) keep the input now; None elsewhere, where order is all one.

    The result stands for the parameter: hand it to `track_kept` with the layer's output.
    """
    if _saved_tensor_hooks is None or _saved_tensor_hooks(False) is None:
        return None
    result: Tensor = _KeepInput.apply(parameter, x, index, axis)  # type: ignore[no-untyped-call]
    return result


def track_kept(y: Tensor, kept: Tensor, axis: str, owner: Content | None, fixed: Tensor | None = None) -> Tensor:
    """As `track_slice`, with an input that `keep_input` kept."""
    result: Tensor = _TrackKept.apply(y, kept, axis, owner, fixed)  # type: ignore[no-untyped-call]
    return result


class _TrackWeight(torch.autograd.Function):
    """Identity on a whole weight whose backward takes the active block out of its gradient.

    For layers whose output is no plain product: the weight's whole gradient exists for as long as one layer's backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        parameter: Tensor,
        index: Tensor,
        layout: str,
        unit: int,
        axis: str,
        owner: Content | None,
        fixed: Tensor | None,
    ) -> Tensor:
        ctx.layout, ctx.unit, ctx.axis = layout, unit, axis
        ctx.owner, ctx.shape, ctx.dtype = owner, parameter.shape, parameter.dtype
        ctx.content = None if owner is None else owner.content
        ctx.save_for_backward(index, fixed)
        return weight.view_as(weight) if torch.compiler.is_compiling() else weight.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_content(ctx.owner, ctx.content)
        index, fixed = ctx.saved_tensors
        lines = lines_of(grad, index, ctx.axis, ctx.layout, ctx.unit)
        return None, _free(pad_block(lines, ctx.shape).to(ctx.dtype), fixed), None, None, None, None, None, None


def track_weight(
    weight: Tensor,
    parameter: Tensor,
    index: Tensor,
    axis: str,
    kind: WeightKind,
    owner: Content | None,
    fixed: Tensor | None = None,
) -> Tensor:
    """Return ``weight`` with the gradient of the active block attached to ``parameter``.

    Args:
        weight: a layer's whole frozen weight, of any shape; it already contains the block's values.
        parameter: the persistent parameter; see `track_slice`, also for ``axis``, ``owner`` and ``fixed``.
        index: lines of the active slice, int64.
        kind: how the weight holds its matrix.

    Raises:
        ContentError: in backward, if the weight's content is not the forward's.
    """
    # a compiler traces strings and numbers, but no object of ours
    result: Tensor = _TrackWeight.apply(  # type: ignore[no-untyped-call]
        weight, parameter, index, kind.layout, kind.unit, axis, owner, fixed
    )
    return result


class _TrackLookup(torch.autograd.Function):
    """Identity on an embedding's output whose backward sums the gradient of the active tokens, or features, only."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        tokens: Tensor,
        parameter: Tensor,
        index: Tensor,
        axis: str,
        size: int,
        padding: int | None,
        owner: Content | None,
        fixed: Tensor | None,
    ) -> Tensor:
        ctx.axis, ctx.size, ctx.padding = axis, size, padding
        ctx.owner, ctx.shape, ctx.dtype = owner, parameter.shape, parameter.dtype
        ctx.content = None if owner is None else owner.content
        ctx.save_for_backward(tokens, index, fixed)
        return y.view_as(y) if torch.compiler.is_compiling() else y.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_content(ctx.owner, ctx.content)
        tokens, index, fixed = ctx.saved_tensors
        if ctx.padding is not None:
            grad = grad.masked_fill((tokens == ctx.padding).unsqueeze(-1), 0)
        lines = lookup_gradient(grad, tokens, index, ctx.axis, ctx.size)
        values = _free(pad_block(lines, ctx.shape).to(ctx.dtype), fixed)
        return None, None, values, None, None, None, None, None, None


def lookup_gradient(grad: Tensor, tokens: Tensor, index: Tensor, axis: str, size: int) -> Tensor:
    """Gradient of a block of a table of ``size`` lines from the output gradient and the tokens, as lines."""
    tokens, grad = tokens.reshape(-1), grad.reshape(-1, grad.shape[-1])
    if axis == "row":
        place = tokens - index[0]
        place = torch.where((place >= 0) & (place < len(index)), place, len(index))  # the others' line is dropped
        return grad.new_zeros(len(index) + 1, grad.shape[1]).index_add_(0, place, grad)[:-1]
    if axis == "column":
        part = grad.index_select(1, index)
        return part.new_zeros(size, len(index)).index_add_(0, tokens, part).t()
    whole = grad.new_zeros(size, grad.shape[1]).index_add_(0, tokens, grad)
    return whole.reshape(-1).index_select(0, index).unsqueeze(0)


def track_lookup(
    y: Tensor,
    tokens: Tensor,
    parameter: Tensor,
    index: Tensor,
    axis: str,
    table: torch.nn.Embedding,
    owner: Content | None,
    fixed: Tensor | None = None,
) -> Tensor:
    """As `track_slice`, of an embedding: ``y`` is ``(..., features)``, ``tokens`` are its indices ``(...)``."""
    result: Tensor = _TrackLookup.apply(  # type: ignore[no-untyped-call]
        y, tokens, parameter, index, axis, table.num_embeddings, table.padding_idx, owner, fixed
    )
    return result


class _GuardContent(torch.autograd.Function):
    """Identity for a layer that trains no slice now: its input gradient still needs the forward's weight."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, owner: Content) -> Tensor:
        ctx.owner, ctx.content = owner, owner.content
        return y.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        check_content(ctx.owner, ctx.content)
        return grad, None


def guard_content(y: Tensor, owner: Content) -> Tensor:
    """Return ``y``; a backward through it raises `ContentError` if ``owner``'s weight holds other content by then."""
    result: Tensor = _GuardContent.apply(y, owner)  # type: ignore[no-untyped-call]
    return result


def block_gradient(grad: Tensor, kept: Tensor, index: Tensor, axis: str) -> Tensor:
    """Gradient of a block as lines from the output gradient ``(..., out)`` and the kept input.

    Rows: ``dY[:, rows].T @ X``. Columns: ``X[:, columns].T @ dY``. Entries: the dense gradient, gathered.
    """
    kept = kept.reshape(-1, kept.shape[-1]).to(grad.dtype)
    grad = grad.reshape(-1, grad.shape[-1])
    if axis == "row":
        return grad.index_select(-1, index).t() @ kept
    if axis == "column":
        return kept.t() @ grad
    return (grad.t() @ kept).reshape(-1).index_select(0, index).unsqueeze(0)


def parameter_gradient(
    grad: Tensor, kept: Tensor, index: Tensor, axis: str, shape: torch.Size, dtype: torch.dtype, fixed: Tensor | None
) -> Tensor:
    """`block_gradient` as the persistent parameter takes it: of its ``shape`` and ``dtype``, zero where ``fixed``."""
    return _free(pad_block(block_gradient(grad, kept, index, axis), shape).to(dtype), fixed)


def pad_block(values: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Zero-pad lines to the shape of the persistent parameter (only alternate mode on oblong layers needs it)."""
    if values.shape == shape:
        return values
    return F.pad(values, (0, shape[1] - values.shape[1], 0, shape[0] - values.shape[0]))


def _free(gradient: Tensor, fixed: Tensor | None) -> Tensor:
    """A block's gradient without the entries that must not change."""
    return gradient if fixed is None else gradient.masked_fill(fixed, 0)


def track_slice(
    y: Tensor,
    x: Tensor,
    parameter: Tensor,
    index: Tensor,
    axis: str,
    owner: Content | None,
    fixed: Tensor | None = None,
) -> Tensor:
    """Return ``y`` with the gradient of the active block attached to ``parameter``.

    Args:
        y: output of the dense layer, ``(..., out)``; its weight already contains the block's values.
        x: the layer's input, ``(..., in)``.
        parameter: the persistent parameter ``(lines, line length)``; receives the gradient.
        index: lines of the active slice, int64, on the same device.
        axis: ``"row"``, ``"column"`` or ``"entries"``.
        owner: knows which content the weight holds, so that a backward over other content raises; None: unchecked.
        fixed: bool like ``parameter``: entries that get no gradient; None: all do.

    Raises:
        ContentError: in backward, if the weight's content is not the forward's.
    """
    result: Tensor = _TrackSlice.apply(y, x, parameter, index, axis, owner, fixed)  # type: ignore[no-untyped-call]
    return result


def slice_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, parameter: Tensor, block: Slice, owner: Content | None = None
) -> Tensor:
    """``F.linear`` with one dense GEMM whose backward forms only the gradient of ``block``.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``, frozen, already holding the block's values.
        bias: ``(out,)`` or None.
        parameter: ``(lines, line length)``, the block's values; receives the gradient.
        block: the active slice.
        owner: see `track_slice`.

    Example:
        >>> x, weight = torch.ones(2, 3), torch.zeros(4, 3)
        >>> block = Slice("row", 1, 2)
        >>> parameter = read_block(weight, block).requires_grad_()
        >>> slice_linear(x, weight, None, parameter, block).sum().backward()
        >>> parameter.grad.shape
        torch.Size([2, 3])
    """
    index = line_index(block, (weight.shape[0], weight.shape[1])).to(x.device)
    return track_slice(F.linear(x, weight, bias), x, parameter, index, block.axis, owner)
