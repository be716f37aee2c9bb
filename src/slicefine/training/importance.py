"""Positions by importance, measured on a run's own train batches before it begins (Section 4, Figs. 3c and 3d)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.importance import magnitude_mask, position_map, wanda_scores
from ..energy import input_energy
from ..errors import ConfigError
from ..quantised import format_of
from ..tasks.base import Loaded, Prepared
from ..weights import matrix_of
from .methods import ENERGY_BATCHES, train_batches
from .settings import LotterySettings, TrainSettings

__all__ = ["lottery_masks", "positions_by_importance"]


def positions_by_importance(
    loaded: Loaded, settings: TrainSettings, prepared: Prepared, ranks: Callable[[str], tuple[int, int]]
) -> dict[str, dict[str, list[int]]]:
    """Starts of every layer in the order that ``slice.positions`` and ``slice.importance`` ask for.

    Args:
        loaded: the base model, which is left as it was.
        settings: of the run.
        prepared: its data.
        ranks: rank of row and column slices, by layer name.
    """
    chosen = settings.slice
    batches = train_batches(loaded, settings, prepared, ENERGY_BATCHES)
    targets = chosen.target_modules or "all-linear"
    energy = input_energy(loaded.model, batches, targets)
    scores: Iterator[tuple[str, Tensor]]
    if chosen.importance == "wanda":
        weights = ((name, _values(loaded.model.get_submodule(name))) for name in energy)
        scores = ((name, wanda_scores(weight, energy[name].sqrt())) for name, weight in weights)
    elif any(format_of(loaded.model.get_submodule(name)) is not None for name in energy):
        raise ConfigError(
            "slice.importance=lottery trains all weights, which quantised ones cannot; choose slice.importance=wanda."
        )
    else:
        drawn = list(train_batches(loaded, settings, prepared, chosen.lottery.steps))
        masks = lottery_masks(loaded.model, drawn, list(energy), chosen.lottery)
        scores = ((name, mask.double()) for name, mask in masks.items())
    category = str(chosen.positions)
    return position_map(scores, {name: ranks(name) for name in energy}, category, settings.training.seed)


def _values(layer: nn.Module) -> Tensor:
    """A layer's weight as ``(out, in)`` values; of a quantised one, what its codes stand for."""
    known = format_of(layer)
    if known is None:
        return matrix_of(layer)
    known.check(layer)
    return known.dense(layer)


def lottery_masks(
    model: Any, batches: Iterable[dict[str, Any]], layers: list[str], settings: LotterySettings
) -> dict[str, Tensor]:
    """The winning ticket: which entries survive rounds of training, pruning and rewinding (Frankle & Carbin 2019).

    All weights are trained, those of ``layers`` are pruned, globally by magnitude; each round starts from the
    pretrained values again, without what is pruned. The model is given back as it was.

    Args:
        model: gives ``.loss``.
        batches: train batches with labels, used in turn.
        layers: names of the linear layers.
        settings: rounds, steps, share and rate.

    Returns:
        ``{layer: (rows, columns)}``, bool on the CPU: True survives. What is False, the losing ticket, went first.
    """
    batches = list(batches)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training = model.training
    matrices = {name: matrix_of(model.get_submodule(name)) for name in layers}
    alive = {name: torch.ones(matrix.shape, dtype=torch.bool) for name, matrix in matrices.items()}
    model.train().requires_grad_(True)
    try:
        for _ in range(settings.rounds):
            _train(model, batches, matrices, alive, settings)
            alive = magnitude_mask(
                {name: matrix.detach().cpu() for name, matrix in matrices.items()}, alive, settings.share
            )
            _restore(model, start)
    finally:
        _restore(model, start)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
        model.train(training)
    return alive


def _train(
    model: Any, batches: list[dict[str, Any]], matrices: dict[str, Tensor], alive: dict[str, Tensor], settings: Any
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    _mask(matrices, alive)
    for step in range(settings.steps):
        optimizer.zero_grad(set_to_none=True)
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        _mask(matrices, alive)


@torch.no_grad()
def _mask(matrices: dict[str, Tensor], alive: dict[str, Tensor]) -> None:
    for name, matrix in matrices.items():
        matrix.mul_(alive[name].to(matrix.device))


@torch.no_grad()
def _restore(model: Any, start: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(start[name])
