"""What a trained language model says: answers to questions, and the lm-evaluation-harness (extra `harness`)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..tasks.reasoning import Reasoning
from .trained import load_trained

__all__ = ["answer_questions", "evaluate_harness", "harness_model"]


def answer_questions(
    adapter: str,
    questions: dict[str, str],
    *,
    limit: int | None = None,
    model: str | None = None,
    batch_size: int = 8,
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """Share of right answers of a trained language model in each file of questions, and their mean as accuracy.

    Args:
        adapter: the folder that `train` wrote for ``task.name=reasoning``.
        questions: ``{name: file}``, files as LLM-Adapters has them.
        limit: at most this many questions of each.
        model: the base, if it is elsewhere than in training.
        trust_remote_code: run code that comes with the base.
        batch_size: sequences at a time.

    Raises:
        AdapterFileError: if the adapter is missing or corrupt.
        ConfigError: if the adapter answers no questions.
        DataError: if a file is missing, or holds no questions.

    Example:
        >>> answer_questions("runs/math/adapter", {"gsm8k": "data/gsm8k/test.jsonl.gz"})  # doctest: +SKIP
        {'gsm8k': 0.31, 'accuracy': 0.31}
    """
    trained = load_trained(Path(adapter), model, trust_remote_code)
    if not isinstance(trained.task, Reasoning):
        raise ConfigError(f"{adapter}: trained for {trained.task.name}; questions are for task.name=reasoning.")
    return trained.task.grade(trained.model, trained.loaded.processor, questions, limit, batch_size)


def harness_model(model: Any, tokenizer: Any, batch_size: int = 8) -> Any:
    """A loaded language model, with or without an adapter, as the harness takes models.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        batch_size: sequences at a time.

    Raises:
        ConfigError: if lm-eval is not installed.

    Example:
        >>> lm_eval.simple_evaluate(harness_model(model, tokenizer), tasks=["arc_easy"])  # doctest: +SKIP
    """
    return _import("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size
    )


def evaluate_harness(
    adapter: str,
    tasks: list[Any],
    *,
    model: str | None = None,
    batch_size: int = 8,
    trust_remote_code: bool = False,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Metrics of harness tasks for a trained adapter.

    Args:
        adapter: the folder that `train` wrote.
        tasks: names of tasks, or the harness's own task objects.
        model: the base, if it is elsewhere than in training.
        trust_remote_code: run code that comes with the base.
        batch_size: sequences at a time.
        **options: of ``lm_eval.simple_evaluate``, such as ``limit`` or ``num_fewshot``.

    Returns:
        For each task, its metrics as the harness names them.

    Raises:
        AdapterFileError: if the adapter is missing or corrupt.
        ConfigError: if lm-eval is not installed, or the adapter belongs to no language model.

    Example:
        >>> evaluate_harness("runs/arc/adapter", ["arc_easy"], limit=100)["arc_easy"]["acc,none"]  # doctest: +SKIP
        0.43
    """
    harness = _import("lm_eval")
    trained = load_trained(Path(adapter), model, trust_remote_code)
    if trained.task.peft_task_type != "CAUSAL_LM":
        raise ConfigError(
            f"{adapter}: trained for {trained.task.name}; the harness evaluates language models "
            "(task.name causal-lm or reasoning)."
        )
    wrapped = harness_model(trained.model, trained.loaded.processor, batch_size)
    results: dict[str, dict[str, Any]] = harness.simple_evaluate(wrapped, tasks=tasks, **options)["results"]
    return results


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f'the lm-evaluation-harness cannot be imported ({error}); run: pip install "slicefine[harness]"'
        ) from error
