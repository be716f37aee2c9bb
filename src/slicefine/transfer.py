"""One layer's adapter as tensors: out for a file or a state dict, in from one, checked before anything changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from .delta import KINDS, expected_shapes, pack, unpack
from .errors import AdapterFileError, UnsupportedError
from .functional import Matrix, read_block, write_block
from .geometry import Slice, line_length
from .journal import read_table
from .packed import PackedDelta
from .schedule import slice_at
from .sharded import ShardedMatrix, is_sharded
from .state import AdapterState, SampledEntry, base_sample, same_base
from .weights import WeightKind
from .zero import register_gathered_hook

__all__ = [
    "BESIDE",
    "ORIGINALS",
    "AdapterTensors",
    "check_tensors",
    "expect",
    "expect_checkpoint",
    "file_tensors",
    "install",
    "load_tensors",
    "take_out_arrived",
    "tensor_name",
    "weight_facts",
]

# two more kinds of tensor
ORIGINALS = "originals"  # what the slices in the weight replaced: for state dicts with whole weights, never in a file
BESIDE = "beside"  # empty: says that the slices are differences beside the weight


class Holder(Protocol):
    """What is used of a layer here; see `slicefine.layer.SliceLayer`."""

    states: dict[str, AdapterState]
    slicefine_active: nn.ParameterDict
    requested: list[str] | None
    arriving: dict[str, Tensor]
    kind: WeightKind

    @property
    def applied(self) -> list[str]: ...
    @property
    def label(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def transposed(self) -> bool: ...
    @property
    def base_weight(self) -> Tensor: ...
    def room(self, name: str) -> torch.Size: ...
    def values(self, name: str) -> Tensor: ...
    def put(self, name: str, values: Tensor) -> None: ...
    def dense(self) -> Matrix: ...
    def reverted(self) -> AbstractContextManager[Matrix]: ...
    def apply_only(self, names: Sequence[str]) -> None: ...
    def begin(self, name: str, block: Slice) -> None: ...
    def load_active(self, name: str) -> None: ...
    def aim(self, name: str) -> None: ...
    def settle(self, name: str) -> None: ...
    def mark_synced(self, name: str) -> None: ...
    def fixed_lines(self, name: str, block: Slice) -> Tensor | None: ...


class AdapterTensors(nn.Module):
    """Input and output of one kind of file tensor in state dicts; shapes follow the run, so nothing is stored here."""

    def __init__(self, owner: Holder, kind: str) -> None:
        super().__init__()
        object.__setattr__(self, "_owner", owner)  # not a child module: the owner contains this one
        self._kind = kind

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name in list(self._owner.states):
            tensor = _state_tensor(self._owner, name, self._kind)
            if tensor is not None:
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in list(self._owner.states):
            if prefix + name in state_dict:
                _stage(self._owner, name, self._kind, state_dict[prefix + name])

    def named_buffers(self, prefix: str = "", recurse: bool = True, *args: Any) -> Iterator[tuple[str, Tensor]]:
        """Names that a state dict may bring, for torch.distributed.checkpoint, which asks module by module.

        Others who ask so mean to move them (accelerate's offloading), and there is nothing to be moved.
        """
        asked = not recurse and torch.distributed.is_available() and torch.distributed.is_initialized()
        for name in self._owner.states if asked else ():
            yield prefix + name, torch.empty(0, device=self._owner.base_weight.device)

    def __getattr__(self, name: str) -> Any:
        owner = self.__dict__.get("_owner")
        if owner is not None and name in owner.states:
            return _state_tensor(owner, name, self._kind)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        owner = self.__dict__.get("_owner")
        if owner is not None and name in owner.states:
            _stage(owner, name, self._kind, value)
        else:
            super().__setattr__(name, value)


def _complete(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Put what DeepSpeed's state dict lacks into it: it was made from parameters and buffers alone."""
    for prefix, module in model.named_modules():
        if isinstance(module, AdapterTensors):
            for key in [key for key in state_dict if key.startswith(f"{prefix}.")]:
                del state_dict[key]
            module._save_to_state_dict(state_dict, f"{prefix}.", keep_vars=False)


register_gathered_hook(_complete)


# -- out ----------------------------------------------------------------------------------------------------------


def file_tensors(layer: Holder, name: str) -> dict[str, Tensor]:
    """Tensors of adapter ``name`` for a file (see `slicefine.delta`), the active block left out."""
    state = layer.states[name]
    _refuse_meta_shards(layer)
    if state.deferred or layer.slicefine_active[name].is_meta or state.layout.keys() - state.staged.keys():
        return _placeholders(state.layout) | state.staged  # a file is on its way: say what is expected
    layer.settle(name)
    journal = state.journal
    key = (state.stamp, len(journal.visits), journal.visits[-1], journal.applied)
    if state.file_cache is None or state.file_cache[0] != key:  # a state dict asks kind by kind
        state.file_cache = (key, pack(journal, layer.dense()))
    return dict(state.file_cache[1])


def weight_facts(layer: Holder, name: str) -> dict[str, Any]:
    """What a file says of the weight under adapter ``name``: shape, orientation, precision, a few of its values."""
    journal = layer.states[name].journal
    block = journal.visits[0].slice
    if layer.applied == [name]:
        values = journal.original()
    else:
        with layer.reverted() as weight:
            values = read_block(weight, block)
    facts: dict[str, Any] = {"shape": list(layer.shape), "transposed": layer.transposed}
    layer_name = layer.states[name].layer_name
    tensor = tensor_name(layer_name, layer.kind.parameter)
    if not layer.kind.called or tensor == layer_name:  # a single parameter is named like its tensor
        facts |= {"layout": layer.kind.layout, "tensor": tensor}
    if isinstance(layer.dense(), PackedDelta):
        facts["additive"] = True  # the originals are zeros, which tell no base from another
    elif block.axis != "entries":
        fixed = layer.fixed_lines(name, block)
        facts["sample"] = [list(entry) for entry in base_sample(values, block, fixed)]
    return facts | {"dtype": str(values.dtype).removeprefix("torch.")}


def tensor_name(layer_name: str, parameter: str) -> str:
    """A weight's full name: slices of a single parameter are named like it, those of a layer like the layer.

    Example:
        >>> tensor_name("attention", "in_proj_weight"), tensor_name("mlp.experts.down_proj", "down_proj")
        ('attention.in_proj_weight', 'mlp.experts.down_proj')
    """
    return layer_name if layer_name.rpartition(".")[2] == parameter else f"{layer_name}.{parameter}"


def _state_tensor(layer: Holder, name: str, kind: str) -> Tensor | None:
    """One tensor of adapter ``name`` for a state dict.

    It holds the weight, too, with the applied slices in it: without the originals it could not be unloaded again.
    """
    if kind == BESIDE:
        return torch.empty(0)
    if kind != ORIGINALS:
        return file_tensors(layer, name).get(kind)
    state = layer.states[name]
    journal = state.journal
    if ORIGINALS in state.layout:
        return _placeholders(state.layout)[ORIGINALS]
    if not journal.applied or state.layout.keys() - state.staged.keys():  # or an adapter's file, without them, is due
        return None
    with layer.reverted() as weight:
        return torch.cat([read_block(weight, block).reshape(-1) for block in journal.slices()])


def _refuse_meta_shards(layer: Holder) -> None:
    """Accelerate's RAM-efficient loading broadcasts every tensor of a state dict as a shard, journals too."""
    weight = layer.base_weight
    if weight.is_meta and is_sharded(weight):
        raise UnsupportedError(
            f"{layer.label}: the state dict of a sharded model without values (meta device) was asked for. Set "
            "fsdp_cpu_ram_efficient_loading: false, or, without accelerate, fill the weights first."
        )


def _placeholders(layout: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of the right shape for loaders that look before they load; they are never written to a file."""
    types = {kind: torch.int64 if kind == "journal" else torch.float32 for kind in layout}
    return {kind: torch.zeros(shape, dtype=types[kind]) for kind, shape in layout.items()}


def expect_checkpoint(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Announce a checkpoint of a whole model, for loaders that read into the tensors of a state dict.

    ``torch.distributed.checkpoint.load`` is one; a state dict then has room for all visits of the checkpoint. Call
    it right before the state dict is made, and load the state dict into the model afterwards.

    Args:
        model: with slices.
        shapes: of the checkpoint's tensors, by their names in the model's state dict.

    Example:
        >>> from torch.distributed.checkpoint import FileSystemReader
        >>> def announce(model, path):
        ...     found = FileSystemReader(path).read_metadata().state_dict_metadata
        ...     sizes = {key.removeprefix("model."): item.size for key, item in found.items() if "slicefine_" in key}
        ...     expect_checkpoint(model, sizes)
    """
    for prefix, layer in model.named_modules():
        if not hasattr(layer, "slicefine_active"):
            continue
        holder = cast(Holder, layer)
        for name in holder.states:
            keys = {kind: f"{prefix}.slicefine_{kind}.{name}".lstrip(".") for kind in (*KINDS, ORIGINALS)}
            expect(holder, name, {kind: tuple(shapes[key]) for kind, key in keys.items() if key in shapes})


# -- in -----------------------------------------------------------------------------------------------------------


def expect(layer: Holder, name: str, layout: dict[str, tuple[int, ...]], sample: Sequence[SampledEntry] = ()) -> None:
    """Announce what a file will bring.

    Args:
        layer: where to.
        name: the adapter.
        layout: shapes of its tensors, for loaders that compare shapes before they load.
        sample: values of the base that its slices were trained on (`weight_facts`); another base is refused.
    """
    layer.states[name].layout, layer.states[name].sample = layout, list(sample)


def check_tensors(layer: Holder, name: str, tensors: dict[str, Tensor]) -> None:
    """Raise `AdapterFileError` unless a file's tensors, ``active`` among them, fit adapter ``name``."""
    room = layer.room(name)
    active = tensors.get("active")
    if active is None or active.shape != room or "journal" not in tensors:
        raise AdapterFileError(
            f"{layer.label}: the file has an active block of shape {None if active is None else tuple(active.shape)}"
            f"{'' if 'journal' in tensors else ' and no journal'}, expected {tuple(room)}. The file is "
            "incomplete, or was made for another base model, rank or mode."
        )
    unpack(tensors, active, layer.shape, layer.label)
    sample = layer.states[name].sample
    if layer.dense().device.type != "meta":
        with layer.reverted():
            _check_base(layer, sample)


def load_tensors(layer: Holder, name: str, tensors: dict[str, Tensor]) -> None:
    """Install a file's tensors, ``active`` among them, in one go, or refuse them before anything changes."""
    check_tensors(layer, name, tensors)
    device = layer.dense().device
    for kind in KINDS:
        if kind in tensors:
            _stage(layer, name, kind, tensors[kind].to(device))
    layer.put(name, tensors["active"])
    layer.settle(name)


def install(layer: Holder, name: str) -> None:
    """Replace adapter ``name`` by the file tensors that were staged."""
    state, parameter = layer.states[name], layer.values(name)
    tensors = {kind: t.detach() for kind, t in state.staged.items()}
    values = unpack(tensors, parameter, layer.shape, state.layer_name)
    names = layer.applied
    table, sample = tensors["journal"].cpu(), state.sample
    state.forget()  # before anything is applied: applying settles, settling installs
    layer.mark_synced(name)  # what the loader put into the parameter must not get into the weight yet
    layer.apply_only([])
    try:
        _check_base(layer, sample)
    except AdapterFileError:
        _recover(layer, name, names)
        raise
    state.journal.load(table, values, tensors.get("before"))
    layer.aim(name)
    half = parameter.dtype != layer.dense().dtype  # then the weight cannot tell the master's values
    state.previous = parameter.detach().clone() if half else None
    layer.mark_synced(name)
    layer.apply_only(names)


def take_out_arrived(layer: Holder) -> None:
    """Restore what the slices of a loaded weight replaced; their journal, still staged, says where they are."""
    arrived, layer.arriving = layer.arriving, {}
    for name, values in arrived.items():
        if layer.dense().device.type == "meta" or layer.requested is None or "journal" not in layer.states[name].staged:
            continue
        visits = read_table(layer.states[name].staged["journal"])
        blocks = list(dict.fromkeys(visit.slice for visit in visits))
        lengths = [line_length(block.axis, layer.shape) for block in blocks]
        parts = torch.split(values, [block.width * length for block, length in zip(blocks, lengths, strict=True)])
        for block, length, part in zip(blocks, lengths, parts, strict=True):
            write_block(layer.dense(), block, part.reshape(-1, length))


def _stage(layer: Holder, name: str, kind: str, tensor: Tensor) -> None:
    """Take over one tensor of a file; it is installed when the journal and the active block are there.

    An empty one is as good as none: loaders that broadcast from one process bring them for what the file lacks.
    """
    if tensor.numel() == 0 and not tensor.is_meta:
        return
    if kind == "journal":
        expected_shapes(tensor, layer.shape)  # refuse a foreign or corrupt journal before anything changes
    if kind == ORIGINALS:
        layer.arriving[name] = tensor
    elif kind != BESIDE:
        layer.states[name].staged[kind] = tensor


def _check_base(layer: Holder, sample: list[SampledEntry]) -> None:
    """Raise `AdapterFileError` unless the reverted weight is the one that a file's slices were trained on.

    Precisions may differ: values are compared with the tolerance of bfloat16.
    """
    weight = layer.dense()
    if not sample or isinstance(weight, PackedDelta):  # what lies beside a weight fits any
        return
    rows, columns = [entry.row for entry in sample], [entry.column for entry in sample]
    places = torch.tensor(rows), torch.tensor(columns)
    found = (weight.at(*places) if isinstance(weight, ShardedMatrix) else cast(Tensor, weight)[places]).tolist()
    if not same_base(sample, found):
        raise AdapterFileError(
            f"{layer.label}: its weight is not the one that the adapter was trained on (it has {found[0]:.6g} at row "
            f"{rows[0]}, column {columns[0]}, not {sample[0].value}). Slices hold values, which fit their own base "
            "model only: load that one."
        )


def _recover(layer: Holder, name: str, names: list[str]) -> None:
    """After a refusal: what was loaded into adapter ``name``'s parameter goes, its own block comes back."""
    state, weight = layer.states[name], layer.dense()
    if state.journal.visits:
        state.journal.apply(weight)
        layer.load_active(name)
    else:
        layer.begin(name, slice_at(state.schedule, 0, layer.shape, state.layer_name))
    state.journal.revert(weight)
    layer.apply_only(names)
