"""A tensor's bits as one number, to tell whether anybody else wrote into a frozen weight."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["fingerprint"]

_WORD = torch.iinfo(torch.int64).bits // 8
_LINE = 4096  # words that share one factor of the second kind
_CHUNK = 1024  # lines at a time, where products have to be stored: 32 MiB


def fingerprint(tensor: Tensor) -> Tensor:
    """An int64 scalar on the tensor's device that follows from all of its bits; made without a synchronisation.

    The bits, read as 64-bit words, are multiplied by odd pseudo-random factors, one per place, and added up modulo
    2^64. A change of one word always changes the sum; changes of several cancel with a probability of about 2^-64.
    Integers add up alike in any order, so the number is the same on every device.

    Args:
        tensor: of any shape, floating-point or quantised; its dtype counts, its strides do not.

    Example:
        >>> a = torch.arange(6.0)
        >>> bool(fingerprint(a) == fingerprint(a.clone())), bool(fingerprint(a) == fingerprint(a.flip(0)))
        (True, False)
    """
    data = tensor.detach().contiguous().reshape(-1)
    if data.storage_offset() * data.element_size() % _WORD:
        data = data.clone()
    whole = data.numel() - data.numel() % (_WORD // min(_WORD, data.element_size()))
    words = data[:whole].view(torch.int64)
    total = words.new_zeros(())
    lines, rest = words[: len(words) // _LINE * _LINE].view(-1, _LINE), words[len(words) // _LINE * _LINE :]
    inner, outer = _factors(_LINE, 0, data.device), _factors(len(lines) + 2, 1, data.device)
    for start in range(0, len(lines), _CHUNK):
        part = lines[start : start + _CHUNK]
        total = total + _dot(_dot(part, inner), outer[start : start + len(part)])
    total = total + _dot(rest, inner[: len(rest)]) * outer[-2]
    tail = data[whole:].view(torch.uint8).to(torch.int64)
    return total + _dot(tail, inner[: len(tail)]) * outer[-1]


def _dot(values: Tensor, factors: Tensor) -> Tensor:
    """``values @ factors`` of integers, which CPUs alone multiply as matrices."""
    return values @ factors if values.is_cpu else (values * factors).sum(-1)


@lru_cache(maxsize=64)
def _factors(count: int, seed: int, device: torch.device) -> Tensor:
    """Odd pseudo-random numbers: the first ones are the same for every count."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2**63), 2**63 - 1
    with torch.inference_mode(False):
        factors = torch.randint(low, high, (count,), generator=generator, dtype=torch.int64)
        return (factors | 1).to(device)
