"""Methods that train parameters the base has: all of them, none but the head, biases, norms, scale and shift."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..biases import BIAS_NAMES
from ..errors import ConfigError, UnsupportedError
from .base import Base, Method, Options, freeze

__all__ = ["METHODS"]


def _full(base: Base, options: Options) -> nn.Module:
    return base.model.requires_grad_(True)


def _all(base: Base, options: Options) -> int:
    heads = {id(p) for name in base.head for p in base.model.get_submodule(name).parameters()}
    return sum(p.numel() for p in base.model.parameters() if id(p) not in heads)


def _head(base: Base, options: Options) -> nn.Module:
    if not base.head:
        raise ConfigError("method.name=head trains a new head, and this task has none; use slicefine, lora or full.")
    freeze(base)
    return base.model


def biases(base: Base) -> dict[str, nn.Parameter]:
    """All biases outside the head (those of norms and of packed attention are among them, as in BitFit)."""
    return _named(base, lambda module, name: name in BIAS_NAMES)


def norms(base: Base) -> dict[str, nn.Parameter]:
    """Weights and biases of all normalisation layers."""
    return _named(base, lambda module, name: "norm" in type(module).__name__.lower())


def _named(base: Base, chosen: Callable[[nn.Module, str], bool]) -> dict[str, nn.Parameter]:
    heads = tuple(f"{name}." for name in base.head) or ("\0",)
    found = {}
    for path, module in base.model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if chosen(module, name) and not f"{path}.".startswith(heads):
                found[f"{path}.{name}"] = parameter
    return found


def _train(pick: Callable[[Base], dict[str, nn.Parameter]], what: str) -> Callable[[Base, Options], nn.Module]:
    def build(base: Base, options: Options) -> nn.Module:
        chosen = pick(base)
        if not chosen:
            raise UnsupportedError(f"{what}: {type(base.model).__name__} has none; choose another method.")
        freeze(base)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        return base.model

    return build


def _count(pick: Callable[[Base], dict[str, nn.Parameter]]) -> Callable[[Base, Options], int]:
    return lambda base, options: sum(parameter.numel() for parameter in pick(base).values())


METHODS = (
    Method(
        name="full",
        title="Full fine-tuning",
        source="-",
        formula="all entries of the model",
        build=_full,
        count=_all,
        learning_rate=5e-5,
        saves="model",
        additions="0",
    ),
    Method(
        name="head",
        title="Head only",
        source="-",
        formula="0 (the head alone)",
        build=_head,
        count=lambda base, options: 0,
        learning_rate=5e-3,
        saves="model",
        additions="0",
    ),
    Method(
        name="bitfit",
        title="BitFit",
        source="Zaken et al. 2021 (arXiv 2106.10199)",
        formula="all biases, those of normalisation layers included",
        build=_train(biases, "bitfit trains biases"),
        count=_count(biases),
        learning_rate=1e-3,
        additions="0",
    ),
    Method(
        name="layernorm",
        title="LayerNorm tuning",
        source="Zhao et al. 2023 (arXiv 2312.11420)",
        formula="weights and biases of all normalisation layers",
        build=_train(norms, "layernorm trains normalisation layers"),
        count=_count(norms),
        learning_rate=1e-3,
        additions="0",
    ),
)
