"""Text classification and regression, of single texts and of pairs."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from ..errors import DataError
from .base import Loaded, Prepared, register
from .labels import Labelled, check_labels, class_names, label_numbers
from .metrics import CLASSIFICATION, REGRESSION
from .models import load_model, load_tokenizer, longest
from .settings import DataSettings, ModelSettings, TaskSettings
from .sources import require_columns

__all__ = ["TextClassification", "TextRegression"]


class _SequenceTask(Labelled):
    """What classification and regression share: one text or two in, one vector out."""

    peft_task_type = "SEQ_CLS"
    minimise: frozenset[str] = frozenset()

    def __init__(self, task: TaskSettings, model: ModelSettings, data: DataSettings) -> None:
        self.task, self.model, self.columns = task, model, data.columns
        self.labels: list[str] = list(task.labels or [])

    def _inputs(self) -> dict[str, str]:
        pair = {"text_pair": self.columns.text_pair} if self.columns.text_pair else {}
        return {"text": self.columns.text, **pair}

    def _load(self, **config: Any) -> Loaded:
        from transformers import AutoModelForSequenceClassification

        loaded = load_model(AutoModelForSequenceClassification, self.model, **config)
        loaded.processor = load_tokenizer(self.model)
        loaded.model.config.pad_token_id = loaded.processor.pad_token_id
        return loaded

    def prepare(self, splits: dict[str, Any], loaded: Loaded) -> Prepared:
        """Tokenise; batches are padded to their longest text."""
        from transformers import DataCollatorWithPadding

        tokenizer, columns = loaded.processor, list(self._inputs().values())
        length = longest(tokenizer, loaded.model.config, self.task.max_length)
        keep = {"input_ids", "attention_mask", "token_type_ids", "labels"}

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            encoded = tokenizer(*(batch[column] for column in columns), truncation=True, max_length=length)
            return {
                **{k: v for k, v in encoded.items() if k in keep},
                "labels": self._targets(batch[self.columns.label]),
            }

        prepared = {
            split: dataset.map(encode, batched=True, remove_columns=dataset.column_names, desc=f"tokenise {split}")
            for split, dataset in splits.items()
        }
        return Prepared(prepared, DataCollatorWithPadding(tokenizer))

    def _targets(self, values: list[Any]) -> list[Any]:
        raise NotImplementedError


@register
class TextClassification(_SequenceTask):
    """One class per text or pair of texts (GLUE)."""

    name = "text-classification"
    metrics = CLASSIFICATION

    def read(self, splits: dict[str, Any]) -> None:
        """Check the columns and learn the classes."""
        require_columns(splits, {**self._inputs(), "label": self.columns.label})
        check_texts(splits, list(self._inputs().values()))
        self.labels = self.labels or class_names(splits, self.columns.label, None)
        check_labels(splits, self.columns.label, self.labels)

    def load(self) -> Loaded:
        """A sequence classifier with a new head for these classes."""
        names = dict(enumerate(self.labels))
        back = {name: i for i, name in names.items()}
        return self._load(
            num_labels=len(names), id2label=names, label2id=back, problem_type="single_label_classification"
        )

    def _targets(self, values: list[Any]) -> list[Any]:
        return label_numbers(values, self.labels)


@register
class TextRegression(_SequenceTask):
    """One number per text or pair of texts (STS-B)."""

    name = "text-regression"
    metrics = REGRESSION
    minimise = frozenset({"rmse"})
    mean: float | None = None  # of the train set's targets

    def read(self, splits: dict[str, Any]) -> None:
        """Check the columns and that every target is a finite number."""
        require_columns(splits, {**self._inputs(), "label": self.columns.label})
        check_texts(splits, list(self._inputs().values()))
        for split, dataset in splits.items():
            for row, value in enumerate(dataset[self.columns.label]):
                if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                    raise DataError(
                        f"{split} set, row {row}: target {value!r} in column {self.columns.label!r} is no finite "
                        "number. Correct or drop the row; for classes use task.name: text-classification."
                    )
        if "train" in splits:
            self.mean = fmean(splits["train"][self.columns.label])

    def load(self) -> Loaded:
        """A sequence classifier with one output; a new head starts at the mean of the train set's targets.

        A head that starts at zero gets gradients of one sign from every row until its bias has grown to that mean, and
        all other trained weights follow them meanwhile (docs/results/accuracy.md, regression).
        """
        loaded = self._load(num_labels=1, problem_type="regression")
        if self.task.center and self.mean is not None:
            for name, parameter in loaded.model.named_parameters():
                new = any(name.startswith(f"{module}.") for module in loaded.new_modules)
                if new and name.endswith("bias") and parameter.numel() == 1:
                    parameter.data.fill_(self.mean)
        return loaded

    def _targets(self, values: list[Any]) -> list[Any]:
        return [float(value) for value in values]


def check_texts(splits: dict[str, Any], columns: list[str]) -> None:
    """Check that text columns hold strings, and not blanks alone.

    Raises:
        DataError: naming split, row and value.
    """
    for split, dataset in splits.items():
        for column in columns:
            empty = True
            for row, value in enumerate(dataset[column]):
                if not isinstance(value, str):
                    raise DataError(
                        f"{split} set, row {row}: column {column!r} holds {value!r} ({type(value).__name__}); expected "
                        "text. Drop the row, or choose another column."
                    )
                empty = empty and not value.strip()
            if empty:
                raise DataError(
                    f"{split} set: every text in column {column!r} is empty. Choose another column, or fill it in."
                )
