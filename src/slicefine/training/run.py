"""`train`: the whole run, from settings to files and report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

from ..files.writing import atomic_folder
from ..plots import draw_run
from ..tasks.general import general_loss
from .backbone import with_changed_backbone
from .folders import RESULTS, RunFolder, open_folder
from .plan import make_plan, print_plan
from .report import environment, peak_memory, print_report, reset_peak_memory, run_counts, write_json
from .screen import Screen
from .session import Session, build, main_metric, measure
from .settings import TrainSettings
from .trained import save_trained, weight_bytes
from .trainer import SliceTrainer, check_weights
from .verify import LIMIT, same_predictions, same_weights

__all__ = ["train"]


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
    with folder.clean_up():
        session = build(with_changed_backbone(settings, folder.path, folder.checkpoint is not None), general=True)
        return _run(session, folder, console)


def _run(session: Session, folder: RunFolder, console: Console) -> dict[str, Any]:
    settings = session.settings
    metric, _ = main_metric(session.task, settings)
    screen = Screen(console, metric)
    trainer = session.trainer(str(folder.checkpoints), screen)
    before = _measure(trainer, session) if settings.training.evaluate_before else {}
    set_seed(settings.training.seed)
    began = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(folder.checkpoint) if folder.checkpoint else None)
    finally:
        screen.stop()
    seconds = time.perf_counter() - began
    check_weights(session.model, trainer.state.global_step)
    memory, kind = peak_memory()
    after = _measure(trainer, session)
    if session.settings.task.tests:  # questions that a language model answers in words
        graded: dict[str, float] = session.task.grade(session.model, session.loaded.processor)  # type: ignore[attr-defined]
        after["test"] = {**after.get("test", {}), **graded}
    with atomic_folder(folder.path / RESULTS) as aside:
        save_trained(session, aside)
    times = session.record.seconds
    report: dict[str, Any] = {
        "before": before,
        "after": after,
        **_forgetting(session),
        "metric": metric,
        "counts": run_counts(session),
        "moves": session.record.moves,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "seconds_per_step": sum(times) / max(1, len(times)),
        "train_seconds": seconds,
        "peak_memory_bytes": memory,
        "peak_memory_kind": kind,
        "file_bytes": weight_bytes(folder.path / RESULTS),
        "output": str(folder.path),
        **_verify(session, folder.path / RESULTS),
        **environment(),
        "settings": settings.as_dict(),
        "history": trainer.state.log_history,
    }
    write_json(folder.path / "metrics.json", report)
    first = before.get("validation", {}).get(metric)
    draw_run(folder.path / "curves.png", trainer.state.log_history, session.record.moves, metric, first)
    print_report(session, report, console)
    return report


def _measure(trainer: SliceTrainer, session: Session) -> dict[str, dict[str, float]]:
    """All metrics on the validation and test sets."""
    splits = session.prepared.splits
    return {name: measure(trainer, session.task, splits[name]) for name in ("validation", "test") if name in splits}


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
