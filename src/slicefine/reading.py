"""JSON from files that anybody may have written: bounded, and refused in one sentence if it is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import AdapterFileError, SliceFineError

__all__ = ["LARGEST", "parse_json", "read_json"]

LARGEST = 64 * 2**20  # bytes: a configuration of a thousand layers has one


def read_json(file: Path, remedy: str = "the file is corrupt.", error: type[SliceFineError] = AdapterFileError) -> Any:
    """What a JSON file holds.

    Args:
        file: the file.
        remedy: end of the message.
        error: what is raised.

    Raises:
        AdapterFileError: or ``error``, if it cannot be read, is too large, or is no JSON.
    """
    try:
        with file.open("rb") as stream:  # one more than allowed: sizes may lie, and pipes have none
            content = stream.read(LARGEST + 1)
    except (OSError, ValueError) as problem:
        raise error(f"{file}: cannot be read ({problem}); {remedy}") from problem
    return parse_json(content, str(file), remedy, error)


def parse_json(
    content: str | bytes,
    where: str,
    remedy: str = "the file is corrupt.",
    error: type[SliceFineError] = AdapterFileError,
) -> Any:
    """As `read_json`, of what was read already.

    Example:
        >>> parse_json('{"r": 4}', "adapter_config.json")
        {'r': 4}
    """
    if len(content) > LARGEST:
        raise error(f"{where}: more than {LARGEST // 2**20} MiB of JSON, which no adapter or recipe has; {remedy}")
    try:
        return json.loads(content)
    except RecursionError as problem:
        raise error(f"{where}: not readable as JSON (nested too deep); {remedy}") from problem
    except ValueError as problem:  # among them bytes that are no text, and numbers of thousands of digits
        raise error(f"{where}: not readable as JSON ({problem}); {remedy}") from problem
