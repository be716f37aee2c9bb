"""Parse the command line, run the verb, and turn our errors into one readable line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ..errors import SliceFineError

__all__ = ["main"]

_FLAGS = (
    *("dry_run", "quiet", "overwrite", "resume", "verify"),
    *("layers", "distance", "keep", "markdown"),
    *("lm_head", "checkpointing", "reentrant", "compiled", "memory", "keep_memory", "private"),
    *("model.trust_remote_code", "trust_remote_code", "training.bf16", "training.gradient_checkpointing"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        argv: arguments without the program's name; None takes those of the process.
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except SliceFineError as error:
        print(f"slicefine: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f'slicefine: {error}; the command line needs it. Run: pip install "slicefine[train]"', file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as stop:
        notes = getattr(stop, "__notes__", [])
        if isinstance(stop, SystemExit) and not notes:  # --help, or a wrong argument
            raise
        print(f"slicefine: interrupted. {' '.join(notes)}".rstrip(), file=sys.stderr)
        return int(getattr(stop, "code", 130))


def _run(argv: Sequence[str]) -> int:
    from jsonargparse import ArgumentParser

    from .. import __version__
    from . import (
        analyze,
        bench,
        compose,
        eval,
        export,
        info,
        merge,
        methods,
        plan,
        push,
        report,
        reproduce,
        sweep,
        train,
        undo,
        verify,
    )
    from .parsing import parse

    about = "Fine-tune in place with small moving slices."
    parser = ArgumentParser(prog="slicefine", description=about, version=__version__)
    commands = parser.add_subcommands()
    verbs: dict[str, Any] = {"train": train, "eval": eval, "merge": merge, "export": export, "compose": compose}
    verbs |= {
        "undo": undo,
        "push": push,
        "info": info,
        "verify": verify,
        "report": report,
        "plan": plan,
        "analyze": analyze,
    }
    verbs |= {"sweep": sweep, "reproduce": reproduce, "methods": methods, "bench": bench}
    for name, verb in verbs.items():
        own = commands.add_subcommand(name, verb.parser(), help=(verb.__doc__ or "").splitlines()[0])
        if verb is analyze:
            analyze.add_studies(own)
    chosen = parse(parser, normalise(argv))
    status: int = verbs[chosen.subcommand].run(chosen[chosen.subcommand])
    return status


def normalise(argv: Sequence[str]) -> list[str]:
    """Let flags stand alone (``--dry_run``) and be written with dashes (``--dry-run``).

    Example:
        >>> normalise(["train", "--dry-run", "--training.batch-size", "8"])
        ['train', '--dry_run=true', '--training.batch_size', '8']
    """
    result: list[str] = []
    for number, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            word = f"--{name.replace('-', '_')}{equals}{value}"
            follower = argv[number + 1] if number + 1 < len(argv) else "--"
            if not equals and name.replace("-", "_") in _FLAGS and follower.startswith("--"):
                word += "=true"
        result.append(word)
    return result
