"""The README's code as scripts, so that what it shows is what runs.

``python tests/readme_blocks.py python`` prints its Python blocks as one program whose line numbers are the
README's own; ``... shell`` prints its commands in a smoke version (`.ci/run` executes them).

Two comments, invisible on the rendered page, steer this; each stands on the line before a block:

    <!-- not run: needs a GPU -->    leave the next block out; the reason is required
    <!-- run first                   Python (up to the line ``-->``) that the next block relies on
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).parents[1] / "README.md"
FENCE = re.compile(r"^```(\w*)")
NOT_RUN = re.compile(r"^<!-- not run: \S.*-->$")
SHELL = ("bash", "sh", "shell", "console")
# set-up commands: the tests themselves have just done what they do
SET_UP = re.compile(r"^(make|git clone|cd|source|\.|(\S*/)?(pip|python3? -m pip))( |$)")
SMOKE_FLAGS = {"slicefine train": "--dry_run=true"}


class Block(NamedTuple):
    """A code block: its language, the README line (from 0) on which the code starts, and the code."""

    language: str
    line: int
    code: list[str]


def blocks(text: str) -> list[Block]:
    """Code blocks of a Markdown text that are to run, hidden ``run first`` blocks included, in order."""
    lines = text.splitlines()
    found: list[Block] = []
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        hidden = lines[number] == "<!-- run first"
        number += 1
        if not fence and not hidden:
            continue
        start = number
        end = "-->" if hidden else "```"
        while number < len(lines) and lines[number].rstrip() != end:
            number += 1
        if number == len(lines):
            raise ValueError(f"line {start}: the block has no closing {end!r}.")
        skipped = start >= 2 and NOT_RUN.match(lines[start - 2].strip())
        if not skipped:
            found.append(Block("python" if hidden else fence[1], start, lines[start:number]))
        number += 1
    return found


def python_script(text: str) -> str:
    """Python blocks as one program; a traceback's line number is the README's."""
    script = [""] * len(text.splitlines())
    for block in blocks(text):
        if block.language in ("python", "py"):
            script[block.line : block.line + len(block.code)] = block.code
    return "\n".join(script) + "\n"


def commands(block: Block) -> list[str]:
    """Commands of a shell block, without set-up commands."""
    joined = "\n".join(block.code).replace("\\\n", " ")
    prompts = [line for line in joined.splitlines() if block.language != "console" or line.startswith("$ ")]
    lines = [line.removeprefix("$ ").strip() for line in prompts]
    return [line for line in lines if line and not SET_UP.match(line)]


def shell_script(text: str) -> str:
    """Commands of the shell blocks, one per line, with the smoke flags."""
    shell = [block for block in blocks(text) if block.language in SHELL]
    return "\n".join(smoke(command) for block in shell for command in commands(block)) + "\n"


def smoke(command: str) -> str:
    """A command with the flag that makes it quick."""
    for start, flag in SMOKE_FLAGS.items():
        if re.match(rf"{re.escape(start)}(\s|$)", command):
            return f"{start} {flag}{command.removeprefix(start)}"
    return command


if __name__ == "__main__":
    make = {"python": python_script, "shell": shell_script}[sys.argv[1]]
    sys.stdout.write(make(README.read_text(encoding="utf-8")))
