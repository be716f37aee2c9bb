"""Measure a trained adapter on a split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .parsing import VerbParser, instantiate

__all__ = ["EvalData", "EvalSettings", "parser", "run"]

_EXAMPLES = (
    "slicefine eval --adapter runs/mrpc/adapter --data.split test",
    "slicefine eval --adapter runs/mrpc/adapter --data.path new.csv --data.split test --json",
)
_COMMON = (
    *("adapter", "data.path", "data.split", "data.file", "data.limit", "model", "batch_size", "output"),
    *("questions", "harness", "quiet", "json"),
)


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
        trust_remote_code: run model code that comes with the base; the adapter's own files cannot say so.
        questions: {name: file} that a language model answers in words, instead of a split.
        harness: tasks of the lm-evaluation-harness for a language model, instead of a split.
    """

    adapter: str
    data: EvalData = field(default_factory=EvalData)
    model: str | None = None
    batch_size: int = 32
    output: str | None = None
    trust_remote_code: bool = False
    questions: dict[str, str] = field(default_factory=dict)
    harness: list[str] = field(default_factory=list)


def parser() -> VerbParser:
    """Options of `slicefine eval`."""
    usage = "slicefine eval --adapter DIR [--data.split SPLIT] [--SETTING VALUE ...]"
    result = VerbParser(usage, "Measure a trained adapter on a split.", _EXAMPLES, _COMMON)
    result.add_argument("--config", action="config", help="Settings in YAML; flags after it override it.")
    result.add_class_arguments(EvalSettings)
    return result


def run(chosen: Any) -> Any:
    """Evaluate and print a table."""
    settings = EvalSettings(**instantiate(parser(), chosen))
    from ..training.evaluate import evaluate
    from ..training.screen import quiet_libraries

    quiet_libraries()
    data = settings.data
    if settings.questions or settings.harness:
        return _in_words(settings)
    return evaluate(
        settings.adapter,
        split=data.split,
        path=data.path,
        name=data.name,
        file=data.file,
        limit=data.limit,
        model=settings.model,
        batch_size=settings.batch_size,
        output=settings.output,
        trust_remote_code=settings.trust_remote_code,
    )


def _in_words(settings: EvalSettings) -> dict[str, float]:
    """What a language model says: answers to questions, and tasks of the harness."""
    from ..training.evaluate import check_output, publish_metrics
    from ..training.language import answer_questions, evaluate_harness

    check_output(settings.output)
    adapter, limit = settings.adapter, settings.data.limit
    given: dict[str, Any] = {"model": settings.model, "batch_size": settings.batch_size}
    given["trust_remote_code"] = settings.trust_remote_code
    found: dict[str, float] = {}
    if settings.questions:
        found |= answer_questions(adapter, settings.questions, limit=limit, **given)
    if settings.harness:
        measured = evaluate_harness(adapter, settings.harness, limit=limit, **given)
        for task, metrics in measured.items():
            found |= {f"{task} {name}": value for name, value in metrics.items() if isinstance(value, float)}
    publish_metrics(found, "answers in words", {"adapter": adapter}, settings.output)
    return found
