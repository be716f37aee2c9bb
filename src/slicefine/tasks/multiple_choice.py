"""Multiple choice for encoders: each choice is read together with its question, and a head of one output scores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError
from .answers import Question, parse_question
from .base import Loaded, Metric, Prepared, as_numbers, register
from .metrics import accuracy
from .models import load_model, load_tokenizer, longest
from .settings import DataSettings, ModelSettings, TaskSettings
from .sources import require_columns
from .text import check_texts

__all__ = ["MultipleChoice"]

EMPTY = 1  # tokens of a slot that holds no choice; a question with its choice has more


@register
class MultipleChoice:
    """One of several answers per question, from the commonsense files of LLM-Adapters.

    ``data.columns.prompt`` names the column of instructions (question, choices, answer format), and
    ``data.columns.label`` the one of right answers (answer1, solution2, true, ...). Questions may differ in how many
    choices they have.
    """

    name = "multiple-choice"
    peft_task_type = None
    metrics: Mapping[str, Metric] = {"accuracy": accuracy}
    minimise: frozenset[str] = frozenset()

    def __init__(self, task: TaskSettings, model: ModelSettings, data: DataSettings) -> None:
        self.task, self.model, self.columns = task, model, data.columns

    def read(self, splits: dict[str, Any]) -> None:
        """Check that every instruction can be taken apart, and that its answer is one of its choices."""
        require_columns(splits, {"prompt": self.columns.prompt, "label": self.columns.label})
        check_texts(splits, [self.columns.prompt, self.columns.label])
        for split, dataset in splits.items():
            pairs = zip(dataset[self.columns.prompt], dataset[self.columns.label], strict=True)
            for row, (instruction, answer) in enumerate(pairs):
                question = _parse(split, row, instruction)
                if answer not in question.names:
                    raise DataError(
                        f"{split} set, row {row}: answer {answer!r} in column {self.columns.label!r} is none of "
                        f"{', '.join(question.names)}. Correct or drop the row, or set data.columns.label."
                    )

    def load(self) -> Loaded:
        """An encoder with a new head of one output."""
        from transformers import AutoModelForMultipleChoice

        loaded = load_model(AutoModelForMultipleChoice, self.model)
        loaded.processor = load_tokenizer(self.model)
        loaded.model.register_forward_hook(_without_empty_slots, with_kwargs=True)
        return loaded

    def prepare(self, splits: dict[str, Any], loaded: Loaded) -> Prepared:
        """Tokenise; a batch is padded to its longest pair and to its largest number of choices."""
        tokenizer = loaded.processor
        length = longest(tokenizer, loaded.model.config, self.task.max_length)
        prompt, label = self.columns.prompt, self.columns.label

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            question = parse_question(row[prompt])
            pairs = [question.text] * len(question.choices), list(question.choices)
            encoded = tokenizer(*pairs, truncation=True, max_length=length)
            return {**encoded, "labels": question.names.index(row[label])}

        prepared = {
            split: dataset.map(encode, remove_columns=dataset.column_names, desc=f"tokenise {split}")
            for split, dataset in splits.items()
        }
        return Prepared(prepared, ChoiceCollator(tokenizer), preprocess_logits=_log_shares)

    def compute(self, outputs: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
        """Share of right answers."""
        return {"accuracy": accuracy(as_numbers(outputs), np.asarray(labels))}

    def state(self) -> dict[str, Any]:
        """Nothing is learnt from the data."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


class ChoiceCollator:
    """Make a batch of shape (questions, choices, tokens); missing choices are slots of one token."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import DataCollatorWithPadding

        self.pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad and stack."""
        names = [name for name in rows[0] if name != "labels"]
        most = max(len(row["input_ids"]) for row in rows)
        flat = []
        for row in rows:
            slots = [{name: row[name][i] for name in names} for i in range(len(row["input_ids"]))]
            empty = {name: slots[0][name][:EMPTY] for name in names}
            flat += slots + [empty] * (most - len(slots))
        batch = {name: values.view(len(rows), most, -1) for name, values in self.pad(flat).items()}
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


def _parse(split: str, row: int, instruction: str) -> Question:
    try:
        return parse_question(instruction)
    except DataError as error:
        raise DataError(
            f"{split} set, row {row}: {error} Correct or drop the row, or set data.columns.prompt."
        ) from None


def _without_empty_slots(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook: slots without a choice get no share of the softmax, so that padding changes no loss.

    The models themselves know only questions that all have as many choices.
    """
    mask, labels = kwargs["attention_mask"], kwargs.get("labels")
    lowest = torch.finfo(output["logits"].dtype).min
    output["logits"] = output["logits"].masked_fill(mask.sum(-1) <= EMPTY, lowest)
    if labels is not None:
        output["loss"] = torch.nn.functional.cross_entropy(output["logits"], labels)
    return output


def _log_shares(logits: Any, labels: Tensor) -> Tensor:
    """Log-softmax: above the -100 that the Trainer fills up smaller batches with, at least for the best choice."""
    return torch.log_softmax((logits[0] if isinstance(logits, tuple) else logits).float(), dim=-1)
