"""Class labels: which classes there are, and their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from ..errors import DataError
from .base import Metric, as_numbers

__all__ = ["Labelled", "check_labels", "class_names", "label_numbers"]

_MANY = 10_000  # a label above this must not exceed the number of rows either


class Labelled:
    """What tasks with class names share: their metrics, and the names as the state that an evaluation needs."""

    metrics: Mapping[str, Metric]
    labels: list[str]

    def compute(self, outputs: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
        """All metrics of the task."""
        return {name: metric(as_numbers(outputs), labels) for name, metric in self.metrics.items()}

    def state(self) -> dict[str, Any]:
        """The class names."""
        return {"labels": self.labels}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the class names."""
        self.labels = list(state["labels"])


def class_names(splits: dict[str, Any], column: str, given: list[str] | None) -> list[str]:
    """Names of the classes: given in the recipe, stored with the data set, or seen in its first split.

    Raises:
        DataError: if labels are missing, or neither integers nor strings.
    """
    if given is not None:
        return [str(name) for name in given]
    first = next(iter(splits.values()))
    stored = getattr(first.features[column], "names", None)
    if stored is not None:
        return [str(name) for name in stored]
    values = list(first[column])
    _check_kind(values, column, next(iter(splits)))
    if isinstance(values[0], str):
        return sorted(set(values))
    if max(values) >= max(_MANY, len(values)):  # a head of that many classes would fill the memory
        raise DataError(
            f"{next(iter(splits))} set, row {values.index(max(values))}: label {max(values)} in column {column!r} is "
            "no class number. Number the classes from 0, or choose another column with data.columns.label."
        )
    return [str(number) for number in range(max(values) + 1)]


def check_labels(splits: dict[str, Any], column: str, names: list[str]) -> None:
    """Check that every label of every split is a class.

    Raises:
        DataError: naming split, row and label.
    """
    if len(names) < 2:
        raise DataError(
            f"column {column!r} holds {len(names)} class only; a classification needs at least 2. Choose another "
            "column with data.columns.label, or name all classes with task.labels."
        )
    for split, dataset in splits.items():
        values = list(dataset[column])
        _check_kind(values, column, split)
        numbers = label_numbers(values, names)
        for row, number in enumerate(numbers):
            if number is None:
                raise DataError(
                    f"{split} set, row {row}: label {values[row]!r} in column {column!r} is out of range; expected "
                    f"{_expected(values, names)}. {_label_remedy(split, values[row])}"
                )


def _label_remedy(split: str, value: Any) -> str:
    if value == -1 and split != "train":  # how the hub marks labels that are not public
        return f"Leave the set out with data.limit_{split}=0 if its labels are hidden, or correct the row."
    return "Correct the row, or name all classes with task.labels."


def label_numbers(values: list[Any], names: list[str]) -> list[int | None]:
    """Class numbers of labels; None for a label that is no class."""
    index = {name: i for i, name in enumerate(names)}
    return [index.get(v) if isinstance(v, str) else (int(v) if 0 <= v < len(names) else None) for v in values]


def _check_kind(values: list[Any], column: str, split: str) -> None:
    for row, value in enumerate(values):
        if value is None or (isinstance(value, float) and value != value):  # one hole makes all numbers of it floats
            raise DataError(
                f"{split} set, row {row} (the first is 0): column {column!r} holds no label. Fill it in, or drop the "
                "row."
            )
    for row, value in enumerate(values):
        if isinstance(value, str) != isinstance(values[0], str):
            raise DataError(
                f"{split} set, row {row}: label {value!r} in column {column!r} is a {type(value).__name__}, row 0 "
                f"holds a {type(values[0]).__name__}; expected one kind. Make them all integers, or all strings."
            )
        if not isinstance(value, int | str):
            raise DataError(
                f"{split} set, row {row}: label {value!r} in column {column!r} is a {type(value).__name__}; expected "
                "an integer or a string. For numbers to be predicted use task.name: text-regression."
            )


def _expected(values: list[Any], names: list[str]) -> str:
    if any(isinstance(v, str) for v in values):
        return f"one of {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
    return f"0 to {len(names) - 1}"
