"""Writes docs/results/runs.md from the files of `slicefine bench`: `python docs/tools/runs.py`. A test compares the two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "benchmarks" / "results" / "bench"
PAGE = ROOT / "docs" / "results" / "runs.md"
HEAD = """# Every run of the benchmark

Written by `docs/tools/runs.py` from the JSON files of `slicefine bench`; do not edit. [Step cost](step_cost.md) and
[windows](windows.md) say what follows from them. *Time* is the median ratio to the frozen model's step, interleaved in the same run, with
the lowest and the highest round in brackets; *kept* is what stays from forward to backward.
"""


def mib(size: float) -> str:
    """Bytes in MiB, with a digit where it counts."""
    return f"{size / 2**20:,.0f}" if size >= 100 * 2**20 else f"{size / 2**20:.1f}"


def table(result: dict[str, Any]) -> list[str]:
    """One model's methods."""
    shape = result["shape"]
    title = f"{shape['name']}, {shape['layers']} layers of {shape['width']}, batch {shape['batch']} x {shape['length']}"
    lines = [f"| {title} | time / frozen model | kept MiB | optimizer MiB | in training | file MiB |", "|---|--:|--:|--:|--:|--:|"]
    for row in result["rows"]:
        time = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        sizes = f"{mib(row['saved'])} | {mib(row['state'])} | {row['trainable']:,} | {mib(row['file'])}"
        lines.append(f"| {row['method']} | {time} | {sizes} |")
    return lines


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for file in sorted(SOURCE.glob("*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        versions = run["environment"]
        with_what = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
        parts.append(f"## {file.stem}\n\n`{run['command']}`\n\n{run['date']}, {with_what}, {versions['threads']} threads.\n")
        parts += ["\n".join(table(result)) + "\n" for result in run["results"]]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
