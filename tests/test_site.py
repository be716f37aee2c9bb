"""The documentation as a site: links and anchors that exist, generated pages in step, and a build that needs no network."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import MOVED, linked, links, markdown_for_site, prose, text_of
from pictures import FOLDER, PICTURES
from runs import PAGE, page

import slicefine

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*MOVED, *(path.relative_to(ROOT).as_posix() for path in sorted(DOCS.rglob("*")) if path.suffix in (".md", ".ipynb"))]


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} (.+)$", prose(text.replace("`", "")), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if i == 0 else f"{slug}-{i}" for slug, count in found.items() for i in range(count + 1)}


@pytest.mark.parametrize("name", PAGES)
def test_links_and_anchors_exist(name: str):
    for path, anchor in links(text_of(name)):
        target = ROOT / linked(name, path)
        assert target.exists(), f"{name} links to {path}"
        assert not anchor or anchor in anchors(text_of(linked(name, path))), f"{name}: no heading {path}#{anchor}"


def test_a_dead_link_and_a_dead_anchor_are_seen():
    text = "# A `b`, c\n[x](no.md) ![y](p.svg) [z](#here)\n```text\n[code](no2.md)\n```\n<!-- run first\n[h](no3.md)\n-->\n"
    assert list(links(text)) == [("no.md", ""), ("p.svg", ""), ("", "here")]
    assert anchors(text) == {"a-b-c"}


def test_links_out_of_the_folder_and_reasons_become_the_sites_own():
    text = "<!-- not run: needs a GPU -->\n```bash\nls\n```\n[r](../recipes/mrpc.yaml) [g](guide.md#errors) [h](../README.md)\n"
    shown = markdown_for_site(text, "start.md", "docs/start.md")
    assert "*Not run in the tests: needs a GPU.*" in shown
    assert "[r](repository/recipes/mrpc.yaml) [g](guide.md#errors) [h](index.md)" in shown


def test_pictures_are_what_the_script_draws():
    assert {file.name for file in FOLDER.iterdir()} == set(PICTURES)
    for name, draw in PICTURES.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == draw(), "run: python docs/tools/pictures.py"


def test_the_page_of_runs_is_what_the_results_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python docs/tools/runs.py"


def test_the_api_page_shows_every_public_name():
    shown = re.findall(r"^::: slicefine\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    errors = {name for name in slicefine.__all__ if name.endswith("Error")}
    assert sorted(shown) == sorted({*slicefine.__all__, "errors"} - errors)


def test_the_messages_of_the_faq_are_the_programs():
    spoken = set()
    for path in Path(slicefine.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                spoken.add(node.value)
    rows = re.findall(r"^\| (`.+?`) \|", (DOCS / "faq.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) >= 25
    assert [message for message in messages if not any(message in text for text in spoken)] == []


def test_notebooks_are_kept_without_outputs():
    files = list((DOCS / "notebooks").glob("*.ipynb"))
    assert len(files) == 2
    for file in files:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in cells)


BUILD = """
import sys

def offline(event, arguments):
    if event == "socket.connect":
        raise OSError(f"the build asks for {arguments[1]}")

sys.addaudithook(offline)
from mkdocs.__main__ import cli
cli(["build", "--quiet", "--site-dir", sys.argv[1]])
"""


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the extra docs is not installed")
def test_the_site_is_built_without_a_network_and_loads_nothing_from_elsewhere(tmp_path: Path):
    command = [sys.executable, "-c", BUILD, str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= 35
    for file in pages:
        text = file.read_text(encoding="utf-8")
        loads = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?https?:[^>]*>|<link\b[^>]*\bhref=\"?https?:[^>]*>", text)
        assert loads == [], file.name
    for file in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )['\"]?https?:", file.read_text(encoding="utf-8")), file.name
