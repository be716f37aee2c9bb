"""The site's hook: what Markdown files mean on GitHub, they mean on the site, too.

Pages link to files of the repository (pictures, recipes, results), which lie outside ``docs/``. Those that are linked are
taken along, as they are, below ``repository/``; folders become a list of their files. The README is the site's front page.
A block's ``<!-- not run: reason -->``, which no reader of the page would see, becomes a line above it.

`mkdocs.yml` names this file; `tests/test_site.py` uses it to check links without building anything.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[2]
MOVED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?P<before>!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()(?P<path>[^)\s#:]*)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"^ *```.*?^ *``` *$", re.MULTILINE | re.DOTALL)
HIDDEN = re.compile(r"^<!-- run first\n.*?^-->\n", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"^<!-- not run: (.*?) -->$", re.MULTILINE)


def prose(text: str) -> str:
    """A page without its code blocks and what is hidden; lines stay where they are."""
    for pattern in (HIDDEN, FENCE):
        text = pattern.sub(lambda found: "\n" * found[0].count("\n"), text)
    return re.sub(r"`[^`\n]*`", "", text)


def links(text: str) -> Iterator[tuple[str, str]]:
    """(path, anchor without #) of each relative link and picture of a page; the path is empty within the page."""
    for found in LINK.finditer(prose(text)):
        if found["path"] or found["anchor"]:
            yield unquote(found["path"]), (found["anchor"] or "").removeprefix("#")


def linked(source: str, path: str) -> str:
    """The repository's name of what a page links to: ``docs/guide.md`` and ``../recipes`` give ``recipes``."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) if path else source


def address(name: str) -> str:
    """Where a file or folder of the repository lies on the site."""
    path = ROOT / name
    if path.is_dir():
        name += "/README.md" if (path / "README.md").is_file() or name.startswith("docs/") else "/index.md"
    if name in MOVED:
        return MOVED[name]
    if name.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", name.removeprefix("docs/"))
    return f"repository/{name}"


def source_of(uri: str) -> str:
    """The repository's name of a page of the site, the other way round."""
    for name, moved in MOVED.items():
        if uri == moved:
            return name
    if uri.startswith("repository/"):
        return uri.removeprefix("repository/")
    page = f"docs/{uri}"
    return page if (ROOT / page).is_file() else re.sub(r"\.md$", ".ipynb", page)


def text_of(name: str) -> str:
    """A page's Markdown: a file as it is, a notebook's cells, or the list of a folder."""
    path = ROOT / name
    if path.is_dir():
        entries = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith((".", "__")))
        return "\n".join([f"# {name}", "", *(f"- [{entry}]({entry})" for entry in entries), ""])
    text = path.read_text(encoding="utf-8")
    return notebook(text, path.name) if path.suffix == ".ipynb" else text


def notebook(text: str, name: str) -> str:
    """A notebook as a page: prose as it is, code in blocks, and the file itself to download."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    parts.insert(1, f'<a href="{name}" download>Download this notebook</a>')
    return "\n\n".join(parts) + "\n"


def outside(sources: list[str]) -> list[str]:
    """Files and folders outside ``docs/`` that pages link to, and that linked pages and folders link to in turn."""
    found: dict[str, None] = {}
    while sources:
        source = sources.pop()
        inside = f"{source}/." if (ROOT / source).is_dir() else source
        for path, _ in links(text_of(source)):
            name = linked(inside, path)
            if name not in found and address(name).startswith("repository/") and (ROOT / name).exists():
                found[name] = None
                sources += [name] if name.endswith(".md") or (ROOT / name).is_dir() else []
    return list(found)


def markdown_for_site(text: str, uri: str, source: str) -> str:
    """A page's text with links that hold on the site, and with reasons in sight."""
    inside = f"{source}/." if (ROOT / source).is_dir() else source

    def moved(found: re.Match[str]) -> str:
        if not found["path"]:
            return found[0]
        target = posixpath.relpath(address(linked(inside, unquote(found["path"]))), posixpath.dirname(uri) or ".")
        return f"{found['before']}{target}{found['anchor'] or ''})"

    pieces, end = [], 0
    text = HIDDEN.sub("", text)
    for fence in FENCE.finditer(text):
        pieces += [LINK.sub(moved, text[end : fence.start()]), fence[0]]
        end = fence.end()
    text = "".join([*pieces, LINK.sub(moved, text[end:])])
    return NOT_RUN.sub(r"*Not run in the tests: \1.*\n{ .not-run }", text)


def on_files(files: Any, config: Any) -> Any:
    """Add the README and its like, notebooks as pages, and what lies outside ``docs/`` and is linked."""
    from mkdocs.structure.files import File

    for name, uri in MOVED.items():
        files.append(File.generated(config, uri, content=text_of(name)))
    notebooks = [f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".ipynb")]
    for name in notebooks:
        files.append(File.generated(config, address(name), content=text_of(name)))
    pages = [source_of(file.src_uri) for file in files.documentation_pages()]
    for name in outside(pages):
        path = ROOT / name
        as_it_is = path.is_file() and path.suffix != ".md"
        content = {"abs_src_path": str(path)} if as_it_is else {"content": text_of(name)}
        files.append(File.generated(config, address(name), **content))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """See `markdown_for_site`."""
    uri = page.file.src_uri
    source = source_of(uri)
    if uri.startswith("repository/") and uri.endswith("/index.md") and not (ROOT / source).exists():
        source = posixpath.dirname(source)
    return markdown_for_site(markdown, uri, source)
