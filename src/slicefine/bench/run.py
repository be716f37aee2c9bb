"""A benchmark from its settings to its files."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from ..errors import ConfigError
from .measure import ShapeResult, iterate
from .report import draw, print_result, write_json
from .settings import BenchSettings

__all__ = ["run_bench"]


def run_bench(settings: BenchSettings, command: str) -> list[ShapeResult]:
    """Measure every shape, print its table, and write ``bench.json`` and ``bench.png`` if a folder was named.

    Raises:
        ConfigError: if the folder cannot be made; before anything is measured.
    """
    console = Console(width=None if Console().is_terminal else 150)
    folder = None if settings.output is None else Path(settings.output)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"bench.output={settings.output!r} cannot be made ({error}); name another.") from error
    results = []
    with console.status("starting") as status:
        for result in iterate(settings, status.update):
            print_result(result, settings, console)
            results.append(result)
            if folder is not None:  # after every shape: an interruption loses one at most
                write_json(folder / "bench.json", results, settings, command, time.strftime("%Y-%m-%d"))
                draw(folder / "bench.png", results)
    if folder is not None:
        console.print(f"written to {folder}/bench.json and bench.png")
    return results
