"""The comparison on GLUE: `slicefine train` with the committed recipes, each method with a rate of its own.

Every run is `slicefine train --config recipes/TASK.yaml` with flags. For each method and task the learning rate with
the best *validation* metric on the first seed is taken; the other seeds run at that rate. Test metrics are read for
the chosen rates only. Finished runs are kept in the results file, so an interrupted table goes on where it stopped.

    python benchmarks/glue_table.py --data DATA/glue --out benchmarks/results/glue_minilm.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[1] / "recipes"
# optimizer steps and the longest text, so that the table fits two cores; the recipes themselves run longer
CAPS = {"sst2": (200, 40), "mrpc": (240, 48), "cola": (640, 24), "rte": (80, 64)}
DROPOUT = 0.0
# flags, and learning rates with the likelier ones first
METHODS: dict[str, tuple[list[str], tuple[float, ...]]] = {
    "head": (["--method.name", "head"], (3e-3, 1e-2)),
    "SliceFine 1R": (["--slice.mode", "row", "--slice.r", "1"], (3e-3, 1e-2)),
    "SliceFine 5R": (["--slice.mode", "row", "--slice.r", "5"], (2e-3, 1e-3, 4e-3)),
    "SliceFine 5C": (["--slice.mode", "column", "--slice.r", "5"], (2e-3, 4e-3, 1e-3)),
    "SliceFine 5RC": (["--slice.mode", "alternate", "--slice.r", "5"], (2e-3, 1e-3, 4e-3)),
    "SliceFine 12C": (["--slice.mode", "column", "--slice.r", "12"], (2e-3, 1e-3, 4e-3)),
    "LoRA r=8": (["--method.name", "lora", "--method.options", '{"r": 8}'], (5e-4, 1e-3, 2e-3)),
    "full": (["--method.name", "full", "--training.head_learning_rate", "1e-3"], (1e-4, 2e-4)),
}

Job = tuple[str, str, float, int]  # task, method, learning rate, seed


def conditions(task: str, smoke: bool) -> dict[str, Any]:
    """What a finished run must share with the table that uses it again."""
    steps, length = (4, 16) if smoke else CAPS[task]
    return {"steps": steps, "max_length": length, "dropout": DROPOUT, "smoke": smoke}


def run(job: Job, data: str, smoke: bool) -> dict[str, Any]:
    """One `slicefine train` in this process, on one thread."""
    import torch

    from slicefine.cli.main import main

    torch.set_num_threads(1)
    task, method, rate, seed = job
    asked = conditions(task, smoke)
    with tempfile.TemporaryDirectory() as output:
        words = ["train", "--config", str(RECIPES / f"{task}.yaml"), "--data.path", str(Path(data, task))]
        words += ["--output", output, "--overwrite", "--quiet", "--verify", "false", "--training.evaluate", "no"]
        words += ["--training.load_best", "false", "--training.evaluate_before", "false"]
        words += ["--task.max_length", str(asked["max_length"]), "--training.max_steps", str(asked["steps"])]
        words += ["--training.seed", str(seed), "--training.learning_rate", str(rate)]
        words += ["--model.dropout", str(asked["dropout"]), *METHODS[method][0]]
        if smoke:
            words += ["--data.limit_train", "64", "--data.limit_validation", "16", "--data.limit_test", "16"]
        status = main(words)
        if status != 0:
            raise RuntimeError(f"{' '.join(words)}: exit status {status}")
        report = json.loads(Path(output, "metrics.json").read_text())
    name = report["metric"]
    return {
        "job": list(job),
        "conditions": asked,
        "metric": name,
        "validation": report["after"]["validation"][name],
        "test": report["after"]["test"][name],
        "counts": report["counts"],
        "moves": len(report["moves"]),
        "steps": report["steps"],
        "file_bytes": report["file_bytes"],
        "train_seconds": round(report["train_seconds"], 1),
    }


def finish(jobs: list[Job], results: dict[Job, Any], args: argparse.Namespace, save: Any) -> None:
    """Run what is missing, a worker process per core."""
    missing = [job for job in jobs if job not in results]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, job, args.data, args.smoke) for job in missing]):
            result = future.result()
            results[tuple(result["job"])] = result
            save()


def chosen_rate(task: str, method: str, results: dict[Job, Any]) -> float:
    """The rate with the best validation metric on seed 0, of those that ran."""
    ran = [rate for rate in METHODS[method][1] if (task, method, rate, 0) in results]
    return max(ran, key=lambda rate: results[task, method, rate, 0]["validation"])


def table(tasks: list[str], methods: list[str], seeds: int, results: dict[Job, Any]) -> Iterator[str]:
    """The table in Markdown: mean and, over several seeds, standard deviation of the test metric, in percent."""
    metrics = {t: next(r["metric"] for job, r in results.items() if job[0] == t) for t in tasks}
    yield "| method | " + " | ".join(f"{t} ({metrics[t]})" for t in tasks) + " | mean | active | changed | file |"
    yield "|---|" + "---|" * (len(tasks) + 4)
    for method in methods:
        cells, means = [], []
        for task in tasks:
            rate = chosen_rate(task, method, results)
            scores = [100 * results[task, method, rate, seed]["test"] for seed in range(seeds)]
            spread = f" ± {statistics.stdev(scores):.1f}" if seeds > 1 else ""
            cells.append(f"{statistics.mean(scores):.1f}{spread} @{rate:g}")
            means.append(statistics.mean(scores))
        last = results[tasks[0], method, chosen_rate(tasks[0], method, results), 0]
        counts = last["counts"]
        cells += [f"{statistics.mean(means):.1f}", f"{counts['trainable']:,}", f"{counts['changed']:,}"]
        yield f"| {method} | " + " | ".join(cells) + f" | {last['file_bytes'] / 2**20:.1f} MiB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with one folder per task")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=list(CAPS), default=list(CAPS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rates", type=int, help="try at most so many rates per method")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="four steps on a few rows, to try the script")
    args = parser.parse_args()
    if args.rates is not None and args.rates < 1:
        parser.error("--rates must be at least 1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results: dict[Job, Any] = {}
    if args.out.exists():
        kept = json.loads(args.out.read_text())["runs"]
        results = {tuple(r["job"]): r for r in kept if r["conditions"] == conditions(r["job"][0], args.smoke)}
        print(f"{len(results)} of {len(kept)} finished runs have the same conditions and count")

    def save() -> None:
        import slicefine

        record = {
            "last_command": f"python benchmarks/glue_table.py {' '.join(sys.argv[1:])}",
            "date": time.strftime("%Y-%m-%d"),
            "slicefine": slicefine.__version__,
            "processor": platform.processor() or platform.machine(),
            "runs": [results[job] for job in sorted(results)],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")

    pairs = [(task, method) for task in args.tasks for method in args.methods]
    finish([(t, m, rate, 0) for t, m in pairs for rate in METHODS[m][1][: args.rates]], results, args, save)
    finish([(t, m, chosen_rate(t, m, results), s) for t, m in pairs for s in range(1, args.seeds)], results, args, save)
    print("\n".join(table(args.tasks, args.methods, args.seeds, results)))


if __name__ == "__main__":
    main()
