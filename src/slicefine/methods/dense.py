"""Dense layers with something of a method's beside them: what methods of weights have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..weights import matrix_of
from .base import MethodLayer, Options

__all__ = ["ChangedLayer", "DenseLayer", "MixedFactors", "ScaledOutput", "added_dtype", "check_choice", "check_range"]


def check_choice(method: str, options: Options, name: str, known: Sequence[object]) -> None:
    """Raise `ConfigError` unless an option is one of the known values."""
    if options[name] not in known:
        expected = ", ".join(map(repr, known))
        raise ConfigError(f"method.options.{name}={options[name]!r}: {method} expects one of {expected}.")


def check_range(method: str, options: Options, name: str, low: float, high: float) -> None:
    """Raise `ConfigError` unless ``low <= option <= high``."""
    if not low <= options[name] <= high:
        raise ConfigError(f"method.options.{name}={options[name]!r}: {method} expects {low:g} to {high:g}.")


def added_dtype(weight: Tensor) -> torch.dtype:
    """Type of entries that are added: at least fp32, as small steps from 1 vanish in half precision."""
    return torch.promote_types(weight.dtype, torch.float32)


class DenseLayer(MethodLayer):
    """A dense layer of the base, seen as a matrix ``(out, in)``."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.training = base.training  # a method may be put on a model that is not in training mode

    @property
    def weight(self) -> Tensor:
        """The base's weight as ``(out, in)``, sharing its storage, without a gradient."""
        return matrix_of(self.base)

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's own."""
        return self.base.bias  # type: ignore[return-value]


class ScaledOutput(DenseLayer):
    """``base(x) * scale ** power``, element-wise over outputs; ``scale`` starts at one.

    Args:
        base: a dense layer.
        power: of the scale.
    """

    def __init__(self, base: nn.Module, power: int = 1) -> None:
        super().__init__(base)
        rows = self.weight.shape[0]
        self.scale = nn.Parameter(torch.ones(rows, dtype=added_dtype(self.weight), device=self.weight.device))
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``."""
        y: Tensor = self.base(x)
        return y * self.scale.pow(self.power).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Scale the rows of the weight, and the bias."""
        factor = self.scale.pow(self.power)
        self.weight.copy_(self.weight * factor[:, None])
        if self.bias is not None:
            self.bias.copy_(self.bias * factor)
        return self.base


class ChangedLayer(DenseLayer):
    """A dense layer whose weight a method adds something to."""

    def change(self) -> Tensor:
        """What is added to the weight once training is over, ``(out, in)``."""
        raise NotImplementedError

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Add the change to the weight."""
        self.weight.copy_(self.weight + self.change())
        return self.base


class MixedFactors(ChangedLayer):
    """``base(x) + scale * B M A x``: low-rank factors with a trained square matrix between them.

    Args:
        base: a dense layer.
        A: ``(r, in)``.
        mixer: ``(r, r)``, trained.
        B: ``(out, r)``.
        scale: of the change.
        dropout: of the input of ``A``.
        trained: whether ``A`` and ``B`` are trained, too; frozen ones come from the base, and no file keeps them.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self, base: nn.Module, A: Tensor, mixer: Tensor, B: Tensor, scale: float, dropout: float, trained: bool
    ) -> None:
        super().__init__(base)
        for name, factor in (("A", A), ("B", B)):
            if trained:
                self.register_parameter(name, nn.Parameter(factor))
            else:
                self.register_buffer(name, factor, persistent=False)
        self.mixer = nn.Parameter(mixer)
        self.scale = scale
        self.dropout = nn.Dropout(dropout).train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``."""
        y: Tensor = self.base(x)
        inside: Tensor = self.dropout(x).to(self.A.dtype)
        for factor in (self.A, self.mixer, self.B):
            inside = F.linear(inside, factor)
        return y + (self.scale * inside).to(y.dtype)

    def change(self) -> Tensor:
        """``scale * B M A``."""
        return torch.mul(self.B @ self.mixer @ self.A, self.scale)
