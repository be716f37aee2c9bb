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
    "kernel_pair",
    "label_energy",
    "label_share",
    "separating_dimension",
    "task_covariance",
    "task_energy_ratio",
    "task_rank",
]

_SECONDS = 30.0  # for one linear programme


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
        labels: ``(n,)`` class numbers (integers), ``(n,)`` targets of a regression (floating), or ``(n, c)`` targets.

    Returns:
        ``(d, d)``, fp64.

    Raises:
        DataError: if the numbers of examples differ.
    """
    reduced = _onto_labels(features, labels)
    return reduced.t() @ reduced / features.shape[0]


def task_rank(features: Tensor, labels: Tensor) -> int:
    """rank(Sigma_task): how many directions of the features the labels reach.

    At most the number of classes, or of targets; nearly always just that, whatever the labels mean.
    """
    return int(torch.linalg.matrix_rank(_onto_labels(features, labels)))


def label_share(features: Tensor, labels: Tensor) -> float:
    """How much of the features' variance the labels explain: tr(P_Y of centred features) / tr(all of it).

    For classes this is the variance between their means. Labels without a meaning explain (c - 1) / (n - 1) of it in
    the mean; labels that are all the same explain nothing.

    Args:
        features: ``(n, d)``.
        labels: as for `task_covariance`.

    Raises:
        DataError: if the numbers of examples differ.
        NumericalError: for NaN, infinite, or constant features.

    Example:
        >>> features = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> round(label_share(features, torch.tensor([0, 0, 1, 1])), 6)
        0.5
    """
    centred = _centred(features)
    return float(_centred_onto(centred, labels).square().sum() / centred.square().sum())


def label_energy(features: Tensor, labels: Tensor) -> Tensor:
    """Cumulative share of what the labels explain (`label_share`) that lies in the first k principal components.

    Beside CEV(k), which knows nothing of the labels: where this lies below it, the task is in directions of less
    variance than most, and k_task(tau) components hold less than tau of it.

    Args:
        features: ``(n, d)``.
        labels: as for `task_covariance`.

    Returns:
        fp64, of length min(n - 1, d), ascending, 1.0 at the end.

    Raises:
        DataError: if the numbers of examples differ, or the labels explain nothing, as where all are the same.
        NumericalError: for NaN, infinite, or constant features.

    Example:
        >>> features = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [3.0, -1.0], [-3.0, -1.0]])
        >>> label_energy(features, torch.tensor([0, 0, 1, 1])).round(decimals=6).tolist()  # in the second one alone
        [0.0, 1.0]
    """
    centred = _centred(features)
    reduced = _centred_onto(centred, labels)
    if float(reduced.square().sum()) <= 1e-20 * float(centred.square().sum()):
        raise DataError("label_energy: the labels explain nothing of the features; are they all the same?")
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[: min(len(centred) - 1, centred.shape[1])]
    energies = (reduced @ directions.t()).square().sum(0)
    shares: Tensor = energies.cumsum(0) / energies.sum()
    return shares


def separating_dimension(features: Tensor, labels: Tensor, most: int | None = None) -> int | None:
    """The fewest principal components on which a linear classifier separates all examples; None if all do not.

    The paper's words "smallest number of orthogonal directions needed to achieve perfect linear classification", for
    nested directions of falling variance. Separability grows with nested directions, so it is found by doubling and
    bisection.

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
    low, high = 0, 1
    while not _separable(scores[:, :high], labels):  # small problems first: most are decided there
        if high == limit:
            return None
        low, high = high, min(2 * high, limit)
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
    kernel, rebuilt, variances = _kernels(_centred(features))
    eigenvalues = torch.linalg.eigvalsh(kernel).flip(0).clamp(min=0)
    count = min(len(variances), len(eigenvalues))
    mine, theirs = (len(kernel) - 1) * variances[:count], eigenvalues[:count]
    shares = [values.cumsum(0) / values.sum() for values in (mine, theirs)]
    return KernelCheck(
        float((kernel - rebuilt).abs().amax() / kernel.abs().amax()),
        float((mine - theirs).abs().amax() / theirs.amax()),
        float((shares[0] - shares[1]).abs().amax()),
    )


def kernel_pair(features: Tensor) -> tuple[Tensor, Tensor]:
    """K = H H^T of centred features, and P P^T from their principal components P = H V: Figure 5's two kernels.

    Raises:
        DataError: for fewer than two examples.
        NumericalError: for NaN, infinite, or constant features.

    Example:
        >>> kernel, rebuilt = kernel_pair(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        >>> kernel.tolist(), rebuilt.tolist()
        ([[1.0, -1.0], [-1.0, 1.0]], [[1.0, -1.0], [-1.0, 1.0]])
    """
    return _kernels(_centred(features))[:2]


def _kernels(centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K, P P^T, and the eigenvalues of the covariance, largest first."""
    variances, directions = torch.linalg.eigh(centred.t() @ centred / (centred.shape[0] - 1))
    components = centred @ directions.flip(1)
    return centred @ centred.t(), components @ components.t(), variances.flip(0).clamp(min=0)


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
    reduced: Tensor = _row_space(_targets(labels, len(wide))).t() @ wide
    return reduced


def _centred_onto(centred: Tensor, labels: Tensor) -> Tensor:
    """The same of centred labels, whose row space lacks the constant direction."""
    targets = _targets(labels, len(centred))
    moved = targets - targets.mean(0)
    moved[:, moved.abs().amax(0) <= 1e-12 * targets.abs().amax(0)] = 0  # what rounding leaves of a constant
    reduced: Tensor = _row_space(moved).t() @ centred
    return reduced


def _targets(labels: Tensor, n: int) -> Tensor:
    """Y^T: one column per class, or the targets of a regression."""
    if labels.dim() not in (1, 2) or labels.shape[0] != n:
        raise DataError(f"task covariance: {n} examples and labels of shape {tuple(labels.shape)}.")
    if labels.dim() == 1 and not labels.is_floating_point():
        labels = labels[:, None] == torch.unique(labels)
    targets = labels.double().reshape(n, -1)
    if not bool(torch.isfinite(targets).all()):
        raise NumericalError("task covariance: there are NaN or infinite labels.")
    return targets


def _row_space(targets: Tensor) -> Tensor:
    left, values, _ = torch.linalg.svd(targets, full_matrices=False)
    basis: Tensor = left[:, values > values.amax() * 1e-10]
    return basis


def _separable(scores: Tensor, labels: Tensor) -> bool:
    """Whether class numbers are separated by one linear score per class, with a margin: a linear programme.

    The largest margin m of (w_y - w_c) x + (b_y - b_c) >= m over every example and every other class, for weights
    within [-1, 1]: it always has a solution, and m is zero where the classes cannot be separated.
    """
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import csr_matrix

    classes, numbers = torch.unique(labels, return_inverse=True)
    n, count = len(scores), len(classes)
    points = torch.cat([scores * n**0.5, torch.ones(n, 1, dtype=scores.dtype)], dim=1).numpy()
    width = points.shape[1]
    # one constraint per example and class; that of its own class is 0 >= m - 1
    owns = np.eye(count)[numbers.numpy()]  # (n, classes)
    signs = np.eye(count)[None] - owns[:, None]  # (n, other, class): w_other - w_own
    matrix = (signs[..., None] * points[:, None, None]).reshape(n * count, count * width)
    margins = np.ones((n * count, 1))
    problem = {
        "c": np.r_[np.zeros(count * width), -1.0],
        "A_ub": csr_matrix(np.hstack([matrix, margins])),
        "b_ub": owns.reshape(-1),
        "bounds": [*[(-1, 1)] * (count * width), (0, 1)],
    }
    found = linprog(**problem, method="highs-ds", options={"time_limit": _SECONDS})
    if found.status != 0:  # the simplex method can stall where the interior point method does not
        found = linprog(**problem, method="highs-ipm", options={"time_limit": _SECONDS})
    if found.status != 0:
        raise NumericalError(f"separating_dimension: the linear programme of {n} examples failed: {found.message}")
    return bool(found.x[-1] > 1e-6)  # HiGHS keeps constraints to 1e-7
