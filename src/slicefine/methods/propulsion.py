"""Propulsion: the output of every weight is scaled by a trained vector to a fixed power."""

from __future__ import annotations

from torch import nn

from .base import Base, Method, Options, numbers, wrap_layers
from .dense import ScaledOutput, check_range

__all__ = ["METHODS"]


def _build(base: Base, options: Options) -> nn.Module:
    _check(options)
    return wrap_layers(base, base.targets(), lambda name, layer: ScaledOutput(layer, int(options["power"])))


def _count(base: Base, options: Options) -> int:
    _check(options)
    return sum(rows for _, rows, _ in numbers(base))


def _check(options: Options) -> None:
    check_range("propulsion", options, "power", 1, 1000)


METHODS = (
    Method(
        name="propulsion",
        title="Propulsion",
        source="Kowsher et al. 2024 (arXiv 2409.10927), compared with the authors' layer",
        formula="outputs per weight",
        build=_build,
        count=_count,
        differs="scales dense layers only: the authors' code can scale embeddings, and trains biases on request",
        options={"power": 15},
        learning_rate=1e-3,
    ),
)
