"""From parsed options to settings objects."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

__all__ = ["instantiate"]


def instantiate(parser: ArgumentParser, chosen: Any) -> dict[str, Any]:
    """Settings objects by name, without the config files that they came from."""
    # jsonargparse 4.50 renamed the method
    make = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    return {name: value for name, value in make(chosen).items() if name != "config"}
