"""What a person sees while training: a progress bar with loss and rate, and a line per evaluation."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from ..mover import movers_of

__all__ = ["Screen", "quiet_libraries"]


def quiet_libraries() -> None:
    """For the command line: no progress bars, notes and deprecations of the libraries between our own lines."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs its errors and raises them as well
    for module in ("transformers", "peft", "torch.utils.data"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


class Screen(TrainerCallback):  # type: ignore[misc]
    """Progress on a rich console.

    Args:
        console: where to print.
        metric: name of the main metric.
    """

    def __init__(self, console: Console, metric: str) -> None:
        self.console, self.metric = console, metric
        self.progress: Progress | None = None
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar."""
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, note="")
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        """Show the latest loss and how many moves were made."""
        if self.progress is None or not logs or "loss" not in logs:
            return
        moves = sum(mover.visits - 1 for mover in movers_of(model))
        self.progress.update(self.task, note=f"loss {float(logs['loss']):.4f}  moves {moves}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Print one line."""
        value, loss = (metrics or {}).get(f"eval_{self.metric}"), (metrics or {}).get("eval_loss")
        if value is None:
            return
        train = next(
            (f"loss {float(entry['loss']):.3f}  " for entry in reversed(state.log_history) if "loss" in entry), ""
        )
        self.console.print(
            f"step {state.global_step}/{state.max_steps}  epoch {state.epoch:.1f}  {train}"
            f"validation {loss:.3f}  {self.metric} {value:.4f}",
            highlight=False,
            soft_wrap=True,
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self.stop()

    def stop(self) -> None:
        """Take the bar away, also after an error."""
        if self.progress is not None:
            self.progress.stop()
