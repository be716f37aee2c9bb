"""Task energy: how much of the features' variance few directions hold, and the three numbers called k_task.

``features`` is always ``(n, d)``, one row per example, as models give them: the paper's H. Its Phi is the transpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, NumericalError

__all__ = [
    "KernelCheck",
    "components_for",
    "explained_variance",
    "kernel_check",
    "separating_dimension",
    "task_covariance",
    "task_energy_ratio",
    "task_rank",
]


def explained_variance(features: Tensor) -> Tensor:
    """Cumulative explained variance of the centred features: the share that the first k components hold, k = 1, 2, ...

    CEV(k) = sum_{i<=k} lambda_i / sum_j lambda_j, with lambda the eigenvalues of the covariance (Appendix C.1).

    Args:
        features: ``(n, d)``, n at least 2.

    Returns:
        fp64, of length min(n - 1, d), ascending, 1.0 at the end.

    Raises:
        DataError: for fewer than two examples.
        NumericalError: for NaN, infinite, or constant features.

    Example:
        >>> explained_variance(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])).round(decimals=2)
        tensor([0.9000, 1.0000], dtype=torch.float64)
    """
    variances = _variances(features)
    return variances.cumsum(0) / variances.sum()


def components_for(features: Tensor, tau: float = 0.9) -> int:
    """k_task(tau): the fewest principal components that hold a share ``tau`` of the variance (Corollary 2.6).

    It knows nothing of the labels: a rule of thumb for the slice rank, not a dimension of the task.

    Raises:
        ConfigError: unless 0 < tau <= 1.
    """
    if not 0 < tau <= 1:
        raise ConfigError(f"components_for: tau={tau!r} must lie in (0, 1].")
    shares = explained_variance(features)
    return int((shares < tau - 1e-12).sum()) + 1


def task_covariance(features: Tensor, labels: Tensor) -> Tensor:
    """Sigma_task = (1/n) Phi P_Y Phi^T, with P_Y the projector onto Y's row space (Section 2, corrected; see below).

    The paper calls it the column space of Y, which is ``(c, n)``; a projector of n examples is onto its row space.

    Args:
        features: ``(n, d)``.
        labels: ``(n,)`` class numbers, or ``(n, c)`` targets.

    Returns:
        ``(d, d)``, fp64.

    Raises:
        DataError: if the numbers of examples differ.
    """
    reduced = _onto_labels(features, labels)
    return reduced.t() @ reduced / features.shape[0]


def task_rank(features: Tensor, labels: Tensor) -> int:
    """rank(Sigma_task): how many directions of the features the labels reach; at most the number of classes."""
    return int(torch.linalg.matrix_rank(_onto_labels(features, labels)))


def separating_dimension(features: Tensor, labels: Tensor, most: int | None = None) -> int | None:
    """The fewest principal components on which a linear classifier separates all examples; None if all do not.

    The paper's words "smallest number of orthogonal directions needed to achieve perfect linear classification", for
    nested directions of falling variance. Separability grows with nested directions, so it is found by bisection.

    Args:
        features: ``(n, d)``.
        labels: ``(n,)`` class numbers.
        most: components to try at most; None tries all.

    Raises:
        DataError: if the numbers of examples differ, or all labels are the same.
    """
    centred = _centred(features)
    if labels.dim() != 1 or labels.shape[0] != centred.shape[0]:
        raise DataError(f"separating_dimension: {centred.shape[0]} examples and labels of shape {tuple(labels.shape)}.")
    if len(torch.unique(labels)) < 2:
        raise DataError("separating_dimension: all labels are the same; there is nothing to separate.")
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    limit = min(int((values > values[0] * 1e-10).sum()), left.shape[1] if most is None else most)
    scores = left[:, :limit]  # every direction to the same scale: separability does not depend on it
    if not _separable(scores, labels):
        return None
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _separable(scores[:, :middle], labels) else (middle, high)
    return high


def task_energy_ratio(features: Tensor, k: int) -> float:
    """E = sum_{j<=k} sigma_j^2 / sum_j sigma_j^2 of the features' own (not centred) singular values (Theorem 2.4).

    Raises:
        ConfigError: unless k is a number of directions that the features have.
    """
    values = torch.linalg.svdvals(_checked(features)).square()
    if not 1 <= k <= len(values):
        raise ConfigError(f"task_energy_ratio: k={k} must lie between 1 and {len(values)}.")
    return float(values[:k].sum() / values.sum())


@dataclass(frozen=True)
class KernelCheck:
    """Lemma 2.5 in numbers: K = H H^T of centred features beside their principal components P = H V.

    Attributes:
        kernel_difference: largest |K - P P^T|, as a share of the largest |K|.
        eigenvalue_difference: largest |mu_i - (n - 1) lambda_i|, as a share of the largest mu.
        share_difference: largest difference of the two cumulative explained variances.
    """

    kernel_difference: float
    eigenvalue_difference: float
    share_difference: float


def kernel_check(features: Tensor) -> KernelCheck:
    """Check Lemma 2.5 on features, from an eigendecomposition of either side: all differences are rounding.

    Raises:
        DataError: for fewer than two examples.
        NumericalError: for NaN, infinite, or constant features.
    """
    centred = _centred(features)
    n = centred.shape[0]
    kernel = centred @ centred.t()
    variances, directions = torch.linalg.eigh(centred.t() @ centred / (n - 1))
    variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)
    components = centred @ directions
    eigenvalues = torch.linalg.eigvalsh(kernel).flip(0).clamp(min=0)
    count = min(len(variances), len(eigenvalues))
    mine, theirs = (n - 1) * variances[:count], eigenvalues[:count]
    shares = [values.cumsum(0) / values.sum() for values in (mine, theirs)]
    return KernelCheck(
        float((kernel - components @ components.t()).abs().amax() / kernel.abs().amax()),
        float((mine - theirs).abs().amax() / theirs.amax()),
        float((shares[0] - shares[1]).abs().amax()),
    )


def _checked(features: Tensor) -> Tensor:
    if features.dim() != 2 or features.shape[0] < 2:
        raise DataError(f"features: expected (examples, width) with at least 2 examples, got {tuple(features.shape)}.")
    wide = features.detach().double()
    if not bool(torch.isfinite(wide).all()):
        raise NumericalError("features: there are NaN or infinite values.")
    return wide


def _centred(features: Tensor) -> Tensor:
    wide = _checked(features)
    centred = wide - wide.mean(0)
    if float(centred.abs().amax()) <= 1e-12 * float(wide.abs().amax()):
        raise NumericalError("features: all examples have the same features, so they have no variance to explain.")
    return centred


def _variances(features: Tensor) -> Tensor:
    """Eigenvalues of the covariance, largest first; of n examples at most n - 1 are not zero."""
    centred = _centred(features)
    values: Tensor = torch.linalg.svdvals(centred).square() / (centred.shape[0] - 1)
    return values[: min(centred.shape[0] - 1, centred.shape[1])]


def _onto_labels(features: Tensor, labels: Tensor) -> Tensor:
    """``Q^T Phi^T`` with Q an orthonormal basis of Y's row space: ``(rank of Y, d)``."""
    wide = _checked(features)
    if labels.shape[0] != wide.shape[0] or labels.dim() not in (1, 2):
        raise DataError(f"task covariance: {wide.shape[0]} examples and labels of shape {tuple(labels.shape)}.")
    if labels.dim() == 1:
        classes = torch.unique(labels)
        targets = (labels[:, None] == classes).double()
    else:
        targets = labels.double()
    left, values, _ = torch.linalg.svd(targets, full_matrices=False)
    basis: Tensor = left[:, values > values.amax() * 1e-10]
    return basis.t() @ wide


def _separable(scores: Tensor, labels: Tensor) -> bool:
    """Whether class numbers are separated by one linear score per class, with a margin: a linear programme.

    Feasible: (w_y - w_c) x + (b_y - b_c) >= 1 for every example and every other class.
    """
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import csr_matrix

    classes, numbers = torch.unique(labels, return_inverse=True)
    points = torch.cat([scores, torch.ones(len(scores), 1, dtype=scores.dtype)], dim=1).numpy()
    n, width, count = len(points), points.shape[1], len(classes)
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    constraint = 0
    for i, own in enumerate(numbers.tolist()):
        for other in range(count):
            if other != own:
                for place, sign in ((own, -1.0), (other, 1.0)):
                    rows += [constraint] * width
                    columns += range(place * width, (place + 1) * width)
                    values += (sign * points[i]).tolist()
                constraint += 1
    matrix = csr_matrix((values, (rows, columns)), shape=(constraint, count * width))
    found = linprog(
        np.zeros(count * width), A_ub=matrix, b_ub=-np.ones(constraint), bounds=(None, None), method="highs"
    )
    if found.status not in (0, 2):
        raise NumericalError(f"separating_dimension: the linear programme of {n} examples failed: {found.message}")
    return bool(found.status == 0)
