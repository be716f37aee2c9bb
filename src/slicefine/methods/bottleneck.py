"""Adapters: small two-layer networks with a bottleneck, put after the parts of a block or beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from ..errors import ConfigError
from ..weights import matrix_of, supports
from .base import Base, Method, MethodLayer, Options, block_outputs, replace_layer, wrap_layers
from .whole import norms

__all__ = [
    "METHODS",
    "Adapter",
    "AfterLayer",
    "activation",
    "add_parallel",
    "parallel_count",
    "seeded",
    "size",
    "switch",
    "undrawn",
    "width_of",
]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Adapter(nn.Module):
    """Down to a bottleneck, a non-linearity, and up again; no residual.

    Args:
        like: parameter whose dtype the adapter takes.
        width: entries of a state.
        bottleneck: entries in between.
        shape: the non-linearity.
        scale: factor on the output.
    """

    def __init__(
        self, like: Tensor, width: int, bottleneck: int, shape: Callable[[Tensor], Tensor], scale: float = 1.0
    ) -> None:
        super().__init__()
        self.down, self.up = undrawn(like, width, bottleneck), undrawn(like, bottleneck, width)
        self.shape, self.scale = shape, scale

    def start(self, draw: Callable[[Tensor], Any], draw_up: Callable[[Tensor], Any]) -> Adapter:
        """Draw both weights; biases are zero."""
        for layer, fill in ((self.down, draw), (self.up, draw_up)):
            fill(layer.weight)
            nn.init.zeros_(layer.bias)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """States ``(..., width)`` to what is added to them, of the same shape."""
        change: Tensor = self.up(self.shape(self.down(x)))
        return change * self.scale


class AfterLayer(MethodLayer):
    """A layer whose output an adapter changes: y + A(y)."""

    def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x: Tensor) -> Tensor:
        """States before the layer to states after it and its adapter."""
        y: Tensor = self.base(x)
        added: Tensor = self.adapter(y)
        return y + added


class _Entry(MethodLayer):
    """The first layer of a part: it also runs the adapter that stands beside the part, on the part's input."""

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter
        self._change: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self._change = self.adapter(x)
        y: Tensor = self.base(x)
        return y

    def take(self) -> Tensor:
        """The adapter's output of this pass, once, so that it is not held until the next."""
        change, self._change = self._change, None
        assert change is not None, "the last layer of a part ran without its first"
        return change


class _Exit(MethodLayer):
    """The last layer of a part, to which the adapter beside the part is added."""

    def __init__(self, base: nn.Module, entry: _Entry) -> None:
        super().__init__()
        self.base = base
        self._entry = (entry,)  # in a tuple, since it is registered where it stands

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + self._entry[0].take()


def undrawn(like: Tensor, inputs: int, outputs: int) -> nn.Linear:
    """A dense layer of a tensor's dtype whose entries are still to be drawn."""
    layer: nn.Linear = skip_init(nn.Linear, inputs, outputs, dtype=like.dtype)  # type: ignore[no-untyped-call]
    return layer


def activation(options: Options) -> Callable[[Tensor], Tensor]:
    """The function that ``options["non_linearity"]`` names.

    Raises:
        ConfigError: for an unknown one.
    """
    name = options["non_linearity"]
    if name not in _ACTIVATIONS:
        expected = ", ".join(_ACTIVATIONS)
        raise ConfigError(f"method.options.non_linearity={name!r} is unknown; expected one of {expected}.")
    return _ACTIVATIONS[name]


def switch(options: Options, name: str) -> bool:
    """An option that is on or off.

    Raises:
        ConfigError: for anything else.
    """
    if not isinstance(options[name], bool):
        raise ConfigError(f"method.options.{name}={options[name]!r}: expected true or false.")
    return bool(options[name])


def seeded(base: Base) -> torch.Generator:
    """What a method draws its start from."""
    return torch.Generator().manual_seed(base.seed)


def width_of(base: Base, name: str) -> int:
    """Outputs of a named dense layer."""
    return matrix_of(base.model.get_submodule(name)).shape[0]


def size(width: int, bottleneck: int) -> int:
    """Entries of one adapter."""
    return 2 * width * bottleneck + bottleneck + width


def _houlsby(base: Base, options: Options) -> nn.Module:
    bottleneck, shape, generator = int(options["bottleneck"]), activation(options), seeded(base)
    if (std := options["init_std"]) <= 0:
        raise ConfigError(f"method.options.init_std={std!r}: expected more than 0, or adapters never move.")

    def draw(weight: Tensor) -> None:
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)

    def make(name: str, layer: nn.Module) -> nn.Module:
        adapter = Adapter(matrix_of(layer), matrix_of(layer).shape[0], bottleneck, shape)
        return AfterLayer(layer, adapter.start(draw, draw))

    trained = _norms(base, options)
    model = wrap_layers(base, [name for names in block_outputs(base) for name in names], make)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return model


def _houlsby_count(base: Base, options: Options) -> int:
    names = [name for names in block_outputs(base) for name in names]
    adapters = sum(size(width_of(base, name), int(options["bottleneck"])) for name in names)
    return adapters + sum(parameter.numel() for parameter in _norms(base, options).values())


def _norms(base: Base, options: Options) -> dict[str, nn.Parameter]:
    return norms(base) if switch(options, "norms") else {}


def _parts(base: Base) -> list[tuple[str, str]]:
    """First and last dense layer of each block's feed-forward part.

    The first one is what follows the end of attention, in the order in which the model registers its layers.
    """
    attention, last = block_outputs(base)
    names = [name for name, _ in base.model.named_modules()]
    parts = []
    for end, exit_name in zip(attention, last, strict=True):
        between = names[names.index(end) + 1 : names.index(exit_name)]
        dense = [name for name in between if supports(base.model.get_submodule(name))]
        if not dense:
            raise ConfigError(f"{exit_name}: no dense layer lies between it and {end}; use houlsby or lora instead.")
        parts.append((dense[0], exit_name))
    return parts


def add_parallel(base: Base, adapter: Callable[[Tensor, int], Adapter]) -> nn.Module:
    """Put ``adapter(weight, width)`` beside each feed-forward part; nothing is frozen or unfrozen.

    Raises:
        ConfigError: if the model's names do not tell where its feed-forward parts are.
    """
    for first, last in _parts(base):
        layer = base.model.get_submodule(first)
        weight = matrix_of(layer)
        entry = _Entry(layer, adapter(weight, weight.shape[1])).to(weight.device)
        replace_layer(base.model, last, _Exit(base.model.get_submodule(last), entry))
        replace_layer(base.model, first, entry)
    return base.model


def parallel_count(base: Base, bottleneck: int) -> int:
    """Entries of the adapters of `add_parallel`."""
    return sum(size(matrix_of(base.model.get_submodule(first)).shape[1], bottleneck) for first, _ in _parts(base))


METHODS = (
    Method(
        name="houlsby",
        title="Adapter^S",
        source="Houlsby et al. 2019 (arXiv 1902.00751); compared with adapters 1.3.0 (double_seq_bn)",
        formula="2L(2db + b + d) and weights and biases of all normalisation layers, for L blocks of width d",
        build=_houlsby,
        count=_houlsby_count,
        differs="the adapter comes before a dropout of the block, not after it: the same where dropout is 0",
        options={"bottleneck": 64, "non_linearity": "gelu", "init_std": 0.01, "norms": True},
        learning_rate=5e-4,
        starts_at_base=False,
        merges=False,
    ),
)
