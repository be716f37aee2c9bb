"""Measure a trained adapter on a split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jsonargparse import ArgumentParser

from .parsing import instantiate

__all__ = ["EvalData", "EvalSettings", "parser", "run"]


@dataclass
class EvalData:
    """The data; what is left out is taken from the training run.

    Args:
        path: hub id, local folder or file.
        name: configuration name on the hub.
        split: train, validation or test.
        file: file name inside the folder, or split name on the hub, that holds this split.
        limit: use at most this many rows.
    """

    path: str | None = None
    name: str | None = None
    split: str = "validation"
    file: str | None = None
    limit: int | None = None


@dataclass
class EvalSettings:
    """Everything that `slicefine eval` needs.

    Args:
        adapter: the adapter folder that `slicefine train` wrote.
        data: the data.
        model: the base, if it is elsewhere than in training.
        batch_size: rows per batch.
        output: file for the metrics in JSON.
    """

    adapter: str
    data: EvalData = field(default_factory=EvalData)
    model: str | None = None
    batch_size: int = 32
    output: str | None = None


def parser() -> ArgumentParser:
    """Options of `slicefine eval`."""
    usage = "slicefine eval --adapter DIR [--data.split SPLIT] [--SETTING VALUE ...]"
    result = ArgumentParser(usage=usage, description="Measure a trained adapter on a split.")
    result.add_argument("--config", action="config", help="Settings in YAML; flags after it override it.")
    result.add_class_arguments(EvalSettings)
    return result


def run(chosen: Any) -> int:
    """Evaluate and print a table."""
    settings = EvalSettings(**instantiate(parser(), chosen))
    from ..training.evaluate import evaluate
    from ..training.screen import quiet_libraries

    quiet_libraries()
    data = settings.data
    evaluate(
        settings.adapter,
        split=data.split,
        path=data.path,
        name=data.name,
        file=data.file,
        limit=data.limit,
        model=settings.model,
        batch_size=settings.batch_size,
        output=settings.output,
    )
    return 0
