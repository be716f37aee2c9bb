"""`train`: the whole run, from settings to files and report."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

from ..files.writing import atomic_folder
from ..peft.stopping import Interrupted, StopOnSignal, raising_on_sigterm
from ..plots import draw_run
from ..tasks.general import general_loss
from .backbone import with_changed_backbone
from .continuing import KeepSettings
from .folders import RESULTS, RunFolder, open_folder
from .plan import make_plan, print_plan
from .report import environment, peak_memory, print_report, reset_peak_memory, run_counts, write_json
from .screen import Screen
from .session import Session, build, main_metric, measure
from .settings import TrainSettings
from .trained import save_trained, weight_bytes
from .trainer import SliceTrainer, check_weights
from .verify import LIMIT, same_predictions, same_weights

__all__ = ["this_command", "train"]


def train(settings: TrainSettings, console: Console | None = None) -> dict[str, Any]:
    """Fine-tune as the settings say, and write adapter, ``metrics.json`` and picture into the output folder.

    Args:
        settings: the recipe.
        console: where to print; a quiet run prints nothing.

    Returns:
        What ``metrics.json`` holds; for a dry run the plan's counts, steps and moves.

    Raises:
        ConfigError: for a setting that is wrong.
        DataError: for data that cannot be used.
        NumericalError: if the loss stops being a finite number.
        Interrupted: by SIGINT or SIGTERM, after the step that was under way, once its checkpoint is written; it is a
            ``SystemExit`` with status 130 or 143. Outside of training SIGINT raises ``KeyboardInterrupt``. A note on
            either says how to go on.

    Example:
        >>> train(TrainSettings(output="runs/demo"))["after"]["test"]["accuracy"]  # doctest: +SKIP
        0.72
    """
    console = console or Console(quiet=settings.quiet)
    if settings.dry_run:
        session = build(settings)
        plan = make_plan(session)
        print_plan(session, plan, console)
        return {"counts": plan.counts, "steps": plan.total_steps, "moves": plan.moves}
    folder = open_folder(settings)
    reset_peak_memory()
    try:
        with raising_on_sigterm(), folder.clean_up():
            changed = with_changed_backbone(settings, folder.path, folder.checkpoint is not None)
            return _run(build(changed, general=True, checkpoint=folder.checkpoint), folder, console)
    except (KeyboardInterrupt, Interrupted) as stop:
        stop.add_note(_how_to_go_on(settings, folder))
        raise


def _run(session: Session, folder: RunFolder, console: Console) -> dict[str, Any]:
    settings = session.settings
    metric, _ = main_metric(session.task, settings)
    screen = Screen(console, metric)
    trainer = session.trainer(str(folder.checkpoints), screen)
    stop = StopOnSignal(say=lambda text: console.print(text, highlight=False, soft_wrap=True))
    trainer.add_callback(KeepSettings(folder.settings))
    trainer.add_callback(stop)  # last: it ends the run when a checkpoint is written
    before = _measure(trainer, session) if settings.training.evaluate_before else {}
    set_seed(settings.training.seed)
    try:
        trainer.train(resume_from_checkpoint=str(folder.checkpoint) if folder.checkpoint else None)
        session.record.stop()
        memory, kind = peak_memory()
        after = _write_trained(session, trainer, folder.path / RESULTS)
    except (KeyboardInterrupt, Interrupted):
        if trainer.trained:
            trainer.save_checkpoint()
        raise
    finally:
        screen.stop()
        stop.restore()
    measured = {"before": before, "after": after, "peak_memory_bytes": memory, "peak_memory_kind": kind}
    report = _report(session, trainer, folder, measured)
    trainer.keep_last_checkpoints()
    print_report(session, report, console)
    return report


def _write_trained(session: Session, trainer: SliceTrainer, folder: Path) -> dict[str, dict[str, float]]:
    """Measure what was trained, and write it; returns the metrics."""
    check_weights(session.model, trainer.state.global_step)
    after = _measure(trainer, session)
    if session.settings.task.tests:  # questions that a language model answers in words
        graded: dict[str, float] = session.task.grade(session.model, session.loaded.processor)  # type: ignore[attr-defined]
        after["test"] = {**after.get("test", {}), **graded}
    with atomic_folder(folder) as aside:
        save_trained(session, aside)
    return after


def _report(session: Session, trainer: SliceTrainer, folder: RunFolder, measured: dict[str, Any]) -> dict[str, Any]:
    """Write ``metrics.json`` and picture."""
    settings, metric = session.settings, main_metric(session.task, session.settings)[0]
    record = session.record
    report: dict[str, Any] = {
        **measured,
        **_forgetting(session),
        "metric": metric,
        "counts": run_counts(session),
        "moves": record.moves,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "seconds_per_step": record.step_seconds / max(1, record.steps),
        "train_seconds": record.seconds,
        "file_bytes": weight_bytes(folder.path / RESULTS),
        "output": str(folder.path),
        **_verify(session, folder.path / RESULTS),
        **environment(),
        "settings": settings.as_dict(),
        "history": trainer.state.log_history,
    }
    write_json(folder.path / "metrics.json", report)
    first = measured["before"].get("validation", {}).get(metric)
    draw_run(folder.path / "curves.png", trainer.state.log_history, record.moves, metric, first)
    return report


def _measure(trainer: SliceTrainer, session: Session) -> dict[str, dict[str, float]]:
    """All metrics on the validation and test sets."""
    splits = session.prepared.splits
    return {name: measure(trainer, session.task, splits[name]) for name in ("validation", "test") if name in splits}


def _how_to_go_on(settings: TrainSettings, folder: RunFolder) -> str:
    """The command that goes on with an interrupted run, or what else to do."""
    if not any(folder.checkpoints.glob("checkpoint-*")):
        return "It was interrupted before its first step, so nothing is kept: start it again."
    resume = "--resume" if settings.output is not None else f"--resume {shlex.quote(str(folder.path))}"
    same = this_command("train")
    if same is None:
        return f"Go on with resume={str(folder.path)!r}."
    if "WORLD_SIZE" in os.environ:  # torchrun, or accelerate, has a command line of its own
        return f"Go on with the same command and {resume}."
    return f"Go on with: {same}{'' if ' --resume' in same else ' ' + resume}"


def this_command(*verbs: str) -> str | None:
    """The command line of this process, if it is one of slicefine's with one of these verbs."""
    words = sys.argv[1:]
    return shlex.join(["slicefine", *words]) if words[:1] and words[0] in verbs else None


def _forgetting(session: Session) -> dict[str, Any]:
    """The loss on general text before and after training, and how much it rose."""
    if session.general is None:
        return {}
    before, after = session.general.loss, general_loss(session.model, session.general.texts)
    return {
        "general": {"texts": len(session.general.texts), "before": before, "after": after, "forgotten": after - before}
    }


def _verify(session: Session, folder: Path) -> dict[str, bool | None]:
    wanted = session.settings.verify
    if wanted is None:
        wanted = sum(p.numel() for p in session.loaded.model.parameters()) < LIMIT
    if not wanted:
        return {}
    return {"reload_identical": same_predictions(session, folder), "unload_identical": same_weights(session)}
