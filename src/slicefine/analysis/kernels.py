"""Empirical neural tangent kernels from Jacobians, and how far two kernels are apart (paper, Remark B.1).

A kernel is ``(n, n)``, or ``(n c, n c)`` where each example has c outputs, ordered example by example.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DataError, NumericalError

__all__ = ["centred_kernel", "kernel_alignment", "kernel_distance", "ntk", "readout_ntk", "unbiased_cka"]


def ntk(jacobians: Tensor | Sequence[Tensor], trace: bool = False) -> Tensor:
    """The empirical NTK, K[(i, a), (j, b)] = <d f_a(x_i) / d theta, d f_b(x_j) / d theta> (Remark B.1).

    Args:
        jacobians: one per example, ``(outputs, parameters)`` each, as `collect.slice_jacobian` gives them.
        trace: sum over equal outputs, sum_a K[(i, a), (j, a)]: one number per pair of examples.

    Returns:
        fp64, ``(n c, n c)``, or ``(n, n)`` of the trace.

    Raises:
        DataError: for no Jacobian, or if their shapes differ.
        NumericalError: for NaN or infinite values.

    Example:
        >>> jacobians = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [2.0, 0.0]]])  # 2 examples, 2 outputs
        >>> ntk(jacobians)[0].tolist(), ntk(jacobians, trace=True).tolist()
        ([1.0, 0.0, 0.0, 2.0], [[2.0, 0.0], [0.0, 8.0]])
    """
    each = list(jacobians)
    shapes = {tuple(jacobian.shape) for jacobian in each}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        known = ", ".join(map(str, sorted(shapes)[:3])) or "none"
        raise DataError(f"ntk: expected Jacobians of one shape (outputs, parameters) per example, got {known}.")
    stacked = torch.stack([jacobian.detach().double() for jacobian in each])  # (n, outputs, parameters)
    if not bool(torch.isfinite(stacked).all()):
        raise NumericalError("ntk: there are NaN or infinite values in the Jacobians.")
    # the trace is the Gram matrix of whole Jacobians
    rows = stacked.flatten(1) if trace else stacked.flatten(0, 1)
    return rows @ rows.t()


def readout_ntk(features: Tensor, outputs: int = 1, bias: bool = False) -> Tensor:
    """The NTK of a linear readout of fixed features, in closed form: (H H^T) (x) I_c (Remark B.1).

    The outputs do not meet: output a depends on row a of the weight alone. Features are not centred here; the paper's
    centred kernel is what is left after `centred_kernel`. A bias adds one to each entry of H H^T.

    Args:
        features: the readout's inputs, ``(n, d)``: the paper's H.
        outputs: number c of outputs.
        bias: whether the readout's bias is among the parameters.

    Returns:
        fp64, ``(n c, n c)``.

    Raises:
        DataError: for features that are no matrix, or fewer than one output.
        NumericalError: for NaN or infinite values.

    Example:
        >>> readout_ntk(torch.tensor([[1.0], [2.0]]), outputs=2).tolist()[0]
        [1.0, 0.0, 2.0, 0.0]
    """
    if features.dim() != 2 or outputs < 1:
        raise DataError(
            f"readout_ntk: features {tuple(features.shape)} and outputs={outputs}; expected (n, d) and >= 1."
        )
    wide = features.detach().double()
    if not bool(torch.isfinite(wide).all()):
        raise NumericalError("readout_ntk: there are NaN or infinite features.")
    kernel = wide @ wide.t() + float(bias)
    return torch.kron(kernel, torch.eye(outputs, dtype=torch.float64))


def centred_kernel(kernel: Tensor) -> Tensor:
    """C K C with C = I - 1 1^T / n: the kernel of the centred features, where K is that of features (Lemma 2.5).

    Raises:
        DataError: if the kernel is not square.
        NumericalError: for NaN or infinite values.

    Example:
        >>> centred_kernel(torch.tensor([[1.0, 3.0], [3.0, 9.0]])).tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    wide = _checked(kernel, "centred_kernel")
    return wide - wide.mean(0, keepdim=True) - wide.mean(1, keepdim=True) + wide.mean()


def kernel_distance(kernel: Tensor, other: Tensor) -> float:
    """||K1 - K0||_F / ||K0||_F: how far a kernel moved, as a share of where it was; small in the lazy regime.

    Args:
        kernel: K0, the reference.
        other: K1, of the same examples.

    Raises:
        DataError: if the kernels are not square, or differ in shape.
        NumericalError: for NaN or infinite values, or if K0 is zero.

    Example:
        >>> kernel_distance(torch.eye(3), 3 * torch.eye(3))
        2.0
    """
    before, after = _pair(kernel, other, "kernel_distance")
    size = float(torch.linalg.matrix_norm(before))
    if size == 0:
        raise NumericalError("kernel_distance: the reference kernel is zero, so no share of it can be told.")
    return float(torch.linalg.matrix_norm(after - before)) / size


def kernel_alignment(kernel: Tensor, other: Tensor, centred: bool = False) -> float:
    """<K0, K1>_F / (||K0||_F ||K1||_F): 1 for kernels that are equal up to scale; of centred kernels it is linear CKA.

    Args:
        kernel: K0.
        other: K1, of the same examples.
        centred: centre both first, which leaves out what all examples have in common.

    Raises:
        DataError: if the kernels are not square, or differ in shape.
        NumericalError: for NaN or infinite values, or if one of them is zero (after centring).

    Example:
        >>> kernel_alignment(torch.eye(3), 5 * torch.eye(3)), kernel_alignment(torch.eye(4), torch.ones(4, 4))
        (1.0, 0.5)
    """
    first, second = _pair(kernel, other, "kernel_alignment")
    scales = [float(each.abs().amax()) for each in (first, second)]
    if centred:
        first, second = centred_kernel(first), centred_kernel(second)
    # what rounding leaves of a constant kernel is no direction
    if any(float(k.abs().amax()) <= 1e-12 * scale for k, scale in zip((first, second), scales, strict=True)):
        raise NumericalError("kernel_alignment: one of the kernels is zero, so it has no direction.")
    first, second = (each / torch.linalg.matrix_norm(each) for each in (first, second))
    return float((first * second).sum())


def unbiased_cka(kernel: Tensor, other: Tensor) -> float:
    """Linear CKA without its bias for few examples: 1 for equal kernels, 0 in the mean for unrelated ones.

    Of n examples with many more features than that, any two kernels are nearly diagonal, and their CKA is near 1
    whatever they are. Here the diagonals are left out (Song et al., 2012, Nguyen et al., 2021); values below 0 occur.

    Args:
        kernel: K0.
        other: K1, of the same examples, at least four.

    Raises:
        DataError: if the kernels are not square, differ in shape, or have fewer than four examples.
        NumericalError: for NaN or infinite values, or if one of them is constant.

    Example:
        >>> kernel = torch.tensor([[1.0, 2, 0, 0], [2, 5, 1, 0], [0, 1, 3, 1], [0, 0, 1, 1]])
        >>> round(unbiased_cka(kernel, 3 * kernel), 6)
        1.0
    """
    first, second = (_without_diagonal(each) for each in _pair(kernel, other, "unbiased_cka"))
    own, others = torch.linalg.matrix_norm(first), torch.linalg.matrix_norm(second)
    if float(own) == 0 or float(others) == 0:
        raise NumericalError("unbiased_cka: one of the kernels is constant off its diagonal; it has no direction.")
    return float((first * second).sum() / (own * others))


def _without_diagonal(kernel: Tensor) -> Tensor:
    """A kernel centred by its entries off the diagonal alone, which becomes zero."""
    n = kernel.shape[0]
    if n < 4:
        raise DataError(f"unbiased_cka: {n} examples; expected at least 4.")
    off = ~torch.eye(n, dtype=torch.bool)
    entries = kernel * off
    sums = entries.sum(0)
    centred = (entries - (sums[:, None] + sums) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))) * off
    # what rounding leaves of a constant kernel is no direction
    return centred * (centred.abs() > 1e-12 * kernel.abs().amax())


def _checked(kernel: Tensor, where: str) -> Tensor:
    if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1] or kernel.shape[0] < 1:
        raise DataError(f"{where}: expected a square kernel, got {tuple(kernel.shape)}.")
    wide = kernel.detach().double()
    if not bool(torch.isfinite(wide).all()):
        raise NumericalError(f"{where}: there are NaN or infinite values.")
    return wide


def _pair(kernel: Tensor, other: Tensor, where: str) -> tuple[Tensor, Tensor]:
    if kernel.shape != other.shape:
        raise DataError(f"{where}: kernels of shapes {tuple(kernel.shape)} and {tuple(other.shape)} differ.")
    return _checked(kernel, where), _checked(other, where)
