"""How far two rankings of the same positions agree, and how unequal scores are: is "most important" a real contrast?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, NumericalError

__all__ = ["gini", "most_to_least", "rank_correlation", "top_overlap"]


def rank_correlation(scores: Tensor, others: Tensor) -> float:
    """Spearman's correlation of two scores of the same positions; ties share their mean rank.

    Returns:
        In [-1, 1]; NaN where either score is the same everywhere, so that there is no order.

    Raises:
        DataError: if the numbers of positions differ.
        NumericalError: for NaN or infinite scores.

    Example:
        >>> rank_correlation(torch.tensor([1.0, 5.0, 7.0]), torch.tensor([0.1, 0.2, 0.9]))
        1.0
    """
    from scipy.stats import rankdata

    first, second = _pair("rank_correlation", scores, others)
    if _constant(first) or _constant(second):
        return float("nan")
    ranks = torch.from_numpy(rankdata(torch.stack([first, second]).numpy(), axis=1))
    centred = ranks - ranks.mean(1, keepdim=True)
    product = (centred[0] * centred[1]).sum() / centred.square().sum(1).prod().sqrt()
    return float(product.clamp(-1, 1))


def top_overlap(scores: Tensor, others: Tensor, share: float) -> tuple[float, float]:
    """How many of the highest positions by one score are among the highest by the other, beside what chance gives.

    Args:
        scores: one per position.
        others: likewise.
        share: of the positions that count as highest, rounded up to whole ones.

    Returns:
        The overlap, and that of a random choice, both as shares.

    Raises:
        ConfigError: for a share outside (0, 1].
        DataError: if the numbers of positions differ.
        NumericalError: for NaN or infinite scores.

    Example:
        >>> top_overlap(torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([9.0, 1.0, 8.0, 2.0]), 0.5)
        (0.5, 0.5)
    """
    if not 0 < share <= 1:
        raise ConfigError(f"top_overlap: share={share!r} must lie in (0, 1].")
    first, second = _pair("top_overlap", scores, others)
    count = max(1, math.ceil(share * len(first) - 1e-9))
    best = [set(torch.sort(each, descending=True, stable=True).indices[:count].tolist()) for each in (first, second)]
    return len(best[0] & best[1]) / count, count / len(first)


def gini(scores: Tensor) -> float:
    """Gini's coefficient: 0 if all positions score the same, towards 1 if one has everything.

    Args:
        scores: not negative, one per position.

    Raises:
        DataError: for no position, or a negative score.
        NumericalError: for NaN or infinite scores, or if all are zero.

    Example:
        >>> gini(torch.tensor([1.0, 1.0, 1.0])), gini(torch.tensor([0.0, 0.0, 0.0, 8.0]))
        (0.0, 0.75)
    """
    values = torch.sort(_positive("gini", scores)).values
    n = len(values)
    places = torch.arange(1, n + 1, dtype=torch.float64)
    return float(((2 * places - n - 1) * values).sum() / (n * values.sum()))


def most_to_least(scores: Tensor) -> float:
    """The highest score by the lowest: infinite where that is zero.

    Raises:
        DataError: for no position, or a negative score.
        NumericalError: for NaN or infinite scores, or if all are zero.

    Example:
        >>> most_to_least(torch.tensor([2.0, 5.0, 4.0]))
        2.5
    """
    values = _positive("most_to_least", scores)
    least = float(values.amin())
    return float(values.amax()) / least if least else float("inf")


def _pair(where: str, scores: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    if scores.dim() != 1 or scores.shape != others.shape or len(scores) < 1:
        raise DataError(
            f"{where}: expected two scores of the same positions, got {tuple(scores.shape)} and {tuple(others.shape)}."
        )
    return _finite(where, scores), _finite(where, others)


def _positive(where: str, scores: Tensor) -> Tensor:
    values = _finite(where, scores)
    if values.dim() != 1 or len(values) < 1 or bool((values < 0).any()):
        raise DataError(f"{where}: expected one score of at least 0 per position, got {tuple(values.shape)}.")
    if float(values.amax()) == 0:
        raise NumericalError(f"{where}: every score is zero, so no position differs.")
    return values


def _finite(where: str, scores: Tensor) -> Tensor:
    values = scores.detach().cpu().double()
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(f"{where}: there are NaN or infinite scores.")
    return values


def _constant(values: Tensor) -> bool:
    return float(values.amax() - values.amin()) <= 1e-12 * float(values.abs().amax())
