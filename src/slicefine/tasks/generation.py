"""What a causal language model answers: by writing, and by how likely it finds each of several answers.

Prompt and answer are tokenised apart and then joined, as `causal-lm` trains them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError

__all__ = ["NORMS", "Likelihood", "choice_likelihoods", "generate_answers", "likelihood_choice"]

NORMS = ("sum", "token", "byte")


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds one answer to a prompt.

    Attributes:
        total: log-likelihood of the answer in nats, summed over its tokens.
        tokens: number of its tokens.
        size: bytes of its text.
    """

    total: float
    tokens: int
    size: int

    def score(self, norm: str) -> float:
        """The log-likelihood as it is ("sum"), or divided by tokens or bytes."""
        return self.total / {"sum": 1, "token": self.tokens, "byte": self.size}[norm]


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 32, beams: int = 1, batch_size: int = 8
) -> list[str]:
    """What a model writes after each prompt, without sampling.

    Batches are padded on the left, so that every prompt is followed by its answer at once. A prompt that leaves no
    room for the answer loses its beginning, with one warning.

    Args:
        model: a causal language model, with or without an adapter; it is evaluated in eval mode.
        tokenizer: its tokenizer, left as it is.
        prompts: the prompts.
        max_new_tokens: longest answer.
        beams: 1 is greedy; LLM-Adapters searches with 4.
        batch_size: prompts at a time.

    Raises:
        ConfigError: if the answer would fill the model's whole context.

    Example:
        >>> generate_answers(model, tokenizer, ["One plus one is"])  # doctest: +SKIP
        [' two.']
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    room = None if positions is None else positions - max_new_tokens
    if room is not None and room < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} leaves no prompt in the {positions} tokens of the model.")
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    _warn_about_cuts([ids for ids in encoded if room is not None and len(ids) > room], len(encoded), room)
    encoded = [ids if room is None else ids[-room:] for ids in encoded]
    pad = _pad_id(tokenizer)
    answers = [""] * len(encoded)
    with _Evaluating(model):
        for batch in _by_length([len(ids) for ids in encoded], batch_size):
            ids, mask = _pad([encoded[i] for i in batch], pad, left=True)
            written = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                num_beams=beams,
                do_sample=False,
                temperature=None,  # a checkpoint's own settings for sampling would only be warned about
                top_p=None,
                top_k=None,
                pad_token_id=pad,
            )
            texts = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text
    return answers


@torch.no_grad()
def choice_likelihoods(
    model: Any, tokenizer: Any, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, batch_size: int = 8
) -> list[list[Likelihood]]:
    """How likely a model finds each choice of each prompt.

    Batches are padded on the right: what stands there is not seen from the left, and positions need no correction.
    A pair that is too long for the model loses the beginning of its prompt, with one warning.

    Raises:
        DataError: if there are not as many lists of choices as prompts, or a choice has no tokens or fills the context.
    """
    if len(prompts) != len(choices):
        raise DataError(
            f"{len(prompts)} prompts came with {len(choices)} lists of choices; expected one list per prompt."
        )
    pairs = [_pair(tokenizer, prompts[i], choice, i) for i in range(len(prompts)) for choice in choices[i]]
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None:
        pairs = _fit(pairs, longest)
    totals = [0.0] * len(pairs)
    pad = _pad_id(tokenizer)
    with _Evaluating(model):
        for batch in _by_length([len(prompt) + len(answer) for prompt, answer in pairs], batch_size):
            joined = [pairs[i][0] + pairs[i][1] for i in batch]
            ids, mask = _pad(joined, pad, left=False)
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
            for row, i in enumerate(batch):
                totals[i] = _answer_likelihood(logits[row], *pairs[i])
    found = iter(zip(totals, pairs, strict=True))
    return [[_likelihood(choice, *next(found)) for choice in listed] for listed in choices]


def likelihood_choice(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    norm: str = "sum",
    batch_size: int = 8,
) -> list[int]:
    """Index of the choice that a model finds likeliest, for each prompt; the first one of equals.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: the prompts.
        choices: for each prompt, the texts to choose from.
        norm: compare log-likelihoods as they are (sum), or divided by the choice's tokens (token) or bytes (byte).
        batch_size: pairs of prompt and choice at a time.

    Raises:
        ConfigError: if the norm is unknown.
        DataError: if prompts and choices do not fit together.

    Example:
        >>> likelihood_choice(model, tokenizer, ["The sky is"], [["blue", "made of stone"]])  # doctest: +SKIP
        [0]
    """
    if norm not in NORMS:
        raise ConfigError(f"norm={norm!r} is unknown; expected one of {', '.join(NORMS)}.")
    for i, listed in enumerate(choices):
        if not listed:
            raise DataError(f"prompt {i} has no choices; give at least one.")
    found = choice_likelihoods(model, tokenizer, prompts, choices, batch_size=batch_size)
    return [max(range(len(row)), key=lambda i, row=row: row[i].score(norm)) for row in found]  # type: ignore[misc]


class _Evaluating:
    """Eval mode for a while."""

    def __init__(self, model: Any) -> None:
        self.model, self.was_training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        self.model.train(self.was_training)


def _pair(tokenizer: Any, prompt: str, choice: str, number: int) -> tuple[list[int], list[int]]:
    asked = tokenizer(prompt)["input_ids"]
    answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
    if not asked or not answer:
        raise DataError(f"prompt {number}: {choice if asked else prompt!r} has no tokens; both need some text.")
    return asked, answer


def _fit(pairs: list[tuple[list[int], list[int]]], longest: int) -> list[tuple[list[int], list[int]]]:
    for _, answer in pairs:
        if len(answer) >= longest:
            raise DataError(f"a choice of {len(answer)} tokens leaves no prompt in the {longest} tokens of the model.")
    cut = [prompt for prompt, answer in pairs if len(prompt) + len(answer) > longest]
    _warn_about_cuts(cut, len(pairs), longest)
    return [(prompt[-(longest - len(answer)) :], answer) for prompt, answer in pairs]


def _answer_likelihood(logits: Tensor, prompt: list[int], answer: list[int]) -> float:
    last = len(prompt) - 1  # the position that predicts the first token of the answer
    shares = torch.log_softmax(logits[last : last + len(answer)].float(), dim=-1)
    return float(shares.gather(1, torch.tensor(answer, device=shares.device)[:, None]).sum())


def _likelihood(choice: str, total: float, pair: tuple[list[int], list[int]]) -> Likelihood:
    return Likelihood(total, len(pair[1]), len(choice.encode()))


def _by_length(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar lengths, the longest first: what does not fit in memory fails at once."""
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size!r} must be at least 1.")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _pad(sequences: list[list[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask. The tokenizer's own padding side is a setting that others may rely on."""
    longest = max(len(ids) for ids in sequences)
    rows = [(ids, [pad] * (longest - len(ids))) for ids in sequences]
    ids = [fill + row if left else row + fill for row, fill in rows]
    mask = [[0] * len(fill) + [1] * len(row) if left else [1] * len(row) + [0] * len(fill) for row, fill in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _pad_id(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0):  # which one is of no matter under the mask
        if token is not None:
            return int(token)
    raise AssertionError


def _warn_about_cuts(cut: list[Any], total: int, room: int | None) -> None:
    if cut:
        warnings.warn(
            f"SliceFine: {len(cut)} of {total} prompts are longer than the {room} tokens that the model has room for; "
            "their beginnings were cut.",
            UserWarning,
            stacklevel=3,
        )
