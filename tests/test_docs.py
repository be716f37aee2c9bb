"""The code on the documentation's pages runs: page by page, in order, in one folder and namespace."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import text_of

from peft_helpers import NATIVE_REASON, PEFT_IS_TOO_OLD, THIRD_PARTY
from readme_blocks import SHELL, Block, blocks, commands, python_script
from slicefine.cli import main

ROOT = Path(__file__).parents[1]
ECOSYSTEMS = "docs/ecosystems.md"  # section by section: each needs another library
LANGUAGES = {"python", "bash", "yaml", "text"}
SMOKE = {  # what makes a command quick, whatever the page says
    "train": "--training.max_steps=3 --slice.minimum_steps=1 --training.batch_size=4 --task.max_length=16 "
    "--data.limit_train=24 --data.limit_validation=8 --data.limit_test=8",
    "eval": "--data.limit=8",
}

pytestmark = [
    *THIRD_PARTY,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),  # transformers 5 renames the setting
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # there is no accelerator
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # on an import
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),  # lightning and torch 2.13
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


def names() -> list[str]:
    """Every page and notebook with code that runs."""
    found = sorted(path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".ipynb"))
    pages = [path.relative_to(ROOT).as_posix() for path in found]
    return [name for name in pages if name != ECOSYSTEMS and blocks(text_of(name))]


def run_block(block: Block, page: str, scope: dict[str, Any]) -> None:
    """A block in the current folder; YAML that begins with ``# name.yaml`` is written there."""
    code = "\n".join(block.code) + "\n"
    if block.language == "python":
        exec(compile("\n" * block.line + code, page, "exec"), scope)
    elif block.language == "yaml":
        yaml.safe_load(code)
        if name := re.match(r"# (\S+\.yaml)$", block.code[0]):
            Path(name[1]).write_text(code, encoding="utf-8")
    elif block.language in SHELL:
        for command in commands(block):
            program, verb, *rest = shlex.split(command, comments=True)
            assert program == "slicefine", (
                f"{page}: only slicefine's commands run in tests; say why {command!r} does not"
            )
            assert main([verb, *rest, *SMOKE.get(verb, "").split()]) == 0, f"{page}: {command}"


@pytest.mark.parametrize("name", names())
def test_the_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    quantises = any("4bit" in line for block in blocks(text_of(name)) for line in block.code)
    if quantises and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "page"}
    for block in blocks(text_of(name)):
        run_block(block, name, scope)


def test_every_block_says_its_language():
    for path in (ROOT / "docs").rglob("*.md"):
        fences = re.findall(r"^```(.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[::2]
        assert set(fences) <= LANGUAGES, f"{path.name}: {set(fences) - LANGUAGES}"


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


SECTIONS = sections(text_of(ECOSYSTEMS))


@pytest.mark.parametrize("title", SECTIONS)
def test_the_section_runs(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    missing = sorted(name for name in libraries(SECTIONS[title]) if importlib.util.find_spec(name) is None)
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    if PEFT_IS_TOO_OLD and ".add_adapter(" in SECTIONS[title]:
        pytest.skip(NATIVE_REASON)
    monkeypatch.chdir(tmp_path)
    exec(compile(SECTIONS[title], ECOSYSTEMS, "exec"), {"__name__": "section"})


def test_every_section_with_code_is_found():
    assert len(SECTIONS) >= 7
    named = set().union(*map(libraries, SECTIONS.values()))
    assert {"trl", "timm", "diffusers", "lightning", "sentence_transformers"} <= named
