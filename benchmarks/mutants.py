"""Mutants by hand: one line of the core broken at a time, and which tests notice.

    python benchmarks/mutants.py --out benchmarks/results/mutants.json
    python benchmarks/mutants.py --only journal --out mutants.json

Each mutant is a plausible slip (an index off by one, a swapped axis, a forgotten copy), made in a copy of the sources.
The tests of its file run first, then those of the rest of the core; the first that fails ends it. One that survives
is a hole in the tests, or a change that makes no difference; `note` says why one is expected to survive.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
CORE = ("geometry", "schedule", "journal", "delta", "undo", "functional", "exactness", "reserve", "weights", "coupling")
CORE += ("layer", "tuner", "mover", "guards")


class Mutant(NamedTuple):
    """A line of ``src/slicefine/{file}.py`` that is written otherwise; ``old`` stands there once."""

    file: str
    old: str
    new: str
    note: str = ""


MUTANTS = (
    Mutant("geometry", "return range(self.start, self.start + self.width)", "return range(self.start, self.width)"),
    Mutant("geometry", "start < 0 or start + self.width > size", "start < 0 or start + self.width >= size"),
    Mutant("geometry", "start < 0 or start + self.width > size", "start + self.width > size"),
    Mutant("geometry", "if self.width < 1 or start", "if start"),
    Mutant("geometry", '{"row": shape[1], "column": shape[0]', '{"row": shape[0], "column": shape[1]'),
    Mutant("geometry", "return -(-size // width)", "return size // width"),
    Mutant("geometry", "return min(block * width, size - width)", "return block * width"),
    Mutant("geometry", "torch.randint(total, (missing", "torch.randint(total - 1, (missing"),
    Mutant("geometry", "return found[keep.sort().values]", "return found[keep]"),
    Mutant("geometry", "return found[keep.sort().values]", "return found[: draw.width]"),
    Mutant("geometry", "for s in slices if s.axis == axis for i in", "for s in slices for i in"),
    Mutant("geometry", "end - max(start, reached)", "end - start"),
    Mutant("geometry", "count += max(0, end", "count += (end"),
    Mutant("geometry", "slice(low - a.start, high - a.start)", "slice(low - b.start, high - b.start)"),
    Mutant("geometry", "if low < high else None", "if low <= high else None"),
    Mutant("geometry", "found |= _inside(own, other, shape)", "found = _inside(own, other, shape)"),
    Mutant("geometry", "(line < block.start + block.width)", "(line <= block.start + block.width)"),
    Mutant("schedule", "return AXES[visit % 2]", "return AXES[(visit + 1) % 2]"),
    Mutant("schedule", 'turn = visit // 2 if schedule.mode == "alternate" else visit', "turn = visit"),
    Mutant("schedule", "min(self.row_rank * shape[1], total)", "min(self.row_rank * shape[0], total)"),
    Mutant("schedule", "return max(1, round(self.mask_fraction * total))", "return round(self.mask_fraction * total)"),
    Mutant("schedule", "for a in axes if self.rank(a) > shape", "for a in axes if self.rank(a) >= shape"),
    Mutant("schedule", 's * unit if a == "column" else s', "s * unit"),
    Mutant("schedule", "schedule.order_of or layer + axis, cycle", "schedule.order_of or layer + axis, 0"),
    Mutant("schedule", "schedule.order_of or layer + axis, cycle", "schedule.order_of or axis, cycle"),
    Mutant("schedule", "        number = 0\n    elif", "        number = number\n    elif"),
    Mutant("schedule", "return free[number::parts]", "return free[number:]"),
    Mutant("schedule", "range(int(start), int(start) + width))]", "range(int(start), int(start) + width - 1))]"),
    Mutant("schedule", "step < 1 or step % self.interval", "step < 1 or (step - 1) % self.interval"),
    Mutant("schedule", "or made < self.limit", "or made <= self.limit"),
    Mutant("schedule", "min(moves + 1, total_steps //", "min(moves, total_steps //"),
    Mutant("schedule", "Moves(total_steps // positions, positions - 1)", "Moves(total_steps // positions, positions)"),
    Mutant("schedule", '2 * counts["column"] + 1)', '2 * counts["column"])'),
    Mutant("schedule", "visit >= schedule.share_visits", "visit > schedule.share_visits"),
    Mutant("schedule", 'draw = 0 if schedule.positions == "fixed" else visit', "draw = visit"),
    Mutant("journal", "self._originals.setdefault(block, kept)", "self._originals[block] = kept"),
    Mutant(
        "journal",
        'kept = values.to("cpu", copy=True)\n        self._originals.set',
        "kept = values\n        self._originals.set",
    ),
    Mutant(
        "journal", "self.visits.append(Visit(block, step + 1, step))", "self.visits.append(Visit(block, step, step))"
    ),
    Mutant("journal", "Visit(block, first, last + 1)", "Visit(block, first + 1, last + 1)"),
    Mutant("journal", "if len(self.visits) == 1 and self.step == 0:", "if len(self.visits) == 1:"),
    Mutant("journal", "if moves > min(len(self.visits) - 1, len", "if moves > min(len(self.visits), len"),
    Mutant("journal", "if last.slice not in self.slices():", "if False:"),
    Mutant(
        "journal",
        "self._before[-1] = self._write_before(weight)",
        "self._write_before(weight)",
        note="the same values: what is packed unpacks alike as long as the originals stay, and they do",
    ),
    Mutant("journal", "Visit(last.slice, last.first_step, last.first_step - 1)", "Visit(*last)"),
    Mutant("journal", "self.visits[:-1]))", "self.visits))"),
    Mutant("journal", "for block in reversed(self._originals):", "for block in self._originals:"),
    Mutant("journal", "if not self._trained:  # after", "if True:  # after"),
    Mutant("journal", ".to(delta.device)] = 0", ".to(delta.device)] *= 1"),
    Mutant("journal", "+ scale * delta)", "+ delta)"),
    Mutant("journal", "for visit in self.visits[:i])", "for visit in self.visits[: i + 1])"),
    Mutant("journal", "width < 1 or first < 1 or last < first - 1", "width < 1 or first < 1 or last < first"),
    Mutant("journal", "width < 1 or first < 1 or last < first - 1", "first < 1 or last < first - 1"),
    Mutant("journal", "if bad or any(count < -1 for count in kept):", "if bad:"),
    Mutant("journal", "v.first_step, v.last_step, count]", "v.last_step, v.first_step, count]"),
    Mutant("journal", "visits[:number]), shape)", "visits[: number + 1]), shape)"),
    Mutant(
        "journal",
        "self._originals[block] = read_block(weight, block).cpu()\n            write_block(weight, block, values)",
        "self._originals.setdefault(block, values)\n            write_block(weight, block, values)",
    ),
    Mutant("delta", "if block == active:\n            continue", "if block == active:\n            pass"),
    Mutant("delta", "lines[active.axis].pop(i, None)", "pass"),
    Mutant("delta", "for i in sorted(lines[axis])])", "for i in lines[axis]])"),
    Mutant("delta", "-1 if part is None else part.numel()", "0 if part is None else part.numel()"),
    Mutant("delta", "if s.axis == axis and s != active]", "if s.axis == axis]"),
    Mutant("delta", "axis) - line_count(own, axis)", "axis)"),
    Mutant("delta", 'if block.axis != "entries" else 0) > size:', 'if block.axis != "entries" else 0) >= size:'),
    Mutant("delta", "count >= 0 and count != history_count", "count >= 0 and count > history_count"),
    Mutant("delta", "active.shape[0] < block[0] or", "active.shape[0] <= block[0] or"),
    Mutant("delta", "own = active.detach()[: block[0], : block[1]]", "own = active.detach()"),
    Mutant("delta", "            offset += item.width\n", ""),
    Mutant("delta", "result[item] = own.clone()", "result[item] = own"),
    Mutant("delta", "if current.axis == axis else set()", "if current.axis != axis else set()"),
)


def broken(mutant: Mutant) -> str:
    """The source of the mutant's file.

    Raises:
        ValueError: if the old text does not stand there exactly once.
    """
    source = (ROOT / "src" / "slicefine" / f"{mutant.file}.py").read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file}: {mutant.old!r} stands there {source.count(mutant.old)} times, not once.")
    return source.replace(mutant.old, mutant.new)


def first_failure(mutant: Mutant, copy: Path) -> str | None:
    """The first test that fails; None if all pass."""
    target = copy / "src" / "slicefine" / f"{mutant.file}.py"
    sound = target.read_text()
    target.write_text(broken(mutant))
    names = [mutant.file, *(name for name in CORE if name != mutant.file)]
    words = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
    words += [f"tests/test_{name}.py" for name in names]
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    target.write_text(sound)
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return found[1] if found else (done.stdout + done.stderr).strip().splitlines()[-1]


def main() -> None:
    """Run the mutants that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="files whose names hold this")
    parser.add_argument("--again", type=Path, help="an earlier result: only what survived there, or is not in it, runs")
    words = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        for name in ("src", "tests", "benchmarks", "recipes"):
            shutil.copytree(ROOT / name, copy / name)
        shutil.copy(ROOT / "pyproject.toml", copy)
        earlier = json.loads(words.again.read_text())["rows"] if words.again else []
        known = {(row["file"], row["old"], row["new"]): row for row in earlier if row["caught_by"] is not None}
        for number, mutant in enumerate(m for m in MUTANTS if words.only in m.file):
            if mutant[:3] in known:
                rows.append(known[mutant[:3]])
                continue
            start = time.perf_counter()
            caught = first_failure(mutant, copy)
            rows.append({**mutant._asdict(), "caught_by": caught})
            seconds = time.perf_counter() - start
            print(
                f"{number + 1:3} {mutant.file}: {mutant.new.strip()!r}: {caught or 'SURVIVED'} ({seconds:.0f} s)",
                flush=True,
            )
    record = {
        "date": str(date.today()),
        "torch": torch.__version__,
        "mutants": len(rows),
        "caught": sum(row["caught_by"] is not None for row in rows),
        "rows": rows,
    }
    words.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['caught']} of {record['mutants']} caught")


if __name__ == "__main__":
    main()
