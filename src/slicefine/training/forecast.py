"""What each mode and rank of a run would cost, before it begins: exact counts, and a few steps on its own data.

Counts, files and moves follow from the schedule. Kept activations and step time are measured on training batches of
the run itself, on this machine, with a frozen model beside them; every weight is restored bit for bit afterwards.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..bench.workload import enable_checkpointing, gradients_to_inputs, kept_bytes, state_bytes, timed_step
from ..delta import expected_shapes
from ..journal import Visit, history_count, visit_table
from ..layer import SliceLayer
from ..mover import Mover, movers_of
from ..schedule import slice_at
from .counts import bias_entries, layer_touched
from .methods import make_trainable, tensor_counts, typical_batches
from .plan import moves_of
from .session import Session
from .settings import TrainSettings

__all__ = ["Forecast", "adapter_bytes", "forecasts", "planned_slices"]

_HEADER = 64  # bytes that safetensors' header spends on a tensor beside its name


@dataclass(frozen=True)
class Forecast:
    """One mode and rank. Sizes are bytes; memory is weights, kept activations, optimizer state and gradients.

    Attributes:
        mode, r: the candidate.
        trainable, changed: entries in training at a time, and touched over the whole run, the head included.
        kept: activations kept for backward, of the largest batch and the costliest position.
        state: AdamW's state.
        memory: what must fit at once; buffers that live within one operation come on top.
        seconds: of a step, forward, backward and optimizer: the mean over batches, orientations and windows.
        ratio: that time / the frozen model's, whose steps are interleaved with these.
        file: the adapter file at the end.
        moves: the steps after which slices move.
    """

    mode: str
    r: int
    trainable: int
    changed: int
    kept: int
    state: int
    memory: int
    seconds: float
    ratio: float
    file: int
    moves: list[int]


def forecasts(
    session: Session, modes: Sequence[str], ranks: Sequence[int], batches: int = 4, rounds: int = 3
) -> Iterator[Forecast]:
    """Measure every mode at every rank.

    Args:
        session: a run with a base model that is not wrapped yet (``method.name=full`` or ``head`` leave it so).
        modes, ranks: the candidates.
        batches: training batches to time, spread evenly from the shortest to the longest.
        rounds: timed steps per batch.

    Raises:
        ConfigError: if a candidate's settings do not fit the model.
    """
    settings = session.settings
    inputs, largest = typical_batches(session.loaded, settings, session.prepared, batches)
    session.loaded.model.requires_grad_(False)
    if settings.training.gradient_checkpointing:
        enable_checkpointing(session.loaded.model)
    for mode in modes:
        for r in ranks:
            # which blocks they are changes neither cost nor counts; whether they move does
            positions = "fixed" if settings.slice.positions == "fixed" else "sweep"
            own_rank: dict[str, Any] = {"r": r, "r_row": None, "r_column": None, "rank_pattern": {}}
            chosen = replace(settings.slice, mode=mode, positions=positions, **own_rank)
            method = replace(settings.method, name="slicefine")
            yield _forecast(session, replace(settings, slice=chosen, method=method), inputs, largest, rounds)


def planned_slices(layer: SliceLayer, name: str, moves: int) -> list[Visit]:
    """The visits that a layer will have made after so many moves, one step each where it trains."""
    state = layer.states[name]
    visits: list[Visit] = []
    turn = 0
    for visit in range(moves + 1):
        inside = state.place is None or state.place.trains(visit)
        if inside or not visits:
            block = slice_at(state.schedule, turn, layer.shape, state.layer_name)
        turn += inside
        visits.append(Visit(block, visit + 1, visit + int(inside)))
    return visits


def adapter_bytes(mover: Mover, moves: int) -> int:
    """Bytes of the slices in an adapter file after so many moves, header included."""
    total = 0
    for name, layer in mover.layers.items():
        visits = planned_slices(layer, mover.name, moves)
        reach = len(visits) - layer.states[mover.name].journal.reach
        kept = [-1 if i < reach else history_count(visits, i, layer.shape) for i in range(len(visits))]
        table = visit_table(visits, kept)
        shapes = expected_shapes(table, layer.shape)
        parameter = layer.slicefine_active[mover.name]
        finished = sum(math.prod(shape) for shape in shapes.values()) * layer.weight.element_size()
        total += table.numel() * 8 + parameter.numel() * parameter.element_size() + finished
        total += (2 + len(shapes)) * (_HEADER + len(f"base_model.model.{name}.slicefine_active"))
    return total


def _forecast(
    session: Session, settings: TrainSettings, batches: list[dict[str, Any]], largest: dict[str, Any], rounds: int
) -> Forecast:
    base = session.loaded.model
    model = make_trainable(session.loaded, session.task, settings, session.prepared).train()
    try:
        (mover,) = movers_of(model)
        moves = moves_of(model, session.total_steps)
        counts = tensor_counts(model, session.loaded, settings.chosen_method)
        beside = counts["head"] + bias_entries(model)  # trained whole
        mover.settings = replace(mover.settings, interval=10**9)  # the steps below must not move
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
        kept, times = 0, []
        for number in range(min(len(moves) + 1, _distinct_visits(mover))):
            if number:
                mover.move()
            kept = max(kept, _kept(model, largest, settings))
            times += [_seconds(model, batch, settings, rounds, optimizer) for batch in batches]
        floor, own = (sum(column) for column in zip(*times, strict=True))
        state = state_bytes(optimizer)
        return Forecast(
            mode=settings.slice.mode,
            r=settings.slice.r,
            trainable=counts["trainable"],
            changed=_changed(mover, len(moves)) + beside,
            kept=kept,
            state=state,
            memory=_bytes(model.parameters()) + _bytes(trained) + state + kept,
            seconds=own / len(times),
            ratio=own / floor,
            file=adapter_bytes(mover, len(moves)) + 4 * beside,
            moves=moves,
        )
    finally:
        model.unload()
        base.requires_grad_(False)
        gc.collect()


def _distinct_visits(mover: Mover) -> int:
    """Visits until every window, and in alternate mode both orientations, have been seen."""
    layers = [(layer.states[mover.name], layer) for layer in mover.layers.values()]
    turns = 2 if any(state.schedule.mode == "alternate" for state, _ in layers) else 1
    places = [state.place for state, _ in layers if state.place is not None]
    return turns * max((place.window.cycle(place.count) for place in places), default=1)


def _forward(model: Any, batch: dict[str, Any], settings: TrainSettings) -> Tensor:
    device = next(iter(batch.values())).device.type
    with torch.autocast(device, torch.bfloat16, enabled=settings.training.bf16):
        loss: Tensor = model(**batch).loss
    return loss


def _kept(model: Any, batch: dict[str, Any], settings: TrainSettings) -> int:
    return kept_bytes(model, lambda: _forward(model, batch, settings))


def _seconds(
    model: Any, batch: dict[str, Any], settings: TrainSettings, rounds: int, optimizer: torch.optim.Optimizer
) -> tuple[float, float]:
    """Median seconds of a step of the frozen model and of the slices, interleaved, the first ones left out."""
    floor, own = [], []
    for _ in range(rounds + 1):
        with model.disable_adapter():
            handle = gradients_to_inputs(model)
            floor.append(sum(timed_step(lambda: _forward(model, batch, settings), None)))
            handle.remove()
        own.append(sum(timed_step(lambda: _forward(model, batch, settings), optimizer)))
    return statistics.median(floor[1:]), statistics.median(own[1:])


def _changed(mover: Mover, moves: int) -> int:
    """Distinct entries of all layers that the planned visits train."""
    total = 0
    for layer in mover.layers.values():
        visits = planned_slices(layer, mover.name, moves)
        total += layer_touched(layer.states[mover.name], visits, layer.shape)
    return total


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
