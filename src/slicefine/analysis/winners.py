"""Winning slices: gradients of slices, how far a slice alone lowers the loss, and the premises of the theorem.

Paper, Definitions 2.2 and 2.3, Theorem 2.4, Lemma D.1. A slice is given by its values, the loss as a function of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, NumericalError
from ..geometry import Slice

__all__ = ["Decrease", "Overlap", "layer_overlap", "overlap", "slice_gradients", "step_decrease"]


def slice_gradients(gradient: Tensor, r: int, axis: str) -> Tensor:
    """||grad_M L||_2 of every position of a slice of r neighbouring rows or columns (Definition 2.2).

    Args:
        gradient: of the whole weight, ``(rows, columns)``.
        r: slice rank.
        axis: ``"row"`` or ``"column"``.

    Returns:
        fp64, one norm per start, ``(lines - r + 1,)``.

    Raises:
        ConfigError: for an unknown axis or a rank that does not fit.

    Example:
        >>> slice_gradients(torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 0.0]]), 2, "row")
        tensor([5., 4.], dtype=torch.float64)
    """
    if axis not in ("row", "column"):
        raise ConfigError(f"slice_gradients: axis={axis!r} is unknown; expected row or column.")
    squares = gradient.detach().double().square().sum(1 if axis == "row" else 0)
    if not 1 <= r <= len(squares):
        raise ConfigError(f"slice_gradients: r={r} must lie between 1 and the {len(squares)} {axis}s.")
    return squares.unfold(0, r, 1).sum(1).sqrt()


@dataclass(frozen=True)
class Overlap:
    """How a slice's Jacobian meets the task subspace at one example (Lemma D.1).

    Attributes:
        gamma: gamma_min(M) = sigma_min(U_k^T J); the Lemma needs it above zero.
        beta: beta(M) = ||(I - U_k U_k^T) J||_2; the Lemma needs it below gamma.
        rank: of U_k^T J; the Theorem needs k.
    """

    gamma: float
    beta: float
    rank: int

    @property
    def premise_holds(self) -> bool:
        """Whether ``0 < beta < gamma`` or ``beta = 0 < gamma``, as Lemma D.1 assumes."""
        return self.gamma > 0 and self.beta < self.gamma


def overlap(jacobian: Tensor, subspace: Tensor) -> Overlap:
    """gamma_min and beta of any slice Jacobian.

    Args:
        jacobian: ``(d, |M|)``, of d features (or logits) with respect to the slice's entries.
        subspace: U_k, ``(d, k)`` with orthonormal columns.

    Raises:
        ConfigError: if the widths differ.
    """
    if jacobian.dim() != 2 or subspace.dim() != 2 or jacobian.shape[0] != subspace.shape[0]:
        raise ConfigError(f"overlap: a Jacobian {tuple(jacobian.shape)} and a subspace {tuple(subspace.shape)} differ.")
    wide, basis = jacobian.detach().double(), subspace.detach().double()
    inside = basis.t() @ wide
    values = torch.linalg.svdvals(inside)
    # fewer entries than directions: the missing singular values of U^T J are zero
    gamma = float(values[-1]) if inside.shape[1] >= inside.shape[0] else 0.0
    beta = float(torch.linalg.matrix_norm(wide - basis @ inside, 2))
    return Overlap(gamma, beta, int(torch.linalg.matrix_rank(inside)))


def layer_overlap(inputs: Tensor, block: Slice, subspace: Tensor) -> Overlap:
    """`overlap` at the layer's own output, in closed form: without the Jacobian of ``out x |M|`` entries.

    For ``phi = W x`` a row slice's Jacobian is ``e_i x^T`` for its rows i: rank at most r, so gamma is zero whenever
    r < k. A column slice's is ``I (x) x_J``: gamma = beta = ||x_J|| whatever the subspace, so that beta < gamma holds
    only if the subspace is everything. At the layer itself the Lemma's premise thus fails for columns and narrow rows.

    Args:
        inputs: of the layer, one example, ``(in,)``.
        block: a row or column slice.
        subspace: U_k of the layer's outputs, ``(out, k)``.

    Raises:
        ConfigError: for a random mask, or a slice outside the layer.
    """
    if block.axis == "entries":
        raise ConfigError("layer_overlap: a random mask has no closed form; give its Jacobian to `overlap`.")
    block.check((subspace.shape[0], inputs.shape[0]), "layer_overlap")
    x, basis = inputs.detach().double(), subspace.detach().double()
    d, k = basis.shape
    part = slice(block.start, block.start + block.width)
    if block.axis == "column":
        norm = float(torch.linalg.vector_norm(x[part]))
        return Overlap(norm, norm if k < d else 0.0, k if norm > 0 else 0)
    own = basis[part]  # (r, k)
    norm = float(torch.linalg.vector_norm(x))
    values = torch.linalg.svdvals(own)
    gamma = float(values[-1]) * norm if own.shape[0] >= k else 0.0
    rest = torch.eye(d, dtype=torch.float64)[:, part] - basis @ own.t()
    rank = int(torch.linalg.matrix_rank(own)) if norm > 0 else 0
    return Overlap(gamma, float(torch.linalg.matrix_norm(rest, 2)) * norm, rank)


@dataclass(frozen=True)
class Decrease:
    """What one step on a slice alone does to the loss (Lemma D.1).

    Attributes:
        gradient: ||grad_M L||_2.
        smoothness: L, the largest absolute eigenvalue of the loss's Hessian in the slice's entries, at the start.
        bound: ||grad_M L||^2 / (2 L): the decrease that the Lemma promises if L held all the way.
        decrease: the measured one, of the step -grad_M L / L; positive when the loss fell.
    """

    gradient: float
    smoothness: float
    bound: float
    decrease: float


def step_decrease(
    loss: Callable[[Tensor], Tensor], values: Tensor, iterations: int = 50, tolerance: float = 1e-4, seed: int = 0
) -> Decrease:
    """Take the Lemma's step on a slice: -grad / L, with L from power iteration on Hessian-vector products.

    Args:
        loss: the loss as a function of the slice's values, twice differentiable.
        values: where to start, any shape.
        iterations: at most.
        tolerance: stop when the estimate changes by less than this share.
        seed: of the first direction.

    Raises:
        NumericalError: if the loss, its gradient or its curvature is not finite.

    Example:
        >>> found = step_decrease(lambda v: 3 * v.square().sum(), torch.tensor([1.0, 2.0]))
        >>> round(found.smoothness, 3), round(found.bound, 3), round(found.decrease, 3)
        (6.0, 15.0, 15.0)
    """
    start = values.detach().clone().requires_grad_(True)
    first = loss(start)
    (gradient,) = torch.autograd.grad(first, start, create_graph=True)
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed)).to(start)
    smoothness = 0.0
    for _ in range(iterations if gradient.requires_grad else 0):  # a linear loss has no curvature
        direction = direction / torch.linalg.vector_norm(direction).clamp(min=1e-30)
        (product,) = torch.autograd.grad(gradient, start, direction, retain_graph=True)
        before, smoothness = smoothness, float(torch.linalg.vector_norm(product))
        direction = product
        if abs(smoothness - before) <= tolerance * smoothness:
            break
    norm = float(torch.linalg.vector_norm(gradient.detach()))
    if not all(map(_finite, (float(first.detach()), norm, smoothness))):
        raise NumericalError("step_decrease: the loss, its gradient or its curvature is not finite.")
    if smoothness == 0:
        return Decrease(norm, 0.0, 0.0 if norm == 0 else float("inf"), 0.0)
    with torch.no_grad():
        after = float(loss(start - gradient.detach() / smoothness))
    return Decrease(norm, smoothness, norm**2 / (2 * smoothness), float(first.detach()) - after)


def _finite(value: float) -> bool:
    return value - value == 0
