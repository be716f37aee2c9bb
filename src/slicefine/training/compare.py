"""``slicefine plan``: the forecasts of all candidates as a table, and which of them fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from .forecast import Forecast, forecasts
from .session import build
from .settings import TrainSettings

__all__ = ["compare"]


def compare(
    settings: TrainSettings,
    modes: Sequence[str],
    ranks: Sequence[int],
    memory: float | None = None,
    batches: int = 4,
    rounds: int = 3,
    console: Console | None = None,
) -> list[Forecast]:
    """Measure every mode at every rank, print a table, and say which one fits ``memory`` GiB.

    Raises:
        ConfigError: for a setting that is wrong.
        DataError: for data that cannot be used.
    """
    console = console or Console(quiet=settings.quiet, width=None if Console().is_terminal else 120)
    # the session's own method leaves the base as it is: the candidates are put on and taken off one by one
    session = build(replace(settings, method=replace(settings.method, name="full")))
    found = []
    with console.status("measuring") as status:
        for forecast in forecasts(session, modes, ranks, batches, rounds):
            found.append(forecast)
            status.update(f"measured {forecast.mode} r={forecast.r}")
    console.print(_table(found, memory))
    console.print(f"{session.total_steps:,} optimizer steps; moves after {_moves(found[0].moves)}")
    if memory is not None:
        console.print(_verdict(found, memory))
    return found


def _table(found: list[Forecast], memory: float | None) -> Table:
    table = Table(title="what each mode and rank would cost")
    table.add_column("slices", no_wrap=True)
    for column in ("active", "changed", "kept MiB", "state MiB", "memory MiB", "s/step", "/ frozen", "file MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    if memory is not None:
        table.add_column("fits", justify="right")
    for item in found:
        sizes = [f"{size / 2**20:,.1f}" for size in (item.kept, item.state, item.memory)]
        cells = [f"{item.mode} r={item.r}", f"{item.trainable:,}", f"{item.changed:,}", *sizes]
        cells += [f"{item.seconds:.3g}", f"{item.ratio:.2f}", f"{item.file / 2**20:,.2f}"]
        if memory is not None:
            cells.append("yes" if item.memory <= memory * 2**30 else "no")
        table.add_row(*cells)
    return table


def _verdict(found: list[Forecast], memory: float) -> str:
    """The candidate that trains most among those that fit."""
    fitting = [item for item in found if item.memory <= memory * 2**30]
    if not fitting:
        least = min(found, key=lambda item: item.memory)
        return (
            f"nothing fits {memory:g} GiB: {least.mode} r={least.r} needs {least.memory / 2**30:.2f}. Use a smaller "
            "batch, gradient checkpointing, or bf16."
        )
    best = max(fitting, key=lambda item: (item.trainable, -item.memory))
    return f"fits {memory:g} GiB and trains most at a time: --slice.mode {best.mode} --slice.r {best.r}"


def _moves(moves: list[int]) -> str:
    if not moves:
        return "no step"
    return f"steps {', '.join(map(str, moves[:12]))}" + (", ..." if len(moves) > 12 else "")
