"""What slices and adapters reach: spans of Jacobians, the Lemma's certificate, and ranks of what can be added.

Paper, Theorem 2.4 (equation 5), Lemma D.1, Corollary D.3, Appendix on alternating slices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, NumericalError
from ..geometry import Slice
from .winners import Overlap, layer_overlap

__all__ = [
    "Certificate",
    "Span",
    "certificate",
    "directions",
    "joint_rank",
    "logit_gradient",
    "lora_jacobian",
    "lora_overlap",
    "span",
]


def directions(features: Tensor, k: int) -> Tensor:
    """U_k: the top k left singular vectors of Phi, ``(d, k)``, of features that are not centred (Lemma D.1).

    Args:
        features: ``(n, d)``, the transpose of Phi.
        k: at most the rank that n examples of width d can have.

    Raises:
        ConfigError: if k does not fit.
        NumericalError: for NaN or infinite features.

    Example:
        >>> directions(torch.tensor([[0.0, 3.0], [1.0, 0.0]]), 1).abs().flatten().tolist()
        [0.0, 1.0]
    """
    wide = features.detach().double()
    if not bool(torch.isfinite(wide).all()):
        raise NumericalError("directions: there are NaN or infinite features.")
    if not 1 <= k <= min(wide.shape):
        raise ConfigError(
            f"directions: k={k} must lie between 1 and {min(wide.shape)} for features {tuple(wide.shape)}."
        )
    found: Tensor = torch.linalg.svd(wide, full_matrices=False).Vh[:k].t()
    return found


@dataclass(frozen=True)
class Certificate:
    """Lemma D.1 in numbers, for one slice and example.

    Attributes:
        rho: ||g_perp|| / ||g_task||; the Lemma assumes that it is below 1. Infinite without a task part.
        bound: gamma ||g_task|| - beta ||g_perp||, which is (1 - c rho) gamma ||g_task|| for c = beta / gamma.
        measured: ||grad_M L||.
    """

    rho: float
    bound: float
    measured: float

    @property
    def vacuous(self) -> bool:
        """Whether the bound says nothing, because no norm is below it; what rounding leaves does not count."""
        return self.bound <= 1e-9 * self.measured

    @property
    def holds(self) -> bool:
        """Whether the measured gradient is at least the bound, up to rounding in fp32."""
        return self.measured >= self.bound - 1e-4 * abs(self.bound)


def certificate(overlap: Overlap, gradient: Tensor, subspace: Tensor, measured: float) -> Certificate:
    """The Lemma's lower bound on a slice's gradient, from the feature gradient's two parts.

    Args:
        overlap: gamma and beta of the slice.
        gradient: g_phi, ``(d,)``, or ``(positions, d)`` if the subspace is meant at each position.
        subspace: U_k, ``(d, k)``.
        measured: ||grad_M L||.

    Raises:
        DataError: if the widths differ.

    Example:
        >>> found = certificate(Overlap(2.0, 1.0, 1), torch.tensor([3.0, 1.0]), torch.eye(2)[:, :1], 5.5)
        >>> found.bound, found.holds, found.vacuous
        (5.0, True, False)
    """
    wide, basis = gradient.detach().double(), subspace.detach().double()
    if wide.shape[-1] != basis.shape[0]:
        raise DataError(f"certificate: a gradient {tuple(wide.shape)} and a subspace {tuple(basis.shape)} differ.")
    inside = wide @ basis
    task = float(torch.linalg.vector_norm(inside))
    rest = float(torch.linalg.vector_norm(wide - inside @ basis.t()))
    rho = rest / task if task > 0 else math.inf
    return Certificate(rho, overlap.gamma * task - overlap.beta * rest, measured)


def logit_gradient(logits: Tensor, label: Tensor) -> Tensor:
    """The gradient of one example's loss with respect to its logits, fp64.

    Args:
        logits: ``(classes,)``, or ``(1,)`` for a regression.
        label: class number, or target of a regression with the squared error.

    Example:
        >>> logit_gradient(torch.zeros(2), torch.tensor(1)).tolist()
        [0.5, -0.5]
    """
    wide = logits.detach().double()
    if len(wide) == 1:
        return 2 * (wide - label.double().reshape(1))
    result = torch.softmax(wide, 0)
    result[int(label)] -= 1
    return result


@dataclass(frozen=True)
class Span:
    """Dimension of a span of Jacobians (equation 5).

    Attributes:
        rank: singular values above a share of the largest one.
        effective: exp of the entropy of the singular values' shares of their sum (Roy and Vetterli, 2007).
        outputs: number of rows: the largest possible rank.
    """

    rank: int
    effective: float
    outputs: int


def span(kernel: Tensor, tolerance: float = 1e-5) -> Span:
    """The span of Jacobians from their kernel ``J J^T``, such as a sum of `kernels.ntk` over slices.

    Args:
        kernel: ``(n c, n c)``, fp64, so that a tolerance of 1e-5 of singular values is 1e-10 of eigenvalues.
        tolerance: share of the largest singular value.

    Raises:
        NumericalError: for NaN or infinite values.

    Example:
        >>> found = span(torch.diag(torch.tensor([4.0, 4.0, 0.0])))
        >>> found.rank, round(found.effective, 3), found.outputs
        (2, 2.0, 3)
    """
    wide = kernel.detach().double()
    if not bool(torch.isfinite(wide).all()):
        raise NumericalError("span: there are NaN or infinite values in the kernel.")
    values = torch.linalg.eigvalsh(wide).clamp(min=0).sqrt()
    most = float(values[-1])
    if most == 0:
        return Span(0, 0.0, len(wide))
    kept = values[values > tolerance * most]
    shares = kept / kept.sum()
    return Span(len(kept), float((-(shares * shares.log()).sum()).exp()), len(wide))


def lora_jacobian(jacobian: Tensor, factor: Tensor) -> Tensor:
    """A LoRA's Jacobian from the whole weight's, at its usual start B = 0 (Corollary D.3).

    W + B A depends at B = 0 on B alone, through dW = dB A; the entries of A have a zero Jacobian and are left out.

    Args:
        jacobian: of the whole weight, ``(outputs, rows, columns)``.
        factor: A, ``(rank, columns)``, with the scale that the adapter multiplies by.

    Returns:
        ``(outputs, rows * rank)``.
    """
    return (jacobian @ factor.t().to(jacobian)).flatten(1)


def lora_overlap(inputs: Tensor, factor: Tensor, subspace: Tensor) -> Overlap:
    """`layer_overlap` of a LoRA at B = 0: that of a column slice which sees A x instead of x_J.

    Hence gamma = beta = ||A x|| at one position, and the Lemma's premise fails as it does for columns.

    Args:
        inputs: of the layer, one example: ``(in,)``, or ``(positions, in)``.
        factor: A, ``(rank, in)``, with the scale that the adapter multiplies by.
        subspace: U_k of the layer's outputs, ``(out, k)``.

    Example:
        >>> lora_overlap(torch.tensor([3.0, 4.0]), torch.eye(2), torch.eye(3)[:, :1]).gamma
        5.0
    """
    reduced = inputs.detach().double() @ factor.detach().double().t()
    return layer_overlap(reduced, Slice("column", 0, factor.shape[0]), subspace)


def joint_rank(inputs: Tensor, row: Slice, column: Slice, rows: int) -> tuple[int, int, int]:
    """Ranks of the Jacobians of a row slice, a column slice, and both, at the layer's own output over all positions.

    Rows give ``X (x) E`` of rank ``r_v rank(X)``. Columns give ``X_J (x) I`` of rank ``rank(X_J) d``, which holds what
    the rows add at all outputs of theirs but for directions of X outside X_J. Over few positions the columns alone
    reach all outputs, so that r_v + r_h counts something else: the rank of the change itself.

    Args:
        inputs: of the layer, ``(positions, in)``.
        row: the row slice.
        column: the column slice.
        rows: of the weight: d.
    """
    wide = inputs.detach().double()
    rounding = max(wide.shape) * torch.finfo(inputs.dtype).eps
    own, part = (int(torch.linalg.matrix_rank(each, rtol=rounding)) for each in (wide, wide[:, list(column.indices())]))
    alone = row.width * own, part * rows
    return *alone, alone[1] + row.width * (own - part)
