"""``SliceFineConfig(bias=...)`` as LoRA's users know it: which biases, and their place in an adapter file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..biases import BIAS_NAMES, Biases
from ..errors import AdapterFileError, ConfigError, UnsupportedError
from ..sharded import is_sharded
from .layer import SliceFineLinear

__all__ = [
    "bias_tensors",
    "biases_of",
    "check_one_has_biases",
    "find_biases",
    "hold_biases",
    "refuse_biases",
]

_PREFIX = "base_model.model."
_INSIDE = ".base_layer"
_FSDP1 = "_fsdp_wrapped_module."  # in modules' names, but not in a state dict's


def hold_biases(model: nn.Module, adapter_name: str, bias: str, warn: bool = True) -> None:
    """Let an adapter's layers train biases, too.

    Args:
        model: with the adapter's layers in place.
        adapter_name: the adapter.
        bias: which; one of `BIASES`.
        warn: say so if there are none.
    """
    layers = [m for m in model.modules() if isinstance(m, SliceFineLinear) and adapter_name in m.states]
    if bias == "none" or not layers:
        return
    owners = {id(layer._owner) for layer in layers}
    places = {}
    for name, module in _own_modules(model):
        for parameter in BIAS_NAMES:
            wanted = bias == "all" or id(module) in owners
            if wanted and module._parameters.get(parameter) is not None:
                places[_plain(f"{name}.{parameter}")] = (module, parameter)
    if not places:
        if warn:
            warnings.warn(
                f"SliceFine: bias={bias!r} trains nothing here: {type(model).__name__} has no such biases. Leave it "
                "out.",
                UserWarning,
                stacklevel=2,
            )
        return
    biases = Biases(places)
    for layer in layers:
        layer.states[adapter_name].biases = biases
        layer.follow_biases()


def biases_of(model: nn.Module, adapter_name: str) -> Biases | None:
    """The biases that an adapter trains, if it does."""
    found = (
        m.states[adapter_name] for m in model.modules() if isinstance(m, SliceFineLinear) if adapter_name in m.states
    )
    first = next(found, None)
    return None if first is None else first.biases


def check_one_has_biases(configs: Mapping[str, object]) -> None:
    """Raise `ConfigError` where LoRA refuses, too: several adapters whose biases would be the same parameters."""
    named = _with_bias(configs)
    if len(named) > 1:
        raise ConfigError(
            "SliceFineModel supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' for "
            f"all adapters. Those with bias are {named}."  # PEFT's own words, and which
        )


def refuse_biases(configs: Mapping[str, object]) -> None:
    """Raise `UnsupportedError` if one of the adapters whose sum is to be a new one trains biases."""
    named = _with_bias(configs)
    if named:
        raise UnsupportedError(
            f"add_weighted_adapter: {named[0]!r} trains biases, which one adapter of a model alone may have. Combine "
            'adapters with bias="none", or merge this one first.'
        )


def bias_tensors(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's biases for its file, under the names that LoRA's files have.

    Args:
        model: with the adapter.
        adapter_name: the adapter.
        state_dict: of the model; it may be a snapshot, or gathered from several processes.
    """
    biases = biases_of(model, adapter_name)
    if biases is None:
        return {}
    names = {id(module): name.replace(_FSDP1, "") for name, module in model.named_modules()}
    owners = {id(m._owner) for m in model.modules() if isinstance(m, SliceFineLinear) and adapter_name in m.states}
    values = biases.values()
    result = {}
    for name, (module, parameter) in biases.places.items():
        current = f"{names[id(module)]}.{parameter}"
        place = f"{_PREFIX if current.startswith(_PREFIX) else ''}{name}".rpartition(".")[0]
        key = f"{place}{_INSIDE if id(module) in owners else ''}.{parameter}"
        given = state_dict.get(current) if biases.applied else None
        result[key] = values[name] if given is None or is_sharded(given) else given
    return result


def find_biases(biases: Biases, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Which of a file's tensors are an adapter's biases: ``{name: key in the file}``.

    Raises:
        AdapterFileError: if one is missing, has another shape, or belongs to a module that has none here.
    """
    found = {_plain(key): key for key in tensors if key.rpartition(".")[2] in BIAS_NAMES}
    missing = sorted(biases.places.keys() - found.keys())
    if missing:
        raise AdapterFileError(
            f"the adapter file lacks the bias {missing[0]} ({len(missing)} in all), which this adapter's bias setting "
            "asks for. Load it with the configuration and the base model that it was saved with."
        )
    here = {_plain(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    unknown = sorted(found.keys() - here - biases.places.keys())
    if unknown:
        raise AdapterFileError(
            f"the adapter file has the bias {unknown[0]} ({len(unknown)} in all), and the module here has none. It was "
            "made for another base model."
        )
    for name in biases.places:
        if tuple(tensors[found[name]].shape) != biases.shape(name):
            raise AdapterFileError(
                f"the adapter file's bias {name} has shape {tuple(tensors[found[name]].shape)}, expected "
                f"{biases.shape(name)}. It was made for another base model."
            )
    return {name: found[name] for name in biases.places}


def _with_bias(configs: Mapping[str, object]) -> list[str]:
    return [name for name, config in configs.items() if getattr(config, "bias", "none") != "none"]


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are the model's own: not those that ``modules_to_save`` copied, nor their originals."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            inside = (*inside, f"{name}.")
        elif not name.startswith(inside or ("\0",)):
            yield name, module


def _plain(key: str) -> str:
    """A parameter's name in the base model, whatever lies around it here or in a file."""
    return key.removeprefix(_PREFIX).replace(f"{_INSIDE}.", ".")
