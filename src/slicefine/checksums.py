"""What tells a tensor in a file from any other: SHA-256 over its type, shape and bytes."""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterFileError

__all__ = ["check_keys", "check_tensor", "checksum", "read_checksums"]

_DIGEST = re.compile("[0-9a-f]{64}")


def checksum(tensor: Tensor) -> str:
    """SHA-256 (hexadecimal) over ``"<dtype> <sizes>\\n"`` and the values, row by row, as they lie in the file.

    Example:
        >>> checksum(torch.zeros(2, 3))[:8]
        'e6624acd'
    """
    sizes = ",".join(str(size) for size in tensor.shape)
    found = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')} {sizes}\n".encode())
    if tensor.numel():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update((ctypes.c_ubyte * flat.numel()).from_address(flat.data_ptr()))  # numpy may not be there
    return found.hexdigest()


def read_checksums(found: Any, where: str) -> dict[str, str]:
    """The checksums that a file names; none in files of earlier versions.

    Raises:
        AdapterFileError: if they are something else.
    """
    if found is None:
        return {}
    entries = found.items() if isinstance(found, dict) else [(None, None)]
    if not all(isinstance(value, str) and _DIGEST.fullmatch(value) for _, value in entries):
        raise AdapterFileError(f"{where}: its checksums are no checksums; the file is corrupt. {_REMEDY}")
    return dict(found)


def check_tensor(name: str, tensor: Tensor, checksums: Mapping[str, str], where: str) -> None:
    """Raise `AdapterFileError` if a tensor is not the one that was written; without checksums anything passes."""
    if checksums and name in checksums and checksum(tensor) != checksums[name]:
        raise AdapterFileError(
            f"{where}: tensor {name} is not what was saved (its checksum differs): the file is damaged, or was mixed "
            f"with another's. {_REMEDY}"
        )


def check_keys(names: Mapping[str, Any] | set[str], checksums: Mapping[str, str], where: str) -> None:
    """Raise `AdapterFileError` if tensors are missing, or some are there that nobody saved."""
    odd = sorted(set(names) ^ set(checksums)) if checksums else []
    if odd:
        kind = "is missing" if odd[0] in checksums else "was not saved with the others"
        raise AdapterFileError(
            f"{where}: tensor {odd[0]} {kind} ({len(odd)} such): the file is damaged, or was mixed with another's. "
            f"{_REMEDY}"
        )


_REMEDY = "Copy the whole folder again, or go back to an earlier one."
