"""From parsed options to settings objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from ..errors import ConfigError, SliceFineError
from ..sweeps.recipes import check_recipe

__all__ = ["instantiate", "parse"]


def parse(parser: ArgumentParser, words: Sequence[str]) -> Any:
    """Options from words and recipes, which anybody may have written.

    Raises:
        ConfigError: for what the parser itself does not put into a usage message, such as a number beyond all measure.
    """
    for number, word in enumerate(words):
        name, equals, file = word.partition("=")
        file = file if equals else "".join(words[number + 1 : number + 2])
        if name == "--config" and Path(file).expanduser().is_file():
            check_recipe(Path(file).expanduser())
    try:
        return parser.parse_args(list(words))
    except SliceFineError:
        raise
    except (OverflowError, RecursionError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"the settings cannot be read ({type(error).__name__}: {error}).") from error


def instantiate(parser: ArgumentParser, chosen: Any) -> dict[str, Any]:
    """Settings objects by name, without the config files that they came from."""
    # jsonargparse 4.50 renamed the method
    make = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    try:
        return {name: value for name, value in make(chosen).items() if name != "config"}
    except SliceFineError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(f"a group of settings is of another kind than expected ({error}).") from error
