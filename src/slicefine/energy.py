"""Positions by input energy: column slices first where a layer's inputs carry the most.

A column slice can only use the r input features that it holds. Features differ widely in their mean square, and taking
the blocks in the order of that energy made column slices better on every task tried (docs/results/accuracy.md).
Rows have no such order: each of them sees the whole input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, DataError
from .geometry import block_count, block_start
from .layer import supports
from .tuner import linear_names, matches

__all__ = ["energy_positions", "input_energy"]


def energy_positions(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    r: int | Callable[[str], int] = 12,
    target_modules: str | Sequence[str] = "all-linear",
    visits: int | None = None,
) -> dict[str, dict[str, list[int]]]:
    """Column positions in the order of input energy, for ``positions=`` of `SliceFineConfig` and `attach`.

    The result is plain data: every process of a run has to be given the same, and it is saved with the adapter.

    Args:
        model: the base model, before slices are attached.
        batches: a few batches of training data (tensors, or mappings of the forward's arguments).
        r: rank of the column slices, or a function of the layer's name that gives it.
        target_modules: ``"all-linear"``, a regular expression for the full name, or name endings.
        visits: how many positions per layer to keep; None keeps all blocks.

    Returns:
        ``{layer name: {"column": starts}}``, best block first.

    Raises:
        ConfigError: if no layer matches, or a rank is below 1.
        DataError: if no batch reaches a chosen layer, or a layer's inputs are not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> energy_positions(model, [torch.tensor([[0.0, 1.0, 3.0, 0.0]])], r=2)
        {'0': {'column': [2, 0]}}
    """
    result = {}
    for name, energy in input_energy(model, batches, target_modules).items():
        size = len(energy)
        rank = r(name) if callable(r) else r
        if rank < 1:
            raise ConfigError(f"energy_positions, layer {name!r}: rank r={rank!r} must be an integer of at least 1.")
        width = min(rank, size)
        starts = torch.tensor([block_start(block, size, width) for block in range(block_count(size, width))])
        sums = energy.unfold(0, width, 1).sum(1)[starts]
        order = torch.sort(sums, descending=True, stable=True).indices  # equal energy: by index
        result[name] = {"column": starts[order][:visits].tolist()}
    return result


@torch.no_grad()
def input_energy(
    model: nn.Module, batches: Iterable[Any], target_modules: str | Sequence[str] = "all-linear"
) -> dict[str, Tensor]:
    """Mean square of each input feature of the chosen layers: ``{layer name: (columns,) in fp64 on the CPU}``.

    Layers that the batches never reach are left out.

    Raises:
        ConfigError: if no layer matches.
        DataError: if no batch reaches a chosen layer, or a layer's inputs are not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3))
        >>> input_energy(model, [torch.tensor([[1.0, 2.0], [3.0, 0.0]])])["0"].tolist()
        [5.0, 2.0]
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, 0.0) + x.float().square().sum(0).double().cpu()
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if supports(module) and matches(name, target_modules)
    ]
    training = model.training
    model.eval()  # dropout would blur the energy, and draw random numbers
    try:
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if not handles:
        raise ConfigError(
            f"input_energy: target_modules={target_modules!r} matches no nn.Linear or Conv1D layer; those of this "
            f"model are called {', '.join(linear_names(model)[:20])}."
        )
    if not sums:
        raise DataError(
            f"input_energy: no batch reached a linear layer of target_modules={target_modules!r}; give at least one "
            "batch of training data, and layers that the model calls."
        )
    broken = [name for name, total in sums.items() if not bool(total.isfinite().all())]
    if broken:
        raise DataError(f"input_energy: the inputs of {broken[0]} are not finite; check the data and the weights.")
    return {name: total / max(1, counts[name]) for name, total in sums.items()}
