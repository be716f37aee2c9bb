"""Any task of EleutherAI's lm-evaluation-harness on a model that `slicefine train` made (extra `harness`)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..errors import ConfigError

__all__ = ["evaluate_harness", "harness_model"]


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
    adapter: str, tasks: list[Any], *, model: str | None = None, batch_size: int = 8, **options: Any
) -> dict[str, dict[str, Any]]:
    """Metrics of harness tasks for a trained adapter.

    Args:
        adapter: the folder that `train` wrote.
        tasks: names of tasks, or the harness's own task objects.
        model: the base, if it is elsewhere than in training.
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
    from ..training.trained import load_trained  # training stands above tasks, except here

    trained = load_trained(Path(adapter), model)
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
