"""Which positions count as important: Wanda's scores and lottery tickets, summed over slices (Section 4, Figs. 3c, 3d).

Importance is a score per entry of a weight; a slice's is the sum over its entries. From scores to an order of
positions it is the same way for all of them, so that categories differ in the score alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import ConfigError, NumericalError
from ..geometry import block_count, block_start

__all__ = ["CATEGORIES", "magnitude_mask", "ordered_starts", "position_map", "slice_scores", "wanda_scores"]

CATEGORIES = ("most", "least", "mixed", "random")


def wanda_scores(weight: Tensor, input_norms: Tensor) -> Tensor:
    """S_ij = |W_ij| ||X_j||_2: Wanda's importance of each entry (Sun et al. 2023; paper, Section 4).

    Args:
        weight: ``(rows, columns)``.
        input_norms: ``(columns,)``: the l2 norm of each input feature over all examples and positions. A common factor
            does not change any order, so the root mean square serves as well.

    Returns:
        ``(rows, columns)``, fp64 on the CPU.

    Raises:
        ConfigError: if the widths differ.
        NumericalError: for NaN or infinite values.

    Example:
        >>> wanda_scores(torch.tensor([[1.0, -2.0]]), torch.tensor([3.0, 1.0]))
        tensor([[3., 2.]], dtype=torch.float64)
    """
    if weight.dim() != 2 or input_norms.shape != weight.shape[1:]:
        raise ConfigError(
            f"wanda_scores: a weight {tuple(weight.shape)} needs one norm per column, got {tuple(input_norms.shape)}."
        )
    scores = weight.detach().cpu().double().abs() * input_norms.detach().cpu().double()
    if not bool(torch.isfinite(scores).all()):
        raise NumericalError("wanda_scores: the weight or the input norms have NaN or infinite values.")
    return scores


def slice_scores(scores: Tensor, r: int, axis: str) -> tuple[list[int], Tensor]:
    """S_slice: the sum of the scores of each block of r rows or columns, at the positions of a sweep.

    Args:
        scores: ``(rows, columns)``.
        r: slice rank, clamped to the matrix.
        axis: ``"row"`` or ``"column"``.

    Returns:
        Starts, and one sum per start; the last block overlaps the one before it where r does not divide the size.

    Raises:
        ConfigError: for an unknown axis or a rank below 1.

    Example:
        >>> slice_scores(torch.tensor([[1.0, 2.0, 4.0]]), 2, "column")
        ([0, 1], tensor([3., 6.], dtype=torch.float64))
    """
    if axis not in ("row", "column"):
        raise ConfigError(f"slice_scores: axis={axis!r} is unknown; expected row or column.")
    if r < 1:
        raise ConfigError(f"slice_scores: r={r} must be at least 1.")
    lines = scores.double().sum(1 if axis == "row" else 0)
    size = len(lines)
    width = min(r, size)
    starts = [block_start(block, size, width) for block in range(block_count(size, width))]
    return starts, lines.unfold(0, width, 1).sum(1)[torch.tensor(starts)]


def ordered_starts(
    starts: list[int], sums: Tensor, category: str, seed: int = 0, least_first: bool = False
) -> list[int]:
    """The positions in the order in which a run of a category visits them.

    Args:
        starts: of the blocks.
        sums: their scores.
        category: ``"most"`` (highest first), ``"least"`` (lowest first), ``"mixed"`` (highest, lowest, second highest,
            and so on), or ``"random"``.
        seed: of the random order.
        least_first: let ``"mixed"`` begin with the lowest.

    Raises:
        ConfigError: for an unknown category.

    Example:
        >>> [ordered_starts([0, 2, 4], torch.tensor([1.0, 5.0, 3.0]), c) for c in ("most", "least", "mixed")]
        [[2, 4, 0], [0, 4, 2], [2, 0, 4]]
    """
    if category not in CATEGORIES:
        raise ConfigError(f"category={category!r} is unknown; expected one of {', '.join(CATEGORIES)}.")
    if category == "random":
        order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed)).tolist()
        return [starts[i] for i in order]
    best = torch.sort(sums, descending=True, stable=True).indices.tolist()
    if category == "least" or (category == "mixed" and least_first):
        best = best[::-1]
    if category == "mixed":
        low, high = 0, len(best) - 1
        mixed = []
        while low <= high:
            mixed.append(best[low])
            if low < high:
                mixed.append(best[high])
            low, high = low + 1, high - 1
        best = mixed
    return [starts[i] for i in best]


def position_map(
    scores: Iterable[tuple[str, Tensor]], ranks: Mapping[str, tuple[int, int]], category: str, seed: int = 0
) -> dict[str, dict[str, list[int]]]:
    """Positions of every layer by importance, for ``positions=`` of `SliceFineConfig` and `attach`.

    Args:
        scores: layer names with scores ``(rows, columns)``; a generator keeps one layer at a time in memory.
        ranks: rank of row and column slices of each layer.
        category: see `ordered_starts`; ``"mixed"`` begins with the lowest in every second layer, so that slices that
            never move are mixed, too.
        seed: of the random order, together with the layer's place among the layers.
    """
    result = {}
    for number, (name, own) in enumerate(scores):
        result[name] = {
            axis: ordered_starts(*slice_scores(own, rank, axis), category, seed + number, number % 2 == 1)
            for axis, rank in zip(("row", "column"), ranks[name], strict=True)
        }
    return result


def magnitude_mask(weights: Mapping[str, Tensor], alive: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """One round of iterative magnitude pruning: the smallest ``share`` of the living entries of all layers dies.

    Args:
        weights: trained values by layer (Frankle & Carbin 2019).
        alive: bool masks from the round before.
        share: of the living entries, in [0, 1).

    Returns:
        New masks; entries equal to the threshold stay alive.

    Raises:
        ConfigError: for a share out of range.
        NumericalError: for NaN weights.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"magnitude_mask: share={share!r} must lie in [0, 1).")
    sizes = torch.cat([weights[name].detach().float().abs()[mask] for name, mask in alive.items()])
    if bool(sizes.isnan().any()):
        raise NumericalError("magnitude_mask: there are NaN weights.")
    count = int(share * len(sizes))
    if count == 0:
        return dict(alive)
    threshold = torch.kthvalue(sizes, count + 1).values
    return {name: mask & (weights[name].detach().float().abs() >= threshold) for name, mask in alive.items()}
