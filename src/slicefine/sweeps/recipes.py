"""Recipes as files that anybody may have written: plain data, of bounded size once its aliases are followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..reading import LARGEST

__all__ = ["check_recipe", "read_recipe"]

_HINT = "A recipe holds settings as `group:` and `  name: value`; a file of rows belongs to data.path."
_MOST = 100_000  # values; the largest recipe of this project has some hundred


def read_recipe(file: Path) -> dict[str, Any]:
    """A recipe's content; YAML's tags for objects of a program are refused.

    Raises:
        ConfigError: if it cannot be read, is no YAML, no mapping, or too large.
    """
    import yaml

    content: dict[str, Any] = yaml.safe_load(check_recipe(file))
    return content


def check_recipe(file: Path) -> str:
    """A recipe's text, once it is clear that it is a mapping and stays small where aliases (``*name``) repeat parts.

    Raises:
        ConfigError: see `read_recipe`.
    """
    import yaml

    try:
        with file.open("rb") as stream:
            text = stream.read(LARGEST + 1).decode("utf-8")
        if len(text) > LARGEST:
            raise ValueError(f"more than {LARGEST // 2**20} MiB")
        for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
            _size(node, {})
        content = yaml.safe_load(text)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else _short(error)
        raise ConfigError(f"{file}: cannot be read as YAML: {reason}. {_HINT}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a mapping, got {type(content).__name__}. {_HINT}")
    return text


def _short(error: Exception) -> object:
    mark = getattr(error, "problem_mark", None)
    return error if mark is None else f"line {mark.line + 1}: {getattr(error, 'problem', '')}"


def _size(node: Any, known: dict[int, int]) -> int:
    """Values below a node, those that aliases stand for counted each time."""
    if id(node) not in known:
        known[id(node)] = _MOST  # of an alias to what it lies in
        inner = node.value if isinstance(node.value, list) else ()
        parts = (part for item in inner for part in (item if isinstance(item, tuple) else (item,)))
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    if known[id(node)] > _MOST:
        raise ValueError(f"more than {_MOST:,} values, aliases followed")
    return known[id(node)]
