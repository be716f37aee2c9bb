"""Run what a sweep still lacks: in worker processes, one JSON file per run, written when the run is over."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import ConfigError, DataError
from ..units import duration
from .settings import (
    Cell,
    Run,
    SweepSettings,
    cells,
    extended,
    final_run,
    runs_of,
    search_run,
    search_seed,
    train_settings,
)

__all__ = ["ARCHIVE", "Outcome", "run_sweep", "stored"]

ARCHIVE = "runs.jsonl"  # results of runs, one per line: what is committed instead of a file each

Outcome = dict[str, Any]  # what `slicefine train` reports, and the run's place in the sweep


def run_sweep(settings: SweepSettings, folder: Path, console: Console) -> list[Outcome]:
    """Make every run that has no result yet; tuning first, then the other seeds with what was best.

    Args:
        settings: the recipe.
        folder: results are in ``folder/runs``.
        console: for one line per run.

    Returns:
        The outcomes of the chosen tuned values, one per cell and seed that could be run; with ``search_only`` those of
        the runs that chose, one per cell that is tuned.

    Raises:
        ConfigError: for a setting that is wrong, before anything runs.
    """
    grid = cells(settings)
    for cell in grid:  # all are checked before the first one starts
        for run in runs_of(settings, cell, settings.seeds[0]):
            train_settings(run.recipe)
    for cell in grid:
        for run in runs_of(settings, cell, settings.seeds[0])[:1]:
            train_settings(final_run(settings, cell, settings.seeds[0], run.tuned).recipe)
    deadline = None if settings.seconds is None else time.monotonic() + settings.seconds
    with _Pool(settings, folder, console, deadline) as pool:
        leaders = _leaders(settings, grid)
        best = _tuned(settings, folder, pool, list(dict.fromkeys(leaders.values())))
        if settings.search_only:
            return _found(settings, folder, best)
        rest = [
            final_run(settings, cell, seed, tuned)
            for seed in settings.seeds
            for cell in grid
            if (tuned := best[leaders[cell]]) is not None
        ]
        pool.make(rest)
    return [outcome for run in rest if (outcome := stored(folder, run)) is not None]


def stored(folder: Path, run: Run) -> Outcome | None:
    """The result of a run, from its own file or the folder's archive; None if it has none (or failed)."""
    path = folder / "runs" / f"{run.key}.json"
    if not path.is_file():
        archive = folder / ARCHIVE
        return _archived(archive, archive.stat().st_mtime_ns).get(run.key) if archive.is_file() else None
    try:
        outcome: Outcome = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as JSON ({error}); remove it to make the run again.") from error
    return None if "error" in outcome else outcome


@cache
def _archived(archive: Path, changed: int) -> dict[str, Outcome]:
    """Results by key from a file with one per line; ``changed`` makes a new file be read anew."""
    try:
        found = [json.loads(line) for line in archive.read_text(encoding="utf-8").splitlines() if line]
        return {outcome["key"]: outcome for outcome in found if "error" not in outcome}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{archive}: not readable as one result per line ({error}); restore or remove it.") from error


def _leaders(settings: SweepSettings, grid: list[Cell]) -> dict[Cell, Cell]:
    """The cell that each one takes its tuned values from: the first with the same labels of ``tune_per``."""
    if settings.tune_per is None:
        return {cell: cell for cell in grid}
    first: dict[tuple[str, ...], Cell] = {}
    for cell in grid:
        first.setdefault(tuple(cell.label(axis) for axis in settings.tune_per), cell)
    return {cell: first[tuple(cell.label(axis) for axis in settings.tune_per)] for cell in grid}


def _found(
    settings: SweepSettings, folder: Path, best: dict[Cell, tuple[tuple[str, Any], ...] | None]
) -> list[Outcome]:
    """The outcomes of the runs that chose the tuned values."""
    seed = search_seed(settings)
    chosen = [search_run(settings, cell, seed, tuned) for cell, tuned in best.items() if tuned is not None]
    return [outcome for run in chosen if (outcome := stored(folder, run)) is not None]


def _tuned(
    settings: SweepSettings, folder: Path, pool: _Pool, leading: list[Cell]
) -> dict[Cell, tuple[tuple[str, Any], ...] | None]:
    """The values that are best on validation for each cell that is tuned; lists grow where the best is at an end."""
    seed = search_seed(settings)
    lists = {cell: dict(settings.tune) for cell in leading}
    open_cells = leading
    for turn in range(settings.extend + 1):
        pool.make(run for cell in open_cells for run in runs_of(settings, cell, seed, lists[cell]))
        best = {cell: _best(folder, runs_of(settings, cell, seed, lists[cell])) for cell in leading}
        if turn == settings.extend:
            break
        grown = {
            cell: {name: extended(values, dict(tuned)[name]) for name, values in lists[cell].items()}
            for cell in open_cells
            if (tuned := best[cell]) is not None
        }
        open_cells = [cell for cell in grown if grown[cell] != lists[cell]]
        lists.update({cell: grown[cell] for cell in open_cells})
    return best


def _best(folder: Path, runs: list[Run]) -> tuple[tuple[str, Any], ...] | None:
    """The tuned values with the best validation metric, of equal ones with the least loss; None if no run succeeded."""
    found = [(run, stored(folder, run)) for run in runs]
    finished = [(run, outcome) for run, outcome in found if outcome is not None]
    if not finished:
        return None
    return max(finished, key=lambda pair: (pair[1]["score"], -_loss(pair[1])))[0].tuned


def _loss(outcome: Outcome) -> float:
    """The validation loss, which still tells values apart that all end at the larger class; without one, infinite."""
    loss = float(outcome["after"]["validation"].get("loss", math.inf))
    return math.inf if math.isnan(loss) else loss


class _Pool:
    """Worker processes that make runs, at most as many as asked for, until the deadline."""

    def __init__(self, settings: SweepSettings, folder: Path, console: Console, deadline: float | None) -> None:
        self.settings, self.folder, self.console, self.deadline = settings, folder, console, deadline
        self.left = settings.limit
        self.executor: ProcessPoolExecutor | None = None
        self.others: list[Any] = []  # child processes that are no workers

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.executor is None:
            return
        ended = kind is not None and not issubclass(kind, Exception)  # by a signal: runs under way are made again
        workers = [child for child in multiprocessing.active_children() if child not in self.others]
        for worker in workers if ended else ():
            worker.terminate()
        try:
            self.executor.shutdown(wait=True, cancel_futures=True)
        except (KeyboardInterrupt, SystemExit):  # once more: at once
            for worker in workers:
                worker.kill()
            raise

    def make(self, runs: Iterable[Run]) -> None:
        """Make those of the runs that have no result."""
        lacking = [run for run in runs if stored(self.folder, run) is None]
        if self.left is not None:
            lacking = lacking[: self.left]
            self.left -= len(lacking)
        if not lacking:
            return
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        for done, (run, outcome) in enumerate(self._outcomes(iter(lacking)), start=1):
            spent = time.monotonic() - began
            shown = f"failed: {outcome['error']}" if "error" in outcome else f"{outcome['score']:.4f}"
            left = spent / done * (len(lacking) - done)
            line = f"{done}/{len(lacking)}  {run.key}  {shown}  ({duration(spent)}, about {duration(left)} left)"
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _outcomes(self, runs: Iterator[Run]) -> Iterator[tuple[Run, Outcome]]:
        if self.executor is None:
            context = multiprocessing.get_context("spawn")
            numbers = context.Queue()
            for number in range(self.settings.workers):
                numbers.put(number)
            workers = self.settings.workers
            self.others = multiprocessing.active_children()
            self.executor = ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(numbers, workers))
        waiting: dict[Future[Outcome], Run] = {}
        more = True
        while more or waiting:
            while more and len(waiting) < self.settings.workers:
                run = None if self._late() else next(runs, None)
                more = run is not None
                if run is not None:
                    place = str(self.folder / "folders" / run.key) if self.settings.keep else None
                    facts = {
                        "key": run.key,
                        "labels": dict(run.cell.labels),
                        "seed": run.seed,
                        "tuned": dict(run.tuned),
                    }
                    job = (run.recipe, facts, str(self.folder / "runs" / f"{run.key}.json"), place)
                    waiting[self.executor.submit(_execute, *job)] = run
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def _prepare(numbers: Any, workers: int) -> None:
    """In each worker: its own device, its share of the cores, and an end with the sweep, however that ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent tells the workers to end
    number = numbers.get()
    devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    import torch

    count = len(devices) or torch.cuda.device_count()
    if count > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % count] if devices else str(number % count)
    if "OMP_NUM_THREADS" not in os.environ:  # else torch has read it: whoever shares a machine says how many are theirs
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    from ..training.screen import quiet_libraries

    quiet_libraries()


def _end_with_parent() -> None:
    """A killed sweep cannot stop its workers; without this they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _execute(recipe: dict[str, Any], facts: Outcome, path: str, place: str | None) -> Outcome:
    """One run in a worker: train, and write the result file; an error becomes its result."""
    import warnings

    from ..training.report import write_json
    from ..training.run import train

    warnings.filterwarnings("ignore", message="SliceFine")  # a plan that moves less than asked for: the file says so
    folder = place or tempfile.mkdtemp(prefix="slicefine-")
    verify = recipe.get("verify", False)
    settings = replace(train_settings(recipe), output=folder, overwrite=True, quiet=True, verify=verify)
    try:
        report = train(settings)
        name = report["metric"]
        if "validation" not in report["after"]:
            raise DataError("a sweep compares on validation, and there is none; set data.validation_fraction.")
        score = report["after"]["validation"][name]
        better = score if _more_is_better(settings) else -score
        outcome = {**facts, "score": better, "value": score, "recipe": recipe, **report}
    except Exception as error:  # one bad run must not end the sweep; its file says what happened
        outcome = {**facts, "error": f"{type(error).__name__}: {error}", "recipe": recipe}
    finally:
        if place is None:
            shutil.rmtree(folder, ignore_errors=True)
    write_json(Path(path), outcome)
    return outcome


def _more_is_better(settings: Any) -> bool:
    from ..tasks import get_task
    from ..training.session import main_metric

    return main_metric(get_task(settings.task, settings.model, settings.data), settings)[1]
