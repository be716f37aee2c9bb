"""What a run leaves beside its weights: metrics.json and the table on screen."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..durable import write_file
from ..units import duration, size
from .counts import model_touched
from .methods import tensor_counts
from .session import Session, main_metric

__all__ = ["ON_GPU", "environment", "peak_memory", "print_report", "reset_peak_memory", "run_counts", "write_json"]

_PACKAGES = ("slicefine", "torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "numpy")
_PROOFS = {"reload_identical": "reloaded: same predictions", "unload_identical": "unloaded: original weights"}


def environment() -> dict[str, Any]:
    """Versions, device and command: what is needed to read a figure later."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    cuda = torch.cuda.is_available()
    return {
        "date": date.today().isoformat(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({torch.get_num_threads()} threads)",
        "versions": versions,
    }


ON_GPU = "CUDA allocated"  # a run's own peak; a process's resident set is that of all its runs


def reset_peak_memory() -> None:
    """Let a new run's peak begin here, where the device counts it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> tuple[int, str]:
    """Peak memory in bytes and what was measured: the GPU's allocations, or the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), ON_GPU
    try:
        import resource
    except ImportError:  # Windows
        import psutil  # type: ignore[import-untyped]

        return int(psutil.Process().memory_info().peak_wset), "process"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024, "process RSS"


def run_counts(session: Session) -> dict[str, int]:
    """Entries trained at a time, in the head, in the model, added, and touched over the whole run."""
    counts = tensor_counts(session.model, session.loaded, session.settings.chosen_method)
    sliced = session.settings.method.name == "slicefine"
    changed = model_touched(session.model) + counts["head"] if sliced else counts["trainable"]
    return {**counts, "changed": changed}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file, whole or not at all.

    Raises:
        ConfigError: if it cannot be written.
    """
    write_file(path, json.dumps(content, indent=2, default=str) + "\n")


def print_report(session: Session, report: dict[str, Any], console: Console) -> None:
    """Print the closing table."""
    counts, name = report["counts"], main_metric(session.task, session.settings)[0]
    table = Table(title=f"{session.settings.method.name} on {session.settings.data.path}", show_header=False)
    for split in session.prepared.splits:
        if split in report["after"]:
            before = report["before"].get(split, {}).get(name)
            shown = "not measured" if before is None else f"{before:.4f}"
            table.add_row(f"{name} ({split})", f"{shown} -> [bold]{report['after'][split][name]:.4f}[/bold]")
    if "general" in report:
        table.add_row("forgotten (loss on general text)", f"{report['general']['forgotten']:+.4f} nats per token")
    table.add_row(
        "trainable entries", f"{counts['trainable']:,} ({counts['trainable'] / counts['total']:.3%} of the model)"
    )
    if counts["head"]:
        table.add_row("  of which new head", f"{counts['head']:,}")
    table.add_row("values changed over the run", f"{counts['changed']:,} ({counts['changed'] / counts['total']:.3%})")
    table.add_row("added parameters", f"{counts['added']:,}")
    table.add_row("moves made", _moves(report["moves"]))
    table.add_row("optimizer steps", f"{report['steps']:,} ({duration(report['seconds_per_step'])} each)")
    if report.get("best_step") not in (None, 0, report["steps"]):
        kept = f"step {report['best_step']:,}, the best {name} (training.load_best=false keeps the last)"
        table.add_row("kept and written", kept)
    table.add_row("training time", duration(report["train_seconds"]))
    table.add_row("peak memory", f"{size(report['peak_memory_bytes'])} ({report['peak_memory_kind']})")
    table.add_row("file size", size(report["file_bytes"]))
    for key, text in _PROOFS.items():
        if report.get(key) is not None:
            table.add_row(text, "yes, bit for bit" if report[key] else "[bold red]NO[/bold red]")
    console.print(table)
    console.print(f"written to {report['output']}", highlight=False, soft_wrap=True)


def _moves(moves: list[int]) -> str:
    if not moves:
        return "0"
    shown = ", ".join(str(step) for step in moves[:10]) + (", ..." if len(moves) > 10 else "")
    return f"{len(moves)} (after steps {shown})"
