"""Reasoning: instructions and answers of LLM-Adapters, to train on and to be graded by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError, DataError
from .answers import answer_kind, answer_names, check_kind, grade
from .base import register
from .causal_lm import CausalLM
from .generation import generate_answers, likelihood_choice
from .settings import DataSettings, ModelSettings, TaskSettings
from .sources import load_splits

__all__ = ["TEMPLATE", "Reasoning", "evaluate_reasoning"]

# Alpaca's words, which LLM-Adapters trains and evaluates with (its source indents the lines by accident)
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
CANDIDATE = "the correct answer is {}"  # how the commonsense files word their answers
LETTERS = ("A", "B", "C", "D", "E")


@register
class Reasoning(CausalLM):
    """A language model that learns to answer instructions.

    ``data.columns.prompt`` names the column of instructions, ``data.columns.answer`` the one of answers in words.
    Perplexity, loss and accuracy per token are measured while it trains; `evaluate_reasoning` grades what it answers.
    """

    name = "reasoning"

    def __init__(self, task: TaskSettings, model: ModelSettings, data: DataSettings) -> None:
        super().__init__(task, model, data)
        if data.columns.answer is None:
            raise ConfigError(
                "task.name=reasoning needs the column of answers in words; set data.columns.answer, to output for the "
                "files of LLM-Adapters."
            )
        self.template = task.template or TEMPLATE.replace("{instruction}", "{" + data.columns.prompt + "}")

    def grade(
        self,
        model: Any,
        tokenizer: Any,
        questions: dict[str, str] | None = None,
        limit: int | None = None,
        batch_size: int = 8,
    ) -> dict[str, float]:
        """Share of right answers in each file, and their mean as accuracy; nothing where there are none.

        Args:
            model: the trained model.
            tokenizer: its tokenizer.
            questions: ``{name: file}``; None is ``task.tests``.
            limit: at most this many of each; None is ``task.tests_limit``.
            batch_size: sequences at a time.

        Raises:
            DataError: if a file is missing, or holds no questions.
        """
        found = {}
        most = limit or self.task.tests_limit
        for name, file in (self.task.tests if questions is None else questions).items():
            rows = load_splits(DataSettings(file, validation_fraction=0.0, limit_train=most))["train"]
            kind = answer_kind(str(rows[0].get("answer")))
            found[name] = evaluate_reasoning(
                model, tokenizer, rows, kind, template=self.template, batch_size=batch_size
            )["accuracy"]
        return {**found, "accuracy": sum(found.values()) / len(found)} if found else {}


def evaluate_reasoning(
    model: Any,
    tokenizer: Any,
    rows: Iterable[dict[str, Any]],
    kind: str,
    *,
    by: str = "generation",
    template: str = TEMPLATE,
    reference: str = "answer",
    norm: str = "sum",
    max_new_tokens: int | None = None,
    beams: int = 1,
    batch_size: int = 8,
) -> dict[str, float]:
    """Share of right answers of a language model.

    Args:
        model: the model, with or without an adapter.
        tokenizer: its tokenizer.
        rows: rows with an instruction and a right answer, as the files of LLM-Adapters have them.
        kind: commonsense (answer1, true, ...), number or letter.
        by: generation grades what the model writes; likelihood takes the answer that it finds likeliest, and knows
            answers of choices only.
        template: the prompt, with column names in braces: the one that the model was trained with.
        reference: column of the right answer.
        norm: with likelihood: sum, token or byte (see `likelihood_choice`).
        max_new_tokens: longest answer; None is 32 for commonsense and 256 for the others, as in LLM-Adapters.
        beams: with generation: 1 is greedy; LLM-Adapters searches with 4.
        batch_size: sequences at a time.

    Returns:
        accuracy; answered, the share of rows with an answer of that kind, right or wrong; and the number of rows.

    Raises:
        ConfigError: if a setting is unknown or does not fit the others.
        DataError: if a row lacks a column, or has an answer of another kind.

    Example:
        >>> evaluate_reasoning(model, tokenizer, rows, "commonsense")  # doctest: +SKIP
        {'accuracy': 0.61, 'answered': 1.0, 'rows': 500.0}
    """
    check_kind(kind)
    if by not in ("generation", "likelihood"):
        raise ConfigError(f"by={by!r} is unknown; expected generation or likelihood.")
    if by == "likelihood" and kind == "number":
        raise ConfigError("by='likelihood' compares given answers, and kind='number' has none; use by='generation'.")
    rows = list(rows)
    if not rows:
        raise DataError("there are no rows to evaluate; give at least one.")
    prompts = [_prompt(template, row, i) for i, row in enumerate(rows)]
    references = [_reference(kind, row, reference, i) for i, row in enumerate(rows)]
    if by == "likelihood":
        names = [_names(kind, row, i) for i, row in enumerate(rows)]
        candidates = [[CANDIDATE.format(name) for name in row] for row in names]
        best = likelihood_choice(model, tokenizer, prompts, candidates, norm=norm, batch_size=batch_size)
        texts = [row[i] for row, i in zip(names, best, strict=True)]
    else:
        most = max_new_tokens or (32 if kind == "commonsense" else 256)
        texts = generate_answers(model, tokenizer, prompts, max_new_tokens=most, beams=beams, batch_size=batch_size)
    grades = [grade(kind, text, right) for text, right in zip(texts, references, strict=True)]
    right, answered = (sum(part) / len(rows) for part in zip(*grades, strict=True))
    return {"accuracy": right, "answered": answered, "rows": float(len(rows))}


def _prompt(template: str, row: dict[str, Any], number: int) -> str:
    try:
        return template.format(**row)
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"row {number}: template={template!r} does not fit ({type(error).__name__}: {error}); the columns are "
            f"{', '.join(row)}."
        ) from error


def _names(kind: str, row: dict[str, Any], number: int) -> tuple[str, ...]:
    if kind == "letter":
        return LETTERS
    try:
        return answer_names(_value(row, "instruction", number))
    except DataError as error:
        raise DataError(f"row {number}: {error}") from None


def _reference(kind: str, row: dict[str, Any], column: str, number: int) -> str:
    value = _value(row, column, number)
    try:
        grade(kind, "", value)  # before the model has answered thousands of rows
    except DataError as error:
        raise DataError(f"row {number}: {error}") from None
    return value


def _value(row: dict[str, Any], column: str, number: int) -> str:
    if column not in row:
        raise DataError(f"row {number}: column {column!r} is missing; the columns are {', '.join(row)}.")
    return str(row[column])
