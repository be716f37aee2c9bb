"""Fine-tune a model; with no arguments MiniLM on docstrings, offline."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from ..training.settings import TrainSettings

__all__ = ["parser", "run"]


def parser() -> ArgumentParser:
    """Options of `slicefine train`."""
    result = ArgumentParser(description="Fine-tune a model. Without arguments: MiniLM on docstrings, offline.")
    result.add_argument("--config", action="config", help="Recipe in YAML; flags after it override it.")
    result.add_class_arguments(TrainSettings)
    return result


def run(chosen: Any) -> int:
    """Train."""
    settings = parser().instantiate_classes(chosen)
    from ..training.run import train

    train(TrainSettings(**{name: value for name, value in settings.items() if name != "config"}))
    return 0
