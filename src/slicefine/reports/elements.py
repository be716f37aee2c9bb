"""Pieces of an HTML page. Whatever is text is escaped here; only what these functions return is markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import NewType

__all__ = ["Html", "bullets", "clean", "details", "figure", "join", "page", "paragraph", "section", "table", "text"]

Html = NewType("Html", str)

# the page asks for nothing, and a browser shall refuse if something in it did
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def clean(value: object) -> str:
    """A value as text that every browser and XML parser takes: no control characters, no halves of characters.

    Example:
        >>> clean("a\\x00b")
        'a\ufffdb'
    """
    whole = str(value).encode("utf-8", "replace").decode("utf-8")
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\ufffd" for sign in whole)


def text(value: object) -> Html:
    """A value as text of a page.

    Example:
        >>> text("<b> & co")
        '&lt;b&gt; &amp; co'
    """
    return Html(html.escape(clean(value)))


def join(parts: Iterable[Html]) -> Html:
    """Pieces below each other."""
    return Html("\n".join(part for part in parts if part))


def paragraph(words: object, kind: str = "") -> Html:
    """A paragraph of plain text, of a class of the style sheet."""
    return Html(f"<p{_class(kind)}>{text(words)}</p>")


def bullets(sentences: Iterable[object]) -> Html:
    """A list of plain sentences; nothing for none."""
    items = "".join(f"<li>{text(sentence)}</li>" for sentence in sentences)
    return Html(f"<ul>{items}</ul>" if items else "")


def section(title: str, level: int, content: Html, name: str = "") -> Html:
    """A section under a heading of a level from 2 to 6; ``name`` is its anchor."""
    anchor = f' id="{text(name)}"' if name else ""
    return Html(f"<section{anchor}>\n<h{level}>{text(title)}</h{level}>\n{content}\n</section>")


def details(title: str, content: str) -> Html:
    """Preformatted text that opens on a click."""
    return Html(f"<details><summary>{text(title)}</summary><pre>{text(content)}</pre></details>")


def figure(svg: str, caption: str) -> Html:
    """An inline picture, which must hold its own title and description, above its caption."""
    scroller = f'<div class="scroll" tabindex="0" role="group" aria-label="Picture">{svg}</div>'
    return Html(f"<figure>{scroller}<figcaption>{text(caption)}</figcaption></figure>")


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> Html:
    """A table of plain cells; the first of each row heads it.

    Args:
        caption: what it shows.
        columns: headings; empty for a table of names and values.
        rows: cells.
        kind: class of the style sheet.

    Example:
        >>> print(table("Sizes", ["layer", "rows"], [["<a>", 3]]))  # doctest: +ELLIPSIS
        <div class="scroll" ...><table><caption>Sizes</caption>...<th scope="row">&lt;a&gt;</th><td>3</td></tr>...
    """
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)
    lines = [f'<tr><th scope="row">{text(row[0])}</th>{"".join(map(_cell, row[1:]))}</tr>' for row in rows]
    top = f"<thead><tr>{head}</tr></thead>" if columns else ""
    inner = f"<table{_class(kind)}><caption>{text(caption)}</caption>{top}<tbody>{''.join(lines)}</tbody></table>"
    return Html(f'<div class="scroll" tabindex="0" role="group" aria-label="{text(caption)}">{inner}</div>')


def page(title: str, style: str, header: Html, main: Html, footer: Html) -> Html:
    """The whole document."""
    return Html(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header>\n{header}\n</header>\n<main>\n{main}\n</main>\n<footer>\n{footer}\n</footer>\n</body>\n</html>\n"
    )


def _cell(value: object) -> str:
    return f"<td>{text(value)}</td>"


def _class(kind: str) -> str:
    return f' class="{text(kind)}"' if kind else ""
