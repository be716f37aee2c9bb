"""Draws the pictures of docs/concepts.md: `python docs/tools/pictures.py` writes docs/pictures/*.svg anew.

A test compares the files with what this draws. Sizes are pixels; colours follow the reader's light or dark setting.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "pictures"
STYLE = """
    .w{fill:#eef1f5;stroke:#8a94a3}.now{fill:#e4572e}.done{fill:#f3b99f}.kept{fill:#5b8def}.l{font-size:13px;fill:#222}
    .s{font-size:12px;fill:#555}.a{stroke:#555;fill:none}
    @media (prefers-color-scheme: dark){.w{fill:#2a2f38}.done{fill:#8a4a35}.kept{fill:#3f66b5}.l{fill:#eee}.s{fill:#aaa}
    .a{stroke:#aaa}}
  """


def picture(title: str, about: str, width: int, height: int, *parts: str) -> str:
    """A whole SVG file, with a title and a description for those who cannot see it."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-family="sans-serif"'
    lines = [f'{head} aria-labelledby="t d">', f'  <title id="t">{title}</title>', f'  <desc id="d">{about}</desc>']
    return "\n".join([*lines, f"  <style>{STYLE}</style>", *(f"  {part}" for part in parts), "</svg>", ""])


def box(kind: str, x: float, y: float, width: float, height: float) -> str:
    """A rectangle; ``kind`` is a class of the style."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'


def say(text: str, x: float, y: float, kind: str = "s") -> str:
    """A line of text that begins at a point."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{text}</text>'


def arrow(x: float, y: float, length: float) -> str:
    """An arrow to the right."""
    tip = x + length
    return f'<path class="a" d="M{x:g} {y:g}H{tip:g}M{tip - 5:g} {y - 4:g}L{tip:g} {y:g}L{tip - 5:g} {y + 4:g}"/>'


def timeline() -> str:
    """A run: positions in turn, and what happens between two of them."""
    parts = [say("optimizer steps", 20, 24, "l"), arrow(20, 34, 700)]
    for i in range(4):
        x = 20 + 175 * i
        parts += [box("now" if i % 2 else "done", x, 50, 165, 26), say(f"position {i + 1}", x + 50, 68, "l")]
        parts += [f'<path class="a" d="M{x + 170:g} 46V96"/>', say("move", x + 152, 110)] if i < 3 else []
    does = [
        "At a move, after an optimizer step:",
        "1. the slice's last values are in the weight already; they stay there",
        "2. the next slice's place follows from the number of moves, the layer's name and shape, and the seed",
        "3. its original values are noted, on the CPU, before anything is written",
        "4. the parameter takes the new slice's values; the optimizer's state for it begins anew",
    ]
    parts += [say(line, 20, 146 + 20 * i, "l" if i == 0 else "s") for i, line in enumerate(does)]
    about = "A run of four positions. Between two positions the slice moves, right after an optimizer step."
    return picture("When slices move", about, 740, 240, *parts)


def memory() -> str:
    """What a layer keeps of its input for backward."""
    parts = []
    for i, (name, kept, note) in enumerate(
        [
            ("row slice", 120, "keeps the whole input"),
            ("column slice", 14, "keeps r columns of it"),
            ("LoRA", 120, "keeps the whole input"),
        ]
    ):
        x = 20 + 245 * i
        parts += [say(name, x, 26, "l"), say("input X", x, 46), say("weight W", x + 135, 46)]
        parts += [box("w", x, 54, 120, 70), box("kept", x, 54, kept, 70), box("w", x + 135, 54, 80, 70)]
        parts.append({0: box("now", x + 135, 54, 80, 10), 1: box("now", x + 135, 54, 10, 70), 2: ""}[i])
        parts.append(say(note, x, 146))
    parts += [box("now", 535 + 110, 132, 20, 14), say("A, B beside W", 535 + 135, 144)]
    parts += [box("kept", 20, 168, 14, 14), say("kept from forward to backward", 42, 180)]
    parts += [box("now", 265, 168, 14, 14), say("in training", 287, 180)]
    parts.append(say("gradients: rows  dY[:, rows]' X      columns  dY' X[:, columns]", 400, 180))
    about = "A row slice needs the whole input for its gradient, as LoRA does; a column slice needs r columns of it."
    return picture("What is kept for backward", about, 760, 194, *(part for part in parts if part))


def journal() -> str:
    """How the originals come back where a row and a column block cross."""
    parts = []
    steps = [("base", 0, 0), ("row block trained", 1, 0), ("then a column block", 1, 1)]
    for i, (name, row, column) in enumerate(steps):
        x = 20 + 170 * i
        parts += [box("w", x, 34, 120, 90), say(name, x, 24, "l")]
        parts += [box("done", x, 34, 120, 14)] if row else []
        parts += [box("now", x, 34, 14, 90)] if column else []
        parts += [arrow(x + 126, 80, 36)] if i < 2 else []
    parts += [say("journal", 540, 24, "l"), box("w", 540, 34, 200, 90)]
    parts += [say("1  rows 0-13: what stood there", 548, 56), say("2  columns 0-13: what stood there,", 548, 78)]
    parts += [say("with the row's trained corner", 563, 96)]
    parts.append(say("Back to the base: write 2, then 1. Every entry has its first bits again; nothing is subtracted.", 20, 152))
    about = "The journal holds what each slice replaced. Writing these back in reverse order restores the base."
    return picture("The journal", about, 760, 166, *parts)


PICTURES = {"timeline.svg": timeline, "memory.svg": memory, "journal.svg": journal}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
