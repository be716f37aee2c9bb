"""A run's numbers as words: the rows of its tables, where what a file does not say is said to be unknown."""

from __future__ import annotations

import json
from typing import Any

from ..units import size
from .content import Run

__all__ = ["UNKNOWN", "comparison", "facts", "headlines", "measured", "settings_text", "split_value"]

UNKNOWN = "not recorded"
_LARGE = ("layout", "weights", "progress")  # of an adapter's configuration


def headlines(run: Run) -> list[tuple[str, str, str]]:
    """The few numbers that come first: name, value, and a line below it."""
    found = []
    if run.metrics is not None:
        name = run.metrics["metric"]
        for split in run.metrics["after"]:
            before = split_value(run, "before", split)
            note = f"{before} before training" if before != UNKNOWN else "not measured before training"
            found.append((f"{name} ({split})", split_value(run, "after", split), note))
        found.append(("trained at a time", _count(run, "trainable"), _share(run, "trainable")))
        found.append(("time per step", _seconds(run.metrics.get("seconds_per_step"), 3), _steps(run)))
    found.append(("file", _file(run), f"{_count(run, 'added')} added parameters" if run.metrics else ""))
    return found


def measured(run: Run) -> tuple[list[str], list[list[str]]]:
    """All metrics: the columns of a table and its rows; nothing for an adapter alone."""
    if run.metrics is None:
        return [], []
    splits = [split for split, values in run.metrics["after"].items() if isinstance(values, dict)]
    names = dict.fromkeys(name for split in splits for name in run.metrics["after"][split])
    columns = ["metric", *(f"{split}, {when}" for split in splits for when in ("before", "after"))]
    rows = [[name, *(split_value(run, w, s, name) for s in splits for w in ("before", "after"))] for name in names]
    return columns, rows


def facts(run: Run) -> list[tuple[str, str]]:
    """Everything else of the summary, as names and values."""
    rows = [("method", _method(run)), ("base model", _base(run))]
    if run.metrics is None:
        return [*rows, *_adapter_facts(run), ("written", f"{run.date} (date of the file)")]
    metrics = run.metrics
    rows += [("task", str(run.setting("task.name"))), ("data", str(run.setting("data.path")))]
    rows += [
        ("entries trained at a time", f"{_count(run, 'trainable')} ({_share(run, 'trainable')})"),
        ("of which new head", _count(run, "head")),
        ("values changed over the run", f"{_count(run, 'changed')} ({_share(run, 'changed')})"),
        ("added parameters", _count(run, "added")),
        ("moves", _moves(run)),
        ("optimizer steps", f"{_steps(run)}, {_seconds(metrics.get('seconds_per_step'), 3)} each"),
        ("training time", _seconds(metrics.get("train_seconds"), 0)),
        ("peak memory", f"{_bytes(metrics.get('peak_memory_bytes'))} ({metrics.get('peak_memory_kind', UNKNOWN)})"),
        ("file size", _file(run)),
        ("seeds", f"training {run.setting('training.seed')}, data {run.setting('data.seed')}"),
        ("device", str(metrics.get("device", UNKNOWN))),
        ("system", f"{metrics.get('platform', UNKNOWN)}, Python {metrics.get('python', UNKNOWN)}"),
        ("versions", _versions(metrics.get("versions"))),
        ("command", str(metrics.get("command", UNKNOWN))),
        ("written", f"{run.date} (date of the file)"),
    ]
    proofs = {"reload_identical": "reloaded: same predictions", "unload_identical": "unloaded: original weights"}
    rows += [(words, "yes" if metrics[key] else "NO") for key, words in proofs.items() if metrics.get(key) is not None]
    return rows


def settings_text(run: Run) -> str:
    """The recipe, or an adapter's configuration without its long lists, as indented JSON."""
    if run.metrics is not None:
        return json.dumps(run.metrics["settings"], indent=2)
    config = {} if run.contents is None else run.contents.config
    return json.dumps({key: value for key, value in config.items() if key not in _LARGE}, indent=2)


def comparison(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """One row per run: what it cost and what it reached."""
    measures = dict.fromkeys((run.metrics["metric"], s) for run in runs if run.metrics for s in run.metrics["after"])
    names = [f"{name} ({split})" for name, split in measures]
    columns = ["run", "method", "mode", "rank", *names, "trained at a time", "changed", "file", "time", "memory"]
    rows = []
    for run in runs:
        metrics = run.metrics or {}
        reached = [split_value(run, "after", split, name) for name, split in measures]
        cost = [_seconds(metrics.get("train_seconds"), 0), _bytes(metrics.get("peak_memory_bytes"))]
        counts = [_count(run, "trainable"), _count(run, "changed"), _file(run)]
        rows.append([run.name, run.method, _mode(run), _rank(run), *reached, *counts, *cost])
    return columns, rows


def split_value(run: Run, when: str, split: str, name: str | None = None) -> str:
    """A metric before or after training; the main one if none is named."""
    found: Any = run.metrics
    for key in (when, split, name or (run.metrics or {}).get("metric")):
        found = found.get(key) if isinstance(found, dict) else None
    return UNKNOWN if found is None else _number(found)


def _adapter_facts(run: Run) -> list[tuple[str, str]]:
    if run.contents is None:
        return []
    layers, others = run.contents.layers, run.contents.others
    return [
        ("layers with slices", str(len(layers))),
        ("values in slices", f"{sum(layer.values for layer in layers):,}"),
        ("other values", f"{sum(others.values()):,} in {len(others)} tensors"),
        ("file size", _file(run)),
    ]


def _method(run: Run) -> str:
    words = [run.method]
    if _mode(run) != "none":
        words.append(f"mode {_mode(run)}")
    if _rank(run) != "none":
        words.append(f"rank {_rank(run)}")
    return ", ".join(words)


def _sliced(run: Run) -> bool:
    return run.method == "slicefine"


def _mode(run: Run) -> str:
    return str(run.setting("slice.mode") or UNKNOWN) if _sliced(run) else "none"


def _rank(run: Run) -> str:
    if run.method == "lora":
        return str(run.setting("method.options.r") or run.setting("r") or 8)
    if not _sliced(run):
        return "none"
    whole = run.setting("slice.r")
    own = [run.setting(f"slice.{name}") for name in ("r_row", "r_column")]
    if own == [None, None]:
        return str(UNKNOWN if whole is None else whole)
    return " / ".join(str(whole if value is None else value) for value in own) + " (rows / columns)"


def _base(run: Run) -> str:
    trained = None if run.contents is None else run.contents.config.get("base_model_name_or_path")
    named = run.setting("model.path")
    return " = ".join(dict.fromkeys(str(name) for name in (named, trained) if name)) or UNKNOWN


def _counts(run: Run) -> dict[str, Any]:
    counts: dict[str, Any] = (run.metrics or {}).get("counts") or {}
    return counts


def _count(run: Run, name: str) -> str:
    value = _counts(run).get(name)
    return f"{value:,}" if isinstance(value, int) else UNKNOWN


def _share(run: Run, name: str) -> str:
    value, total = _counts(run).get(name), _counts(run).get("total")
    if not isinstance(value, int) or not isinstance(total, int) or total < 1:
        return "share " + UNKNOWN
    return f"{value / total:.3%} of the model"


def _moves(run: Run) -> str:
    if not _sliced(run):
        return "none: only slices move"
    moves = run.moves
    shown = ", ".join(str(step) for step in moves[:10]) + (", ..." if len(moves) > 10 else "")
    return f"{len(moves)}, after steps {shown}" if moves else "none in a run of this length"


def _steps(run: Run) -> str:
    steps = (run.metrics or {}).get("steps")
    return f"{steps:,} steps" if isinstance(steps, int) else UNKNOWN


def _file(run: Run) -> str:
    size = (run.metrics or {}).get("file_bytes")
    return _bytes(run.contents.file_bytes if size is None and run.contents is not None else size)


def _versions(found: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items()) if isinstance(found, dict) else UNKNOWN


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _seconds(value: Any, digits: int) -> str:
    return f"{value:,.{digits}f} s" if isinstance(value, (int, float)) else UNKNOWN


def _bytes(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return UNKNOWN
    return size(value)
