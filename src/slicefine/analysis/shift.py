"""How far a fine-tuned model went from its base: predictions (Figure 7) and representations (Figure 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError, NumericalError

__all__ = ["linear_cka", "prediction_shift"]


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
    if features.dim() != 2 or base_features.dim() != 2 or features.shape[0] != base_features.shape[0]:
        raise DataError(
            f"linear_cka: expected features of the same examples, got {tuple(features.shape)} and "
            f"{tuple(base_features.shape)}."
        )
    if features.shape[0] < 2:
        raise DataError("linear_cka: one example has no variance; give at least two.")
    ours, theirs = (each.detach().double() - each.detach().double().mean(0) for each in (features, base_features))
    if not bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        raise NumericalError("linear_cka: there are NaN or infinite features.")
    own, other = torch.linalg.matrix_norm(ours.t() @ ours), torch.linalg.matrix_norm(theirs.t() @ theirs)
    if float(own) == 0 or float(other) == 0:
        raise NumericalError("linear_cka: all examples have the same features, so there is nothing to compare.")
    return float(torch.linalg.matrix_norm(theirs.t() @ ours).square() / (own * other))
