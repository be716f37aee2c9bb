"""The accuracy sweep's results as a Markdown table: per setting and task the mean over seeds, and every seed's value.

Settings that ran on all three tasks get a mean over tasks of the seeds that have all of them, and the paired
difference to LoRA r=8 (the same tasks and seeds) with its standard error over those pairs.

    python benchmarks/accuracy_table.py benchmarks/results/accuracy_sweep.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

TASKS = ("sst2", "qqp", "qnli")
ORDERS = {"input": "by input energy", "gradient": "by gradient", "weight": "by weight"}
Scores = dict[tuple[str, int], float]  # (task, seed) -> validation accuracy


def setting(run: dict[str, Any]) -> tuple[str, str]:
    """What was tried, in words, and its learning rate."""
    if run["method"] != "slicefine":
        name = {"lora": "LoRA r=8", "full": "full fine-tuning", "head": "head"}[run["method"]]
    else:
        chosen = run["slice"]
        r, mode = chosen.get("r", 5), chosen.get("mode", "alternate")
        name = f"alternate, r={r}" if mode == "alternate" else f"{r} {mode}s"
        if run.get("order"):
            name += f", {ORDERS[run['order']]}"
        if chosen.get("positions") == "fixed":
            name += ", static"
        if "moves" in chosen:
            name += f", {chosen['moves']} move{'s' if chosen['moves'] != 1 else ''}"
        if chosen.get("state_policy", "reset") != "reset":
            name += f", {chosen['state_policy']}"
            name += f" over {chosen['rewarm_steps']} steps" if "rewarm_steps" in chosen else ""
    for key, words in (
        ("dropout", "dropout {:g}"),
        ("weight_decay", "decay {:g}"),
        ("column_rate", "columns at {:g} x the rate"),
    ):
        if run.get(key):
            name += ", " + words.format(run[key])
    # full fine-tuning always has a rate of its own for the head
    if run.get("head_lr") and run["method"] != "full":
        name += f", head at {run['head_lr']:g}"
    return name, f"{run['lr']:g}"


def read(paths: list[Path]) -> dict[tuple[str, str], Scores]:
    """Scores of every setting; a run that was repeated counts once, the last time."""
    found: dict[tuple[str, str], Scores] = defaultdict(dict)
    for path in paths:
        for line in path.read_text().splitlines():
            run = json.loads(line)
            if "error" not in run and run["steps"] == 320 and run["task"] in TASKS:
                found[setting(run)][run["task"], run["seed"]] = run["final"]
    return found


def cell(scores: Scores, task: str) -> str:
    """Mean over seeds, and the seeds' values behind it."""
    values = [scores[key] for key in sorted(scores) if key[0] == task]
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{statistics.mean(values):.1f} ({' / '.join(f'{v:.1f}' for v in values)})"


def paired(scores: Scores, base: Scores) -> str:
    """Mean difference to the base over the tasks and seeds that both have, and its standard error."""
    differences = [scores[key] - base[key] for key in sorted(scores.keys() & base.keys())]
    if len(differences) < 3:
        return ""
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.mean(differences):+.1f} ± {error:.1f} (n={len(differences)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    found = read(args.results)
    base = found["LoRA r=8", "0.0005"]  # its best rate
    print("| setting | rate | " + " | ".join(TASKS) + " | mean | difference to LoRA r=8 at 5e-4 |")
    print("|---|---|" + "---|" * (len(TASKS) + 2))
    for (name, rate), scores in sorted(found.items(), key=lambda item: (item[0][0].split(",")[0], item[0])):
        seeds = [s for s in {seed for _, seed in scores} if all((task, s) in scores for task in TASKS)]
        mean = f"{statistics.mean(scores[t, s] for t in TASKS for s in seeds):.1f}" if seeds else ""
        cells = [cell(scores, task) for task in TASKS]
        difference = "" if scores is base else paired(scores, base)
        print(f"| {name} | {rate} | " + " | ".join(cells) + f" | {mean} | {difference} |")


if __name__ == "__main__":
    main()
