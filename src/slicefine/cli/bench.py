"""Measure what methods cost on this machine, side by side."""

from __future__ import annotations

import sys
from typing import Any

from jsonargparse import ArgumentParser

from ..bench.settings import BenchSettings
from .parsing import instantiate

__all__ = ["parser", "run"]


def parser() -> ArgumentParser:
    """Options of `slicefine bench`."""
    usage = "slicefine bench [--suite core] [--models roberta,llama] [--SETTING VALUE ...]"
    result = ArgumentParser(usage=usage, description="Measure step time, memory, files and moves, interleaved.")
    result.add_class_arguments(BenchSettings)
    return result


def run(chosen: Any) -> int:
    """Measure, print, and write what was asked for."""
    settings = BenchSettings(**instantiate(parser(), chosen))
    from ..bench.run import run_bench
    from ..training.screen import quiet_libraries

    quiet_libraries()
    run_bench(settings, "slicefine bench " + " ".join(sys.argv[2:]))
    return 0
