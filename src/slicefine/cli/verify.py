"""Check that adapters, checkpoints and runs are whole: every file, checksum, shape and value."""

from __future__ import annotations

from typing import Any

from .parsing import Status, VerbParser

__all__ = ["parser", "run"]

_EXAMPLES = ("slicefine verify runs/mrpc", "slicefine verify runs/a/adapter runs/b/adapter --quiet && echo whole")


def parser() -> VerbParser:
    """Options of `slicefine verify`."""
    usage = "slicefine verify DIR [DIR ...]"
    result = VerbParser(usage, "Check that adapters, checkpoints and runs are whole.", _EXAMPLES)
    help_ = "Adapter, checkpoint, model or run folder, a tuner's .safetensors file, or user/name on the hub."
    result.add_argument("folders", type=str, nargs="+", help=help_)
    return result


def run(chosen: Any) -> Any:
    """Print a line for each part of each folder; the exit status is 1 if one of them is damaged or missing."""
    from ..training.whole import verify

    found = [part for folder in chosen.folders for part in verify(folder)]
    for part in found:
        state = "whole  " if part.error is None else "MISSING" if part.missing else "DAMAGED"
        text = (part.error or part.summary).removeprefix(f"{part.path}: ")
        print(f"{state}  {part.path}: {text}")
    return Status(int(any(part.error is not None for part in found)), found)
