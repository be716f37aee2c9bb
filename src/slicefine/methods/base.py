"""What a fine-tuning method is, and what it is given: the protocol of every entry of the registry.

A method changes a loaded model so that only its own parameters train. Adding one is one file in this folder with a
`Method` in its ``METHODS``, and its name in the registry's list of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedError
from ..targets import matches, shared_names
from ..weights import matrix_of, supports
from ..window import block_paths

__all__ = [
    "Base",
    "Method",
    "MethodLayer",
    "block_outputs",
    "freeze",
    "merge_layers",
    "numbers",
    "options_of",
    "replace_layer",
    "wrap_layers",
]

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Base:
    """A pretrained model before a method is put on.

    Attributes:
        model: changed in place by the method.
        head: names of modules that are new and trained whole beside the method.
        target_modules: which dense layers a method of weights may change, as PEFT says it.
        exclude_modules: which of these to leave out.
        layers_to_transform: indices of blocks; None is all.
        task_type: PEFT's name of the model class, or None.
        steps: optimizer steps of the whole run.
        seed: of what the method draws itself.
    """

    model: nn.Module
    head: tuple[str, ...] = ()
    target_modules: str | list[str] | None = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: list[int] | None = None
    task_type: str | None = None
    steps: int = 1000
    seed: int = 0

    def targets(self) -> list[str]:
        """Names of the dense layers to change, in the order of the model; heads are left out.

        Raises:
            ConfigError: if there is none.
        """
        own = [*self.head, *(n for n, m in self.model.named_modules() if m is self._output())]
        heads = tuple(f"{name}." for name in own)
        wanted = "all-linear" if self.target_modules is None else self.target_modules
        names = [
            name
            for name, module in self.model.named_modules()
            if supports(module) and matches(name, wanted) and not f"{name}.".startswith(heads or ("\0",))
            if not (self.exclude_modules and matches(name, self.exclude_modules))
        ]
        names = self.inside(names)
        if not names:
            raise ConfigError(f"slice.target_modules={self.target_modules!r} matches no dense layer of the model.")
        for name in names:
            if len(sharing := shared_names(self.model, self.model.get_submodule(name).weight)) > 1:
                raise ConfigError(
                    f"{name}: its weight is tied ({', '.join(sharing)}); leave the layer out, or untie it."
                )
        return names

    def inside(self, names: list[str]) -> list[str]:
        """Those of the layers that lie in the chosen blocks.

        Raises:
            ConfigError: for a block that the model does not have.
        """
        if self.layers_to_transform is None or not names:
            return names
        paths = block_paths(names)
        wrong = [index for index in self.layers_to_transform if not 0 <= index < len(paths)]
        if wrong:
            raise ConfigError(f"slice.layers_to_transform={wrong}: the model has the blocks 0 to {len(paths) - 1}.")
        return [name for name in names if name.startswith(tuple(f"{paths[i]}." for i in self.layers_to_transform))]

    def _output(self) -> Any:
        return getattr(self.model, "get_output_embeddings", lambda: None)() or self


@dataclass(frozen=True)
class Method:
    """One entry of the registry.

    Attributes:
        name: how recipes call it.
        title: how tables call it.
        source: paper, and the implementation that is used or was compared with.
        formula: trained entries, in words of the model's dimensions; `count` computes it.
        build: ``(base, options) -> model`` whose trainable parameters are the method's and the head's.
        count: ``(base, options) -> entries`` that the method trains, without the head, from the base's shapes alone.
        differs: where it differs from the original; empty where it does not.
        options: what `method.options` may set, with defaults.
        learning_rate: default peak rate, from which a search starts.
        saves: ``adapter`` (a folder in PEFT's layout), ``tensors`` (the trained tensors alone) or ``model``.
        starts_at_base: whether outputs before the first step are the base's.
        merges: whether the trained model can be turned into the base's own layers.
        additions: entries that are added to the model, in words; "0" where trained in place.
        groups: ``(parameter name, options) -> factor`` of the learning rate where parts have their own; None: 1.
        optimizer: ``(model, options, rate, decay) -> optimizer`` where the method has its own; None is the recipe's.
        penalty: ``(model, progress) -> scalar`` added to the loss; progress runs from 0 to 1.
        after_step: ``(model, step, steps)``, called after each optimizer step with gradients still there.
    """

    name: str
    title: str
    source: str
    formula: str
    build: Callable[[Base, Options], nn.Module]
    count: Callable[[Base, Options], int]
    differs: str = ""
    options: Options = field(default_factory=dict)
    learning_rate: float = 1e-3
    saves: Literal["adapter", "tensors", "model"] = "tensors"
    starts_at_base: bool = True
    merges: bool = True
    additions: str = "as trained"
    groups: Callable[[str, Options], float] | None = None
    optimizer: Callable[[nn.Module, Options, float, float], torch.optim.Optimizer] | None = None
    penalty: Callable[[nn.Module, float], Tensor] | None = None
    after_step: Callable[[nn.Module, int, int], None] | None = None


def options_of(method: Method, given: Options) -> dict[str, Any]:
    """A method's options with what is given put in.

    Raises:
        ConfigError: for an option that the method does not have, or one of another type.

    Example:
        >>> method = Method("x", "X", "", "", None, None, options={"r": 8})
        >>> options_of(method, {"r": 4})
        {'r': 4}
    """
    unknown = sorted(set(given) - set(method.options))
    if unknown:
        known = ", ".join(method.options) or "none"
        raise ConfigError(f"method.options: {method.name} has no {', '.join(unknown)}; its options are: {known}.")
    for name, value in given.items():
        default = method.options[name]
        number = isinstance(default, int | float) and not isinstance(default, bool)
        fits = isinstance(value, int | float) and not isinstance(value, bool) if number else True
        if not fits or (isinstance(default, int) and number and (value != int(value) or value < min(1, default))):
            raise ConfigError(f"method.options.{name}={value!r}: expected a number like {default!r} for {method.name}.")
    return {**method.options, **given}


class MethodLayer(nn.Module):
    """A module put in the place of one of the base's, which it keeps as ``base``.

    Trained tensors are its parameters that require a gradient; what else belongs in the method's file are its
    persistent buffers.
    """

    base: nn.Module

    def merged(self) -> nn.Module:
        """The base's layer with what was trained inside; the base is changed.

        Raises:
            UnsupportedError: where that cannot be done.
        """
        raise UnsupportedError(f"{type(self).__name__} computes what no single layer of the base can; keep it apart.")


def freeze(base: Base) -> None:
    """Freeze all but the head."""
    base.model.requires_grad_(False)
    for name in base.head:
        base.model.get_submodule(name).requires_grad_(True)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a module in a named place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def wrap_layers(base: Base, names: list[str], make: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """Freeze the model and put ``make(name, layer)`` in the place of each named layer."""
    freeze(base)
    for name in names:
        layer = base.model.get_submodule(name)
        made = make(name, layer)
        made.to(next(layer.parameters()).device)
        replace_layer(base.model, name, made)
    return base.model


def merge_layers(model: nn.Module) -> nn.Module:
    """Turn every `MethodLayer` back into a layer of the base.

    Raises:
        UnsupportedError: where a layer cannot be.
    """
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, MethodLayer)]:
        replace_layer(model, name, layer.merged())
    return model


# last dense layer of the attention, and of the feed-forward part, by the names that transformers gives them
_ATTENTION = (
    "attention.output.dense",
    "o_proj",
    "out_proj",
    "attn.c_proj",
    "attention.dense",
    "attn.proj",
    "self_attention.dense",
    "out_lin",
)
_FEED_FORWARD = ("output.dense", "down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "lin2", "w2")


def block_outputs(base: Base) -> tuple[list[str], list[str]]:
    """Names of the dense layers that end attention and feed-forward parts, one of each per block.

    Raises:
        ConfigError: if the model's names do not tell.
    """
    layers = [n for n, m in base.model.named_modules() if supports(m) and any(part.isdigit() for part in n.split("."))]
    attention = [name for name in layers if name.endswith(_ATTENTION)]
    feed_forward = [name for name in layers if name.endswith(_FEED_FORWARD) and name not in attention]
    if not attention or len(attention) != len(feed_forward):
        raise ConfigError(
            f"adapters go after each block's attention and feed-forward part, and {type(base.model).__name__} names "
            f"{len(attention)} and {len(feed_forward)} layers as their ends; use a method of weights, such as lora."
        )
    return base.inside(attention), base.inside(feed_forward)


def numbers(base: Base) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of each target layer."""
    for name in base.targets():
        rows, columns = matrix_of(base.model.get_submodule(name)).shape
        yield name, rows, columns
