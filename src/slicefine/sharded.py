"""Blocks of weights of which every process holds a part only: FSDP2's rectangles, flat pieces of ZeRO's stage 3.

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
from .zero import full_shape, has_master, is_spread, look_at, pieces, watch

__all__ = [
    "ShardedMatrix",
    "full",
    "is_sharded",
    "is_plain",
    "is_whole",
    "placed_like",
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

_engines: dict[Any, Any] = cast(Any, _module_state_mapping).data  # whether it is empty is asked at every layer
# of each module that FSDP2 looks after, its own record of each parameter
_records: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is spread over processes: a ``DTensor``, or a parameter under ZeRO's stage 3."""
    return is_spread(tensor) or _is_dtensor(tensor)


def _is_dtensor(tensor: object) -> bool:
    return torch.distributed.is_available() and isinstance(tensor, DTensor)


def is_whole(parameter: Tensor) -> bool:
    """Whether a parameter is certainly not FSDP2's: a quick look, for what happens at every layer and step."""
    return type(parameter) is nn.Parameter and not _engines


def is_plain(parameter: Tensor) -> bool:
    """As `is_whole`, and no other engine's either: DeepSpeed and FSDP1 leave their marks on parameters."""
    return type(parameter) is nn.Parameter and not parameter.__dict__ and not _engines


def sharded_parameter(module: nn.Module, name: str) -> Tensor | None:
    """The parameter ``module.name`` as optimizers hold it, if it is sharded; else None.

    While a forward or backward runs, the module shows FSDP2's gathered copy instead, and FSDP2 alone knows the
    parameter. DeepSpeed gathers within the parameter.
    """
    shown = look_at(module, name)
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


class _Flat(NamedTuple):
    """The same of a matrix that lies flat in several processes: entries that follow each other."""

    values: Tensor
    first: int
    strides: tuple[int, int]

    def t(self) -> _Flat:
        return _Flat(self.values, self.first, (self.strides[1], self.strides[0]))


class ShardedMatrix:
    """A ``(rows, columns)`` matrix that lies in parts in several processes, read and written block by block.

    Every process has to make the same reads in the same order.

    Args:
        stored: the sharded parameter.
        shown: what the module shows now: the parameter itself, or a gathered copy, which is written to as well (as is
            what DeepSpeed has gathered).
        transposed: the parameter is ``(columns, rows)``.

    Raises:
        UnsupportedError: if it is sharded in another way than FSDP2 does (tensor parallelism).
    """

    def __init__(self, stored: Tensor, shown: Tensor | None = None, transposed: bool = False) -> None:
        copies = [stored] if shown is None or shown is stored else [stored, shown]
        parts = [part for copy in copies for part in _parts(copy)]
        self._parts = [part.t() for part in parts] if transposed else parts
        self._stored = stored
        shape = full_shape(stored)
        self.shape = torch.Size(reversed(shape)) if transposed else shape
        self.dtype, self.device = stored.dtype, stored.device

    def read(self, block: Slice) -> Tensor:
        """Copy of a block's values as lines, from all processes."""
        part, lines = self._parts[0], self._lines(block)
        if isinstance(part, _Flat) or block.axis == "entries":
            return self.at(*self._coordinates(block)).reshape(lines)
        values = torch.zeros(lines, dtype=self.dtype, device=self.device)
        where, own = _overlap(part, block)
        values[where] = own
        return _gather([(values, self._stored)])[0]

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Values of single entries, from all processes."""
        part = self._parts[0]
        device = part.values.device  # of offloaded pieces the CPU
        values = torch.zeros(len(rows), dtype=self.dtype, device=device)
        inside, place = _inside(part, rows.to(device), columns.to(device))
        values[inside] = part.values[place]
        return _gather([(values, self._stored)])[0].to(self.device)

    def write(self, block: Slice, values: Tensor) -> None:
        """Overwrite this process's part of a block with ``values`` (all of its lines)."""
        for part in self._parts:
            given = values.to(part.values)
            if isinstance(part, _Flat) or block.axis == "entries":
                rows, columns = (index.to(given.device) for index in self._coordinates(block))
                inside, place = _inside(part, rows, columns)
                part.values[place] = given.reshape(-1)[inside]
            else:
                where, own = _overlap(part, block)
                own.copy_(given[where])

    @property
    def _size(self) -> tuple[int, int]:
        return self.shape[0], self.shape[1]

    def _lines(self, block: Slice) -> tuple[int, int]:
        """How many lines a block has, and how long they are."""
        if block.axis == "entries":
            return 1, block.width
        return block.width, line_length(block.axis, self._size)

    def _coordinates(self, block: Slice) -> tuple[Tensor, Tensor]:
        """Row and column of each of a block's entries, line by line."""
        if block.axis == "entries":
            index = entry_indices(block, self._size)
            return index // self.shape[1], index % self.shape[1]
        width, length = self._lines(block)
        line = torch.arange(block.start, block.start + width, device=self.device).repeat_interleave(length)
        along = torch.arange(length, device=self.device).repeat(width)
        return (line, along) if block.axis == "row" else (along, line)


def whole(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Parameters' values: their own storage, or, of sharded ones, copies gathered by one collective for all of them."""
    buffers = []
    for parameter in parameters:
        if is_sharded(parameter):
            part = _parts(parameter)[0]
            buffer = torch.zeros(full_shape(parameter), dtype=parameter.dtype, device=parameter.device)
            if isinstance(part, _Flat):
                buffer.view(-1)[part.first : part.first + part.values.numel()] = part.values
            else:
                where, own = _overlap(part, Slice("row", 0, parameter.shape[0]))
                buffer[where] = own
            buffers.append((buffer, parameter))
    gathered = iter(_gather(buffers))
    return [next(gathered) if is_sharded(parameter) else parameter.data for parameter in parameters]


def full(tensor: Tensor) -> Tensor:
    """A tensor that is spread over processes, gathered; others as they are."""
    if is_spread(tensor):
        return whole([tensor])[0]
    return cast(DTensor, tensor).full_tensor() if _is_dtensor(tensor) else tensor


def placed_like(values: Tensor, stored: Tensor) -> Tensor:
    """Values spread over processes as an FSDP2 parameter is; of whole ones, the first process's count."""
    if not _is_dtensor(stored) or _is_dtensor(values):
        return values
    from torch.distributed.tensor import distribute_tensor

    shard = cast(DTensor, stored)
    return distribute_tensor(values.to(shard.to_local()), shard.device_mesh, shard.placements)


def put_whole(parameter: Tensor, shown: Tensor, values: Tensor) -> None:
    """Overwrite this process's part of a sharded parameter, and the copy that its module shows."""
    ShardedMatrix(parameter, shown).write(Slice("row", 0, full_shape(parameter)[0]), values)


def refuse_engine(tensors: Sequence[Any], layer: Any) -> None:
    """Raise `UnsupportedError` inside a forward of an engine that takes a layer's parameters apart; watch ZeRO's.

    Args:
        tensors: the weight, if slices are written to it, and the slice's parameter.
        layer: whose forward it is.
    """
    for tensor in tensors:
        if type(tensor) is nn.Parameter and not tensor.__dict__:  # every forward of every layer comes here
            continue
        if is_spread(tensor) or has_master(tensor):
            layer.check_spread()
            if tensor is not tensors[-1] and has_master(tensor):
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
        if _is_dtensor(tensor):
            raise UnsupportedError(
                f"{layer.label}: its forward runs on a part of the weight (tensor parallelism), and a slice needs "
                "whole rows and columns. Use FSDP2 instead of parallelize_module or tp_plan."
            )


def _parts(tensor: Tensor) -> Sequence[_Part | _Flat]:
    """This process's part of a matrix, and what DeepSpeed has gathered of it."""
    if not is_spread(tensor):
        return [_part(tensor)]
    return [_Flat(values, first, (full_shape(tensor)[1:].numel(), 1)) for values, first in pieces(tensor)]


def _part(tensor: Tensor) -> _Part:
    """This process's part of a matrix; all of it, if the tensor is not sharded."""
    if not _is_dtensor(tensor):
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


def _inside(part: _Part | _Flat, rows: Tensor, columns: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Which of some entries a process holds, and where they lie in its part."""
    if isinstance(part, _Flat):
        place = rows * part.strides[0] + columns * part.strides[1] - part.first
        inside = (place >= 0) & (place < part.values.numel())
        return inside, (place[inside],)
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
    groups: dict[tuple[Any, torch.device | str], list[int]] = {}
    for i, (_, source) in enumerate(buffers):
        place = _group(source)
        if place is not None:
            groups.setdefault(place, []).append(i)
    for (group, device), members in groups.items():
        parts = [result[i].reshape(-1).view(torch.uint8) for i in members]
        flat = torch.cat(parts).to(device)
        torch.distributed.all_reduce(flat, group=group)
        for i, piece in zip(members, torch.split(flat, [part.numel() for part in parts]), strict=True):
            buffer = result[i]
            result[i] = piece.clone().to(buffer.device).view(buffer.dtype).reshape(buffer.shape)
    return result


def _group(tensor: Any) -> tuple[Any, torch.device | str] | None:
    """The processes over which a tensor is sharded, and the device that they send from; None if each has all of it."""
    if is_spread(tensor):
        return tensor.ds_process_group, tensor.device
    dimension, place = _sharding(tensor)
    return None if dimension is None else (tensor.device_mesh.get_group(place), tensor.device_mesh.device_type)
