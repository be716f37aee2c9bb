"""The examples of docs/ecosystems.md run, section by section, where their library is installed."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from peft_helpers import THIRD_PARTY
from readme_blocks import python_script

PAGE = Path(__file__).parents[1] / "docs" / "ecosystems.md"

pytestmark = [
    *THIRD_PARTY,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),  # transformers 5 renames the setting
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # there is no accelerator
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # on an import
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),  # lightning and torch 2.13
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


def sections(text: str) -> dict[str, str]:
    """Each section's Python as a program of its own, with the page's line numbers."""
    lines = text.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("## ")]
    found = {}
    for start, end in zip(heads, [*heads[1:], len(lines)], strict=True):
        script = python_script("\n" * start + "\n".join(lines[start:end]))
        if script.strip():
            found[lines[start].removeprefix("## ")] = script
    return found


def libraries(script: str) -> set[str]:
    """Top-level names that a program imports."""
    found = set()
    for node in ast.walk(ast.parse(script)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


SECTIONS = sections(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("title", SECTIONS)
def test_the_section_runs(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    missing = sorted(name for name in libraries(SECTIONS[title]) if importlib.util.find_spec(name) is None)
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(SECTIONS[title], str(PAGE), "exec"), {"__name__": "section"})


def test_every_section_with_code_is_found():
    assert len(SECTIONS) >= 7
    named = set().union(*map(libraries, SECTIONS.values()))
    assert {"trl", "timm", "diffusers", "lightning", "sentence_transformers"} <= named
