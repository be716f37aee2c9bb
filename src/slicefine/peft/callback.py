"""Trainer's side: it tells the mover the run's length and the losses. Moves themselves ride on the optimizer's step."""

from __future__ import annotations

from typing import Any

import torch
from transformers.trainer_callback import ExportableState, TrainerCallback

from ..errors import AdapterFileError
from ..mover import Mover, movers_of

__all__ = ["SliceFineCallback", "kept_by"]


class SliceFineCallback(TrainerCallback, ExportableState):
    """Give every SliceFine adapter of the model the run's total steps and the steps done before a resume.

    ``Trainer`` gets it by itself; pass it to loops that take transformers callbacks but are not a ``Trainer``.

    A checkpoint's ``trainer_state.json`` carries what a resumed run needs to be the same one: the step of each adapter
    at which the run began; the run's steps that trained nothing, since their gradients were not finite (``Trainer``
    counts them, adapters do not); and the random state at the epoch's start, from which samplers that group by length
    draw the epoch's order (transformers keeps the state at the checkpoint only), of each process where they differ.
    """

    def __init__(self) -> None:
        self.any_model = False  # look after the order of epochs for models without slices, too
        self.starts: dict[str, int] = {}
        self.skipped: dict[str, list[int]] = {}
        self._movers: list[Mover] = []  # looked for once: that walks through the whole model
        self.epoch_began: list[str] = []  # of each process, or of all
        self._resumed_epoch: list[str] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        skipped = {name: list(steps) for name, steps in self.skipped.items()}
        attributes = {"starts": dict(self.starts), "skipped": skipped, "epoch_began": list(self.epoch_began)}
        return {"args": {}, "attributes": attributes}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        found = kept_by(self, state) if state.global_step else {}
        starts = found.get("starts", {})
        epoch = found.get("epoch_began", [])
        self._resumed_epoch = [epoch] if isinstance(epoch, str) else epoch
        self._movers = movers_of(model) if model is not None else []
        for mover in self._movers:
            start = starts.get(mover.name)
            self.skipped[mover.name] = list(found.get("skipped", {}).get(mover.name, ()))
            mover.begin_run(state.max_steps, done=state.global_step, start=start)
            if mover.step == start and mover.trains and self._trained(mover, state.global_step):
                raise AdapterFileError(
                    f"adapter {mover.name!r}: the run resumes after step {state.global_step}, but the slices are where "
                    "they were when it began: the checkpoint was not read into the model. It was written by another "
                    "version of accelerate, or loaded by other means; read its adapter with PeftModel.from_pretrained "
                    "and begin a run from there."
                )
            self.starts[mover.name] = mover.run_start
            for entry in state.log_history if state.global_step else []:  # a resumed run's, from before
                mover.note(self._trained(mover, entry.get("step")), **_measured(entry))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Draw the order of the epoch that a checkpoint broke off as it was drawn; note the random state of others."""
        if not self.any_model and not (model is not None and movers_of(model)):
            return
        kept, rank = self._resumed_epoch, _rank()
        own = kept[0] if len(kept) == 1 else kept[rank] if rank < len(kept) else ""
        if own:
            torch.set_rng_state(torch.frombuffer(bytearray.fromhex(own), dtype=torch.uint8))
        self._resumed_epoch = []
        self._note_epoch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note a step that trained nothing; after the last step of an epoch a checkpoint belongs to the next one."""
        for mover in self._movers:
            skipped = self.skipped[mover.name]
            if mover.step - mover.run_start + len(skipped) < state.global_step and mover.trains:
                skipped.append(state.global_step)
        self._epoch_ends(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation draws random numbers."""
        self._epoch_ends(state)

    def _epoch_ends(self, state: Any) -> None:
        if self.epoch_began and float(state.epoch or 0.0).is_integer():
            self._note_epoch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Later evaluations belong to no epoch."""
        self.epoch_began = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        """Note the loss and the metrics with the visit that they belong to."""
        found = _measured(logs or {})
        for mover in movers_of(model) if found and model is not None else []:
            mover.note(self._trained(mover, state.global_step), **found)

    def _trained(self, mover: Mover, step: int | None) -> int | None:
        """How many of the run's first steps trained."""
        return None if step is None else step - sum(number <= step for number in self.skipped.get(mover.name, ()))

    def _note_epoch(self) -> None:
        own = torch.get_rng_state().numpy().tobytes().hex()
        states = [own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():  # dropout draws unlike numbers
            states = [""] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, own)
        self.epoch_began = states if len(set(states)) > 1 else [own]


def _rank() -> int:
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if started else 0


def kept_by(callback: Any, state: Any) -> dict[str, Any]:
    """What a checkpoint kept of a callback; nothing if it was written without it.

    Args:
        callback: an ``ExportableState``.
        state: of the ``Trainer``; it is given the callback's name, which ``Trainer`` takes for granted when it saves.
    """
    name = type(callback).__name__
    if name not in state.stateful_callbacks:
        state.stateful_callbacks[name] = callback.state()
        return {}
    found = state.stateful_callbacks[name]
    last = found[-1] if isinstance(found, list) else found  # a callback that was given twice
    attributes: dict[str, Any] = last.get("attributes", {})
    return attributes


def _measured(logs: dict[str, Any]) -> dict[str, float]:
    """The loss and the metrics in what Trainer logs, without its timings."""
    timing = ("runtime", "_per_second", "_time")
    return {
        name: value
        for name, value in logs.items()
        if (name == "loss" or name.startswith("eval_"))
        and isinstance(value, (int, float))
        and not name.endswith(timing)
    }
