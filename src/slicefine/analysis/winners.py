"""Winning slices: gradients of slices, how far a slice alone lowers the loss, and the premises of the theorem.

Paper, Definitions 2.2 and 2.3, Theorem 2.4, Lemma D.1. A slice is given by its values, the loss as a function of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, NumericalError
from ..geometry import Slice

__all__ = [
    "Decrease",
    "GradientNoise",
    "Overlap",
    "descend",
    "layer_overlap",
    "overlap",
    "random_step",
    "slice_gradients",
    "step_decrease",
    "wilson",
]


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
    return _windows(squares, r, axis).sqrt()


class GradientNoise:
    """How far a layer's gradient stands out of its own spread over batches, for every position of a slice.

    In floating point no gradient is exactly zero, so that "non-zero" (Definition 2.2) says nothing. This is the norm
    of the mean gradient over the batches, divided by its standard error: about 1 where the true gradient is zero.

    Example:
        >>> noise = GradientNoise()
        >>> for gradient in ([[3.0], [1.0]], [[5.0], [-1.0]]):
        ...     noise.add(torch.tensor(gradient))
        >>> noise.ratios(1, "row").tolist()
        [4.0, 0.0]
    """

    def __init__(self) -> None:
        self._count = 0
        self._sum = torch.zeros(())
        self._squares = {"row": torch.zeros(()), "column": torch.zeros(())}

    def add(self, gradient: Tensor) -> None:
        """Take the gradient of one batch, ``(rows, columns)``; all batches count alike."""
        wide = gradient.detach().double()
        squares = wide.square()
        self._count += 1
        self._sum = self._sum + wide
        self._squares = {axis: own + squares.sum(1 if axis == "row" else 0) for axis, own in self._squares.items()}

    def mean(self) -> Tensor:
        """The mean gradient, fp64."""
        return self._sum / max(1, self._count)

    def ratios(self, r: int, axis: str) -> Tensor:
        """Mean over standard error of every start; infinite where the batches agree exactly, zero for a zero gradient.

        Raises:
            ConfigError: for an unknown axis or a rank that does not fit.
            DataError: for fewer than two batches, which have no spread.
        """
        if self._count < 2:
            raise DataError(f"GradientNoise: {self._count} batches have no spread; add at least 2.")
        means = slice_gradients(self.mean(), r, axis)
        own = self.mean().square().sum(1 if axis == "row" else 0)
        spread = (self._squares[axis] - self._count * own).clamp(min=0) / (self._count - 1)
        errors = _windows(spread / self._count, r, axis).sqrt()
        return torch.where(means == 0, 0.0, means / errors)


def _windows(values: Tensor, r: int, axis: str) -> Tensor:
    """Sums over r neighbouring lines."""
    if not 1 <= r <= len(values):
        raise ConfigError(f"slice_gradients: r={r} must lie between 1 and the {len(values)} {axis}s.")
    return values.unfold(0, r, 1).sum(1)


@dataclass(frozen=True)
class Overlap:
    """How a slice's Jacobian meets the task subspace at one example (Lemma D.1).

    Attributes:
        gamma: gamma_min(M) = sigma_min(U_k^T J); the Lemma needs it above zero.
        beta: beta(M) = ||(I - U_k U_k^T) J||_2; the Lemma needs it below gamma.
        rank: of U_k^T J; the Theorem needs k. What rounding in the Jacobian's own type makes does not count, and gamma
            is zero below rank k.
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
    values, rank = _values(inside, jacobian.dtype)
    # fewer entries than directions: the missing singular values of U^T J are zero
    gamma = float(values[-1]) if rank == inside.shape[0] else 0.0
    beta = float(torch.linalg.matrix_norm(wide - basis @ inside, 2))
    return Overlap(gamma, beta, rank)


def _values(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Singular values, and the rank of a matrix that was computed in ``dtype``: what rounding makes is no direction."""
    values = torch.linalg.svdvals(matrix.double()) if matrix.numel() else torch.zeros(1, dtype=torch.float64)
    limit = max(matrix.shape) * torch.finfo(dtype).eps * values[0]
    return values, int((values > limit).sum())


def layer_overlap(inputs: Tensor, block: Slice, subspace: Tensor) -> Overlap:
    """`overlap` at the layer's own output, in closed form: without the Jacobian of ``out x |M|`` entries.

    For ``phi = W x`` a row slice's Jacobian is ``e_i x^T`` for its rows i: rank at most r, so gamma is zero whenever
    r < k. A column slice's is ``I (x) x_J``: gamma = beta = ||x_J|| whatever the subspace, so that beta < gamma holds
    only if the subspace is everything. At the layer itself the Lemma's premise thus fails for columns and narrow rows.

    With several positions, phi holds the outputs of all of them and the task subspace is U_k at each. The Jacobians are
    ``X (x) E`` (E: the slice's unit vectors) and ``X_J (x) I``: gamma is zero for columns, too, once there are more
    positions than columns in the slice.

    Args:
        inputs: of the layer, one example: ``(in,)``, or ``(positions, in)``.
        block: a row or column slice.
        subspace: U_k of the layer's outputs, ``(out, k)``.

    Raises:
        ConfigError: for a random mask, or a slice outside the layer.

    Example:
        >>> found = layer_overlap(torch.tensor([3.0, 4.0, 1.0]), Slice("column", 0, 2), torch.eye(5)[:, :2])
        >>> found.gamma, found.beta, found.premise_holds
        (5.0, 5.0, False)
    """
    if block.axis == "entries":
        raise ConfigError("layer_overlap: a random mask has no closed form; give its Jacobian to `overlap`.")
    block.check((subspace.shape[0], inputs.shape[-1]), "layer_overlap")
    x, basis = inputs.detach().double().reshape(-1, inputs.shape[-1]), subspace.detach().double()
    d, k = basis.shape
    part = slice(block.start, block.start + block.width)
    if block.axis == "column":
        inside, outside = torch.eye(k, dtype=x.dtype), torch.eye(d - k, dtype=x.dtype)
        return _product(x[:, part], inside, outside, inputs.dtype)
    own = basis[part].t()  # (k, r)
    return _product(x, own, torch.eye(d, dtype=x.dtype)[:, part] - basis @ own, inputs.dtype)


def _product(x: Tensor, inside: Tensor, outside: Tensor, dtype: torch.dtype) -> Overlap:
    """`Overlap` of ``U^T J = x (x) inside`` and ``(I - U U^T) J = x (x) outside``: singular values multiply."""
    (first, rank), (second, reached), (third, _) = (_values(part, dtype) for part in (x, inside, outside))
    full = rank == x.shape[0] and reached == inside.shape[0]  # else some direction is reached by no entry
    gamma = float(first[-1] * second[-1]) if full else 0.0
    return Overlap(gamma, float(first[0] * third[0]), rank * reached)


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


def descend(loss: Callable[[Tensor], Tensor], values: Tensor, rate: float, steps: int) -> list[Tensor]:
    """Plain gradient steps on a slice alone: its values after each step.

    Args:
        loss: the loss as a function of the slice's values.
        values: where to start, any shape.
        rate: step length over gradient norm, such as 1/L.
        steps: how many.

    Example:
        >>> descend(lambda v: v.square().sum(), torch.tensor([8.0]), 0.25, 3)
        [tensor([4.]), tensor([2.]), tensor([1.])]
    """
    found = []
    at = values.detach().clone()
    for _ in range(steps):
        point = at.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(point), point)
        at = at - rate * gradient
        found.append(at)
    return found


def random_step(values: Tensor, length: float, seed: int = 0) -> Tensor:
    """``values`` moved by ``length`` in a direction drawn evenly from all: what a step without a gradient does.

    Example:
        >>> round(float(random_step(torch.zeros(3, 4), 2.0).norm()), 5)
        2.0
    """
    direction = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step: Tensor = direction * (length / torch.linalg.vector_norm(direction))
    return values.detach() + step.to(values)


def wilson(successes: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a share: the shares that a normal test of the observed one does not reject.

    Raises:
        DataError: unless 0 <= successes <= count and count is above zero.

    Example:
        >>> low, high = wilson(10, 10)
        >>> round(low, 3), high
        (0.722, 1.0)
    """
    if not 0 <= successes <= count or count == 0:
        raise DataError(f"wilson: {successes} of {count} is no share.")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, scale = successes / count, 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def _finite(value: float) -> bool:
    return value - value == 0
