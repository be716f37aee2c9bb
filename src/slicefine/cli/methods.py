"""List the fine-tuning methods: name, trained entries, source, and the options that a recipe may set."""

from __future__ import annotations

from typing import Any

from .parsing import VerbParser

__all__ = ["as_markdown", "parser", "run"]

_HEADS = ("method.name", "title", "trained entries", "source", "differs from the original", "method.options")


def parser() -> VerbParser:
    """Options of `slicefine methods`."""
    examples = ("slicefine methods", "slicefine train --method.name lora --method.options '{r: 16}'")
    result = VerbParser("slicefine methods", "List the methods that method.name may be.", examples)
    result.add_argument("--markdown", type=bool, default=False, help="Print a Markdown table (docs/methods.md).")
    return result


def run(chosen: Any) -> Any:
    """Print the registry."""
    if chosen.markdown:
        print(as_markdown(), end="")
        return None
    from rich.console import Console
    from rich.table import Table

    table = Table(*_HEADS[:4], _HEADS[5], title="methods")
    for row in _rows():
        table.add_row(*row[:4], row[5])
    Console(width=None if Console().is_terminal else 170).print(table)
    return [dict(zip(_HEADS, row, strict=True)) for row in _rows()]


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
