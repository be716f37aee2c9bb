"""How far a fine-tuned model went from its base: predictions (Figure 7) and representations (Figure 8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import DataError, NumericalError
from .kernels import unbiased_cka

__all__ = ["debiased_cka", "linear_cka", "prediction_shift", "relative_change"]


def prediction_shift(logits: Tensor, base_logits: Tensor) -> float:
    """KL_D(theta_r || theta_b): the mean over examples of sum_c p_r(c) log(p_r(c) / p_b(c)), in nats (Appendix C.2).

    Args:
        logits: of the fine-tuned model, ``(n, classes)``.
        base_logits: of the base, the same shape.

    Raises:
        DataError: if the shapes differ, or there is one class or no example.
        NumericalError: for NaN or infinite logits.

    Example:
        >>> prediction_shift(torch.zeros(3, 2), torch.zeros(3, 2))
        0.0
    """
    if logits.shape != base_logits.shape or logits.dim() != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
        raise DataError(
            f"prediction_shift: expected two tensors (examples, classes), got {tuple(logits.shape)} and "
            f"{tuple(base_logits.shape)}."
        )
    ours, theirs = (torch.log_softmax(each.detach().double(), dim=1) for each in (logits, base_logits))
    if not bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        raise NumericalError("prediction_shift: there are NaN or infinite logits.")
    return float((ours.exp() * (ours - theirs)).sum(1).mean())


def linear_cka(features: Tensor, base_features: Tensor) -> float:
    """Linear CKA of two representations of the same examples: 1 for equal ones up to rotation and scale (Appendix C.3).

    ||H_b^T H_r||_F^2 / (||H_b^T H_b||_F ||H_r^T H_r||_F), both centred. Widths may differ.

    Args:
        features: ``(n, d)``.
        base_features: ``(n, d')``.

    Raises:
        DataError: if the numbers of examples differ or are below 2.
        NumericalError: for NaN, infinite or constant features.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
        >>> round(linear_cka(features, 5 * features.flip(1)), 6)
        1.0
    """
    ours, theirs = _same_examples("linear_cka", features, base_features, 2)
    own, other = torch.linalg.matrix_norm(ours.t() @ ours), torch.linalg.matrix_norm(theirs.t() @ theirs)
    return float(torch.linalg.matrix_norm(theirs.t() @ ours).square() / (own * other))


def debiased_cka(features: Tensor, base_features: Tensor) -> float:
    """Linear CKA from the unbiased estimate of HSIC: about 0 for unrelated features, however few the examples.

    `linear_cka` of unrelated features grows with the width and falls with n: with n below the width it is near 1 for
    anything. HSIC_1 (Song et al. 2012; Nguyen et al. 2021) leaves the Gram matrices' diagonals out.

    Args:
        features: ``(n, d)``, n at least 4.
        base_features: ``(n, d')``.

    Returns:
        At most 1, and below 0 at times.

    Raises:
        DataError: if the numbers of examples differ or are below 4.
        NumericalError: for NaN, infinite or constant features, or such whose Gram matrix is constant off its diagonal.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [2.0, 5.0], [4.0, 4.0]])
        >>> round(debiased_cka(features, 5 * features.flip(1)), 6)
        1.0
    """
    ours, theirs = _same_examples("debiased_cka", features, base_features, 4)
    return unbiased_cka(ours @ ours.t(), theirs @ theirs.t())


def relative_change(weight: Tensor, base_weight: Tensor) -> float:
    """||W_r - W_b||_F / ||W_b||_F: how far a weight went, as a share of where it came from.

    Args:
        weight: of the fine-tuned model.
        base_weight: of the base, the same shape.

    Returns:
        0 for equal weights; infinite if the base's are all zero and the others not.

    Raises:
        DataError: if the shapes differ.
        NumericalError: for NaN or infinite weights.

    Example:
        >>> relative_change(torch.tensor([[3.0, 5.0]]), torch.tensor([[3.0, 4.0]]))
        0.2
    """
    if weight.shape != base_weight.shape:
        raise DataError(
            f"relative_change: a weight {tuple(weight.shape)} and a base {tuple(base_weight.shape)} have no difference."
        )
    base = base_weight.detach().double()
    change = float(torch.linalg.vector_norm(weight.detach().double() - base))
    size = float(torch.linalg.vector_norm(base))
    if not (math.isfinite(change) and math.isfinite(size)):
        raise NumericalError("relative_change: there are NaN or infinite weights.")
    if size == 0:
        return math.inf if change else 0.0
    return change / size


def _same_examples(where: str, features: Tensor, base_features: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both centred, in fp64."""
    if features.dim() != 2 or base_features.dim() != 2 or features.shape[0] != base_features.shape[0]:
        raise DataError(
            f"{where}: expected features of the same examples, got {tuple(features.shape)} and "
            f"{tuple(base_features.shape)}."
        )
    if features.shape[0] < 2:
        raise DataError(f"{where}: one example has no variance; give at least two.")
    if features.shape[0] < least:
        raise DataError(f"{where}: got {features.shape[0]} examples; the unbiased estimate needs at least {least}.")
    ours, theirs = (each.detach().double() for each in (features, base_features))
    if not bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        raise NumericalError(f"{where}: there are NaN or infinite features.")
    if bool((ours == ours[0]).all() or (theirs == theirs[0]).all()):
        raise NumericalError(f"{where}: all examples have the same features, so there is nothing to compare.")
    return ours - ours.mean(0), theirs - theirs.mean(0)
