"""Fine-tune a model; with no arguments MiniLM on docstrings, offline."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from ..training.settings import TrainSettings
from .parsing import instantiate

__all__ = ["parser", "run"]


def parser() -> ArgumentParser:
    """Options of `slicefine train`."""
    usage = "slicefine train [--config RECIPE.yaml] [--SETTING VALUE ...]"
    result = ArgumentParser(usage=usage, description="Fine-tune a model; without arguments MiniLM on docstrings.")
    result.add_argument("--config", action="config", help="Recipe in YAML; flags after it override it.")
    result.add_class_arguments(TrainSettings)
    return result


def run(chosen: Any) -> int:
    """Train."""
    settings = TrainSettings(**instantiate(parser(), chosen))
    from ..training.run import train
    from ..training.screen import quiet_libraries

    quiet_libraries()
    train(settings)
    return 0
