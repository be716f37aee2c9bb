"""Add to the committed corpus the smallest inputs of a working copy that reach lines which it does not reach.

python fuzz/minimise.py adapter --corpus DIR
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import targets

import slicefine

HERE = Path(__file__).parent
SOURCE = str(Path(slicefine.__file__).parent)


def lines_of(target: str, data: bytes) -> set[tuple[str, int]]:
    """The lines of slicefine that an input reaches."""
    found: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line":
            found.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        targets.TARGETS[target](data)
    finally:
        sys.settrace(None)
    return found


def main() -> None:
    """Small ones first, so that they stand for the large ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=tuple(targets.TARGETS))
    parser.add_argument("--corpus", type=Path, required=True)
    chosen = parser.parse_args()
    committed = HERE / "corpus" / chosen.target
    known: set[tuple[str, int]] = set()
    for file in sorted(committed.iterdir()):
        known |= lines_of(chosen.target, file.read_bytes())
    for file in sorted(chosen.corpus.iterdir(), key=lambda path: path.stat().st_size):
        found = lines_of(chosen.target, file.read_bytes()) - known
        if found:
            known |= found
            shutil.copyfile(file, committed / f"found-{file.name[:12]}")
    print(f"{chosen.target}: {len(list(committed.iterdir()))} inputs reach {len(known)} lines")


if __name__ == "__main__":
    main()
