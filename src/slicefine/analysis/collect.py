"""Where the analysis reaches into models: features, gradients and slice Jacobians as tensors, and nothing else.

Every function leaves the model as it was: weights, gradients, training mode and ``requires_grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian as jacobian_of
from torch.func import functional_call

from ..errors import ConfigError, DataError
from ..geometry import Slice
from ..targets import linear_names
from ..weights import supports

__all__ = [
    "POOLS",
    "Batch",
    "features",
    "gradients",
    "logits_of",
    "output_gradients",
    "slice_function",
    "slice_jacobian",
    "slice_values",
]

POOLS = ("mean", "first", "last", "tokens")

Batch = Mapping[str, Tensor]


@torch.no_grad()
def features(
    model: nn.Module, batches: Iterable[Batch], modules: Sequence[str], pool: str = "mean", side: str = "output"
) -> dict[str, Tensor]:
    """What modules give (or get) for each example: the paper's H, ``{module: (n, d)}`` in fp32 on the CPU.

    Args:
        model: any model that takes the batches as keywords.
        batches: the forward's arguments; an ``attention_mask`` says which positions are padding.
        modules: names of modules that give (or get) ``(batch, d)`` or ``(batch, positions, d)``.
        pool: how positions become one row: ``"mean"`` (padding left out), ``"first"``, ``"last"`` (the last that is no
            padding), or ``"tokens"`` (each position that is no padding is a row of its own).
        side: ``"output"`` or ``"input"``.

    Raises:
        ConfigError: for an unknown module, pool or side.
        DataError: if the batches never reach a module, or what passes there is no feature tensor.
    """
    if pool not in POOLS:
        raise ConfigError(f"features: pool={pool!r} is unknown; expected one of {', '.join(POOLS)}.")
    if side not in ("input", "output"):
        raise ConfigError(f"features: side={side!r} is unknown; expected input or output.")
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    mask: Tensor | None = None

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            value = (result[0] if isinstance(result, tuple) else result) if side == "output" else args[0]
            if not isinstance(value, Tensor) or value.dim() not in (2, 3):
                raise DataError(
                    f"features: module {name!r} has no features of shape (batch, d) or (batch, positions, d)"
                )
            found[name].append(_pooled(value.detach(), mask, pool).float().cpu())

        return hook

    with _evaluating(model):
        handles = [_module(model, name).register_forward_hook(watch(name)) for name in modules]
        try:
            for batch in batches:
                mask = batch.get("attention_mask")
                model(**batch)
        finally:
            for handle in handles:
                handle.remove()
    missing = [name for name, parts in found.items() if not parts]
    if missing:
        raise DataError(f"features: no batch reached module {missing[0]!r}; give at least one batch that does.")
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def logits_of(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """The model's ``logits``, ``(n, classes)`` in fp32 on the CPU.

    Raises:
        DataError: if there is no batch.
    """
    with _evaluating(model):
        parts = [model(**batch).logits.float().cpu() for batch in batches]
    if not parts:
        raise DataError("logits_of: there is no batch.")
    return torch.cat(parts)


def gradients(model: nn.Module, batches: Iterable[Batch], layers: Sequence[str]) -> dict[str, Tensor]:
    """grad_W of the mean loss over all rows of the batches: ``{layer: (rows, columns)}`` in fp32 on the CPU.

    Args:
        model: gives ``.loss`` when the batches hold labels.
        batches: with labels.
        layers: names of linear layers; their weights need no ``requires_grad``.

    Raises:
        ConfigError: for a name that is no linear layer.
        DataError: if there is no batch, or no loss.
    """
    weights = {name: _weight(model, name) for name in layers}
    sums: dict[str, Tensor] = {}
    rows = 0
    with _evaluating(model), _only(model, weights.values()):
        for batch in batches:
            count = _rows(batch)
            parts = torch.autograd.grad(_loss(model, batch), list(weights.values()), allow_unused=True)
            for (name, weight), part in zip(weights.items(), parts, strict=True):
                own = torch.zeros_like(weight) if part is None else part
                sums[name] = sums.get(name, 0.0) + own.detach().float().cpu() * count
            rows += count
    if not rows:
        raise DataError("gradients: there is no batch.")
    return {name: _as_matrix(model, name, total / rows) for name, total in sums.items()}


def output_gradients(
    model: nn.Module, batches: Iterable[Batch], modules: Sequence[str]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Inputs of modules and the loss's gradient with respect to their outputs, g_phi of Lemma D.1.

    Args:
        model: gives ``.loss`` when the batches hold labels.
        batches: with labels.
        modules: names of modules that get and give one tensor.

    Returns:
        ``{module: [(inputs, gradients), ...]}``, one pair per batch, in the module's own shapes, fp32 on the CPU. A
        module that is called more than once counts with its last call; one that the loss does not reach has zeros.

    Raises:
        ConfigError: for an unknown module.
        DataError: if a batch never reaches a module, what passes there is no tensor, or there is no loss.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
    caught: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], result: Any) -> Tensor:
            if not (args and isinstance(args[0], Tensor) and isinstance(result, Tensor)):
                raise DataError(f"output_gradients: module {name!r} does not get and give one tensor.")
            kept = result if result.requires_grad else result.detach().requires_grad_(True)
            caught[name] = args[0].detach(), kept
            return kept

        return hook

    with _evaluating(model), _only(model, ()):
        handles = [_module(model, name).register_forward_hook(watch(name)) for name in modules]
        try:
            for batch in batches:
                caught.clear()
                loss = _loss(model, batch)
                missing = [name for name in modules if name not in caught]
                if missing:
                    raise DataError(f"output_gradients: no batch reached module {missing[0]!r}.")
                parts = torch.autograd.grad(loss, [caught[name][1] for name in modules], allow_unused=True)
                for name, part in zip(modules, parts, strict=True):
                    inputs, outputs = caught[name]
                    own = torch.zeros_like(outputs) if part is None else part
                    found[name].append((inputs.float().cpu(), own.float().cpu()))
        finally:
            for handle in handles:
                handle.remove()
    return found


def slice_values(model: nn.Module, layer: str, block: Slice) -> Tensor:
    """A slice's values as lines, ``(width, line length)``: a copy.

    Raises:
        ConfigError: for a name that is no linear layer, a random mask, or a slice outside the weight.
    """
    weight = _as_matrix(model, layer, _weight(model, layer).detach())
    _check(block, weight, layer)
    return _lines(weight, block).clone()


def slice_function(
    model: nn.Module, batch: Batch, layer: str, block: Slice, of: str = "loss"
) -> Callable[[Tensor], Tensor]:
    """The loss, the logits, or the layer's own output as a function of one slice's values, differentiable twice.

    Args:
        model: in whatever mode it is; put it to `eval` for a deterministic function.
        batch: with labels for the loss.
        layer: a linear layer.
        block: a row or column slice.
        of: ``"loss"``, ``"logits"``, or ``"layer"`` (what the layer gives, all positions).

    Raises:
        ConfigError: for an unknown layer or ``of``, or a slice outside the weight.
    """
    if of not in ("loss", "logits", "layer"):
        raise ConfigError(f"slice_function: of={of!r} is unknown; expected loss, logits or layer.")
    weight = _weight(model, layer)
    _check(block, _as_matrix(model, layer, weight), layer)
    module = _module(model, layer)

    def function(values: Tensor) -> Tensor:
        changed = _with_lines(_as_matrix(model, layer, weight.detach()), block, values)
        caught: list[Tensor] = []
        handle = module.register_forward_hook(lambda _m, _a, result: caught.append(result)) if of == "layer" else None
        try:
            result = functional_call(model, {f"{layer}.weight": _as_matrix(model, layer, changed)}, (), dict(batch))
        finally:
            if handle is not None:
                handle.remove()
        if of == "layer":
            return caught[-1]
        value: Tensor = result.loss if of == "loss" else result.logits
        if value is None:
            raise DataError("slice_function: the model gives no loss; the batch needs labels.")
        return value

    return function


def slice_jacobian(model: nn.Module, example: Batch, layer: str, block: Slice, of: str = "logits") -> Tensor:
    """J_M(x) of one example: ``(outputs, |M|)``, by reverse mode (Theorem 2.4, Lemma D.1).

    Args:
        model: any model.
        example: a batch of one row.
        layer: a linear layer.
        block: a row or column slice.
        of: ``"logits"``, or ``"layer"``: the mean of the layer's own output over positions.

    Raises:
        ConfigError: for an unknown layer, or a slice outside the weight.
        DataError: unless the batch has one row.
    """
    if _rows(example) != 1:
        raise DataError(f"slice_jacobian: expected a batch of one row, got {_rows(example)}.")
    function = slice_function(model, example, layer, block, of)

    def flat(values: Tensor) -> Tensor:
        result = function(values)
        return result.reshape(-1, result.shape[-1]).mean(0)

    with _evaluating(model):
        jacobian: Tensor = jacobian_of(flat, slice_values(model, layer, block))  # type: ignore[no-untyped-call]
    return jacobian.reshape(jacobian.shape[0], -1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off for as long as the context lasts; each module's own mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _only(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Gradients for these weights alone."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        known = ", ".join(linear_names(model)[:20])
        raise ConfigError(f"module {name!r}: there is none of that name; linear layers are called {known}.") from error


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    module = _module(model, name)
    if not supports(module):
        raise ConfigError(
            f"layer {name!r} is {type(module).__name__}; expected nn.Linear or Conv1D, such as "
            f"{', '.join(linear_names(model)[:5])}."
        )
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    return weight


def _as_matrix(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """``(out, in)`` from a layer's own layout, and back: Conv1D keeps its weight transposed."""
    return weight if isinstance(_module(model, name), nn.Linear) else weight.t()


def _check(block: Slice, weight: Tensor, layer: str) -> None:
    if block.axis == "entries":
        raise ConfigError(f"layer {layer!r}: expected a row or column slice, got a random mask.")
    block.check((weight.shape[0], weight.shape[1]), layer)


def _lines(weight: Tensor, block: Slice) -> Tensor:
    part = slice(block.start, block.start + block.width)
    return weight[part] if block.axis == "row" else weight[:, part].t()


def _with_lines(weight: Tensor, block: Slice, values: Tensor) -> Tensor:
    """The weight with a slice's lines taken from ``values``, differentiable in them."""
    lines = weight if block.axis == "row" else weight.t()
    changed = torch.cat([lines[: block.start], values.to(lines.dtype), lines[block.start + block.width :]])
    return changed if block.axis == "row" else changed.t()


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor | None = model(**batch).loss
    if loss is None:
        raise DataError("gradients: the model gives no loss; the batches need labels.")
    return loss


def _rows(batch: Batch) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim())


def _pooled(value: Tensor, mask: Tensor | None, pool: str) -> Tensor:
    if value.dim() == 2:
        return value
    if mask is None or mask.shape != value.shape[:2]:
        mask = torch.ones(value.shape[:2], device=value.device)
    if pool == "tokens":
        return value[mask.bool()]
    if pool == "first":
        return value[:, 0]
    if pool == "last":
        places = torch.arange(mask.shape[1], device=value.device) * mask.to(torch.int64)
        return value[torch.arange(len(value), device=value.device), places.amax(1)]
    share = mask.to(value.dtype)[..., None]
    return (value * share).sum(1) / share.sum(1).clamp(min=1)
