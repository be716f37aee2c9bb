"""FSDP2: blocks of weights of which every process holds a part only.

A write needs no communication: each process writes the part that it holds. A read is one collective over the block,
never over the weight. The bytes are added up as integers, and all processes but one add zeros, so that every value
arrives bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .errors import UnsupportedError
from .geometry import Slice, entry_indices, line_length
from .zero import is_partitioned, refuse_stage_3, watch

__all__ = [
    "ShardedMatrix",
    "full",
    "is_sharded",
    "is_whole",
    "put_whole",
    "refuse_engine",
    "sharded_parameter",
    "whole",
]

if torch.distributed.is_available():
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.tensor import DTensor, Replicate, Shard
else:
    _module_state_mapping = weakref.WeakKeyDictionary()

# of each module that FSDP2 looks after, its own record of each parameter
_records: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is spread over processes (a ``DTensor``)."""
    return torch.distributed.is_available() and isinstance(tensor, DTensor)


def is_whole(parameter: Tensor) -> bool:
    """Whether a parameter is certainly not sharded: a quick look, for what happens at every layer and step."""
    return type(parameter) is nn.Parameter and not _module_state_mapping


def sharded_parameter(module: nn.Module, name: str) -> Tensor | None:
    """The parameter ``module.name`` as FSDP2 keeps it and optimizers hold it; None if it is not sharded.

    While a forward or backward runs, the module shows a gathered copy instead, and FSDP2 alone knows the parameter.
    """
    shown = getattr(module, name)
    if not torch.distributed.is_available() or not (_module_state_mapping or is_sharded(shown)):
        return None
    if module not in _records:
        _look_around()
    record = _records.get(module, {}).get(name)
    if record is not None:
        return cast(Tensor, record.sharded_param)
    return shown if is_sharded(shown) else None


def _look_around() -> None:
    """Note which parameters FSDP2 keeps for which modules; it has no public way to ask."""
    for state in [reference() for reference in list(_module_state_mapping.values())]:
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for record in [record for group in groups if group is not None for record in group.fsdp_params]:
            info = record._module_info
            _records.setdefault(info.module, {})[info.param_name] = record


class _Part(NamedTuple):
    """What one process holds of a matrix: a rectangle, and where its first entry lies."""

    values: Tensor
    row: int
    column: int

    def t(self) -> _Part:
        return _Part(self.values.t(), self.column, self.row)


class ShardedMatrix:
    """A ``(rows, columns)`` matrix that lies in parts in several processes, read and written block by block.

    Every process has to make the same reads in the same order.

    Args:
        stored: the sharded parameter.
        shown: what the module shows now: the parameter itself, or a gathered copy, which is written to as well.
        transposed: the parameter is ``(columns, rows)``.

    Raises:
        UnsupportedError: if it is sharded in another way than FSDP2 does (tensor parallelism).
    """

    def __init__(self, stored: Tensor, shown: Tensor | None = None, transposed: bool = False) -> None:
        copies = [stored] if shown is None or shown is stored else [stored, shown]
        parts = [_part(copy) for copy in copies]
        self._parts = [part.t() for part in parts] if transposed else parts
        self._stored = stored
        self.shape = torch.Size(reversed(stored.shape)) if transposed else stored.shape
        self.dtype, self.device = stored.dtype, stored.device

    def read(self, block: Slice) -> Tensor:
        """Copy of a block's values as lines, from all processes."""
        if block.axis == "entries":
            return self.at(*self._coordinates(block)).unsqueeze(0)
        lines = torch.zeros(block.width, line_length(block.axis, self._size), dtype=self.dtype, device=self.device)
        where, own = _overlap(self._parts[0], block)
        lines[where] = own
        return _gather([(lines, self._stored)])[0]

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Values of single entries, from all processes."""
        values = torch.zeros(len(rows), dtype=self.dtype, device=self.device)
        inside, place = _inside(self._parts[0], rows.to(self.device), columns.to(self.device))
        values[inside] = self._parts[0].values[place]
        return _gather([(values, self._stored)])[0]

    def write(self, block: Slice, values: Tensor) -> None:
        """Overwrite this process's part of a block with ``values`` (all of its lines)."""
        for part in self._parts:
            given = values.to(part.values)
            if block.axis == "entries":
                rows, columns = (index.to(given.device) for index in self._coordinates(block))
                inside, place = _inside(part, rows, columns)
                part.values[place] = given.reshape(-1)[inside]
            else:
                where, own = _overlap(part, block)
                own.copy_(given[where])

    @property
    def _size(self) -> tuple[int, int]:
        return self.shape[0], self.shape[1]

    def _coordinates(self, block: Slice) -> tuple[Tensor, Tensor]:
        index = entry_indices(block, self._size)
        return index // self.shape[1], index % self.shape[1]


def whole(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Parameters' values: their own storage, or, of sharded ones, copies gathered by one collective for all of them."""
    buffers = []
    for parameter in parameters:
        if is_sharded(parameter):
            part = _part(parameter)
            buffer = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            where, own = _overlap(part, Slice("row", 0, parameter.shape[0]))
            buffer[where] = own
            buffers.append((buffer, parameter))
    gathered = iter(_gather(buffers))
    return [next(gathered) if is_sharded(parameter) else parameter.data for parameter in parameters]


def full(tensor: Tensor) -> Tensor:
    """A tensor that is spread over processes, gathered; others as they are."""
    return cast(DTensor, tensor).full_tensor() if is_sharded(tensor) else tensor


def put_whole(parameter: Tensor, shown: Tensor, values: Tensor) -> None:
    """Overwrite this process's part of a sharded parameter, and the copy that its module shows."""
    ShardedMatrix(parameter, shown).write(Slice("row", 0, parameter.shape[0]), values)


def refuse_engine(weight: Any, parameter: Any, layer: Any) -> None:
    """Raise `UnsupportedError` inside a forward of an engine that takes a layer's parameters apart; watch ZeRO's."""
    for tensor in (weight, parameter):
        if type(tensor) is nn.Parameter and not tensor.__dict__:  # every forward of every layer comes here
            continue
        refuse_stage_3(tensor, layer.label)
        if is_partitioned(tensor):
            if tensor is weight:
                raise UnsupportedError(
                    f"{layer.label}: DeepSpeed's optimizer holds the weight, which slices freeze. Make the slices "
                    "first (attach, get_peft_model), then the optimizer and the engine."
                )
            watch()
            continue
        if getattr(tensor, "_fsdp_flattened", False) or not isinstance(tensor, nn.Parameter):
            raise UnsupportedError(
                f"{layer.label}: FSDP1 flattens the parameters of several layers into one, so there are no rows and "
                "columns to train. Use FSDP2: fully_shard(model), or fsdp_version: 2 in accelerate's configuration."
            )
        if is_sharded(tensor):
            raise UnsupportedError(
                f"{layer.label}: its forward runs on a part of the weight (tensor parallelism), and a slice needs "
                "whole rows and columns. Use FSDP2 instead of parallelize_module or tp_plan."
            )


def _part(tensor: Tensor) -> _Part:
    """This process's part of a matrix; all of it, if the tensor is not sharded."""
    if not is_sharded(tensor):
        return _Part(tensor.data, 0, 0)
    shard = cast(DTensor, tensor)
    values = cast(DTensor, shard.detach()).to_local()
    dimension, place = _sharding(shard)
    if dimension is None:
        return _Part(values, 0, 0)
    mesh, length = shard.device_mesh, shard.shape[dimension]
    start = min(mesh.get_local_rank(place) * -(-length // mesh.size(place)), length)
    return _Part(values, *((start, 0) if dimension == 0 else (0, start)))


def _sharding(tensor: DTensor) -> tuple[int | None, int]:
    """Which dimension is sharded, and over which dimension of the mesh; None if every process has all of it."""
    split = [(i, place) for i, place in enumerate(tensor.placements) if type(place) is not Replicate]
    if not split:
        return None, 0
    if len(split) > 1 or type(split[0][1]) is not Shard:
        raise UnsupportedError(
            f"a weight of shape {tuple(tensor.shape)} is placed as {tensor.placements}; slices can be trained in "
            "weights that FSDP2 alone shards (one Shard, else Replicate). Leave tensor parallelism out."
        )
    return split[0][1].dim, split[0][0]


def _overlap(part: _Part, block: Slice) -> tuple[tuple[slice, slice], Tensor]:
    """Which of a block's lines and entries a process holds, and a view of them."""
    values, first, offset = part if block.axis == "row" else part.t()
    low, high = max(block.start, first), min(block.start + block.width, first + values.shape[0])
    high = max(low, high)
    where = slice(low - block.start, high - block.start), slice(offset, offset + values.shape[1])
    return where, values[min(low - first, values.shape[0]) : high - first]


def _inside(part: _Part, rows: Tensor, columns: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Which of some entries a process holds, and where they lie in its part."""
    rows, columns = rows - part.row, columns - part.column
    height, width = part.values.shape
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return inside, (rows[inside], columns[inside])


def _gather(buffers: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Fill buffers, zero where this process holds nothing: one collective per group of processes.

    Args:
        buffers: each with the sharded tensor that it was read from.
    """
    buffers = list(buffers)
    result = [buffer for buffer, _ in buffers]
    groups: dict[tuple[Any, int], list[int]] = {}
    for i, (_, source) in enumerate(buffers):
        shard = cast(DTensor, source)
        dimension, place = _sharding(shard)
        if dimension is not None:
            groups.setdefault((shard.device_mesh, place), []).append(i)
    for (mesh, place), members in groups.items():
        parts = [result[i].reshape(-1).view(torch.uint8) for i in members]
        flat = torch.cat(parts).to(mesh.device_type)
        torch.distributed.all_reduce(flat, group=mesh.get_group(place))
        for i, piece in zip(members, torch.split(flat, [part.numel() for part in parts]), strict=True):
            buffer = result[i]
            result[i] = piece.clone().to(buffer.device).view(buffer.dtype).reshape(buffer.shape)
    return result
