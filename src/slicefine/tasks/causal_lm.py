"""Causal language modelling: plain text, packed or cut, and prompts with answers (loss on the answer only)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, DataError
from .base import Loaded, Metric, Prepared, register
from .models import load_model, load_tokenizer, longest
from .settings import DataSettings, ModelSettings, TaskSettings
from .sources import require_columns
from .text import check_texts

__all__ = ["CausalLM"]

IGNORED = -100  # label of a token without loss, as PyTorch's cross entropy has it


def token_loss(sums: NDArray[Any], labels: NDArray[Any]) -> float:
    """Mean loss per token over the whole set, in nats (each token counts once, whatever its batch)."""
    total = sums.sum(axis=0)
    return float(total[0] / max(total[1], 1))


def perplexity(sums: NDArray[Any], labels: NDArray[Any]) -> float:
    """Exponential of the mean loss per token."""
    loss = token_loss(sums, labels)
    return math.exp(loss) if loss < 700 else math.inf


def token_accuracy(sums: NDArray[Any], labels: NDArray[Any]) -> float:
    """Share of tokens that the model would have written itself, given what stands before."""
    total = sums.sum(axis=0)
    return float(total[2] / max(total[1], 1))


@register
class CausalLM:
    """A language model that continues text, or answers prompts."""

    name = "causal-lm"
    peft_task_type = "CAUSAL_LM"
    metrics: Mapping[str, Metric] = {
        "perplexity": perplexity,
        "token_loss": token_loss,
        "token_accuracy": token_accuracy,
    }
    minimise = frozenset({"perplexity", "token_loss"})

    def __init__(self, task: TaskSettings, model: ModelSettings, data: DataSettings) -> None:
        self.task, self.model, self.columns = task, model, data.columns
        self.template = task.template or "{" + data.columns.prompt + "}"

    def read(self, splits: dict[str, Any]) -> None:
        """Check the columns."""
        if self.columns.answer is None:
            require_columns(splits, {"text": self.columns.text})
            check_texts(splits, [self.columns.text])
            return
        wanted = {"answer": self.columns.answer}
        if self.task.template is None:
            wanted["prompt"] = self.columns.prompt
        require_columns(splits, wanted)
        check_texts(splits, list(wanted.values()))
        self._check_template(splits)

    def load(self) -> Loaded:
        """The language model; nothing in it is new."""
        from transformers import AutoModelForCausalLM

        loaded = load_model(AutoModelForCausalLM, self.model)
        if loaded.new_modules and self.model.config is None:
            raise ConfigError(
                f"model.path={self.model.path!r} is no language model: it has no weights for "
                f"{', '.join(loaded.new_modules)}. Choose a model that was trained to write text, or another task.name."
            )
        loaded.processor = load_tokenizer(self.model)
        return loaded

    def prepare(self, splits: dict[str, Any], loaded: Loaded) -> Prepared:
        """Tokenise; batches are padded to their longest sequence, and padding has no loss."""
        from transformers import DataCollatorForSeq2Seq

        tokenizer = loaded.processor
        length = longest(tokenizer, loaded.model.config, self.task.max_length)
        if self.columns.answer is not None:
            encode = self._answer_encoder(tokenizer, length)
        else:
            encode = self._text_encoder(tokenizer, length)
        prepared = {
            split: dataset.map(encode, batched=True, remove_columns=dataset.column_names, desc=f"tokenise {split}")
            for split, dataset in splits.items()
        }
        self._check_prepared(prepared, length)
        # this collator pads ready-made labels with -100; the one for language modelling would overwrite them
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
        return Prepared(prepared, collator, preprocess_logits=_sums)

    def compute(self, outputs: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
        """Perplexity, loss and accuracy per token."""
        return {name: metric(np.asarray(outputs), labels) for name, metric in self.metrics.items()}

    def state(self) -> dict[str, Any]:
        """Nothing is learnt from the data."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""

    def _check_template(self, splits: dict[str, Any]) -> None:
        for split, dataset in splits.items():
            try:
                self.template.format(**dataset[0])
            except (KeyError, IndexError, ValueError) as error:
                raise ConfigError(
                    f"task.template={self.template!r} does not fit the {split} set ({type(error).__name__}: {error}); "
                    f"use its columns in braces: {', '.join(dataset.column_names)}. "
                    "Double a brace that is meant literally."
                ) from error

    def _check_prepared(self, prepared: dict[str, Any], length: int) -> None:
        for split, dataset in prepared.items():
            if len(dataset) == 0:
                raise DataError(
                    f"{split} set: no sequence is left after tokenising with task.max_length={length}. Prompts that "
                    "fill the whole length leave no answer: raise task.max_length, or give longer texts."
                )

    def _answer_encoder(self, tokenizer: Any, length: int) -> Any:
        answer_column = self.columns.answer or ""
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            inputs, labels = [], []
            for row in rows:
                prompt = tokenizer(self.template.format(**row))["input_ids"]
                answer = tokenizer(row[answer_column], add_special_tokens=False)["input_ids"] + end
                ids = (prompt + answer)[:length]
                if len(ids) > len(prompt):
                    inputs.append(ids)
                    labels.append(ids if self.task.prompt_loss else [IGNORED] * len(prompt) + ids[len(prompt) :])
            return {"input_ids": inputs, "attention_mask": [[1] * len(i) for i in inputs], "labels": labels}

        return encode

    def _text_encoder(self, tokenizer: Any, length: int) -> Any:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        column, packing = self.columns.text, self.task.packing

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            texts = [ids + end for ids in tokenizer(batch[column])["input_ids"]]
            joined = [[token for ids in texts for token in ids]]
            inputs = list(_cut(joined, length)) if packing else [ids[:length] for ids in texts]
            inputs = [ids for ids in inputs if len(ids) > 1]
            return {"input_ids": inputs, "attention_mask": [[1] * len(i) for i in inputs], "labels": inputs}

        return encode


def _cut(sequences: list[list[int]], length: int) -> Iterator[list[int]]:
    for ids in sequences:
        for start in range(0, len(ids), length):
            yield ids[start : start + length]


def _sums(logits: Any, labels: Tensor) -> Tensor:
    """Per sequence: loss summed over tokens, number of tokens, number of correct ones. Small enough to gather."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    logits = logits[:, -labels.shape[1] :]  # virtual tokens of prompt tuning come first
    targets = labels[:, 1:]
    scores = logits[:, :-1].float().transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(scores, targets, reduction="none", ignore_index=IGNORED)
    counted = targets != IGNORED
    correct = (scores.argmax(1) == targets) & counted
    return torch.stack([losses.sum(1), counted.sum(1).float(), correct.sum(1).float()], dim=1)
