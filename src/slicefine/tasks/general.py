"""General text of a language model: what it should still foretell after it was fine-tuned on something else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..energy import evaluating
from ..errors import DataError
from .settings import DataSettings, TaskSettings
from .sources import load_splits, require_columns
from .text import check_texts

__all__ = ["SAMPLES", "General", "general_loss", "general_of", "general_texts", "own_texts"]

SAMPLES = "samples"  # instead of a file: texts that the model itself writes
_LENGTH = 128  # tokens of a text that the model writes
_BATCH = 8


@dataclass(frozen=True)
class General:
    """General texts as token ids, and the base's mean loss per token on them, in nats."""

    texts: list[list[int]]
    loss: float


def general_of(model: Any, tokenizer: Any, task: TaskSettings) -> General:
    """The general texts of a recipe, and what the base foretells of them."""
    texts = general_texts(model, tokenizer, task)
    return General(texts, general_loss(model, texts))


def general_texts(model: Any, tokenizer: Any, task: TaskSettings) -> list[list[int]]:
    """Token ids of the general texts, at most ``task.general_limit``; ``samples`` are drawn before any training.

    Raises:
        DataError: if the file is missing, or holds no text of two tokens.
    """
    if task.general == SAMPLES:
        return own_texts(model, tokenizer, task.general_limit)
    file = Path(str(task.general)).expanduser()
    if not file.is_file():
        raise DataError(f"task.general={task.general!r} is no file; give one with a text per row, or {SAMPLES!r}.")
    data = DataSettings(path=str(file), limit_train=task.general_limit, validation_fraction=0.0)
    rows = load_splits(data)
    require_columns(rows, {"text": data.columns.text})
    check_texts(rows, [data.columns.text])
    length = min(task.max_length or 512, getattr(model.config, "max_position_embeddings", None) or 512)
    texts = [tokenizer(text)["input_ids"][:length] for text in rows["train"][data.columns.text]]
    texts = [ids for ids in texts if len(ids) > 1]
    if not texts:
        raise DataError(f"task.general={task.general!r}: no text has two tokens; there is nothing to foretell.")
    return texts


@torch.no_grad()
def own_texts(model: Any, tokenizer: Any, count: int, seed: int = 0) -> list[list[int]]:
    """Texts drawn from the model itself (temperature 1), up to 128 tokens: a sample of what it was pretrained on.

    The global random state is left as it was.
    """
    start = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)
    length = min(_LENGTH, (getattr(model.config, "max_position_embeddings", None) or 512) - 1)
    texts: list[list[int]] = []
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in range(0, count, _BATCH):
            size = min(_BATCH, count - first)
            prompt = torch.full((size, 1), start, device=model.device)
            drawn = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,  # from the model itself, whatever its own settings of generation are
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                max_new_tokens=length,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=start,
            )
            texts += [_ended(ids, tokenizer.eos_token_id) for ids in drawn.tolist()]
    return texts


@torch.no_grad()
def general_loss(model: Any, texts: list[list[int]]) -> float:
    """Mean loss per token over all texts, in nats.

    Example:
        >>> general_loss(model, general_texts(model, tokenizer, task))  # doctest: +SKIP
        1.43
    """
    total, count = 0.0, 0
    with evaluating(model):
        for first in range(0, len(texts), _BATCH):
            batch = texts[first : first + _BATCH]
            longest = max(len(ids) for ids in batch)
            padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch], device=model.device)
            there = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch], device=model.device)
            logits = model(input_ids=padded, attention_mask=there).logits[:, -longest:]  # virtual tokens come first
            for scores, ids in zip(logits, batch, strict=True):  # one by one: in fp32 a vocabulary is large
                losses = torch.nn.functional.cross_entropy(
                    scores[: len(ids) - 1].float(), torch.tensor(ids[1:], device=model.device), reduction="sum"
                )
                total += float(losses)
            count += sum(len(ids) - 1 for ids in batch)
    return total / max(1, count)


def _ended(ids: list[int], end: int | None) -> list[int]:
    """A drawn text without its padding: up to the first end token after the start."""
    places = [place for place, token in enumerate(ids[1:], start=1) if token == end]
    return ids[: places[0] + 1] if places else ids
