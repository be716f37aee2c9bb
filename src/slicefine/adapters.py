"""The adapters of a layer: made, applied, moved and kept in step with the weight; no forward."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .delta import KINDS
from .errors import AdapterFileError, ConfigError, UnsupportedError
from .functional import (
    Matrix,
    block_view,
    line_index,
    pad_block,
    read_block,
    write_block,
)
from .geometry import Slice, covered, line_length
from .held import HeldWeight
from .initial import initial_block
from .journal import Journal, visit_table
from .packed import PackedDelta
from .schedule import Schedule, check_positions, slice_at, slices_of_others, widened
from .sharded import is_sharded
from .state import AdapterState, version_of
from .transfer import BESIDE, ORIGINALS, AdapterTensors, install, take_out_arrived
from .weights import Stack, refuse_offloaded, value_dtype
from .window import Place
from .zero import is_spread

__all__ = ["SliceAdapters"]


class SliceAdapters(HeldWeight):
    """A held weight and its adapters.

    The dense weight always holds what the forward needs: the values of the applied adapters, or the originals.
    """

    def _init_slices(
        self, base_layer: nn.Module, additive: bool | None = None, parameter_name: str | None = None
    ) -> None:
        self._hold(base_layer, additive, parameter_name)
        for tensors in (*KINDS, ORIGINALS if self.packed is None else BESIDE):
            setattr(self, f"slicefine_{tensors}", AdapterTensors(self, tensors))
        if self.packed is not None:  # a hook of the layer's own would take time at every call; this is never called
            self.slicefine_active.register_forward_pre_hook(_be_called)
        self.register_load_state_dict_post_hook(_sync_after_load)  # type: ignore[no-untyped-call]

    # -- adapters -------------------------------------------------------------------------------------------------

    def add_slice(
        self, name: str, schedule: Schedule, layer_name: str = "", history: int = 8, ready: bool = False
    ) -> None:
        """Create adapter ``name`` at its first position, not applied, with the base's own values.

        Args:
            name: the adapter.
            schedule: where its slices go.
            layer_name: for messages, and for positions that depend on it.
            history: how many moves can be undone.
            ready: the schedule is this layer's already (`fitted`).
        """
        if name in self.states:
            raise ConfigError(f"{layer_name}: adapter {name!r} exists already; delete it first or choose another name.")
        if not name or "." in name or hasattr(self.slicefine_active, name):  # torch would give a KeyError of its own
            raise ConfigError(
                f"adapter {name!r}: torch cannot name a parameter so (it is empty, has a dot, or is a method's name, "
                'such as "half" and "keys"); choose another name.'
            )
        weight = self.base_weight
        if is_sharded(weight) and (not is_spread(weight) or hasattr(weight, "_z3_optimizer")):
            raise UnsupportedError(
                f"{layer_name}: its weight is spread over processes already, so the slice's parameter would be left "
                "out of what synchronises them. Make the slices first (attach, get_peft_model), then fully_shard, or "
                "DeepSpeed's engine; leave tensor parallelism out (tp_plan, parallelize_module)."
            )
        schedule = schedule if ready else self.fitted(schedule, layer_name)
        check_positions(schedule, self.shape, layer_name)
        if self.packed is not None:
            _check_beside(schedule, layer_name)
        state = AdapterState(schedule, layer_name, history)
        shape = schedule.block_shape(self.shape)
        dtype = self.dense().dtype
        master = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        with torch.inference_mode(False):  # who loads for serving may train later, and versions are counted
            self.slicefine_active[name] = nn.Parameter(torch.zeros(shape, dtype=master, device=self.base_weight.device))
        self.states[name] = state
        state.deferred = self.base_weight.is_meta
        if not state.deferred:
            with self.reverted():
                self.begin(name, slice_at(schedule, 0, self.shape, layer_name))
                state.journal.revert(self.dense())

    def fitted(self, schedule: Schedule, layer_name: str = "") -> Schedule:
        """A schedule as it is for this layer, where ranks and starts of columns count input features.

        Raises:
            UnsupportedError: for a random mask of weights that lie in one piece per expert.
        """
        if self.kind.stacked and schedule.mode == "random_mask":
            raise UnsupportedError(
                f"{layer_name or self.label}: mode='random_mask' draws entries of one matrix, and these are the "
                "weights of several experts. Use mode='row', 'column' or 'alternate'."
            )
        return schedule if self.kind.unit == 1 else widened(schedule, self.kind.unit, layer_name)

    def delete_slice(self, name: str) -> None:
        """Remove adapter ``name``; the weight is restored first if it was applied."""
        self.apply_only([other for other in self.requested or self.applied if other != name])
        biases = self.states[name].biases
        if biases is not None:
            biases.follow(applied=False, trains=False)
        del self.states[name]
        del self.slicefine_active[name]

    def apply_only(self, names: Sequence[str]) -> None:
        """Make the weight hold exactly the adapters ``names``; the originals elsewhere, bit for bit."""
        names = [name for name in names if name in self.states]
        for name in names:
            self.settle(name)
        self.requested = names if self.base_weight.is_meta else None
        if names == self.applied:
            return
        if self.base_weight.is_meta:
            refuse_offloaded(self.base_layer, self.label)
            return
        weight, before = self.dense(), self.applied
        for name in reversed(before):
            if len(before) == 1:  # a sum of several is not what a parameter holds: see `_sync`
                self._sync(name)
            self.states[name].journal.revert(weight)
        if len(names) == 1:
            self.states[names[0]].journal.apply(weight)
        else:
            deltas = {name: self.deltas(name, weight) for name in names}
            for name in names:
                self.states[name].journal.add(weight, deltas[name])
        if self.packed is not None and not names:
            self.packed.clear()  # zeros only
        self._order = names  # so that reverting in reverse restores every entry

    def deltas(self, name: str, weight: Matrix) -> list[tuple[Slice, Tensor]]:
        """``(slice, trained - original)`` of an adapter that is not applied; what belongs to others does not count.

        An adapter that was trained on top of another carries the other's values where their lines cross.
        """
        state = self.states[name]
        result = state.journal.deltas(weight)
        for block, delta in result:
            fixed = self.fixed_lines(name, block)
            if fixed is not None:
                delta[fixed.to(delta.device)] = 0
        return result

    def fixed_lines(self, name: str, block: Slice) -> Tensor | None:
        """Entries of a block that belong to other runs, bool, as lines; None where nobody else trains.

        Where the others are does not change, so it is looked up once.
        """
        state = self.states[name]
        if not state.schedule.reserve and state.schedule.share is None:
            return None
        if state.others is None:
            state.others = slices_of_others(state.schedule, self.shape, state.layer_name)
        return covered(block, state.others, self.shape)

    @contextmanager
    def reverted(self) -> Iterator[Matrix]:
        """The dense weight with its originals in place, for as long as the context lasts."""
        names = self.applied
        self.apply_only([])
        try:
            yield self.dense()
        finally:
            self.apply_only(names)

    def block(self, name: str) -> Tensor:
        """The active part of adapter ``name``'s parameter, without padding: its own storage, or a copy (`values`)."""
        return self._active_part(name, self.values(name))

    def _active_part(self, name: str, values: Tensor) -> Tensor:
        active = self.states[name].journal.active
        return values if active.axis == "entries" else values[: active.width, : line_length(active.axis, self.shape)]

    def clear_padding(self, name: str, values: Tensor) -> None:
        """Zero what lies beyond the active block in adapter ``name``'s ``values``."""
        lines, length = self._active_part(name, values).shape
        values[lines:] = 0
        values[:, length:] = 0

    def weight_block(self, name: str) -> Tensor:
        """What the dense weight holds at the active slice, shaped and typed like the parameter (padded)."""
        state, parameter = self.states[name], self.parameter(name)
        values = read_block(self.dense(), state.journal.active, state.index)
        return pad_block(values, self.room(name)).to(parameter.dtype)

    def active_entries(self, name: str) -> int:
        """Entries that adapter ``name`` trains now, without padding and others' entries; none outside the window."""
        state = self.states[name]
        if state.idle:
            return 0
        if state.deferred:
            first = slice_at(state.schedule, 0, self.shape, state.layer_name)
            fixed = self.fixed_lines(name, first)
            return first.width * line_length(first.axis, self.shape) - (0 if fixed is None else int(fixed.sum()))
        active = state.journal.active
        length = 1 if active.axis == "entries" else line_length(active.axis, self.shape)
        return active.width * length - self.fixed_entries(name)

    def fixed_entries(self, name: str) -> int:
        """Entries of adapter ``name``'s slice that belong to other runs and stay as they are."""
        return self.states[name].crossings

    def cast_active(self, name: str, dtype: torch.dtype) -> None:
        """Keep adapter ``name``'s parameter in ``dtype`` from now on (a new parameter, as PEFT's own casts make)."""
        if self.slicefine_active[name].dtype != dtype:
            self.settle(name)
            old = self.slicefine_active[name]
            self.slicefine_active[name] = nn.Parameter(old.data.to(dtype), requires_grad=old.requires_grad)

    # -- moving ---------------------------------------------------------------------------------------------------

    def check_block(self, name: str, block: Slice) -> None:
        """Raise `ConfigError` unless ``block`` lies inside the weight and fits adapter ``name``'s parameter."""
        where = self.states[name].layer_name or self.label
        block.check(self.shape, where)
        if block.axis == "column" and (block.start % self.kind.unit or block.width % self.kind.unit):
            raise ConfigError(
                f"{where}: {self.kind.unit} columns of its weight belong to one input feature, and {block} does not "
                "begin and end with one."
            )
        lines = 1 if block.axis == "entries" else block.width
        length = block.width if block.axis == "entries" else line_length(block.axis, self.shape)
        fixed = self.fixed_lines(name, block)
        if fixed is not None and bool(fixed.all()):
            raise ConfigError(
                f"{where}: every entry of {block} belongs to other runs (reserve=, share=), so there is nothing to "
                "train. Choose other positions, or leave the layer out (exclude_modules)."
            )
        room = tuple(self.room(name))
        if lines > room[0] or length > room[1] or (block.axis == "entries" and (lines, length) != room):
            raise ConfigError(
                f"{where}: a {block.axis} slice of width {block.width} needs a parameter of shape {(lines, length)}, "
                f"but the adapter's has {room}; keep to its mode and rank."
            )

    def next_block(self, name: str) -> Slice:
        """Where adapter ``name`` goes at its next visit: the schedule's next slice, or, outside the window, nowhere."""
        state = self.states[name]
        visit = turn = len(state.journal.visits)
        if state.place is not None:
            if not state.place.trains(visit):
                return state.journal.active
            turn = state.place.turn(visit)
        return slice_at(state.schedule, turn, self.shape, state.layer_name)

    def move(self, name: str, block: Slice, step: int | None = None) -> None:
        """Freeze the active slice of an applied adapter and load ``block`` into its parameter (see `Journal.begin`)."""
        self._sync(name)
        self.begin(name, block, step)

    def stand(self, name: str, place: Place) -> None:
        """Put adapter ``name`` under a window of blocks: it trains only while the layer is inside."""
        self.states[name].place = place
        self.aim(name)

    def undo(self, name: str) -> None:
        """Take back the last move of an applied adapter."""
        state = self.states[name]
        state.journal.undo(self.dense())
        self.load_active(name)

    def restart(self, name: str) -> None:
        """Take back what the current visit of an applied adapter trained; it begins again."""
        self.states[name].journal.restart(self.dense())
        self.load_active(name)
        self._start_anew(name)

    def begin(self, name: str, block: Slice, step: int | None = None) -> None:
        self.check_block(name, block)
        self.load_active(name, self.states[name].journal.begin(self.dense(), block, step))
        self._start_anew(name)

    def _start_anew(self, name: str) -> None:
        """Give a slice at its first visit the values that `Schedule.start_values` names, if not the pretrained ones."""
        state = self.states[name]
        schedule, block = state.schedule, state.journal.active
        if schedule.start_values == "pretrained" or any(v.slice == block for v in state.journal.visits[:-1]):
            return
        values = initial_block(schedule.start_values, block, self.shape, state.layer_name, schedule.seed)
        whole_values = self.values(name)
        self._active_part(name, whole_values).copy_(values)
        self.take(name, whole_values)

    def load_active(self, name: str, values: Tensor | None = None) -> None:
        """Make parameter, index and content stamp agree with the journal's active slice; None reads its values."""
        state, parameter = self.states[name], self.parameter(name)
        parameter.grad = None  # it belonged to the slice that was there
        if not parameter.is_meta:
            values = read_block(self.dense(), state.journal.active) if values is None else values
            self.put(name, pad_block(values.to(parameter.dtype), self.room(name)))
        self.aim(name)
        state.previous = None
        self.mark_synced(name)

    @torch.inference_mode(False)
    def aim(self, name: str) -> None:
        """Make what the forward looks at agree with the journal's last visit."""
        state = self.states[name]
        visit = max(0, len(state.journal.visits) - 1)
        state.idle = state.place is not None and not state.place.trains(visit)
        state.below = state.place is not None and state.place.below(visit)
        if not state.journal.visits:  # the weight has no values yet
            return
        state.views = ()
        state.index = line_index(state.journal.active, self.shape).to(self.base_weight.device)
        state.axis = state.journal.active.axis
        fixed = self.fixed_lines(name, state.journal.active)
        if fixed is not None:
            state.crossings = int(fixed.sum())
            state.fixed = pad_block(fixed, self.room(name)).to(self.base_weight.device)

    # -- keeping the weight in step with the parameter ------------------------------------------------------------

    def mark_synced(self, name: str) -> None:
        """Note that the weight holds the parameter's values as they are now."""
        self.states[name].mark_synced(self.parameter(name))
        self.states[name].base_version = self._base_version

    @property
    def _base_version(self) -> tuple[weakref.ref[Tensor], int]:
        """The weight, and a number that someone else's writes change; our own go past it."""
        weight = self.base_weight
        return weakref.ref(weight), version_of(weight)

    def others_wrote(self, name: str) -> bool:
        """Whether someone wrote into the weight since adapter ``name`` was in sync with it; FSDP2 does all the time."""
        before, now = self.states[name].base_version, self._base_version
        if before is None or is_sharded(self.parameter(name)):
            return False
        return before[0]() is now[0]() and before[1] != now[1]

    def write_views(self, name: str, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
        """The active block's views in the dense weight and in ``parameter``; None for masks and sharded weights.

        They are kept from step to step: only a move, or other storage under either of the two, makes new ones.
        """
        state = self.states[name]
        if state.axis == "entries" or is_sharded(parameter) or is_sharded(self.base_weight):
            return None
        if not state.views or state.views[0] != (self._place(), parameter.data_ptr()):
            view = self._view(state.journal.active)
            if view is None:
                return None
            # asked again: making a view may pack lines anew
            state.views = ((self._place(), parameter.data_ptr()), view, self.block(name).view(view.shape))
        return state.views[1], state.views[2]

    def _place(self) -> int:
        """Changes when views of the weight, or of what lies beside it, do not hold any more."""
        return self.base_weight.data_ptr() if self.packed is None else self.packed.version

    def _view(self, block: Slice) -> Tensor | None:
        if self.packed is not None:
            return self.packed.view(block)
        matrix = self._base_matrix()
        return matrix.view(block) if isinstance(matrix, Stack) else block_view(cast(Tensor, matrix), block)

    def _in_sync(self, name: str, shown: Tensor | None = None) -> bool:
        """Whether the weight holds the parameter's values; ``shown`` is what the layer shows of it, if at hand."""
        parameter, synced = self.parameter(name, shown), self.states[name].synced
        return synced is not None and synced[0]() is parameter and synced[1] == version_of(parameter)

    def _sync(self, name: str) -> None:
        """Write the parameter into the weight if something changed it (an optimizer, a loader, an average)."""
        state = self.states[name]
        if self._in_sync(name) or not state.journal.applied or self.slicefine_active[name].is_meta:
            return
        if len(self.applied) > 1:  # the weight holds their sum: add them up anew
            with self.reverted():
                return
        if self.others_wrote(name) and torch.distributed.is_initialized() and not state.copied:
            state.journal.renew(self.dense())  # DDP brought rank 0's weights: what the slice replaced is theirs
        self.take(name, self.values(name))

    def take(self, name: str, values: Tensor) -> None:
        """Bring the values of adapter ``name``'s parameter into the weight of an applied adapter.

        Args:
            name: the adapter.
            values: see `values`; what belongs to others is restored in them.
        """
        state = self.states[name]
        if is_sharded(weight := self.base_weight) and not (is_spread(weight) or is_sharded(self.parameter(name))):
            raise UnsupportedError(
                f"{self.label}: FSDP2 shards the weight but not the slice's parameter, so nothing would add up the "
                "processes' gradients. Leave slicefine_active out of ignored_params."
            )
        self.restore_fixed(name, values)
        self.put(name, values, rounded=True)
        write_block(self.dense(), state.journal.active, self._active_part(name, values), state.index)
        if state.previous is not None:
            state.previous.copy_(values)
        self.mark_synced(name)

    def follow_weight(self, name: str) -> None:
        """Take the weight's values for a slice that no step trained yet, where an initialisation wrote past it."""
        state, parameter, weight = self.states[name], self.parameter(name), self.base_weight
        if self.packed is not None or weight.is_meta or is_sharded(weight) or is_sharded(parameter):
            return
        if not state.journal.applied or state.journal.step > 0 or len(state.journal.visits) != 1:
            return
        if not self._in_sync(name):  # the parameter is what was written, and counts
            return
        shown = self.weight_block(name)
        if not torch.equal(parameter.detach().to(weight.dtype), shown.to(weight.dtype)):
            state.journal.renew(self.dense())
            self.put(name, shown)  # and its gradient stays: the forward read the weight
            self.mark_synced(name)

    def restore_fixed(self, name: str, values: Tensor) -> None:
        """Take what belongs to others back from the weight into adapter ``name``'s ``values``, whatever wrote to it."""
        state = self.states[name]
        if state.fixed is None or state.crossings == 0:
            return
        block = self._active_part(name, values)
        fixed = state.fixed[: block.shape[0], : block.shape[1]].to(block.device)
        block.copy_(torch.where(fixed, read_block(self.dense(), state.journal.active).to(block), block))

    def settle(self, name: str) -> None:
        """Finish what had to wait: a base weight without values, a file's tensors, a parameter written elsewhere."""
        state = self.states[name]
        if self.base_weight.is_meta:
            return
        take_out_arrived(self)
        if self.packed is not None and self.packed.device.type == "meta":  # the base has come
            self.packed = PackedDelta(self.shape, value_dtype(self.base_layer), self.base_weight.device)
        if state.deferred and "journal" not in state.staged:
            with self.reverted():
                for block in state.again or [slice_at(state.schedule, 0, self.shape, state.layer_name)]:
                    self.begin(name, block)
                state.journal.revert(self.dense())
        state.deferred, state.again = False, []
        if "journal" in state.staged and not self.slicefine_active[name].is_meta:
            install(self, name)
        elif not state.journal.applied and not self._in_sync(name):
            self._refresh_reverted(name)
        self._sync(name)

    def _refresh_reverted(self, name: str) -> None:
        """A parameter changed while its adapter was not applied: carry the new values into the journal."""
        state = self.states[name]
        if self.slicefine_active[name].is_meta:
            return
        with self.reverted():
            state.journal.apply(self.dense())
            self._sync(name)
            state.journal.revert(self.dense())

    def combine(self, name: str, parts: dict[str, float]) -> None:
        """Add adapter ``name`` with the weighted sum of other adapters' deltas (same schedule), not applied."""
        first = self.states[next(iter(parts))]
        alone = replace(first.schedule, reserve={}, share=None, share_visits=None)  # the sum keeps out of nobody's way
        self.add_slice(name, alone, first.layer_name, ready=True)  # it fits the layer already
        journals = [self.states[part].journal for part in parts]
        with self.reverted() as weight:
            deltas = [self.deltas(part, weight) for part in parts]
            for journal, delta, scale in zip(journals, deltas, parts.values(), strict=True):
                journal.add(weight, delta, scale)
            slices = list(dict.fromkeys(s for journal in journals for s in journal.slices()))
            values = {block: read_block(weight, block) for block in slices}
            for journal in reversed(journals):
                journal.revert(weight)
        state = self.states[name]
        table = visit_table([visit for journal in journals for visit in journal.visits])
        state.journal.load(table, {s: values[s] for s in slices})
        with self.reverted() as weight:
            state.journal.apply(weight)
            self.load_active(name)
            state.journal.revert(weight)

    # -- nn.Module ------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Before a weight arrives together with the slices that it holds, ours are taken out of the old one."""
        self.arriving = {}
        for name in self.states:
            active = state_dict.get(f"{prefix}slicefine_active.{name}")
            if is_spread(self.parameter(name)) and active is not None and active.numel() > 0:
                raise UnsupportedError(
                    f"{self.label}: ZeRO stage 3 has spread the slices over processes, and reads them from its own "
                    "checkpoints only (engine.load_checkpoint, Trainer's resume_from_checkpoint). Load an adapter "
                    "before the model is handed to Trainer, Accelerator or deepspeed.initialize."
                )
        sliced = any(key.startswith(f"{prefix}slicefine_journal.") for key in state_dict)
        weight_comes = f"{prefix}{'base_layer.' * (self.depth + 1)}{self.kind.parameter}" in state_dict
        beside = any(key.startswith(f"{prefix}slicefine_{BESIDE}.") for key in state_dict)
        if sliced and beside != (self.packed is not None):
            raise AdapterFileError(
                f"{self.label}: the state dict's slices {'are differences' if beside else 'are values'}, and this "
                f"layer's {'are values' if beside else 'are differences'}; attach with additive={beside}."
            )
        alone = [n for n in self.states if f"{prefix}slicefine_active.{n}" in state_dict] if not sliced else []
        for name in alone:
            _check_alone(self, name)
        weight = state_dict.get(f"{prefix}{'base_layer.' * (self.depth + 1)}{self.kind.parameter}")
        if weight_comes:
            self.forget_frozen()
        if weight_comes and (sliced or (not alone and self._is_new(weight))):
            names = self.applied if self.requested is None else self.requested
            self.apply_only([])
            self.requested = names
            for state in self.states.values() if not sliced else ():
                if state.journal.visits and state.journal.step == 0:  # untrained: it begins anew, in this weight
                    state.again = [visit.slice for visit in state.journal.visits]
                    state.journal, state.deferred = Journal(state.journal.reach), True
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]

    def _is_new(self, weight: Tensor) -> bool:
        """Whether a weight that arrives differs from what is there: another base, or ours without the slices."""
        here = self.base_weight
        if self.packed is not None or here.is_meta or weight.is_meta or is_sharded(here) or is_sharded(weight):
            return False
        return weight.shape == here.shape and not torch.equal(weight.to(here), here)

    def _replicate_for_data_parallel(self) -> Any:
        raise UnsupportedError(
            f"{self.label}: nn.DataParallel copies the layers in each forward, and a copy cannot train a slice in "
            "place. Start one process per GPU (torchrun or accelerate launch), or show one GPU only: "
            "CUDA_VISIBLE_DEVICES=0."
        )

    def _apply(self, fn: Any, recurse: bool = True) -> SliceAdapters:
        synced, dtype = {name for name in self.states if self._in_sync(name)}, self.base_weight.dtype
        for state in self.states.values():  # torchao's tensors are swapped, which nothing that refers to them outlives
            state.synced = state.base_version = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.base_weight.device
        if self.base_weight.dtype != dtype:
            self.forget_frozen()
        if self.packed is not None:
            self.packed.map(fn)
        for name, state in self.states.items():
            state.views = ()
            if device.type != "meta":
                state.index = state.index.to(device)
                state.fixed = None if state.fixed is None else state.fixed.to(device)
            if name in synced:  # the values are the same ones, elsewhere or in another precision
                state.synced = (weakref.ref(self.parameter(name)), version_of(self.parameter(name)))
                state.base_version = self._base_version
        return self


def _be_called(layer: nn.Module, args: Any) -> None:
    """PyTorch's fused transformer layers read weights past their layers, but not where one of them has a hook."""


def _check_alone(layer: SliceAdapters, name: str) -> None:
    """A parameter without its journal has values of nobody knows which lines: a snapshot of what requires gradients.

    Raises:
        AdapterFileError: if the slice has moved; before that they are those of the first slice, unless it moved there.
    """
    how = (
        "Snapshots and files hold a slice's place beside its values: take get_peft_model_state_dict(model) and "
        "set_peft_model_state_dict, all of model.state_dict(), or save_pretrained (of attach: tuner.save, tuner.load)."
    )
    text = f"{layer.label}: the state dict has slicefine_active.{name} without slicefine_journal.{name}"
    if len(layer.states[name].journal.visits) > 1:
        raise AdapterFileError(f"{text}, so it does not say which of the visited slices these values are of. {how}")
    mover = layer.states[name].mover
    if mover is not None and mover.settings.moves != 0:
        warnings.warn(
            f"SliceFine: {text}; the values are taken for the first slice's. {how}", UserWarning, stacklevel=4
        )


def _check_beside(schedule: Schedule, layer_name: str) -> None:
    """Raise `UnsupportedError` for what cannot be trained beside a weight."""
    refused = {
        "mode='random_mask' trains scattered entries, which no few lines beside the weight hold": (
            schedule.mode == "random_mask"
        ),
        f"start_values={schedule.start_values!r} replaces the weight's own values": (
            schedule.start_values != "pretrained"
        ),
    }
    for reason in (text for text, found in refused.items() if found):
        raise UnsupportedError(
            f"{layer_name or 'SliceFine'}: {reason}, and slices lie beside it here (it is quantised, or additive=True "
            "was given). Use mode row, column or alternate and start_values='pretrained'."
        )


def _sync_after_load(layer: nn.Module, incompatible: Any) -> None:
    assert isinstance(layer, SliceAdapters)
    if any(is_spread(layer.parameter(name)) for name in layer.states):
        return  # DeepSpeed brings weights and parameters later: the run's start, or the next forward, settles
    take_out_arrived(layer)
    names = layer.requested  # settling may forget them
    for name in list(layer.states):  # settling may reorder them
        layer.settle(name)
    if names is not None:
        layer.apply_only(names)
