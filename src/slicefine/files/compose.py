"""Several adapters of one base in one: slices that do not meet add up untouched, the others by a rule that is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterFileError, ConfigError, UnsupportedError
from ..geometry import Slice, touched
from ..journal import Visit
from ..packed import PackedDelta
from .adapter import Adapter, LayerFile
from .checkpoint import Checkpoint, replaced

__all__ = ["POLICIES", "Overlap", "compose", "overlaps"]

POLICIES = ("refuse", "sum", "last", "mean")
_TARGETS = ("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern")
_SAME = ("mode", "r", "r_row", "r_column", "rank_pattern", "mask_fraction", "whole_heads", "coupled")


@dataclass(frozen=True)
class Overlap:
    """Where two adapters touch the same entries of one layer.

    Attributes:
        layer: its name.
        first, second: which adapters, counted from 0.
        rows, columns: lines that both trained.
        crossings: entries where a row of one crosses a column of the other; rows and columns always do.
    """

    layer: str
    first: int
    second: int
    rows: list[int]
    columns: list[int]
    crossings: int


def overlaps(adapters: Sequence[Adapter]) -> list[Overlap]:
    """Every layer and pair of adapters that touch common entries, by position (a touched entry may be unchanged).

    Raises:
        ConfigError: if a layer has another shape in another adapter: they are not of one base.
        UnsupportedError: for random masks.
    """
    result = []
    for adapter in adapters:
        _refuse_masks(adapter)
    for i, first in enumerate(adapters):
        for j, second in enumerate(adapters[i + 1 :], start=i + 1):
            for name in first.layers.keys() & second.layers.keys():
                shapes = [adapter.layers[name].shape for adapter in (first, second)]
                if shapes[0] != shapes[1]:
                    raise ConfigError(
                        f"{first.folder} and {second.folder} belong to different base models: the weight of {name} is "
                        f"{shapes[0]} in one and {shapes[1]} in the other."
                    )
                a, b = (list(adapter.layers[name].values) for adapter in (first, second))
                lines = {axis: (set(touched(a, axis)), set(touched(b, axis))) for axis in ("row", "column")}
                rows, columns = (sorted(lines[axis][0] & lines[axis][1]) for axis in ("row", "column"))
                crossings = len(lines["row"][0]) * len(lines["column"][1]) + len(lines["row"][1]) * len(
                    lines["column"][0]
                )
                if rows or columns or crossings:
                    result.append(Overlap(name, i, j, rows, columns, crossings))
    return sorted(result, key=lambda found: (found.first, found.second, found.layer))


def compose(
    adapters: Sequence[Adapter],
    base: Checkpoint | None,
    policy: str = "refuse",
    weights: Sequence[float] | None = None,
    head: int | None = None,
) -> Adapter:
    """One adapter with the changes of several.

    An entry that one adapter changed has that adapter's value, bit for bit. For an entry that several changed, and not
    to the same value:

    - ``"refuse"``: nothing is composed;
    - ``"sum"``: the base's value plus all changes;
    - ``"last"``: the value of the last of them in the given order;
    - ``"mean"``: the base's value plus the changes' weighted mean.

    Args:
        adapters: at least two, trained on the same base with the same mode and ranks.
        base: the weights that they were trained on; None will do for differences (`LayerFile.additive`).
        policy: see above.
        weights: of ``"mean"``, one per adapter; equal ones if None.
        head: the adapter whose other tensors (a classification head, say) the result gets, counted from 0; needed
            where several have some.

    Returns:
        The adapter, to be written with `write_adapter`.

    Raises:
        ConfigError: for settings that contradict the adapters, or with ``"refuse"`` if an entry was changed twice.
        UnsupportedError: for random masks.
        AdapterFileError: if the base is not the adapters'.
    """
    _check(adapters, policy, weights, head)
    shares = list(weights) if weights is not None else [1.0] * len(adapters)
    layers: dict[str, LayerFile] = {}
    clashes: dict[str, int] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        found = [(adapter.layers.get(name), share) for adapter, share in zip(adapters, shares, strict=True)]
        parts = [(layer, share) for layer, share in found if layer is not None]
        layers[name], clash = _layer(name, parts, base, policy)
        clashes |= {name: clash} if clash else {}
    if policy == "refuse" and clashes:
        worst = max(clashes, key=lambda name: clashes[name])
        raise ConfigError(
            f"compose: {sum(clashes.values()):,} entries in {len(clashes)} layers were changed by several adapters "
            f"({clashes[worst]:,} in {worst}). Choose a policy for them ({', '.join(POLICIES[1:])}), or train at "
            "positions= that do not meet."
        )
    owners = [n for n, adapter in enumerate(adapters) if adapter.others]
    chosen = head if head is not None else owners[0] if owners else None
    others = {} if chosen is None else dict(adapters[chosen].others)
    config = _config(adapters, None if chosen is None else adapters[chosen])
    return Adapter(adapters[0].folder, config, layers, others)


def _refuse_masks(adapter: Adapter) -> None:
    for name, layer in adapter.layers.items():
        if any(block.axis == "entries" for block in layer.values):
            raise UnsupportedError(
                f"compose: {name} was trained with a random mask; only rows and columns are composed."
            )


def _check(adapters: Sequence[Adapter], policy: str, weights: Sequence[float] | None, head: int | None) -> None:
    if len(adapters) < 2:
        raise ConfigError(f"compose: {len(adapters)} adapter; give at least two.")
    if policy not in POLICIES:
        raise ConfigError(f"compose: policy={policy!r} is unknown; expected one of {', '.join(POLICIES)}.")
    if weights is not None and (policy != "mean" or len(weights) != len(adapters)):
        raise ConfigError(f"compose: weights are for policy='mean', one per adapter ({len(adapters)} here).")
    if weights is not None and not (all(0 < weight < float("inf") for weight in weights)):
        raise ConfigError(f"compose: weights={list(weights)} must be positive numbers.")
    for adapter in adapters:
        _refuse_masks(adapter)
    for adapter in adapters[1:]:
        for key in _SAME:
            if (adapter.config.get(key) or None) != (adapters[0].config.get(key) or None):  # absent in older files
                raise ConfigError(
                    f"compose: {adapter.folder} has {key}={adapter.config.get(key)}, {adapters[0].folder} has "
                    f"{key}={adapters[0].config.get(key)}; one adapter has one mode and rank. Export them to LoRA "
                    "instead (slicefine export), whose changes add up."
                )
    owners = [n for n, adapter in enumerate(adapters) if adapter.others]
    if head is not None and not 0 <= head < len(adapters):
        raise ConfigError(f"compose: head={head} is none of the {len(adapters)} adapters, counted from 0.")
    if len(owners) > 1 and head is None:
        some = next(iter(adapters[owners[0]].others))
        raise ConfigError(
            f"compose: {len(owners)} adapters bring tensors of their own beside the slices ({some}, ...), and the "
            "result can have one's only; say whose with head=."
        )


def _layer(
    name: str, parts: list[tuple[LayerFile, float]], base: Checkpoint | None, policy: str
) -> tuple[LayerFile, int]:
    """One layer's slices of several adapters in one, and how many entries several of them changed."""
    first = parts[0][0]
    blocks = list(dict.fromkeys(block for layer, _ in parts for block in layer.values))
    if len({layer.additive for layer, _ in parts}) > 1:
        raise AdapterFileError(
            f"compose: of the adapters' slices of {name}, some hold values and others differences beside a quantised "
            "weight. Export them to LoRA instead (slicefine export), whose changes add up."
        )
    if len({(layer.shape, layer.transposed, layer.room, layer.dtype) for layer, _ in parts}) > 1:
        raise AdapterFileError(f"compose: the adapters do not agree on the weight of {name}; they have other bases.")
    originals: dict[Slice, Tensor] = {}
    for layer, _ in parts:
        originals |= replaced(base, name, layer)
    matrices = [_matrix(first.shape, originals, layer.values) for layer, _ in parts]
    result = _matrix(first.shape, originals, {})
    clashes = PackedDelta(first.shape, torch.float32, torch.device("cpu"))  # ones where several changed an entry
    for block in blocks:
        plain = originals[block].to(result.dtype)
        values = [matrix.read(block) for matrix in matrices]
        changed = torch.stack([value != plain for value in values])
        several = _disagreed([value.to(first.dtype).to(value.dtype) for value in values], changed)
        result.write(block, _resolved(plain, values, changed, several, policy, [share for _, share in parts]))
        clashes.write(block, several.to(clashes.dtype))
    merged = {block: result.read(block) for block in blocks}
    visits = _visits([layer for layer, _ in parts])
    whole = replace(first, visits=visits, values=merged, before=[None] * len(visits))  # in no single order: no undo
    return whole, clashes.count_nonzero()


def _matrix(shape: tuple[int, int], originals: dict[Slice, Tensor], values: dict[Slice, Tensor]) -> PackedDelta:
    """The base's lines with an adapter's values in them."""
    dtypes = [lines.dtype for lines in originals.values()]
    matrix = PackedDelta(shape, torch.promote_types(dtypes[0], torch.float32), torch.device("cpu"))
    for source in (originals, values):
        for block, lines in source.items():
            matrix.write(block, lines)
    return matrix


def _disagreed(values: list[Tensor], changed: Tensor) -> Tensor:
    """Entries to which several adapters gave different values.

    An adapter that was trained on top of another carries the other's values where their lines cross.
    """
    stacked = torch.stack(values)
    infinity = torch.full_like(stacked, torch.inf)
    lowest = torch.where(changed, stacked, infinity).amin(0)
    highest = torch.where(changed, stacked, -infinity).amax(0)
    return (changed.sum(0) > 1) & (lowest != highest)


def _resolved(
    plain: Tensor, values: list[Tensor], changed: Tensor, several: Tensor, policy: str, shares: list[float]
) -> Tensor:
    result = plain.clone()
    for value, mask in zip(values, changed, strict=True):  # the last one's value where it is the only one, and anyway
        result[mask] = value[mask]
    if policy in ("sum", "mean") and bool(several.any()):
        total, weight = torch.zeros_like(plain), torch.zeros_like(plain)
        for value, mask, share in zip(values, changed, shares, strict=True):
            factor = share if policy == "mean" else 1.0
            total += factor * (value - plain) * mask
            weight += factor * mask
        mixed = plain + (total / weight.clamp(min=1e-30) if policy == "mean" else total)
        result[several] = mixed[several]
    return result


def _visits(layers: list[LayerFile]) -> list[Visit]:
    """The visits one after the other, as if the runs had been one."""
    result: list[Visit] = []
    for layer in layers:
        before = result[-1].last_step if result else 0
        result += [Visit(v.slice, v.first_step + before, v.last_step + before) for v in layer.visits]
    return result


def _config(adapters: Sequence[Adapter], head: Adapter | None) -> dict[str, Any]:
    layers = {name: layer for adapter in adapters for name, layer in adapter.layers.items()}
    single = sorted(name for name, layer in layers.items() if layer.tensor == name)  # parameters, not whole layers
    names = sorted(layers.keys() - set(single))
    same = all(adapter.config.get(key) == adapters[0].config.get(key) for adapter in adapters for key in _TARGETS)
    own: dict[str, Any] = (
        {}
        if same
        else {
            **dict.fromkeys(_TARGETS),
            "target_modules": names,
            "target_parameters": single or None,
        }
    )
    source = {} if head is None else head.config
    changes: dict[str, Any] = {
        **own,
        "trainable_token_indices": source.get("trainable_token_indices"),
        "modules_to_save": source.get("modules_to_save"),
        "bias": source.get("bias", "none"),
        "progress": None,
        "reserve": None,
        "share": None,
        "window": None,
        "window_order": "top-down",
        "window_dwell": "uniform",
    }
    return {**adapters[0].config, **changes}
