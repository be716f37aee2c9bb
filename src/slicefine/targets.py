"""Which layers and parameters of a model a user's names mean."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .errors import ConfigError, nearest
from .layer import SliceLayer
from .quantised import place_of
from .weights import TRAINABLE, is_linear, kind_of, trains

__all__ = [
    "linear_names",
    "match_layers",
    "match_parameters",
    "matches",
    "set_module",
    "shared_names",
    "warn_about_unknown",
]


def match_layers(model: nn.Module, targets: str | Sequence[str], exclude: str | Sequence[str] = ()) -> list[str]:
    """Names of the supported layers that ``targets`` selects and ``exclude`` does not.

    As in PEFT, ``"all-linear"`` leaves a language model's output layer out.

    Raises:
        ConfigError: if nothing matches, or if a weight is shared with another layer.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)() if targets == "all-linear" else None
    kinds = {name: kind_of(module) for name, module in model.named_modules() if name and module is not output}
    found = {
        name: kind
        for name, kind in kinds.items()
        if kind is not None and (targets != "all-linear" or is_linear(model.get_submodule(name)))
        if matches(name, targets) and not (exclude and matches(name, exclude))
    }
    if not found:
        some = [name for name, kind in kinds.items() if kind is not None][:5]
        raise ConfigError(
            f"target_modules={targets!r} matches no layer that can be trained ({TRAINABLE}); this model has for "
            f"example {some}."
        )
    for name, kind in found.items():
        weight = place_of(model.get_submodule(name)) if kind.layout == "quantised" else None
        _check_tied(model, f"{name}.{kind.parameter}", weight)
    warn_about_unknown(model, targets)
    return list(found)


def warn_about_unknown(model: nn.Module, targets: object) -> None:
    """Warn of names in a list of targets that no module of the model has: a slip leaves layers untrained in silence.

    Names of modules that exist and are not trained, for another reason, say nothing.

    Args:
        model: the model.
        targets: as the user gave them; of a regular expression nothing can be said.
    """
    listed = sorted(targets) if isinstance(targets, (set, frozenset, list, tuple)) else []
    names = [name.replace(".base_layer", "") for name, _ in model.named_modules()] if listed else []
    unknown = [target for target in listed if not any(matches(name, [target]) for name in names)]
    if unknown:
        known = {name.rpartition(".")[2] for name in names if name and not name.rpartition(".")[2].isdigit()}
        warnings.warn(
            f"SliceFine: target_modules names {unknown[0]!r}, and the model has no such module; "
            f"{nearest(unknown[0], sorted(known), 'its other layers are trained.')}",
            UserWarning,
            stacklevel=4,
        )


def match_parameters(
    model: nn.Module, targets: Sequence[str], exclude: str | Sequence[str] = (), layers: Sequence[str] = ()
) -> list[str]:
    """Full names of the parameters with two or three dimensions that end as ``targets`` say.

    Args:
        model: the model.
        targets: endings of names.
        exclude: modules to leave out.
        layers: layers that are trained anyway.

    Raises:
        ConfigError: if one of them matches nothing, is shared, or belongs to one of ``layers``.
    """
    found = []
    for name, _ in model.named_parameters():
        path, _, parameter = name.rpartition(".")
        if path and targets and matches(name, targets) and not (exclude and matches(path, exclude)):
            if kind_of(model.get_submodule(path), parameter) is None:
                raise ConfigError(f"target_parameters: {name} is no floating-point weight of 2 or 3 dimensions.")
            _check_tied(model, name)
            found.append(name)
    twice = next((name for name in found if name.rpartition(".")[0] in layers and _is_own(model, name)), None)
    if twice is not None:
        raise ConfigError(f"target_parameters: {twice} is trained by target_modules already; leave it out of one.")
    missing = [target for target in targets if not any(matches(name, [target]) for name in found)]
    if missing:
        raise ConfigError(f"target_parameters: {missing[0]!r} matches no parameter of the model; give full endings.")
    return found


def _is_own(model: nn.Module, parameter: str) -> bool:
    path, _, name = parameter.rpartition(".")
    kind = kind_of(model.get_submodule(path))
    return kind is not None and kind.parameter == name


def _check_tied(model: nn.Module, parameter: str, weight: Tensor | None = None) -> None:
    sharing = shared_names(model, model.get_parameter(parameter) if weight is None else weight)
    if len(sharing) > 1:
        raise ConfigError(
            f"{parameter.removesuffix('.weight')}: its weight is tied to "
            f"{', '.join(n for n in sharing if n != parameter)}; training a slice of it would change both. Exclude the "
            "layer, or untie the weights first."
        )


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of a model's supported layers, for messages: ``["key", "query", "value"]``."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if trains(module)})


def shared_names(model: nn.Module, weight: Any) -> list[str]:
    """Names under which one parameter occurs in a model (more than one: tied)."""
    return [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]


def matches(name: str, targets: str | Sequence[str]) -> bool:
    """Whether a layer's full name is chosen by ``"all-linear"``, a regular expression, or name endings."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, by its full name in the model."""
    path, _, child = name.rpartition(".")
    parent = model.get_submodule(path)
    while isinstance(parent, SliceLayer) and child != "base_layer":  # an attention module's own projection lies in it
        parent = parent.base_layer
    setattr(parent, child, module)
