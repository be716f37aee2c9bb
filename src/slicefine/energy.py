"""Positions by energy: column slices first where a layer's inputs are large, row slices where its output's gradient is.

A column slice can only use the r input features that it holds, and a row slice can only answer the gradient of the r
outputs that it holds. Both differ widely in their mean square. Taking blocks in the order of that energy made column
slices better on every task tried, and brought row slices off a plateau on one task of six (docs/results/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, DataError
from .geometry import block_count, block_start
from .quantised import prepare, release
from .targets import linear_names, matches
from .weights import trains

__all__ = ["energy_positions", "evaluating", "gradient_energy", "input_energy"]

Loss = Callable[[Any], Tensor]  # what the model returns -> the loss


def energy_positions(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    r: int | Callable[[str], int] = 12,
    r_row: int | Callable[[str], int] | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    visits: int | None = None,
    axes: Sequence[str] = ("column",),
    loss: Loss | None = None,
) -> dict[str, dict[str, list[int]]]:
    """Positions in the order of energy, for ``positions=`` of `SliceFineConfig` and `attach`.

    Columns go by the mean square of the layer's input, rows by that of the gradient at its output: for rows the batches
    need their labels, and a backward pass is made for each.

    The result is plain data: every process of a run has to be given the same, and it is saved with the adapter.

    Args:
        model: the base model, before slices are attached.
        batches: a few batches of training data (tensors, or mappings of the forward's arguments).
        r: rank of the slices, or a function of the layer's name that gives it.
        r_row: rank of the row slices where it is another one.
        target_modules: ``"all-linear"``, a regular expression for the full name, or name endings.
        visits: how many positions per layer and orientation to keep; None keeps all blocks.
        axes: ``"column"``, ``"row"`` or both; what the result leaves out sweeps.
        loss: the loss of what the model returns; None is its ``.loss``, as transformers' models have it.

    Returns:
        ``{layer name: {axis: starts}}``, best block first.

    Raises:
        ConfigError: if no layer matches, a rank is below 1, an axis is unknown, or there is no loss for rows.
        DataError: if no batch reaches a chosen layer, or its inputs or gradients are not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> energy_positions(model, [torch.tensor([[0.0, 1.0, 3.0, 0.0]])], r=2)
        {'0': {'column': [2, 0]}}
    """
    if not axes or not set(axes) <= {"row", "column"}:
        raise ConfigError(f"energy_positions: axes={axes!r}: expected some of row, column.")
    batches = list(batches)
    result: dict[str, dict[str, list[int]]] = {}
    if "column" in axes:
        for name, energy in input_energy(model, batches, target_modules).items():
            result[name] = {"column": _ordered(name, energy, r, visits)}
    if "row" in axes:
        for name, energy in gradient_energy(model, batches, target_modules, loss).items():
            result.setdefault(name, {})["row"] = _ordered(name, energy, r if r_row is None else r_row, visits)
    return result


def _ordered(name: str, energy: Tensor, r: int | Callable[[str], int], visits: int | None) -> list[int]:
    """Starts of the blocks of a layer, the one with the most energy first; equal ones by index."""
    size = len(energy)
    rank = r(name) if callable(r) else r
    if rank < 1:
        raise ConfigError(f"energy_positions, layer {name!r}: rank r={rank!r} must be an integer of at least 1.")
    width = min(rank, size)
    starts = torch.tensor([block_start(block, size, width) for block in range(block_count(size, width))])
    sums = energy.unfold(0, width, 1).sum(1)[starts]
    return starts[torch.sort(sums, descending=True, stable=True).indices][:visits].tolist()


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
            _add(sums, counts, name, args[0])

        return hook

    with _watched(model, target_modules, lambda name, layer: layer.register_forward_pre_hook(watch(name))):
        for batch in batches:
            _forward(model, batch)
    return _means(sums, counts, "inputs", target_modules)


@torch.enable_grad()  # type: ignore[untyped-decorator]
def gradient_energy(
    model: nn.Module,
    batches: Iterable[Any],
    target_modules: str | Sequence[str] = "all-linear",
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Mean square of the loss's gradient at each output of the chosen layers: ``{layer: (rows,) in fp64 on the CPU}``.

    No weight gets a gradient; layers that the batches never reach are left out.

    Args:
        model: the model, left as it was.
        batches: with labels.
        target_modules: as in `energy_positions`.
        loss: of what the model returns; None is its ``.loss``.

    Raises:
        ConfigError: if no layer matches, or the model returns no loss.
        DataError: if no batch reaches a chosen layer, or a gradient is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3))
        >>> gradient_energy(model, [torch.ones(1, 2)], loss=lambda y: (y * torch.tensor([0.0, 2.0, 1.0])).sum())["0"]
        tensor([0., 4., 1.], dtype=torch.float64)
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # the model itself lets no gradient through here
                return output
            # where nothing below is trained no gradient would come here; a new tensor may be changed in place later
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            output.register_hook(lambda gradient: _add(sums, counts, name, gradient))  # type: ignore[no-untyped-call]
            return output

        return hook

    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        with _watched(model, target_modules, lambda name, layer: layer.register_forward_hook(watch(name))):
            for batch in batches:
                found = _scalar(_forward(model, batch), loss)
                if found.requires_grad:  # else no chosen layer had a part in it
                    found.backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return _means(sums, counts, "gradients", target_modules)


def _scalar(output: Any, loss: Loss | None) -> Tensor:
    if loss is not None:
        found: Any = loss(output)
    elif isinstance(output, Mapping):  # as transformers' Trainer finds it
        found = output.get("loss")
    else:
        found = output[0] if isinstance(output, tuple) and output else getattr(output, "loss", None)
    if not isinstance(found, Tensor) or found.dim() > 0:
        raise ConfigError(
            f"gradient_energy: the model returned {type(output).__name__} without a loss; give batches with labels, or "
            "loss=, a function of what the model returns (slicefine train: or --slice.row_order sweep)."
        )
    return found


def _forward(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


@contextmanager
def _watched(
    model: nn.Module, target_modules: str | Sequence[str], register: Callable[[str, nn.Module], Any]
) -> Iterator[None]:
    """The model in evaluation mode with a hook on each chosen layer; dropout would blur, and draw random numbers."""
    handles = [
        register(name, module)
        for name, module in model.named_modules()
        if trains(module) and matches(name, target_modules)
    ]
    if not handles:
        raise ConfigError(
            f"energy: target_modules={target_modules!r} matches no nn.Linear or Conv1D layer; those of this "
            f"model are called {', '.join(linear_names(model)[:20])}."
        )
    prepared = [module for module in model.modules() if prepare(module)]
    try:
        with evaluating(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module in prepared:
            release(module)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for as long as the context lasts; then every module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _add(sums: dict[str, Tensor], counts: dict[str, int], name: str, found: Tensor) -> None:
    found = found.detach().reshape(-1, found.shape[-1])
    sums[name] = sums.get(name, 0.0) + found.float().square().sum(0).double().cpu()
    counts[name] = counts.get(name, 0) + len(found)


def _means(
    sums: dict[str, Tensor], counts: dict[str, int], what: str, target_modules: str | Sequence[str]
) -> dict[str, Tensor]:
    if not sums:
        raise DataError(
            f"energy: no batch reached a linear layer of target_modules={target_modules!r}; give at least one "
            "batch of training data, and layers that the model calls."
        )
    broken = [name for name, total in sums.items() if not bool(total.isfinite().all())]
    if broken:
        raise DataError(f"energy: the {what} of {broken[0]} are not finite; check the data and the weights.")
    return {name: total / max(1, counts[name]) for name, total in sums.items()}
