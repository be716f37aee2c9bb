"""Slices as LoRA factors, exactly: the change of a row or a column is an outer product with a one-hot vector.

``delta = B A`` with ``B`` (out, n) and ``A`` (n, in), where n counts the distinct rows and columns that changed. No
singular value decomposition, no rounding: each factor holds the change itself or zeros and ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ConfigError, UnsupportedError
from .geometry import Slice

__all__ = ["exact_rank", "lora_factors", "read_factors", "truncate"]

Parts = Sequence[tuple[Slice, Tensor]]  # of one layer: slices with the change of each entry, counted once


def exact_rank(slices: Sequence[Slice], shape: tuple[int, int]) -> int:
    """The rank that exact factors of these slices have: distinct rows and columns, or the matrix' smaller side.

    Args:
        slices: rows and columns in any order; they may overlap and cross.
        shape: ``(rows, columns)`` of the weight.

    Example:
        >>> exact_rank([Slice("row", 0, 5), Slice("row", 3, 5), Slice("column", 0, 2)], (64, 64))
        10
    """
    lines = {(block.axis, i) for block in slices for i in block.indices()}
    return min(len(lines), *shape)


def lora_factors(parts: Parts, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """``(A, B)`` with ``B @ A`` equal to the change of a weight, bit for bit.

    Args:
        parts: slices with their changes as lines, every entry counted once (`Journal.deltas`).
        shape: ``(rows, columns)`` of the weight.

    Returns:
        ``A`` of shape ``(n, columns)`` and ``B`` of shape ``(rows, n)`` with n as `exact_rank` says; rows come first.

    Raises:
        UnsupportedError: for a random mask, whose entries share no few rows or columns.

    Example:
        >>> A, B = lora_factors([(Slice("row", 1, 1), torch.ones(1, 3))], (2, 3))
        >>> B @ A
        tensor([[0., 0., 0.],
                [1., 1., 1.]])
    """
    lines: dict[str, dict[int, Tensor]] = {"row": {}, "column": {}}
    for block, delta in parts:
        if block.axis not in lines:
            raise UnsupportedError(
                "export: a random mask's entries lie in all rows and columns, so no small LoRA factors hold them. "
                "Merge the adapter into its base instead (slicefine merge)."
            )
        for i, line in zip(block.indices(), delta, strict=True):
            own = lines[block.axis]
            own[i] = own[i] + line if i in own else line  # overlapping blocks: zero where the earlier one counts
    rows, columns = (dict(sorted(lines[axis].items())) for axis in ("row", "column"))
    like = parts[0][1] if parts else torch.zeros(0)
    if len(rows) + len(columns) > min(shape):
        return _dense_factors(rows, columns, shape, like)
    A, B = like.new_zeros(len(rows) + len(columns), shape[1]), like.new_zeros(shape[0], len(rows) + len(columns))
    for n, (i, line) in enumerate(rows.items()):
        A[n], B[i, n] = line, 1
    for n, (i, line) in enumerate(columns.items(), start=len(rows)):
        A[n, i], B[:, n] = 1, line
    return A, B


def _dense_factors(
    rows: dict[int, Tensor], columns: dict[int, Tensor], shape: tuple[int, int], like: Tensor
) -> tuple[Tensor, Tensor]:
    """So many lines that the change itself, beside an identity, is the smaller pair."""
    dense = like.new_zeros(shape)
    for i, line in rows.items():
        dense[i] += line
    for i, line in columns.items():
        dense[:, i] += line
    identity = torch.eye(min(shape), dtype=like.dtype, device=like.device)
    return (identity, dense) if shape[1] <= shape[0] else (dense, identity)


def truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of a smaller rank, and the share of the change's energy (squared Frobenius norm) they keep.

    Two thin QR decompositions and one singular value decomposition of an ``(n, n)`` matrix, in fp64.

    Raises:
        ConfigError: for a rank below 1.

    Example:
        >>> A, B, kept = truncate(torch.eye(2), torch.diag(torch.tensor([3.0, 1.0])), rank=1)
        >>> round(kept, 3)
        0.9
    """
    if rank < 1:
        raise ConfigError(f"truncate: rank={rank} must be at least 1.")
    if rank >= A.shape[0]:
        return A, B, 1.0
    left, inner_left = torch.linalg.qr(B.double())
    right, inner_right = torch.linalg.qr(A.double().t())
    u, s, v = torch.linalg.svd(inner_left @ inner_right.t())
    total = float(s.square().sum())
    kept = float(s[:rank].square().sum()) / total if total else 1.0
    root = s[:rank].sqrt()
    small_b, small_a = left @ u[:, :rank] * root, root[:, None] * v[:rank] @ right.t()
    return small_a.to(A.dtype), small_b.to(B.dtype), kept


def read_factors(A: Tensor, B: Tensor) -> list[tuple[Slice, Tensor]] | None:
    """The slices in factors that `lora_factors` made: neighbouring lines of one axis as one block; None for others.

    Args:
        A: ``(n, columns)``.
        B: ``(rows, n)``.
    """
    lines: dict[str, dict[int, Tensor]] = {"row": {}, "column": {}}
    for n in range(A.shape[0]):
        row, column = _one_hot(B[:, n]), _one_hot(A[n])
        if not bool(A[n].any()) or not bool(B[:, n].any()):
            continue  # padding up to one rank for all layers, or a line that did not change
        if row is not None and row not in lines["row"]:
            lines["row"][row] = A[n]
        elif column is not None and column not in lines["column"]:
            lines["column"][column] = B[:, n]
        else:
            return None
    result = []
    for axis, found in lines.items():
        for i in sorted(found):
            if i - 1 not in found:
                width = next(w for w in range(1, len(found) + 1) if i + w not in found)
                result.append((Slice(axis, i, width), torch.stack([found[i + w] for w in range(width)])))
    return result


def _one_hot(vector: Tensor) -> int | None:
    """Where a vector of zeros has its single one."""
    places = vector.nonzero()
    return int(places[0, 0]) if len(places) == 1 and float(vector[places[0, 0]]) == 1 else None
