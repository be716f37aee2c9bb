"""Biases that an adapter trains whole beside its slices: in place, with their originals kept."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import UnsupportedError
from .sharded import full, placed_like, sharded_parameter

__all__ = ["BIASES", "BIAS_NAMES", "Biases"]

BIASES = ("none", "all", "slicefine_only")  # which of them an adapter trains
BIAS_NAMES = ("bias", "in_proj_bias")  # as modules call them; the second is packed attention's


class Biases:
    """The biases of one adapter; all of its layers share this object.

    The parameters hold the trained values while the adapter is applied, and the originals otherwise, bit for bit.

    Args:
        places: where each bias is: the module, and the parameter's name there.

    Raises:
        UnsupportedError: if a bias has no values yet, so that there is nothing to keep.
    """

    def __init__(self, places: Mapping[str, tuple[nn.Module, str]]) -> None:
        self.places = dict(places)
        empty = next((name for name in self.places if self._stored(name).is_meta), None)
        if empty is not None:
            raise UnsupportedError(
                f"{empty}: the bias has no values yet (meta device), so its original cannot be kept. Load the base's "
                'weights before the adapter is made, or leave bias="none".'
            )
        self._originals = self._read()
        self._away: dict[str, Tensor] | None = None  # trained values, while the parameters hold the originals
        self._settled = False

    @property
    def applied(self) -> bool:
        """Whether the parameters hold the trained values."""
        return self._away is None

    def follow(self, applied: bool, trains: bool) -> None:
        """Make the parameters hold trained values or originals, and want gradients or not."""
        if applied and self._away is not None:
            self._write(self._away)
            self._away = None
        elif not applied and self._away is None:
            self._away = self._read()
            self._write(self._originals)
        for name in self.places:
            self._stored(name).requires_grad_(trains)
            self._shown(name).requires_grad_(trains)

    def settle(self) -> None:
        """Before the first optimizer step: DDP and FSDP2 may have brought another process's biases meanwhile."""
        if not self._settled and self.applied and torch.distributed.is_initialized():
            self._originals = self._read()
        self._settled = True

    def values(self) -> dict[str, Tensor]:
        """The trained values, whether they are applied or not; sharded ones are gathered, by all processes."""
        found = self._read() if self._away is None else self._away
        return {name: full(value) for name, value in found.items()}

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take a file's values, one for each bias, for the trained ones."""
        self._settled = True  # what the parameters hold from now on is not the originals
        if self._away is None:
            self._write(values)
        else:
            self._away = {name: values[name].detach().clone() for name in self.places}

    def parameters(self) -> list[Tensor]:
        """The parameters themselves, as their modules show them."""
        return [self._shown(name) for name in self.places]

    def entries(self) -> int:
        """Of all biases together."""
        return sum(math.prod(self.shape(name)) for name in self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """A bias' shape, wherever its parts are."""
        return tuple(self._stored(name).shape)

    def _shown(self, name: str) -> Tensor:
        module, parameter = self.places[name]
        shown: Tensor = getattr(module, parameter)
        return shown

    def _stored(self, name: str) -> Tensor:
        stored = sharded_parameter(*self.places[name])
        return self._shown(name) if stored is None else stored

    def _read(self) -> dict[str, Tensor]:
        return {name: self._stored(name).detach().clone() for name in self.places}

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        """Unseen by autograd: no backward reads a bias, and one may come after the adapter was off for a while."""
        for name in self.places:
            stored, shown = self._stored(name), self._shown(name)
            stored.data.copy_(placed_like(values[name], stored))
            if shown is not stored:  # the copy that FSDP2 gathered for a forward
                shown.data.copy_(full(values[name]))
