"""Measure what methods cost on this machine, side by side."""

from __future__ import annotations

import sys
from typing import Any

from ..bench.settings import BenchSettings
from .parsing import VerbParser, instantiate

__all__ = ["parser", "run"]

_EXAMPLES = (
    "slicefine bench --models roberta --layers 2 --rounds 5",
    "slicefine bench --suite peft --models llama --output results/bench",
)
_COMMON = (
    *("models", "suite", "methods", "rounds", "layers", "batch", "length", "lm_head", "device", "dtype"),
    *("checkpointing", "compiled", "loop", "memory", "keep_memory", "output", "json"),
)


def parser() -> VerbParser:
    """Options of `slicefine bench`."""
    usage = "slicefine bench [--suite core] [--models roberta,llama] [--SETTING VALUE ...]"
    result = VerbParser(usage, "Measure step time, memory, files and moves, interleaved.", _EXAMPLES, _COMMON)
    result.add_class_arguments(BenchSettings)
    return result


def run(chosen: Any) -> Any:
    """Measure, print, and write what was asked for."""
    settings = BenchSettings(**instantiate(parser(), chosen))
    from ..bench.run import run_bench
    from ..training.screen import quiet_libraries

    quiet_libraries()
    return [result.to_dict() for result in run_bench(settings, "slicefine bench " + " ".join(sys.argv[2:]))]
