"""``slicefine plan --gpus n``: what each of several GPUs holds and sends, from shapes alone.

With n GPUs, P parameters of b bytes, and E entries in the slices' parameters (their padding included; for LoRA the
entries of its factors), all of fp32 with gradient and AdamW's two moments, each GPU

====================  ============================  =====================================================
                      DDP                           FSDP2
====================  ============================  =====================================================
holds                 ``b P + 16 E``                ``(b P + 16 E) / n``
gathers at a time     nothing                       two blocks and the rest: ``b (2 P_block + P_rest)``
sends per step        ``2 (n-1)/n 4 E``             ``(n-1)/n (2 (b P + 4 E) + 4 E)``, slices ``+ 2 (n-1)/n 4 E``
sends per move        nothing                       ``2 (n-1)/n (4 + b) E``
====================  ============================  =====================================================

In rings, an all-reduce of x bytes has each GPU send ``2 (n-1)/n x``, an all-gather or a reduce-scatter half of that.
FSDP2 gathers the weights for forward and again for backward, and reduce-scatters gradients; slices then take one
all-reduce of their values, from which each GPU writes its part of the weights. A move checks them once more and reads
the blocks that come next. Activations, buffers and the journal (in host memory) come on top, with every engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from ..errors import ConfigError
from ..schedule import Schedule
from ..targets import match_layers
from ..weights import kind_of

__all__ = ["Load", "ModelShape", "loads", "plan_gpus", "print_loads", "shape_of"]

_MASTER, _STATE = 4, 16  # bytes per trained entry: fp32; and with gradient and two moments


@dataclass(frozen=True)
class ModelShape:
    """What the formulas need of a model.

    Attributes:
        matrices: ``(rows, columns)`` of each trained weight.
        parameters: of the whole model.
        block: parameters of the largest block; FSDP2 gathers block by block, the next one while one computes.
        rest: parameters outside all blocks (embeddings, head), which stay gathered from forward to backward.
    """

    matrices: tuple[tuple[int, int], ...]
    parameters: int
    block: int
    rest: int


@dataclass(frozen=True)
class Load:
    """One method under one engine; bytes per GPU.

    Attributes:
        method, engine: ``"slices"`` or ``"LoRA"``, ``"DDP"`` or ``"FSDP2"``.
        entries: trained entries of the whole model, padding included.
        holds: weights, masters, gradients and optimizer state.
        gathered: weights of other GPUs that lie here at a time.
        step, move: sent per optimizer step, and per move.
    """

    method: str
    engine: str
    entries: int
    holds: int
    gathered: int
    step: int
    move: int


def shape_of(model: nn.Module, targets: str | Sequence[str] = "all-linear", exclude: Any = ()) -> ModelShape:
    """Read the shape off a model; weights on the meta device will do.

    Args:
        model: before slices.
        targets, exclude: the layers, as for `slicefine.attach`.

    Raises:
        ConfigError: if no layer matches.

    Example:
        >>> shape_of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
        ModelShape(matrices=((4, 3), (2, 4)), parameters=26, block=16, rest=0)
    """
    names = match_layers(model, targets, exclude)
    layers = [model.get_submodule(name) for name in names]
    matrices = [kind.shape(layer) for layer in layers if (kind := kind_of(layer)) is not None]
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    blocks = [_count(block) for found in lists[:1] for block in found] or [_count(model)]
    return ModelShape(tuple(matrices), _count(model), max(blocks), _count(model) - sum(blocks))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def loads(shape: ModelShape, schedule: Schedule, gpus: int, weight_bytes: int = 2, lora_rank: int = 8) -> list[Load]:
    """Slices and LoRA under DDP and FSDP2; see the formulas above.

    Args:
        shape: of the model.
        schedule: mode and ranks of the slices.
        gpus: how many.
        weight_bytes: of a weight: 2 for bfloat16.
        lora_rank: of the LoRA adapters beside them, on the same layers.

    Raises:
        ConfigError: for fewer than one GPU.

    Example:
        >>> shape = ModelShape(matrices=((4, 4),), parameters=16, block=16, rest=0)
        >>> [load.holds for load in loads(shape, Schedule("row", 1, 1), gpus=2)]
        [96, 48, 1056, 528]
    """
    if gpus < 1 or lora_rank < 1:
        raise ConfigError(f"gpus={gpus} and lora_rank={lora_rank} must be at least 1.")
    slices = sum(prod(schedule.block_shape(matrix)) for matrix in shape.matrices)
    factors = sum(lora_rank * (rows + columns) for rows, columns in shape.matrices)
    return [
        make(method, entries, shape, gpus, weight_bytes)
        for method, entries in (("slices", slices), ("LoRA", factors))
        for make in (_replicated, _sharded)
    ]


def _replicated(method: str, entries: int, shape: ModelShape, gpus: int, width: int) -> Load:
    holds = width * shape.parameters + _STATE * entries
    return Load(method, "DDP", entries, holds, 0, _reduced(_MASTER * entries, gpus), 0)


def _sharded(method: str, entries: int, shape: ModelShape, gpus: int, width: int) -> Load:
    weights, masters = width * shape.parameters, _MASTER * entries
    holds = -(-(weights + _STATE * entries) // gpus)
    gathered = 0 if gpus == 1 else width * (2 * shape.block + shape.rest)
    step = _reduced(2 * (weights + masters) + masters, gpus) // 2
    if method != "slices":
        return Load(method, "FSDP2", entries, holds, gathered, step, 0)
    move = _reduced((_MASTER + width) * entries, gpus)
    return Load(method, "FSDP2", entries, holds, gathered, step + _reduced(masters, gpus), move)


def _reduced(size: int, gpus: int) -> int:
    """Bytes that a GPU sends in an all-reduce of ``size`` bytes, in a ring."""
    return 2 * (gpus - 1) * size // gpus


def plan_gpus(settings: Any, gpus: int, lora_rank: int = 8, console: Console | None = None) -> list[Load]:
    """Plan a recipe's model from its configuration alone, and print the table.

    Args:
        settings: the recipe; its model and its slices count.
        gpus, lora_rank: see `loads`.

    Raises:
        ConfigError: if the configuration cannot be read, or for a setting that is wrong.
    """
    model = _empty_model(settings.model)
    chosen = settings.slice
    targets = "all-linear" if chosen.target_modules is None else chosen.target_modules
    shape = shape_of(model, targets, chosen.exclude_modules or ())
    row, column = (chosen.r if rank is None else rank for rank in (chosen.r_row, chosen.r_column))
    schedule = Schedule(chosen.mode, row, column, mask_fraction=chosen.mask_fraction)
    width = {"float32": 4}.get(settings.model.dtype, 2)
    found = loads(shape, schedule, gpus, width, lora_rank)
    what = f"{chosen.mode} r={chosen.r} and LoRA r={lora_rank}"
    print_loads(found, shape, gpus, what, console or Console(quiet=settings.quiet))
    return found


def print_loads(found: Sequence[Load], shape: ModelShape, gpus: int, what: str, console: Console) -> None:
    """Print the loads as a table."""
    table = Table(title=f"{shape.parameters / 1e9:,.2f}B parameters on {gpus} GPUs, {what}: per GPU")
    for column in ("", "engine", "trained", "holds GiB", "gathers GiB", "MiB/step", "MiB/move"):
        table.add_column(column, justify="left" if column in ("", "engine") else "right", no_wrap=True)
    for load in found:
        sizes = [f"{size / 2**30:,.2f}" for size in (load.holds, load.gathered)]
        sent = [f"{size / 2**20:,.1f}" for size in (load.step, load.move)]
        table.add_row(load.method, load.engine, f"{load.entries:,}", *sizes, *sent)
    console.print(table)
    console.print("Activations and buffers come on top; they are alike with both engines.")


def _empty_model(settings: Any) -> nn.Module:
    """The model without weights, on the meta device."""
    import torch
    import transformers

    from ..tasks.models import resolve_path

    try:
        config = transformers.AutoConfig.from_pretrained(
            resolve_path(settings.path), revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.path={settings.path!r}: no configuration can be read: {error}") from error
    names = [getattr(transformers, name, None) for name in config.architectures or ()]
    with torch.device("meta"):
        for kind in filter(None, names):
            return kind(config)  # type: ignore[no-any-return]
        return transformers.AutoModel.from_config(config)  # type: ignore[no-any-return, no-untyped-call]
