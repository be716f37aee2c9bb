"""Diff pruning: a change of every weight behind random gates that a penalty closes; the largest entries are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Base, Method, Options, numbers, wrap_layers
from .dense import ChangedLayer, added_dtype, check_choice, check_range

__all__ = ["METHODS", "GatedChange", "keep_largest"]

_EDGE = 1e-4  # random numbers keep this far from 0 and 1, whose logits are infinite


class GatedChange(ChangedLayer):
    """A dense layer with ``gate * change`` added to its weight until it is pruned, and ``mask * change`` from then on.

    A gate is hard-concrete: ``clamp(lower + (upper - lower) * sigmoid(logit(u) + a), 0, 1)`` with u uniform while
    training, 1/2 otherwise, and ``a`` trained.

    Args:
        base: a dense layer.
        lower: below 0; how far gates are stretched.
        upper: above 1; the same.
        start: of every ``a``.
        structured: a second gate for the whole weight, multiplied with each entry's.
        penalty: of an expected open gate.
        target: share of all layers' entries that pruning keeps.
        fixed: share of steps after pruning.
    """

    mask: Tensor
    pruned: Tensor

    def __init__(
        self,
        base: nn.Module,
        *,
        lower: float,
        upper: float,
        start: float,
        structured: bool,
        penalty: float,
        target: float,
        fixed: float,
    ) -> None:
        super().__init__(base)
        shape, dtype = self.weight.shape, added_dtype(self.weight)
        self.diff = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.gates = nn.Parameter(torch.full(shape, start, dtype=dtype))
        self.group_gate = nn.Parameter(torch.full((1,), start, dtype=dtype)) if structured else None
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("pruned", torch.zeros((), dtype=torch.bool))
        self.lower, self.upper, self.penalty = lower, upper, penalty
        self.target, self.fixed = target, fixed

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``."""
        return F.linear(x, self.weight + self.change().to(self.weight.dtype), self.bias)

    def change(self) -> Tensor:
        """``(out, in)``; random while training, before pruning."""
        if self.pruned:
            return self.diff * self.mask
        group = 1.0 if self.group_gate is None else self._open(self.group_gate)
        return group * self._open(self.gates) * self.diff

    def _open(self, gate: Tensor) -> Tensor:
        if self.training:
            gate = gate + torch.rand_like(gate).clamp(_EDGE, 1 - _EDGE).logit()
        return (self.lower + (self.upper - self.lower) * gate.sigmoid()).clamp(0, 1)

    def expected_open(self) -> Tensor:
        """Expected number of gates that are not closed; 0 after pruning."""
        if self.pruned:
            return self.gates.new_zeros(())
        shift = math.log(-self.lower / self.upper)
        gates = [self.gates] if self.group_gate is None else [self.gates, self.group_gate]
        return torch.stack([(gate - shift).sigmoid().sum() for gate in gates]).sum()


def _layers(model: nn.Module) -> Iterator[GatedChange]:
    return (layer for layer in model.modules() if isinstance(layer, GatedChange))


@torch.no_grad()
def keep_largest(model: nn.Module) -> None:
    """Leave only the largest entries of the changes, over all layers, for good; gates have done their work."""
    layers, training = list(_layers(model)), model.training
    for layer in layers:
        layer.eval()  # the gates' values without chance
        layer.diff.copy_(layer.change())
        layer.train(training)
    sizes = torch.cat([layer.diff.abs().flatten() for layer in layers])
    kept = torch.zeros_like(sizes, dtype=torch.bool)
    kept[sizes.topk(round(layers[0].target * len(sizes)), sorted=False).indices] = True
    for layer, own in zip(layers, torch.split(kept, [layer.diff.numel() for layer in layers]), strict=True):
        layer.mask.copy_(own.view_as(layer.mask))
        layer.pruned.fill_(True)


def _after_step(model: nn.Module, step: int, steps: int) -> None:
    first = next(_layers(model))
    if step >= max(1, round(steps * (1 - first.fixed))) and not first.pruned:
        keep_largest(model)


def _penalty(model: nn.Module, progress: float) -> Tensor:
    return torch.stack([layer.penalty * layer.expected_open() for layer in _layers(model)]).sum()


def _gate_factor(name: str, options: Options) -> float:
    factor: float = options["gate_factor"] if name.endswith((".gates", ".group_gate")) else 1.0
    return factor


def _check(options: Options) -> None:
    check_choice("diff_pruning", options, "structured", (False, True))
    check_range("diff_pruning", options, "target", 1e-9, 1)
    check_range("diff_pruning", options, "fixed", 0, 0.99)
    check_range("diff_pruning", options, "lower", -100, -1e-3)
    check_range("diff_pruning", options, "upper", 1 + 1e-3, 100)


def _build(base: Base, options: Options) -> nn.Module:
    _check(options)
    settings = {name: value for name, value in options.items() if name != "gate_factor"}
    return wrap_layers(base, base.targets(), lambda name, layer: GatedChange(layer, **settings))


def _count(base: Base, options: Options) -> int:
    _check(options)
    return sum(2 * rows * columns + bool(options["structured"]) for _, rows, columns in numbers(base))


METHODS = (
    Method(
        name="diff_pruning",
        title="Diff pruning",
        source="Guo et al. 2020 (arXiv 2012.07463), compared with the authors' gates and their gradients",
        formula="2 x outputs x inputs + 1 per weight while training; target x outputs x inputs are kept",
        build=_build,
        count=_count,
        differs="changes dense layers, not embeddings, biases and norms; pruning and evaluation use each gate at its "
        "median, not as last drawn; the second phase, with the mask fixed, is part of the run's steps",
        options={
            "target": 0.005,
            "penalty": 1.25e-7,
            "structured": True,
            "fixed": 0.5,
            "lower": -1.5,
            "upper": 1.5,
            "start": 5.0,
            "gate_factor": 400.0,
        },
        learning_rate=2.5e-4,
        groups=_gate_factor,
        penalty=_penalty,
        after_step=_after_step,
    ),
)
