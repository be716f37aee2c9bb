"""The registry of fine-tuning methods: ours and those it is compared with, each with its source and its formula.

Example:
    >>> find("lora").title
    'LoRA'
"""

from __future__ import annotations

import importlib
from functools import cache

from ..errors import ConfigError
from .base import Base, Method, MethodLayer, options_of

__all__ = ["Base", "Method", "MethodLayer", "find", "methods", "options_of"]

# one file per family; a file's METHODS are its entries, in the order in which tables show them
FILES = (
    "whole",
    "slices",
    "peft_methods",
    "bottleneck",
    "prefix",
    "mam",
    "propetl",
    "rocoft",
    "propulsion",
    "lora_xs",
    "moslora",
    "diffit",
    "sparse",
    "diff_pruning",
)


@cache
def methods() -> dict[str, Method]:
    """All methods by name."""
    found: dict[str, Method] = {}
    for file in FILES:
        for method in importlib.import_module(f"{__name__}.{file}").METHODS:
            found[method.name] = method
    return found


def find(name: str) -> Method:
    """A method by its name.

    Raises:
        ConfigError: for an unknown one.
    """
    known = methods()
    if name not in known:
        raise ConfigError(f"method.name={name!r} is unknown; expected one of {', '.join(known)}.")
    return known[name]
