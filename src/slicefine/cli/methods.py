"""List the fine-tuning methods: name, trained entries, source, and the options that a recipe may set."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

__all__ = ["parser", "run"]


def parser() -> ArgumentParser:
    """Options of `slicefine methods`."""
    return ArgumentParser(usage="slicefine methods", description="List the methods that method.name may be.")


def run(chosen: Any) -> int:
    """Print the registry."""
    from rich.console import Console
    from rich.table import Table

    from ..methods import methods

    console = Console(width=None if Console().is_terminal else 160)
    table = Table(title="method.name")
    for column in ("name", "trained entries", "source", "differs", "options"):
        table.add_column(column, overflow="fold")
    for method in methods().values():
        own = "" if method.name == "slicefine" else ", ".join(f"{k}={v!r}" for k, v in method.options.items())
        own = "see slice.* of slicefine train --help" if method.name == "slicefine" else own
        table.add_row(method.name, method.formula, method.source, method.differs, own)
    console.print(table)
    return 0
