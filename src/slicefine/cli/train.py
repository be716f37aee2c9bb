"""Fine-tune a model; with no arguments MiniLM on docstrings, offline."""

from __future__ import annotations

from typing import Any

from ..training.settings import TrainSettings
from .parsing import VerbParser, instantiate

__all__ = ["parser", "run"]

_EXAMPLES = (
    "slicefine train",
    "slicefine train --data.path reviews.csv --data.columns '{text: review, label: stars}'",
    "slicefine train --config recipes/mrpc.yaml --output runs/mrpc --resume",
)
_COMMON = (
    *("config", "output", "resume", "dry_run", "quiet", "json", "model.path", "task.name", "data.path"),
    *("data.columns.text", "data.columns.label", "data.limit_train", "slice.r", "slice.mode", "slice.moves"),
    *("training.epochs", "training.batch_size", "training.learning_rate", "training.bf16", "training.seed"),
    *("method.name",),
)


def parser() -> VerbParser:
    """Options of `slicefine train`."""
    usage = "slicefine train [--config RECIPE.yaml] [--SETTING VALUE ...]"
    about = "Fine-tune a model with slices, or another method; without arguments MiniLM on docstrings."
    result = VerbParser(usage, about, _EXAMPLES, _COMMON)
    result.add_argument("--config", action="config", help="Recipe in YAML; flags after it override it.")
    result.add_class_arguments(TrainSettings)
    return result


def run(chosen: Any) -> dict[str, Any]:
    """Train; gives what ``metrics.json`` holds."""
    settings = TrainSettings(**instantiate(parser(), chosen))
    from ..training.run import train
    from ..training.screen import quiet_libraries

    quiet_libraries()
    return train(settings)
