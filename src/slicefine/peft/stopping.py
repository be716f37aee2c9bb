"""SIGINT and SIGTERM end a run of ``Trainer`` after a whole step and a checkpoint, instead of in the middle."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

__all__ = ["SIGNALS", "Interrupted", "StopOnSignal", "at_epoch_end", "raising_on_sigterm"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A signal ended the run; the exit status is 128 plus its number, as a shell says it.

    Args:
        number: of the signal.
        message: what is kept, and how to go on.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(128 + number)
        self.number, self.message = number, message

    def __str__(self) -> str:
        return self.message


class StopOnSignal(TrainerCallback):
    """Let SIGINT (Ctrl-C) and SIGTERM end a run of ``Trainer`` so that it can go on as if nothing had happened.

    The step that is under way is finished, a checkpoint is written, and `Interrupted` ends the process with status 130
    or 143. A second signal ends it at once. Where an evaluation belongs to that step, it is made first: the resumed run
    would not make it. With several processes all of them stop after the same step, which they agree upon after each
    step on a CPU, and where the loss is logged on a GPU, where the process waits for the device anyway.

    Args:
        say: called with one sentence when the signal arrives, and with one when the checkpoint is there; None prints
            them to stderr.

    Example:
        >>> from transformers import Trainer  # doctest: +SKIP
        >>> Trainer(model, arguments, train_dataset=rows, callbacks=[StopOnSignal()]).train()  # doctest: +SKIP
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.received: int | None = None
        self._agreed: int | None = None
        self._epoch_over = False
        self._previous: dict[int, Any] = {}
        self._say = say if say is not None else _to_stderr

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen to the signals, in the main thread only: others have none; and not to those that are ignored."""
        if threading.current_thread() is threading.main_thread():
            self.restore()
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._note) for number in heard}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen no more; a signal that came after the last checkpoint goes to whom it would have gone without us."""
        self.restore()
        if self.received is not None:
            os.kill(os.getpid(), self.received)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The epoch goes on."""
        self._epoch_over = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint, unless the end of the epoch comes first."""
        if self._all_agree(args, state) and not at_epoch_end(state, control):
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint after the evaluation of the epoch, if there is one."""
        self._epoch_over = True
        if self._all_agree(args, state):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint is there: end the run.

        Raises:
            Interrupted: if a signal asked for it.
        """
        if getattr(args, "world_size", 1) == 1:  # it may have come since, during an evaluation
            self._agreed = self.received
        if self._agreed is None or (at_epoch_end(state, control) and not self._epoch_over):
            return
        self.restore()
        message = f"{_name(self._agreed)}: stopped after step {state.global_step}, and its checkpoint is written."
        if getattr(state, "is_world_process_zero", True):
            self._say(f"{message} Go on with resume_from_checkpoint.")
        raise Interrupted(self._agreed, message)

    def restore(self) -> None:
        """Give the signals back to whom they belonged."""
        if threading.current_thread() is threading.main_thread():
            for number, previous in self._previous.items():
                signal.signal(number, previous if previous is not None else signal.SIG_DFL)
            self._previous = {}

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            self.restore()
            os.kill(os.getpid(), number)
            return
        self.received = number
        self._say(f"{_name(number)}: finishing this step, then writing a checkpoint. Once more ends at once.")

    def _all_agree(self, args: Any, state: Any) -> bool:
        """Whether a signal came, to this process or to another one that takes the same steps."""
        self._agreed = self.received
        if getattr(args, "world_size", 1) > 1:
            every = 1 if args.device.type == "cpu" else max(1, int(args.logging_steps))
            self._agreed = None
            if state.global_step % every == 0 or state.global_step >= state.max_steps:
                numbers = torch.tensor([self.received or 0], device=args.device)
                torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
                self._agreed = int(numbers) or None
        return self._agreed is not None


@contextmanager
def raising_on_sigterm() -> Iterator[None]:
    """SIGTERM raises `Interrupted`, as SIGINT raises ``KeyboardInterrupt``, instead of ending the process on the spot.

    Does nothing outside the main thread, or where SIGTERM is ignored.
    """
    number = signal.SIGTERM
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) is signal.SIG_IGN:
        yield
        return
    previous = signal.signal(number, _raise)
    try:
        yield
    finally:
        signal.signal(number, previous if previous is not None else signal.SIG_DFL)


def _raise(number: int, frame: Any) -> None:
    raise Interrupted(number, f"{_name(number)}.")


def at_epoch_end(state: Any, control: Any) -> bool:
    """Whether the step was the last one of its epoch or of the run: an evaluation may follow, which belongs to it."""
    last = state.global_step >= state.max_steps or control.should_training_stop
    return last or float(state.epoch or 0.0).is_integer()


def _name(number: int) -> str:
    return signal.Signals(number).name


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
