"""DiffFit: biases, normalisation layers, and a scale of what each part of a block adds."""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedError
from ..weights import matrix_of
from .base import Base, Method, Options, block_outputs, wrap_layers
from .dense import ScaledOutput
from .whole import biases, norms

__all__ = ["METHODS"]


def _trained(base: Base) -> dict[str, nn.Parameter]:
    own = biases(base)
    if not own:
        raise UnsupportedError(
            f"diffit trains biases: {type(base.model).__name__} has none; choose another method, such as layernorm."
        )
    return {**own, **norms(base)}


def _parts(base: Base) -> list[str]:
    attention, feed_forward = block_outputs(base)
    return [*attention, *feed_forward]


def _build(base: Base, options: Options) -> nn.Module:
    trained = _trained(base)
    model = wrap_layers(base, _parts(base), lambda name, layer: ScaledOutput(layer))
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return model


def _count(base: Base, options: Options) -> int:
    scales = sum(matrix_of(base.model.get_submodule(name)).shape[0] for name in _parts(base))
    return scales + sum(parameter.numel() for parameter in _trained(base).values())


METHODS = (
    Method(
        name="diffit",
        title="DiffFit",
        source="Xie et al. 2023 (arXiv 2304.06648), compared with the block of mkshing/DiffFit-pytorch",
        formula="all biases and normalisation layers, and 2 x hidden size per block",
        build=_build,
        count=_count,
        differs="made for diffusion transformers; here of any transformer whose blocks add two parts to their input",
        learning_rate=1e-3,
        additions="2 x hidden size per block",
    ),
)
