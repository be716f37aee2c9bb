"""MoSLoRA: LoRA with a trained square matrix, the mixer, between its factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..weights import matrix_of
from .base import Base, Method, Options, numbers, wrap_layers
from .dense import MixedFactors, added_dtype, check_choice, check_range

__all__ = ["METHODS"]


def _check(options: Options) -> None:
    check_choice("moslora", options, "mixer", ("kaiming", "orthogonal"))
    check_range("moslora", options, "r", 1, float("inf"))
    check_range("moslora", options, "dropout", 0, 1)


def _uniform(rows: int, columns: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(rows, columns, dtype=dtype), a=math.sqrt(5), generator=generator)


def _build(base: Base, options: Options) -> nn.Module:
    _check(options)
    r, scale = int(options["r"]), options["alpha"] / options["r"]
    generator = torch.Generator().manual_seed(base.seed)

    def make(name: str, layer: nn.Module) -> MixedFactors:
        weight = matrix_of(layer)
        (rows, columns), dtype = weight.shape, added_dtype(weight)
        A, mixer = _uniform(r, columns, generator, dtype), _uniform(r, r, generator, dtype)
        if options["mixer"] == "orthogonal":
            nn.init.orthogonal_(mixer, generator=generator)
        B = torch.zeros(rows, r, dtype=dtype)
        return MixedFactors(layer, A, mixer, B, scale, options["dropout"], trained=True)

    return wrap_layers(base, base.targets(), make)


def _count(base: Base, options: Options) -> int:
    _check(options)
    r = int(options["r"])
    return sum(r * (rows + columns + r) for _, rows, columns in numbers(base))


METHODS = (
    Method(
        name="moslora",
        title="MoSLoRA",
        source="Wu et al. 2024 (arXiv 2406.11909), compared with the authors' layer",
        formula="r x (outputs + inputs + r) per weight",
        build=_build,
        count=_count,
        options={"r": 16, "alpha": 32, "dropout": 0.05, "mixer": "kaiming"},
        learning_rate=3e-4,
    ),
)
