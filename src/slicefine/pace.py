"""When slices move: the settings of a run, resolved to an interval, and what to say before a run that looks odd."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import AdapterFileError, ConfigError
from .schedule import POLICIES, Moves, plan_moves, wrap_visit
from .state import AdapterState
from .window import Window

__all__ = ["FALLBACK_INTERVAL", "ON_NONFINITE", "MoveSettings", "check_progress", "warn_about_plan"]

FALLBACK_INTERVAL = 500  # the paper's N (Appendix I), for custom loops of unknown length
ON_NONFINITE = ("raise", "skip")


@dataclass
class MoveSettings:
    """When slices move and what happens to the optimizer's state then.

    Attributes:
        moves: number of moves, spread evenly over the run; None if ``interval`` is given.
        interval: steps between moves (the paper's N); overrides ``moves``.
        total_steps: optimizer steps of the run; transformers' ``Trainer`` tells it by itself.
        minimum_steps: with ``moves``, a position gets at least this many steps, or there are fewer moves.
        state_policy: ``"reset"`` starts the new slice with fresh optimizer state, ``"rewarm"`` also scales its first
            updates up from zero, ``"keep"`` leaves the old slice's state in place (for study).
        rewarm_steps: length of that ramp in optimizer steps.
        window: train only the layers of a moving group of blocks; None trains all of them at once.
        on_nonfinite: ``"raise"`` stops when a slice turned out to be NaN or infinite, which is looked for at moves, at
            logging and before saving; ``"skip"`` looks at the gradients before each optimizer step, which costs a
            synchronisation, and leaves a step with a NaN or infinite one out.
    """

    moves: int | None = 8
    interval: int | None = None
    total_steps: int | None = None
    minimum_steps: int = 50
    state_policy: str = "reset"
    rewarm_steps: int = 10
    window: Window | None = None
    on_nonfinite: str = "raise"

    def __post_init__(self) -> None:
        if self.on_nonfinite not in ON_NONFINITE:
            raise ConfigError(f"on_nonfinite={self.on_nonfinite!r} is unknown; expected {' or '.join(ON_NONFINITE)}.")
        if self.state_policy not in POLICIES:
            raise ConfigError(f"state_policy={self.state_policy!r} is unknown; expected one of {', '.join(POLICIES)}.")
        for name, value, low in (
            ("moves", self.moves, 0),
            ("interval", self.interval, 1),
            ("total_steps", self.total_steps, 1),
            ("minimum_steps", self.minimum_steps, 1),
            ("rewarm_steps", self.rewarm_steps, 1),
        ):
            absent = value is None and name in ("moves", "interval", "total_steps")
            if not absent and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ConfigError(f"{name}={value!r} must be an integer of at least {low}.")
        if self.moves is None and self.interval is None:
            raise ConfigError("give either moves= (a number of moves) or interval= (steps between moves).")

    def plan(self, total_steps: int | None) -> Moves | None:
        """Resolve to an interval; None while the run's length is needed and unknown."""
        if self.interval is not None:
            return Moves(self.interval)
        total = total_steps if total_steps is not None else self.total_steps
        if self.moves == 0:
            return Moves(None, 0)
        if total is None or self.moves is None:
            return None
        return plan_moves(self.moves, total, self.minimum_steps)


def warn_about_plan(
    plan: Moves,
    settings: MoveSettings,
    total: int,
    layers: Sequence[tuple[str, tuple[int, int], AdapterState]],
    around: bool = True,
) -> bool:
    """Warn if a run would never move, leave layers out, or come back to slices that it trained before.

    Args:
        plan: of the run.
        settings: that it follows from.
        total: optimizer steps of the run.
        layers: name, shape and state of each.
        around: warn of the last.

    Returns:
        Whether it warned of the last.
    """
    due = 0 if plan.interval is None else (total - 1) // plan.interval
    due = due if plan.limit is None else min(due, plan.limit)
    states = [state for _, _, state in layers]
    fixed = settings.window is None and all(state.schedule.positions == "fixed" for state in states)
    if due == 0 and not fixed and settings.moves != 0:
        warnings.warn(
            f"SliceFine: the slice will not move in this run of {total} steps ({_pace(plan, settings)}). "
            "Train longer, or lower interval= or minimum_steps=, if it should.",
            UserWarning,
            stacklevel=3,
        )
    waiting = [s.layer_name for s in states if s.place is not None and s.place.turn(due + 1) == 0]
    if due > 0 and waiting and settings.window is not None and settings.window.order != "fixed":
        warnings.warn(
            f"SliceFine: the window gets to {due + 1} of its positions in this run, so {len(waiting)} layers never "
            f"train ({waiting[0]}, ...). Use more moves, a larger window, or window_order='fixed' to say so.",
            UserWarning,
            stacklevel=3,
        )
    for name, shape, state in layers if around else ():
        wrap = wrap_visit(state.schedule, shape, state.layer_name)
        own = due if state.place is None else state.place.turn(due + 1) - 1
        if wrap is not None and own >= wrap:
            warnings.warn(
                f"SliceFine: {own} moves go around the matrix of {name} (shape {shape}) from move {wrap} on, "
                "so slices are trained again. Use fewer moves or a smaller rank if that is not wanted.",
                UserWarning,
                stacklevel=3,
            )
            return True
    return False


def _pace(plan: Moves, settings: MoveSettings) -> str:
    if plan.interval is not None:
        return f"it moves every {plan.interval}"
    return f"a position gets at least {settings.minimum_steps}"


def check_progress(progress: Any, where: str) -> list[dict[str, float]]:
    """What a file says of the loss and the metrics of each visit.

    Raises:
        AdapterFileError: if it is no list of named numbers.
    """
    found = [] if progress is None else progress
    if not isinstance(found, list) or not all(
        isinstance(entry, dict) and all(isinstance(value, (int, float)) for value in entry.values()) for entry in found
    ):
        raise AdapterFileError(f"{where}: progress is no list of losses and metrics; the file is corrupt.")
    try:
        return [{str(name): float(value) for name, value in entry.items()} for entry in found]
    except OverflowError as error:
        raise AdapterFileError(f"{where}: progress has a number beyond all measure; the file is corrupt.") from error
