"""Parse the command line, run the verb, and turn our errors into one readable line."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from ..errors import SliceFineError

__all__ = ["VERBS", "main", "normalise"]

_FLAGS = (
    *("dry_run", "json", "quiet", "overwrite", "resume", "verify", "search_only", "per_layer"),
    *("layers", "distance", "keep", "markdown"),
    *("lm_head", "checkpointing", "reentrant", "compiled", "memory", "keep_memory", "private"),
    *("model.trust_remote_code", "trust_remote_code", "training.bf16", "training.gradient_checkpointing"),
)
_OURS = "SliceFine: "
_ALWAYS = ("json", "quiet")  # flags in every command; other names are numbers or folders in some
_NAMED = ("eval", "merge", "export", "undo", "push")  # of an adapter's folder: these take --adapter DIR, others DIR
_PLACED = ("info", "verify", "compose", "report")
_TRUTHS = ("true", "false", "yes", "no", "null", "none")
_EXAMPLES = (
    "slicefine train                  # the embedded default: MiniLM on docstrings, offline",
    "slicefine train --data.path reviews.csv --data.columns '{text: review, label: stars}'",
    "slicefine COMMAND --help         # a command's settings, with examples",
)
VERBS = {
    "train": "fine-tune a model",
    "eval": "measure a trained adapter on a split",
    "merge": "write the base with an adapter's values as a plain checkpoint",
    "export": "write slices as a LoRA adapter, for PEFT, vLLM or llama.cpp",
    "compose": "put several adapters of one base together",
    "undo": "take moves out of an adapter",
    "push": "publish an adapter on the Hugging Face hub",
    "info": "show what an adapter holds",
    "verify": "check that adapters, checkpoints and runs are whole",
    "report": "show runs on one HTML page",
    "plan": "say what each mode and rank would cost",
    "analyze": "measure the theory on a model and its data",
    "sweep": "run a grid of training runs, resumable",
    "reproduce": "make a table of the paper, resumable",
    "methods": "list the fine-tuning methods",
    "bench": "measure what methods cost on this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        argv: arguments without the program's name; None takes those of the process.
    """
    usual, warnings.formatwarning = warnings.formatwarning, _one_line
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
    finally:
        warnings.formatwarning = usual


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Ours in one line, without the line of code that gave it."""
    text = str(message)
    if not text.startswith(_OURS) and f"{os.sep}slicefine{os.sep}" not in filename:
        text = f"{filename}:{lineno}: {category.__name__}: {text}"
    return f"slicefine: warning: {text.removeprefix(_OURS)}\n"


def _run(argv: Sequence[str]) -> int:
    words = normalise(argv)
    asked = next((word for word in words if not word.startswith("-")), "")
    from .. import __version__
    from .parsing import VerbParser, add_outputs, parse, run_verb

    about = "Fine-tune in place with small moving slices."
    parser = VerbParser(None, about, _EXAMPLES, prog="slicefine", version=__version__)
    commands = parser.add_subcommands(metavar="COMMAND", title="commands", description="")
    verb: Any = None
    for name, help_ in VERBS.items():
        if name != asked:  # a command's own libraries are loaded for that command alone
            commands.add_subcommand(name, VerbParser(), help=help_)
            continue
        verb = importlib.import_module(f".{name}", __package__)
        own = commands.add_subcommand(name, verb.parser(), help=help_)
        if hasattr(verb, "add_studies"):
            verb.add_studies(own)
        else:
            add_outputs(own)
    chosen = parse(parser, words)
    options = chosen[chosen.subcommand]
    return run_verb(verb.run, options, options[options.study] if "study" in options else options)


def normalise(argv: Sequence[str]) -> list[str]:
    """Let flags stand alone (``--dry_run``), dashes be underscores, and an adapter come with ``--adapter`` or without.

    Example:
        >>> normalise(["train", "--dry-run", "--training.batch-size", "8"])
        ['train', '--dry_run=true', '--training.batch_size', '8']
        >>> normalise(["eval", "runs/mrpc/adapter"]), normalise(["info", "--adapter", "runs/mrpc/adapter"])
        (['eval', '--adapter', 'runs/mrpc/adapter'], ['info', 'runs/mrpc/adapter'])
    """
    first = argv[1] if len(argv) > 1 else ""
    if argv and argv[0] in _NAMED and first and not first.startswith("-"):
        argv = [argv[0], "--adapter", *argv[1:]]
    elif argv and argv[0] in _PLACED and (first == "--adapter" or first.startswith("--adapter=")):
        given = first.partition("=")[2]
        argv = [argv[0], *([given] if given else []), *argv[2:]]
    result: list[str] = []
    for number, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            word = f"--{name.replace('-', '_')}{equals}{value}"
            follower = argv[number + 1] if number + 1 < len(argv) else "--"
            plain = name.replace("-", "_")
            alone = follower.startswith("--") or (plain in _ALWAYS and follower.lower() not in _TRUTHS)
            if not equals and plain in _FLAGS and alone:
                word += "=true"
        result.append(word)
    return result
