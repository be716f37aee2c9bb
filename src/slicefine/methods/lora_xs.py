"""LoRA-XS: a small square matrix is trained between frozen factors, the weight's own largest singular directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..weights import matrix_of
from .base import Base, Method, Options, numbers, wrap_layers
from .dense import MixedFactors, added_dtype, check_range

__all__ = ["METHODS", "singular_factors"]

_OVERSAMPLING, _ITERATIONS = 10, 10  # of the randomised decomposition, as scikit-learn's TruncatedSVD has them
_SPREAD = 1e-5  # of the trained matrix at the start


def singular_factors(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``(A, B)`` with ``B @ A`` the best approximation of rank r: B orthonormal, the singular values in A.

    A pure function of the weight, as a file holds the trained matrix alone: the randomised decomposition begins at
    fixed numbers, and the largest entry of each column of B is positive.

    Args:
        weight: ``(out, in)``.
        r: rank.

    Returns:
        ``A`` ``(r, in)`` and ``B`` ``(out, r)``.
    """
    weight = weight.to(added_dtype(weight))
    sample = min(r + _OVERSAMPLING, *weight.shape)
    start = torch.randn(weight.shape[1], sample, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    basis = torch.linalg.qr(weight @ start.to(weight.device)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ basis).Q).Q
    inside, values, right = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
    A, B = values[:r, None] * right[:r], basis @ inside[:, :r]
    signs = B.gather(0, B.abs().argmax(dim=0, keepdim=True)).sign()
    return A * signs.t(), B * signs


def _rank(rows: int, columns: int, options: Options) -> int:
    """A layer's rank: a weight has no more singular directions than its smaller side."""
    check_range("lora_xs", options, "r", 1, float("inf"))
    return min(int(options["r"]), rows, columns)


def _build(base: Base, options: Options) -> nn.Module:
    generator = torch.Generator().manual_seed(base.seed)
    ranks = {name: _rank(rows, columns, options) for name, rows, columns in numbers(base)}

    def make(name: str, layer: nn.Module) -> MixedFactors:
        A, B = singular_factors(matrix_of(layer), ranks[name])
        mixer = torch.empty(ranks[name], ranks[name], dtype=A.dtype).normal_(std=_SPREAD, generator=generator)
        scale = options["alpha"] / options["r"]
        return MixedFactors(layer, A, mixer.to(A.device), B, scale, dropout=0.0, trained=False)

    return wrap_layers(base, list(ranks), make)


def _count(base: Base, options: Options) -> int:
    return sum(_rank(rows, columns, options) ** 2 for _, rows, columns in numbers(base))


METHODS = (
    Method(
        name="lora_xs",
        title="LoRA-XS",
        source="Balazy et al. 2024 (arXiv 2405.17604), compared with the authors' layer and decomposition",
        formula="r x r per weight",
        build=_build,
        count=_count,
        options={"r": 25, "alpha": 16},
        learning_rate=1e-3,
        starts_at_base=False,  # nearly: the trained matrix starts at random values of 1e-5
        additions="r x r + r x (outputs + inputs) per weight, of which r x r are trained",
    ),
)
