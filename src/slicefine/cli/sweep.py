"""Run a grid of training runs from one recipe; the same command goes on where it stopped."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from ..sweeps.settings import SweepSettings
from .parsing import instantiate

__all__ = ["parser", "run"]


def parser() -> ArgumentParser:
    """Options of `slicefine sweep`."""
    usage = "slicefine sweep --config SWEEP.yaml --output DIR [--workers N] [--SETTING VALUE ...]"
    result = ArgumentParser(usage=usage, description="Run a grid of training runs, tuned on validation, and resume it.")
    result.add_argument("--config", action="config", help="The sweep in YAML; flags after it override it.")
    result.add_class_arguments(SweepSettings)
    return result


def run(chosen: Any) -> int:
    """Make the runs, print tables, write the figure."""
    settings = SweepSettings(**instantiate(parser(), chosen))
    from ..sweeps.report import sweep

    sweep(settings)
    return 0
