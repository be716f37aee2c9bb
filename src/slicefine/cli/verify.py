"""Check that adapters, checkpoints and runs are whole: every file, checksum, shape and value."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

__all__ = ["parser", "run"]


def parser() -> ArgumentParser:
    """Options of `slicefine verify`."""
    usage = "slicefine verify DIR [DIR ...]"
    result = ArgumentParser(usage=usage, description="Check that adapters, checkpoints and runs are whole.")
    help_ = "Adapter, checkpoint or run folder, a tuner's .safetensors file, or user/name on the hub."
    result.add_argument("folders", type=str, nargs="+", help=help_)
    return result


def run(chosen: Any) -> int:
    """Print a line for each part of each folder; the exit status is 1 if one of them is damaged."""
    from ..training.whole import verify

    found = [part for folder in chosen.folders for part in verify(folder)]
    for part in found:
        print(f"{'whole  ' if part.error is None else 'DAMAGED'}  {part.path}: {part.error or part.summary}")
    return int(any(part.error is not None for part in found))
