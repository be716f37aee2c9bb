"""Does the planner's rank foretell the rank at which accuracy saturates? (Corollary 2.6 against Figure 3a)

Takes the finished sweep `recipes/sweeps/rank.yaml`, asks the planner for k_task(tau) on the train rows of each of its
tasks, and sets both side by side. A task saturates at the smallest rank whose mean metric is within a tolerance of its
best: a number of points, and the standard deviation of the best cell's seeds, whichever is larger.

    slicefine sweep --config recipes/sweeps/rank.yaml --output results/rank --workers 2
    python benchmarks/planner_rank.py --sweep recipes/sweeps/rank.yaml --results results/rank --out benchmarks/results
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from scipy.stats import spearmanr

from slicefine.charts import Chart, Line, Panel, plain
from slicefine.plots import save_chart
from slicefine.sweeps.settings import SweepSettings, ViewSettings, cells, runs_of, train_settings
from slicefine.training.rank import rank_plan
from slicefine.training.report import environment, write_json


def saturation(values: dict[int, float], deviation: float, points: float) -> int:
    """The smallest rank whose metric is within the tolerance of the best."""
    best = max(values.values())
    return min(rank for rank, value in values.items() if value >= best - max(points, deviation))


def planned(settings: SweepSettings, task: str, tau: float, examples: int) -> dict[str, int]:
    """The planner's rank of row and column slices, on the task's own train rows."""
    cell = next(cell for cell in cells(settings) if cell.label("task") == task and cell.label("rank") != "0")
    recipe = runs_of(settings, cell, settings.seeds[0])[0].recipe
    found = rank_plan(train_settings(recipe), tau, examples=examples, console=Console(quiet=True))
    return found.ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", required=True, help="the sweep's recipe")
    parser.add_argument("--results", required=True, help="its folder, with index.json")
    parser.add_argument("--out", required=True, help="folder for planner_rank.json and .png")
    parser.add_argument("--taus", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--points", type=float, default=0.01, help="tolerance in units of the metric")
    args = parser.parse_args()
    content = yaml.safe_load(Path(args.sweep).read_text())
    settings = SweepSettings(**{**content, "view": ViewSettings(**content["view"])})
    index = json.loads((Path(args.results) / "index.json").read_text())
    rows: list[dict[str, Any]] = []
    for task in content["vary"]["task"]:
        own = [cell for cell in index["cells"] if cell["labels"]["task"] == task and cell["labels"]["rank"] != "0"]
        values = {int(cell["labels"]["rank"]): cell["mean"] for cell in own}
        deviation = max(own, key=lambda cell: cell["mean"])["deviation"]
        plans = {f"{tau:g}": planned(settings, task, tau, args.examples) for tau in args.taus}
        enough = saturation(values, deviation, args.points)
        rows.append({"task": task, "saturation": enough, "planned": plans, "metric": values})
        print(task, "saturates at", enough, "planned", plans)
    correlation = {}
    for tau in args.taus:
        for axis in ("row", "column"):
            wanted = [row["planned"][f"{tau:g}"][axis] for row in rows]
            reached = [row["saturation"] for row in rows]
            if min(len(set(wanted)), len(set(reached))) < 2:  # no order to compare
                continue
            found = spearmanr(wanted, reached)
            correlation[f"{axis}s, tau {tau:g}"] = {"spearman": found.statistic, "p": found.pvalue}
    print(json.dumps(plain(correlation), indent=1))
    names = [row["task"] for row in rows]
    lines = [Line("rank at which accuracy saturates", names, [row["saturation"] for row in rows], style="bars")]
    lines += [
        Line(f"k_task({tau:g}), columns", names, [row["planned"][f"{tau:g}"]["column"] for row in rows], style="bars")
        for tau in args.taus
    ]
    words = "; ".join(f"{row['task']}: saturates at {row['saturation']}, planned {row['planned']}" for row in rows)
    panel = Panel("", lines, "task", "slice rank", log_y=True)
    save_chart(Chart("planner_rank", "The planner's rank and the rank at saturation", [panel], words), Path(args.out))
    facts = {"tasks": rows, "correlation": correlation, "points": args.points, "examples": args.examples}
    write_json(Path(args.out) / "planner_rank.json", plain({**facts, "chart": words, **environment()}))


if __name__ == "__main__":
    main()
