"""Make a table of the paper: ours beside the published numbers; the same command goes on where it stopped."""

from __future__ import annotations

from typing import Any

from .parsing import VerbParser

__all__ = ["parser", "run"]

_EXAMPLES = (
    "slicefine reproduce table7 --dry-run",
    "slicefine reproduce table7 --output results/table7 --workers 2",
    """slicefine reproduce table7 --output results/table7 --only '{"task": ["rte"]}'""",
)


def parser() -> VerbParser:
    """Options of `slicefine reproduce`."""
    usage = "slicefine reproduce table7 --scale here|paper --output DIR [--workers N] [--dry_run]"
    result = VerbParser(usage, "Make a table of the paper, ours beside the published numbers.", _EXAMPLES)
    result.add_argument("table", type=str, help="Name of a recipe below recipes/paper, such as table7, or a file.")
    result.add_argument("--scale", type=str, default="here", help="here: small models and data; paper: the paper's.")
    result.add_argument("--output", type=str, default=None, help="Folder for results; it goes on with what is there.")
    result.add_argument("--workers", type=int, default=1, help="Runs at a time, each with its own device if possible.")
    result.add_argument("--seconds", type=float, default=None, help="Start no new run after so many seconds.")
    result.add_argument("--limit", type=int, default=None, help="Make at most so many runs, for a smoke test.")
    result.add_argument("--only", type=dict[str, list[str]], default={}, help='These labels alone: {"task": ["rte"]}.')
    result.add_argument("--change", type=dict[str, Any], default={}, help="Settings for all runs, on top of the base.")
    result.add_argument("--seeds", type=list[int], default=None, help="Instead of the recipe's.")
    result.add_argument("--search_only", type=bool, default=False, help="Choose rates on validation; read no test set.")
    result.add_argument("--dry_run", type=bool, default=False, help="Show the plan with its predicted time and memory.")
    return result


def run(chosen: Any) -> Any:
    """Make what is missing, and print the table."""
    from dataclasses import replace

    from ..sweeps.paper import find_recipe, read_table
    from ..sweeps.reproduce import reproduce

    table = read_table(find_recipe(chosen.table), chosen.scale)
    settings = replace(
        table.settings,
        output=chosen.output,
        workers=chosen.workers,
        seconds=chosen.seconds,
        limit=chosen.limit,
        only=dict(chosen.only),
        change={**table.settings.change, **chosen.change},
        seeds=chosen.seeds or table.settings.seeds,
        search_only=chosen.search_only,
        dry_run=chosen.dry_run,
    )
    return reproduce(replace(table, settings=settings))
