"""Spectral balance: whether groups of a weight's rows or columns have like spectra (paper, Lemma 2.1 and Figure 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, NumericalError

__all__ = ["NULLS", "SpectralBalance", "null_weight", "spectral_balance"]

NULLS = ("gaussian", "shuffled", "shuffled_lines")


@dataclass(frozen=True)
class SpectralBalance:
    """How alike the spectra of a weight's groups are. All is 1, 0 and 0 for equal spectra.

    Attributes:
        axis: ``"row"`` or ``"column"``: what the groups are made of.
        eigenvalues: ``(groups, m)``, the nonzero eigenvalues of W_g W_g^T, largest first; m is the smallest group's
            number of lines, or the other side of the matrix where that is smaller.
        energy_ratio: largest over smallest mean eigenvalue of the groups; the Lemma says that it is about 1.
        decay_difference: largest relative difference of two groups' i-th eigenvalues, max |l_i(g) - l_i(g')| / l_i(g'),
            over all i, g and g'; the Lemma bounds it by a small rho.
        variance: mean over i of the variance over groups of the i-th eigenvalue, in squared units of the weight's
            squares. This is what Figure 2 calls rho, a different statistic than the Lemma's.
        relative_variance: the same of eigenvalues divided by the mean of all, which has no units.
    """

    axis: str
    eigenvalues: Tensor
    energy_ratio: float
    decay_difference: float
    variance: float
    relative_variance: float


def spectral_balance(weight: Tensor, groups: int = 8, axis: str = "row") -> SpectralBalance:
    """Compare the spectra of a weight's groups of neighbouring rows or columns.

    The eigenvalues of W_g W_g^T and of W_g^T W_g are the same but for zeros, so the smaller one is decomposed, in fp64.
    For column groups W_g W_g^T has mostly zero eigenvalues, on which relative differences would be 0 / 0.

    Args:
        weight: ``(rows, columns)``.
        groups: number of groups; sizes differ by one line where they have to, and then the smallest eigenvalues of the
            larger groups are left out.
        axis: ``"row"`` or ``"column"``.

    Raises:
        ConfigError: for an unknown axis, something else than a matrix, or more groups than lines.
        NumericalError: for a weight with NaN or infinite values, or with a group of zeros.

    Example:
        >>> found = spectral_balance(torch.eye(6), groups=3)
        >>> found.energy_ratio, found.decay_difference
        (1.0, 0.0)
    """
    lines = _lines(weight, groups, axis)
    spectra = [_spectrum(group) for group in torch.tensor_split(lines, groups)]
    count = min(len(spectrum) for spectrum in spectra)
    # energy per group from all of its own eigenvalues; the comparison one by one from those that every group has
    means = torch.stack([spectrum.mean() for spectrum in spectra])
    values = torch.stack([spectrum[:count] for spectrum in spectra])
    if not bool((means > 0).all()):
        raise NumericalError(
            f"spectral_balance: group {int(means.argmin())} of {groups} is zero; its spectrum is empty."
        )
    lowest, highest = values.amin(0), values.amax(0)
    # numerically zero eigenvalues (a rank-deficient group) have no relative difference
    real = lowest > 1e-12 * values.amax()
    difference = float(((highest - lowest) / lowest)[real].amax()) if bool(real.any()) else float("inf")
    variance = values.var(0, unbiased=False).mean()
    relative = (values / values.mean()).var(0, unbiased=False).mean()
    ratio = float(means.amax() / means.amin())
    return SpectralBalance(axis, values, ratio, difference, float(variance), float(relative))


def null_weight(weight: Tensor, kind: str = "gaussian", seed: int = 0) -> Tensor:
    """A weight to compare with, so that a figure means something.

    Args:
        weight: ``(rows, columns)``.
        kind: ``"gaussian"``: independent values of the same mean and standard deviation: what balance is without any
            training. ``"shuffled"``: the same entries in a random order: what the values' distribution alone gives.
            ``"shuffled_lines"``: whole rows and whole columns in a random order: whether neighbours belong together.
            Balance of row groups does not see the order of columns, nor that of column groups the order of rows.
        seed: of the draw.

    Raises:
        ConfigError: for an unknown kind, or something else than a matrix.

    Example:
        >>> null_weight(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "shuffled_lines").sum()
        tensor(10., dtype=torch.float64)
    """
    if kind not in NULLS:
        raise ConfigError(f"null_weight: kind={kind!r} is unknown; expected one of {', '.join(NULLS)}.")
    if weight.dim() != 2:
        raise ConfigError(f"null_weight: expected a matrix, got a tensor of shape {tuple(weight.shape)}.")
    generator = torch.Generator().manual_seed(seed)
    values = weight.detach().cpu().double()
    if kind == "gaussian":
        return values.mean() + values.std() * torch.randn(values.shape, generator=generator, dtype=values.dtype)
    if kind == "shuffled_lines":
        rows, columns = (torch.randperm(count, generator=generator) for count in values.shape)
        return values[rows][:, columns]
    return values.reshape(-1)[torch.randperm(values.numel(), generator=generator)].reshape(values.shape)


def _lines(weight: Tensor, groups: int, axis: str) -> Tensor:
    if axis not in ("row", "column"):
        raise ConfigError(f"spectral_balance: axis={axis!r} is unknown; expected row or column.")
    if weight.dim() != 2:
        raise ConfigError(f"spectral_balance: expected a matrix, got a tensor of shape {tuple(weight.shape)}.")
    lines = weight.detach() if axis == "row" else weight.detach().t()
    if not 1 <= groups <= lines.shape[0]:
        raise ConfigError(f"spectral_balance: groups={groups} must lie between 1 and the {lines.shape[0]} {axis}s.")
    if not bool(torch.isfinite(lines).all()):
        raise NumericalError("spectral_balance: the weight has NaN or infinite values.")
    return lines


def _spectrum(group: Tensor) -> Tensor:
    """Eigenvalues of the smaller Gram matrix of a group of lines, largest first, never below zero."""
    wide = group.double()
    gram = wide @ wide.t() if wide.shape[0] <= wide.shape[1] else wide.t() @ wide
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0).clamp(min=0)
