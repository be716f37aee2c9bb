"""Eager against `torch.compile`, interleaved: does compiling help slices wherever it helps a frozen model?

Every round each model makes one step, eager and compiled; ratios are to the eager frozen model of the same round.

    python benchmarks/compiled.py --out benchmarks/results/compiled.json --threads 2
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from slicefine.bench.methods import FLOOR, find_method
from slicefine.bench.report import environment
from slicefine.bench.settings import BenchSettings
from slicefine.bench.shapes import find_shape, make_batch, make_model
from slicefine.bench.workload import Workload, keep_freed_memory

METHODS = (FLOOR, "row r=5", "column r=5", "alternate r=5", "lora r=8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["roberta", "llama"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--smoke", action="store_true", help="tiny models, to try the script")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch._dynamo.config.recompile_limit = 64  # the models of a family share their code objects, and this budget
    record = {
        "command": f"python benchmarks/compiled.py {' '.join(sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(BenchSettings(device=args.device)),
        "rounds": args.rounds,
        "results": [],
    }
    for name in args.models:
        shape = find_shape(name, **({"layers": 1, "width": 64, "batch": 1, "length": 8} if args.smoke else {}))
        base = make_model(shape).to(args.device, dtype)
        batch = make_batch(shape, torch.device(args.device), dtype)
        workloads = {
            (method, compiled): Workload(method, find_method(method), base, shape.family, batch, None, compiled)
            for method in METHODS
            for compiled in (False, True)
        }
        times: dict[tuple[str, bool], list[float]] = {key: [] for key in workloads}
        for _ in range(2):  # compiles; in alternate mode both orientations
            for workload in workloads.values():
                workload.step()
        for _ in range(args.rounds):
            for key, workload in workloads.items():
                gc.collect()
                times[key].append(sum(workload.step()))
        floor = times[FLOOR, False]
        for (method, compiled), own in times.items():
            ratios = [mine / other for mine, other in zip(own, floor, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            row = {"model": name, "method": method, "compiled": compiled, "ratio": middle, "low": low, "high": high}
            record["results"].append(row)
            print(
                f"{name} {method}{' compiled' if compiled else ''}: {middle:.3f} ({low:.3f} - {high:.3f})", flush=True
            )
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
