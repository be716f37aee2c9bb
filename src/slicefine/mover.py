"""The only stateful loop: after an optimizer step, write the slices back; when it is time, move them.

Moves ride on PyTorch's optimizer-step hook, so any training loop works unchanged. A hook sees steps, not
micro-batches: gradient accumulation, recomputation and skipped steps never move a slice.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .errors import ConfigError, NumericalError, OptimizerError
from .geometry import Slice
from .guards import all_finite, check_frozen, not_finite, remember
from .layer import SliceLayer
from .optimizers import (
    creates_state,
    held_by_some_optimizer,
    refuse_optimizer,
    reset_optimizer_state,
    reset_optimizer_states,
)
from .pace import FALLBACK_INTERVAL, MoveSettings, warn_about_plan
from .schedule import Moves
from .sharded import is_sharded, whole
from .state import AdapterState
from .window import places
from .zero import (
    ZeroOptimizer,
    has_master,
    is_spread,
    master,
    refuse_unseen,
    register_zero_step_hooks,
    watch,
    why_foreign,
)

__all__ = ["Mover", "movers_of"]

SKIPS_IN_A_ROW = 20  # steps left out one after the other, before training is given up
FOREIGN_STEPS = 3  # steps of other optimizers, with gradients waiting for ours, before this is called a mistake

_MOVERS: weakref.WeakSet[Mover] = weakref.WeakSet()
AnyOptimizer: TypeAlias = Optimizer | ZeroOptimizer


class _Entry(NamedTuple):
    """A layer in training, with what is looked up once per step: the hook runs for every layer, at every step."""

    layer: SliceLayer
    state: AdapterState
    parameter: Tensor


@dataclass(eq=False)
class Mover:
    """Moves the slices of one adapter in step with the optimizer.

    Attributes:
        name: the adapter.
        layers: its layers by name.
        settings: when to move, and the policy for optimizer state.
        run_start: the step at which this run began; moves are counted from there.
        progress: for each visit the loss and metrics that were last noted in it (`note`); shorter if none were.
        skipped: optimizer steps that were left out (``on_nonfinite="skip"``).
        watching: the fingerprints of all weights are taken (`slicefine.guards`).
    """

    name: str
    layers: dict[str, SliceLayer]
    settings: MoveSettings
    run_start: int = 0
    plan: Moves | None = None
    moves_before: int = 0
    foreign_steps: int = 0
    stepped: bool = False
    warned: bool = False
    warned_below: bool = False
    progress: list[dict[str, float]] = field(default_factory=list)
    skipped: int = 0
    watching: bool = False
    _checked: int = 0
    _skips: int = 0  # in a row
    _drops: bool = False
    _owners: weakref.WeakSet[AnyOptimizer] = field(default_factory=weakref.WeakSet, repr=False)
    _seen: tuple[Tensor, int] | None = field(default=None, repr=False)  # gradient at the last foreign step
    _pace: weakref.ref[AnyOptimizer] | None = field(default=None, repr=False)  # the last optimizer of a round of steps

    def __post_init__(self) -> None:
        window = self.settings.window
        stands = {} if window is None or not self.layers else places(window, self.layers)
        for layer in self.layers.values():  # the layers keep the mover alive, whatever the user keeps
            layer.states[self.name].mover = self
        for name, place in stands.items():
            self.layers[name].stand(self.name, place)
        _MOVERS.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_owners", "_pace", "_seen")}

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copied or unpickled model moves by itself, too
        self.__dict__.update(state)
        self._owners, self._pace, self._seen = weakref.WeakSet(), None, None
        _MOVERS.add(self)

    # -- what a user may ask --------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps that trained this adapter so far."""
        return max((state.journal.step for _, state in self._pairs()), default=0)

    @property
    def visits(self) -> int:
        """Positions visited so far, the first included."""
        return next((len(state.journal.visits) for _, state in self._pairs()), 0)

    @property
    def trains(self) -> bool:
        """Whether the adapter is active and its slices require gradients."""
        return bool(self._training())

    def active_entries(self) -> int:
        """Entries in training now; padding and others' entries do not count."""
        return sum(layer.active_entries(self.name) for layer in self._with_adapter())

    def fixed_entries(self) -> int:
        """Entries of the active slices that belong to other runs (``reserve=``, ``share=``) and stay as they are."""
        return sum(layer.fixed_entries(self.name) for layer in self._with_adapter())

    def slices(self) -> dict[str, Slice]:
        """The active slice of every layer that trains now."""
        states = {name: layer.states[self.name] for name, layer in self._own().items()}
        return {name: s.journal.active for name, s in states.items() if s.journal.visits and not s.idle}

    def begin_run(self, total_steps: int | None, done: int = 0, start: int | None = None) -> None:
        """Tell the run's length, and how many of its optimizer steps were done before (when resuming).

        Warns when the run would never move, or would come back to slices that it trained before.

        Args:
            total_steps: optimizer steps of the whole run.
            done: how many of them were made before this process.
            start: `step` when the run began, if it is known; steps that ``GradScaler`` skipped are in ``done`` and
                not in `step`, and a resumed run must count as the uninterrupted one does.
        """
        for layer in self._with_adapter():
            layer.check_spread()
            if is_spread(layer.base_weight):
                watch()
                layer.settle(self.name)  # a checkpoint brings the parameters after all else
        self.run_start = self.step - done if start is None else start
        if total_steps is not None and total_steps <= 0:
            total_steps = None
        self.plan = self.settings.plan(total_steps)
        self.moves_before = self._moves_before_run()
        total = total_steps or self.settings.total_steps
        if done == 0 and total is not None and self.plan is not None:
            layers = [(name, layer.shape, layer.states[self.name]) for name, layer in self._own().items()]
            self.warned |= warn_about_plan(self.plan, self.settings, total, layers, around=not self.warned)

    def note(self, step: int | None = None, **values: float) -> None:
        """Note the loss or a metric with the visit that it belongs to; adapter files carry them (`slicefine info`).

        ``Trainer`` does so with what it logs.

        Args:
            step: optimizer step of the run after which they were measured; None is the last one.
            **values: ``loss=0.7``, ``eval_accuracy=0.8``, and the like.

        Raises:
            NumericalError: if an active slice is NaN or infinite; under FSDP2 that shows at a move.
        """
        visits = next((state.journal.visits for _, state in self._pairs()), [])
        total = self.step if step is None else self.run_start + step
        if total > self.step:  # the weights are those of an earlier step again (the best checkpoint's)
            return
        starts = [visit.first_step for visit in visits]
        if self.step != self._checked and not any(
            is_sharded(layer.parameter(self.name)) for layer in self._with_adapter()
        ):
            self._check_finite()
        number = max((i for i, first in enumerate(starts) if first <= total), default=0)
        self.progress += [{} for _ in range(number + 1 - len(self.progress))]
        self.progress[number] |= {"step": float(total), **{name: float(value) for name, value in values.items()}}

    def sound_progress(self) -> list[dict[str, float]]:
        """`progress` without what was noted after the step that the weights are of (a best checkpoint was restored)."""
        return [entry if entry.get("step", 0) <= self.step else {} for entry in self.progress[: self.visits]]

    def move(self, to: Mapping[str, Slice] | None = None) -> None:
        """Freeze the active slices and go on to the next ones (or to ``to``, by layer name)."""
        self._move(to or {}, list(self._owners))

    def undo(self, moves: int = 1) -> None:
        """Take back the last visit or visits; see `Journal.undo`."""
        self._check_active()
        for layer in self._with_adapter():  # all of them are checked before the first one changes
            layer.states[self.name].journal.check_undo(moves)
        for _ in range(moves):
            for layer in self._with_adapter():
                layer.undo(self.name)
        del self.progress[self.visits :]
        self._reset(list(self._owners))

    def restart(self) -> None:
        """Take back what the current visit trained; it begins again, with fresh optimizer state.

        After a `NumericalError` this is the last state that was good. What is trained beside slices (a head) stays.

        Raises:
            UnsupportedError: if the history does not hold what was there before the visit.
        """
        self._check_active()
        for layer in self._with_adapter():  # all of them are checked before the first one changes
            layer.states[self.name].journal.check_restart()
        for layer in self._with_adapter():
            layer.restart(self.name)
        del self.progress[self.visits - 1 :]
        self._checked = self.step
        self._reset(list(self._owners))

    # -- the hooks ------------------------------------------------------------------------------------------------

    def before_step(
        self, optimizer: AnyOptimizer, closure: Callable[[], Any] | None = None
    ) -> Callable[[], Any] | None:
        """Before the first step of ``optimizer`` note what is frozen; before each, see to gradients to be skipped.

        Args:
            optimizer: about to step.
            closure: that makes the gradients within the step.

        Returns:
            The closure to call instead.
        """
        skips = self.settings.on_nonfinite == "skip" and not isinstance(optimizer, ZeroOptimizer)  # which skips itself
        if isinstance(optimizer, ZeroOptimizer) and optimizer not in self._owners:
            slices = [entry.parameter for entry in self._training()]
            optimizer.check(slices, self.settings.state_policy != "keep", self.settings.window is not None)
        if self.watching and not skips:
            return closure
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        ids = {id(p) for p in parameters}
        if not any(id(entry.parameter) in ids for entry in self._training()):
            return closure
        if not self.watching:
            for layer in self._with_adapter():
                layer.follow_weight(self.name)
            remember(self._with_adapter())
            for biases in {state.biases for _, state in self._pairs() if state.biases is not None}:
                biases.settle()
            self.watching = True
        if not skips:
            return closure
        if closure is None:
            self._drop_gradients(parameters)
            return None

        def looked_at() -> Any:
            loss = closure()
            self._drop_gradients(parameters)
            return loss

        return looked_at

    def _drop_gradients(self, parameters: list[Tensor]) -> None:
        """Without gradients an optimizer's step changes nothing: no parameter, no momentum, no decay."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._drops = bool(gradients) and not all_finite(gradients)
        self._skips = self._skips + 1 if self._drops else 0
        if not self._drops:
            return
        for parameter in parameters:
            parameter.grad = None
        self._note_skipped()

    def _note_skipped(self) -> None:
        self.skipped += 1
        if self._skips >= SKIPS_IN_A_ROW:
            raise NumericalError(
                f"adapter {self.name!r}, after step {self.step}: {self._skips} steps in a row had NaN or infinite "
                "gradients and were left out, so nothing is trained any more. Lower the learning rate, or look at the "
                "loss and the data; the slices are as they were before."
            )
        warnings.warn(
            f"SliceFine: a step after step {self.step} had NaN or infinite gradients and was left out "
            f"({self.skipped} so far).",
            UserWarning,
            stacklevel=5,
        )

    def after_step(self, optimizer: AnyOptimizer) -> None:
        """React to one step of ``optimizer``; steps of optimizers that own none of our slices are not ours."""
        training = self._training()
        if not training:
            return
        owned_ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        owned = [entry for entry in training if id(entry.parameter) in owned_ids]
        if not owned:
            self._note_foreign_step(optimizer, next((e for e in training if not e.state.idle), training[0]).parameter)
            return
        self.foreign_steps, self.stepped = 0, True
        if torch._C._current_graph_task_id() != -1:
            raise OptimizerError(
                f"{type(optimizer).__name__} steps inside the backward pass, where the input gradient still needs the "
                "old weights. Step once after backward: do not use optimizer-in-backward with SliceFine."
            )
        first = optimizer not in self._owners or all(not _steps(entry.state) for entry in owned)
        new_round = self._sets_pace(optimizer, owned)
        if isinstance(optimizer, ZeroOptimizer):
            self._after_zero(optimizer, owned, new_round)
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) != 0.0:  # a fused step that GradScaler skipped
            for entry in owned if first else ():  # the fused SGD then leaves a momentum of unwritten memory
                reset_optimizer_state(optimizer, entry.parameter)
            return
        if self._drops or creates_state(optimizer, [entry.parameter for entry in owned]):
            self._drops = False
            return
        self._write_back([entry for entry in owned if not entry.state.idle])
        if new_round:
            self._count_step()

    def _after_zero(self, optimizer: ZeroOptimizer, owned: list[_Entry], new_round: bool) -> None:
        """As `after_step`; DeepSpeed leaves steps out by itself where gradients are not finite."""
        if optimizer.left_out:
            if not optimizer.scales_loss:
                self._skips += 1
                self._note_skipped()
            return
        self._skips = 0
        self._write_back(owned)
        if new_round:
            self._count_step()

    def _sets_pace(self, optimizer: AnyOptimizer, owned: list[_Entry]) -> bool:
        """Whether this optimizer's step completes a step of the run.

        With several optimizers the last of a round does: a move before it would hand the old slice's gradient to the
        new one. A newcomer that owns other layers follows in the round that was just counted.
        """
        pace = None if self._pace is None else self._pace()
        if optimizer in self._owners:
            self._pace = self._pace if pace is not None else weakref.ref(optimizer)
            return pace is None or pace is optimizer
        refuse_optimizer(optimizer, [name for name, layer in self._own().items() if self._padded(layer)])
        self._owners.add(optimizer)
        self._pace = weakref.ref(optimizer)
        if pace is None:
            return True
        before = {id(p) for group in pace.param_groups for p in group["params"]}
        return any(id(entry.parameter) in before for entry in owned)

    def _count_step(self) -> None:
        for _, state in self._pairs():
            if not state.idle:
                state.journal.count_step()
        if self.plan is None:
            self._plan_without_length()
        assert self.plan is not None
        if self.plan.due(self.step - self.run_start, self.visits - 1 - self.moves_before):
            self.move()

    def _write_back(self, entries: list[_Entry]) -> None:
        """One multi-tensor copy of all active blocks into their dense weights; one collective for sharded ones."""
        whole_values = whole([entry.parameter for entry in entries])
        targets: list[Tensor] = []
        values: list[Tensor] = []
        partitioned = bool(entries) and has_master(entries[0].parameter)
        for entry, own in zip(entries, whole_values, strict=True):
            if partitioned and self._alters(entry):
                self._write_back_master(entry)
                continue
            self._rewarm(entry, own)
            if self.settings.state_policy == "keep":  # moments of a row block would move the padding of a column block
                entry.layer.clear_padding(self.name, own)
            views = entry.layer.write_views(self.name, entry.parameter)
            if views is None:
                entry.layer.take(self.name, own)
            else:
                if entry.state.crossings:  # others' entries: neither decay nor momentum moves them
                    entry.layer.restore_fixed(self.name, own)
                targets.append(views[0])
                values.append(views[1])
        if targets:
            torch._foreach_copy_(targets, values)
        for entry in entries:
            entry.state.mark_synced(entry.parameter)

    def _alters(self, entry: _Entry) -> bool:
        """Whether what an optimizer's step made of a parameter is changed before it comes into the weight."""
        pads = self.settings.state_policy == "keep" and self._padded(entry.layer)
        return pads or bool(entry.state.crossings) or self._ramps(entry.state)

    def _write_back_master(self, entry: _Entry) -> None:
        """As `_write_back` for one entry whose master in fp32 lies in parts in several processes."""
        values = master(entry.parameter)
        self._rewarm(entry, values)
        if self.settings.state_policy == "keep":
            entry.layer.clear_padding(self.name, values)
        entry.layer.take(self.name, values)

    def _ramps(self, state: AdapterState) -> bool:
        rewarms = self.settings.state_policy == "rewarm" and len(state.journal.visits) > 1
        return rewarms and _steps(state) + 1 < self.settings.rewarm_steps

    def _rewarm(self, entry: _Entry, values: Tensor) -> None:
        """Scale the updates of the first steps after a move, whatever the optimizer and its group's rate."""
        if self.settings.state_policy != "rewarm":
            return
        state = entry.state
        if self._ramps(state):
            done = _steps(state) + 1  # this step included
            before = state.previous if state.previous is not None else entry.layer.weight_block(self.name)
            values.copy_(torch.lerp(before.to(values), values, done / self.settings.rewarm_steps))
            state.previous = values.clone()
        else:
            state.previous = None

    def _move(self, to: Mapping[str, Slice], optimizers: list[AnyOptimizer]) -> None:
        layers = self._own()
        unknown = sorted(to.keys() - layers.keys())
        if unknown:
            raise ConfigError(f"move: no sliced layer is named {unknown[0]!r}; the names are {sorted(layers)[:5]}, ...")
        self._check_active()
        self._check_finite()
        check_frozen([layer for layer in layers.values() if layer.others_wrote(self.name)], "move")
        blocks = {}  # all of them are checked before the first layer moves
        for name, layer in layers.items():
            blocks[name] = to[name] if name in to else layer.next_block(self.name)
            layer.check_block(self.name, blocks[name])
            place = layer.states[self.name].place
            if name in to and place is not None and not place.trains(self.visits):
                raise ConfigError(f"move: {name} lies outside the window of blocks at the next visit; leave it out.")
        step = self.step
        for name, layer in layers.items():
            layer.move(self.name, blocks[name], step)
        self._reset(optimizers)

    def _reset(self, optimizers: list[AnyOptimizer]) -> None:
        if self.settings.state_policy == "keep":
            return
        parameters = [layer.parameter(self.name) for layer in self._with_adapter()]
        for optimizer in optimizers:
            reset_optimizer_states(optimizer, parameters)

    # -- guards ---------------------------------------------------------------------------------------------------

    def _check_active(self) -> None:
        for name, layer in self._own().items():
            if layer.applied != [self.name]:
                raise ConfigError(
                    f"{name}: the active adapters are {layer.applied}, but only {self.name!r} alone can be moved; call "
                    f"set_adapter({self.name!r}) first."
                )

    def _check_finite(self) -> None:
        """Raise `NumericalError` if an active slice is NaN or infinite."""
        layers = self._own()
        bad = not_finite(layers, self.name)
        if bad:
            first = min(self._checked, self.step - 1) + 1
            raise NumericalError(
                f"adapter {self.name!r}, steps {first} to {self.step}: the active slice of {bad[0]} is NaN "
                f"or infinite ({len(bad)} of {len(layers)} layers), so it is not committed. What was there before this "
                "visit is kept: restart() of the tuner, or of slicefine.movers_of(model)[0], brings it back. Lower the "
                'learning rate, clip gradients, leave such steps out (on_nonfinite="skip"), or look for bad rows in '
                "the data."
            )
        self._checked = self.step

    def _padded(self, layer: SliceLayer) -> bool:
        schedule = layer.states[self.name].schedule
        rows, columns = layer.shape
        return schedule.mode == "alternate" and (rows != columns or schedule.row_rank != schedule.column_rank)

    def _note_foreign_step(self, optimizer: AnyOptimizer, parameter: Tensor) -> None:
        """An optimizer that owns no slice stepped: a mistake if gradients wait and no other optimizer comes."""
        if has_master(parameter):
            if isinstance(optimizer, Optimizer):  # the one inside, most likely
                refuse_unseen(optimizer, parameter)
            return
        gradient = parameter.grad
        if self.stepped or gradient is None:
            return
        seen, self._seen = self._seen, (gradient, gradient._version)
        if seen is not None and seen[0] is gradient and seen[1] == gradient._version:
            return  # no backward came through the slices since then: that step was another model's
        self.foreign_steps += 1
        if self.foreign_steps >= FOREIGN_STEPS:
            ours = {id(entry.parameter) for entry in self._training()}
            if held_by_some_optimizer(ours):  # it will step later: a head is trained first, or more often
                self.stepped = True
                return
            raise OptimizerError(
                f"adapter {self.name!r}: gradients arrive, but {self.foreign_steps} optimizer steps went by and no "
                "optimizer holds the slices' parameters. Build the optimizer after get_peft_model (or attach), from "
                f"the parameters that require gradients.{why_foreign()}"
            )

    def _plan_without_length(self) -> None:
        self.plan = self.settings.plan(None)
        if self.plan is None:
            self.plan = Moves(FALLBACK_INTERVAL)
            warnings.warn(
                f"moves={self.settings.moves} needs the run's length, which this training loop does not tell. Moving "
                f"every {FALLBACK_INTERVAL} steps instead; pass total_steps= or interval= to decide.",
                UserWarning,
                stacklevel=2,
            )

    def _own(self) -> dict[str, SliceLayer]:
        """Layers that still have this mover's adapter, and not a later one of the same name."""
        return {name: layer for name, layer in self.layers.items() if self._state_of(layer) is not None}

    def _pairs(self) -> Iterator[tuple[SliceLayer, AdapterState]]:
        for layer in self.layers.values():
            state = self._state_of(layer)
            if state is not None:
                yield layer, state

    def _state_of(self, layer: SliceLayer) -> AdapterState | None:
        state = layer.states.get(self.name)
        return state if state is not None and state.mover is self else None

    def _with_adapter(self) -> list[SliceLayer]:
        return [layer for layer, _ in self._pairs()]

    def _training(self) -> list[_Entry]:
        entries = []
        for layer, state in self._pairs():
            parameter = layer.parameter(self.name)
            if parameter.requires_grad and state.journal.applied:
                entries.append(_Entry(layer, state, parameter))
        return entries

    def _moves_before_run(self) -> int:
        """Moves made by earlier runs: they do not count against this run's limit."""
        starts = [
            visit.first_step
            for layer in self._with_adapter()[:1]
            for visit in layer.states[self.name].journal.visits[1:]
        ]
        return sum(first <= self.run_start + 1 for first in starts)


def _steps(state: AdapterState) -> int:
    """Optimizer steps of the current visit."""
    visit = state.journal.visits[-1]
    return visit.last_step - visit.first_step + 1


def movers_of(model: torch.nn.Module) -> list[Mover]:
    """Movers of the slices inside ``model``, in the order in which the adapters were added."""
    layers = {id(module) for module in model.modules() if isinstance(module, SliceLayer)}
    found = [mover for mover in _MOVERS if any(id(layer) in layers for layer in mover._with_adapter())]
    names = dict.fromkeys(name for module in model.modules() for name in getattr(module, "slicefine_active", ()))
    order = {name: i for i, name in enumerate(names)}
    return sorted(found, key=lambda mover: order.get(mover.name, math.inf))


def _before_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Args of ``step``: in a pre-hook the optimizer comes first."""
    rest = args[1:] if args and args[0] is optimizer else args
    closure = given = rest[0] if rest else kwargs.get("closure")
    for mover in list(_MOVERS):
        closure = mover.before_step(optimizer, closure)
    if closure is given:
        return args, kwargs
    head = args[: len(args) - len(rest)]
    return ((*head, closure, *rest[1:]), kwargs) if rest else (args, {**kwargs, "closure": closure})


def _before_zero_step(optimizer: ZeroOptimizer) -> None:
    for mover in list(_MOVERS):
        mover.before_step(optimizer)


def _after_zero_step(optimizer: ZeroOptimizer) -> None:
    for mover in list(_MOVERS):
        mover.after_step(optimizer)


def _after_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for mover in list(_MOVERS):
        mover.after_step(optimizer)


register_optimizer_step_pre_hook(_before_optimizer_step)
register_optimizer_step_post_hook(_after_optimizer_step)
register_zero_step_hooks(_before_zero_step, _after_zero_step)
