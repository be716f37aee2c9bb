"""The parser that all verbs share: help that fits a screen, mistakes in one line, settings objects."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from ..charts import plain
from ..errors import ConfigError, SliceFineError
from ..sweeps.recipes import check_recipe

__all__ = ["Status", "VerbParser", "add_outputs", "instantiate", "parse", "run_verb"]

_WIDTH = 80
_GROUP = re.compile(r'Parser key "([\w.]+)":\s+Unable to load config [\'"]([^\'"]*)')
_INDENT = 26


class VerbParser(ArgumentParser):  # type: ignore[misc]
    """An ArgumentParser whose ``--help`` shows examples, and of many settings those that most runs need.

    Args:
        usage: the line after "usage:".
        about: what the command does, in one sentence.
        examples: commands to copy.
        common: names of the settings that ``--help`` shows; empty shows all. ``--help_all`` always shows all.
    """

    def __init__(
        self,
        usage: str | None = None,
        about: str = "",
        examples: Sequence[str] = (),
        common: Sequence[str] = (),
        **_: Any,
    ) -> None:
        super().__init__(usage=usage, description=about, **{"allow_abbrev": False, **_})
        self.examples, self.common = tuple(examples), tuple(common)
        if common:
            self.add_argument("--help_all", action=_HelpAll, help="Show every setting and exit.")

    def format_help(self, formatter: Any = None) -> str:
        """The page of ``--help``."""
        if not self.common:
            return "\n".join([self.everything().rstrip("\n"), *(["", *self._examples()] if self.examples else []), ""])
        known = {name: action for action in self._actions for name in action.option_strings}
        lines = [f"usage: {self.usage}", "", *textwrap.wrap(str(self.description), _WIDTH), ""]
        lines += [*self._examples(), "", "settings that most runs need:"]
        for name in self.common:
            lines += _entry(known[f"--{name}"]) if f"--{name}" in known else []
        lines += ["", f"All {len(known)} settings: {self.command} --help_all; as YAML: {self.command} --print_config"]
        return "\n".join(lines) + "\n"

    @property
    def command(self) -> str:
        """The words that call it."""
        without_usage = re.sub(r"\[[^\]]*\]|\{[^}]*\}", "", str(self.prog))  # of the level above
        return " ".join(without_usage.split())

    def everything(self) -> str:
        """The page of ``--help_all``."""
        text: str = super().format_help()
        return text

    def _examples(self) -> list[str]:
        return ["examples:", *(f"  {line}" for line in self.examples)]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say in few lines what is wrong, and what may have been meant; status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or _command(self, message)
        short = re.sub(r" \(choose from .*|:\n  Expected.*NestedArg.*", "", message, flags=re.DOTALL).rstrip(".")
        group = _GROUP.match(message)
        if group is not None:
            short = f"--{group[1]} {group[2]}: {group[1]} is a group of settings"
        if short.startswith("the following arguments are required: "):
            names = re.findall(r"\w+\.([\w.]+)", short)
            short = f"missing: {', '.join(_written(parser, name) for name in names)}" if names else short
        short = re.sub(r"^Subcommand '\w+' does not accept option '([\w.]+)'$", r"there is no setting \1", short)
        sys.stderr.write(f"{self.prog.split()[0]}: error: {short}.{_meant(parser, message)}\n")
        sys.stderr.write(f"Help: {getattr(parser, 'command', parser.prog)} --help\n")
        sys.exit(2)


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Any, dest: Any, **settings: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **settings)

    def __call__(self, parser: Any, *_: Any) -> None:
        sys.stdout.write(parser.everything())
        parser.exit()


def _entry(action: Any) -> list[str]:
    """One setting in the short page: its name, the first sentence of its help, and its default."""
    about = re.split(r"(?<=[a-z)])[;.] ", str(action.help or "").strip())[0].rstrip(".")
    default = action.default
    if default not in (None, argparse.SUPPRESS, False):
        about += f" ({default})"
    head = f"  {action.option_strings[-1]}"
    text = textwrap.wrap(about, _WIDTH - _INDENT)
    if len(head) >= _INDENT:
        return [head, *(" " * _INDENT + line for line in text)]
    return [f"{head:<{_INDENT}}{text[0]}", *(" " * _INDENT + line for line in text[1:])]


def _command(parser: Any, message: str) -> Any:
    """The parser of the command that an error speaks of."""
    named = re.match(r"Subcommand '(\w+)'|the following arguments are required: (\w+)\.", message)
    commands = next((action.choices for action in parser._actions if isinstance(action.choices, dict)), {})
    return parser if named is None else commands.get(named[1] or named[2], parser)


def _written(parser: Any, name: str) -> str:
    """How a setting is written: with its name, or by its place."""
    return f"--{name}" if any(f"--{name}" in action.option_strings for action in parser._actions) else name.upper()


def _meant(parser: Any, message: str) -> str:
    """The nearest name that exists, for a word that does not."""
    known = [name for action in parser._actions for name in action.option_strings]
    group = _GROUP.match(message)
    if group is not None:
        names = [f"--{group[1]}.{part}" for part in ("path", "name") if f"--{group[1]}.{part}" in known]
        return f" Did you mean {names[0]} {group[2]}?" if names else " Its parts are written as --group.name value."
    key = re.search(r"does not accept option '([\w.]+)'", message)
    if key is not None:  # in a recipe
        keys = sorted(name.removeprefix("--") for name in known if name.startswith("--"))
        near = difflib.get_close_matches(key[1], keys, n=1, cutoff=0.6)
        return f" Did you mean {near[0]}?" if near else ""
    choices = re.search(r"invalid choice: '([^']+)' \(choose from (.+)\)", message)
    if choices is not None:
        known = re.findall(r"[\w-]+", choices[2])
        unknown = [choices[1]]
    else:
        listed = re.search(r"unrecognized arguments: (.+)", message)
        unknown = [word.partition("=")[0] for word in listed[1].split() if word.startswith("--")] if listed else []
    nested = re.search(r'Parser key "([\w.]+)".*NestedArg\(.*val=\'?([^\')]+)', message, flags=re.DOTALL)
    if nested is not None:
        return f" Did you mean --{nested[1]} {nested[2]}?"
    near = [match for word in unknown for match in difflib.get_close_matches(word, known, n=1, cutoff=0.6)]
    if near or choices is not None or not message.startswith("unrecognized"):
        return f" Did you mean {', '.join(near)}?" if near else ""
    return " Settings are written as --name value."


def add_outputs(parser: Any) -> None:
    """Give a verb ``--json`` and ``--quiet``."""
    parser.add_argument("--json", type=bool, default=False, help="Print the result as JSON, and nothing else.")
    if "--quiet" not in parser._option_string_actions:  # train has a setting of that name
        parser.add_argument("--quiet", type=bool, default=False, help="Print nothing but errors.")


def run_verb(run: Callable[[Any], Any], chosen: Any, outputs: Any) -> int:
    """Run a verb and print as the user asked; the exit status.

    Args:
        run: gives the verb's result, which ``--json`` prints.
        chosen: the verb's options.
        outputs: those of them that hold what `add_outputs` added.
    """
    as_json, quiet = bool(outputs.json), bool(outputs.quiet)
    with ExitStack() as stack:
        if as_json or quiet:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        result = run(chosen)
    if as_json:
        print(json.dumps(plain(_content(result)), indent=1, ensure_ascii=False, default=str))
    return result.status if isinstance(result, Status) else 0


@dataclass(frozen=True)
class Status:
    """A verb's result that is no success."""

    status: int
    content: Any


def _content(result: Any) -> Any:
    """Dataclasses as dictionaries, at every depth."""
    if isinstance(result, Status):
        return _content(result.content)
    if is_dataclass(result) and not isinstance(result, type):
        return {item.name: _content(getattr(result, item.name)) for item in fields(result)}
    if isinstance(result, Mapping):
        return {str(name): _content(value) for name, value in result.items()}
    if isinstance(result, (list, tuple, set, frozenset)):
        return [_content(value) for value in result]
    return result


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
        known = {action.dest for action in parser._actions}
        own = chosen.clone() if hasattr(chosen, "clone") else chosen
        for name in ("json", "quiet"):
            if name not in known:  # the verb was given it by `add_outputs`
                own.pop(name, None)
        return {name: value for name, value in make(own).items() if name != "config"}
    except SliceFineError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(f"a group of settings is of another kind than expected ({error}).") from error
