"""List the fine-tuning methods: name, trained entries, source, and the options that a recipe may set."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

__all__ = ["as_markdown", "parser", "run"]

_HEADS = ("method.name", "title", "trained entries", "source", "differs from the original", "method.options")


def parser() -> ArgumentParser:
    """Options of `slicefine methods`."""
    result = ArgumentParser(usage="slicefine methods", description="List the methods that method.name may be.")
    result.add_argument("--markdown", type=bool, default=False, help="Print a Markdown table (docs/methods.md).")
    return result


def run(chosen: Any) -> int:
    """Print the registry."""
    if chosen.markdown:
        print(as_markdown(), end="")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(*_HEADS[:4], _HEADS[5], title="methods")
    for row in _rows():
        table.add_row(*row[:4], row[5])
    Console(width=None if Console().is_terminal else 170).print(table)
    return 0


def as_markdown() -> str:
    """The registry as a Markdown table."""
    lines = ["| " + " | ".join(_HEADS) + " |", "|" + "---|" * len(_HEADS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") or "-" for cell in row) + " |" for row in _rows()]
    return "\n".join(lines) + "\n"


def _rows() -> list[tuple[str, ...]]:
    from ..methods import methods

    result: list[tuple[str, ...]] = []
    for method in methods().values():
        options = ", ".join(f"{name}={value!r}" for name, value in method.options.items())
        options = "below `slice`" if method.name == "slicefine" else options
        result.append((method.name, method.title, method.formula, method.source, method.differs, options))
    return result
