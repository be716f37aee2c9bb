"""``--dry_run``: what a run would train, and when its slices would move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ..mover import movers_of
from .counts import layer_kind
from .methods import tensor_counts
from .session import Session

__all__ = ["LayerPlan", "Plan", "make_plan", "moves_of", "print_plan"]


@dataclass(frozen=True)
class LayerPlan:
    """Layers of one kind: their common name, number, shape, first slice, and entries trained in each."""

    name: str
    count: int
    shape: tuple[int, int]
    first: str
    entries: int


@dataclass(frozen=True)
class Plan:
    """A run before it begins.

    Attributes:
        layers: the layers, those of one kind together.
        counts: see `tensor_counts`.
        total_steps: optimizer steps.
        moves: the steps after which the slices move.
    """

    layers: list[LayerPlan]
    counts: dict[str, int]
    total_steps: int
    moves: list[int]


def make_plan(session: Session) -> Plan:
    """Read the plan off a session that is ready to train."""
    total = session.total_steps
    return Plan(
        _layers(session.model),
        tensor_counts(session.model, session.loaded, session.settings.chosen_method),
        total,
        moves_of(session.model, total),
    )


def print_plan(session: Session, plan: Plan, console: Console) -> None:
    """Print the plan as tables."""
    counts, settings = plan.counts, session.settings
    if plan.layers:
        table = Table(title=f"{settings.method.name}: what is trained first")
        for column in ("layers", "number", "shape", "first slice", "entries each"):
            table.add_column(
                column, justify="left" if column in ("layers", "first slice") else "right", overflow="fold"
            )
        for layer in plan.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            table.add_row(layer.name, str(layer.count), shape, layer.first, f"{layer.entries:,}")
        console.print(table)
    facts = Table(title="plan", show_header=False)
    facts.add_row("model", str(settings.model.path or "from model.config"))
    facts.add_row("data", f"{settings.data.path} " + _sizes(session))
    facts.add_row("method", settings.method.name)
    facts.add_row("learning rate", f"{settings.learning_rate:g}")
    facts.add_row(
        "trainable entries", f"{counts['trainable']:,} ({counts['trainable'] / counts['total']:.3%} of the model)"
    )
    facts.add_row("of which new head", f"{counts['head']:,}")
    facts.add_row("added parameters", f"{counts['added']:,}")
    facts.add_row("optimizer steps", f"{plan.total_steps:,}")
    if settings.method.name == "slicefine":
        facts.add_row("moves", f"{len(plan.moves)}" + (f", after steps {_steps(plan.moves)}" if plan.moves else ""))
    console.print(facts)


def moves_of(model: Any, total: int) -> list[int]:
    """The steps of a run of ``total`` after which the model's slices will move."""
    movers = movers_of(model)
    moves = movers[0].settings.plan(total) if movers else None
    if moves is None or moves.interval is None:
        return []
    steps = list(range(moves.interval, total + 1, moves.interval))
    return steps if moves.limit is None else steps[: moves.limit]


def _layers(model: Any) -> list[LayerPlan]:
    groups: dict[tuple[str, tuple[int, int], str, int, int], list[int]] = {}
    for mover in movers_of(model):
        for name, layer in mover.layers.items():
            if layer.states[mover.name].idle:  # its turn comes later
                continue
            active = layer.states[mover.name].journal.active
            key = (layer_kind(name), layer.shape, active.axis, active.width, layer.active_entries(mover.name))
            groups.setdefault(key, []).append(active.start)
    return [
        LayerPlan(name, len(starts), shape, _first(axis, width, set(starts)), entries)
        for (name, shape, axis, width, entries), starts in groups.items()
    ]


def _first(axis: str, width: int, starts: set[int]) -> str:
    if axis == "entries":
        return f"{width:,} random entries"
    if len(starts) > 1:
        return f"{width} {axis}s, by layer"
    (start,) = starts
    return f"{axis}s {start} to {start + width - 1}"


def _sizes(session: Session) -> str:
    return "(" + ", ".join(f"{split} {len(rows):,}" for split, rows in session.prepared.splits.items()) + ")"


def _steps(moves: list[int]) -> str:
    shown = ", ".join(str(step) for step in moves[:12])
    return shown if len(moves) <= 12 else f"{shown}, ... {moves[-1]}"
