"""Run a grid of training runs from one recipe; the same command goes on where it stopped."""

from __future__ import annotations

from typing import Any

from ..sweeps.settings import SweepSettings
from .parsing import VerbParser, instantiate

__all__ = ["parser", "run"]

_EXAMPLES = ("slicefine sweep --config recipes/sweeps/rank.yaml --output results/rank --workers 2",)
_COMMON = (
    "config",
    "output",
    "workers",
    "seeds",
    "limit",
    "seconds",
    "search_only",
    "only",
    "change",
    "keep",
    "dry_run",
    "quiet",
    "json",
)


def parser() -> VerbParser:
    """Options of `slicefine sweep`."""
    usage = "slicefine sweep --config SWEEP.yaml --output DIR [--workers N] [--SETTING VALUE ...]"
    result = VerbParser(usage, "Run a grid of training runs, tuned on validation, and resume it.", _EXAMPLES, _COMMON)
    result.add_argument("--config", action="config", help="The sweep in YAML; flags after it override it.")
    result.add_class_arguments(SweepSettings)
    return result


def run(chosen: Any) -> Any:
    """Make the runs, print tables, write the figure."""
    settings = SweepSettings(**instantiate(parser(), chosen))
    from ..sweeps.report import sweep

    return sweep(settings)
