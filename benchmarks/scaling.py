"""How step time / floor depends on width, depth, rank and the number of moves made; and a move of 3 billion weights.

Four sweeps with `slicefine bench`'s own measurement vary one size of a Llama type (width 768, two layers, 256 tokens,
rank 5: few tokens make overhead show). Then, on the shape of Llama-3.2-3B (12.8 GB in fp32), a step and a move of each
mode, with the largest tensor that the move and the optimizer's step allocate.

    python benchmarks/scaling.py --out benchmarks/results/scaling --threads 2
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slicefine.bench.measure import measure_shape
from slicefine.bench.methods import find_method, make_optimizer
from slicefine.bench.report import environment
from slicefine.bench.settings import BenchSettings
from slicefine.bench.shapes import find_shape, make_batch, make_model, step_loss
from slicefine.bench.workload import gradients_to_inputs, now, timed_step
from slicefine.mover import movers_of

MODES = ("row", "column", "alternate")
SWEEPS = {
    "width": (256, 512, 1024, 2048, 4096),
    "depth": (2, 4, 8, 16, 32),
    "rank": (1, 8, 32, 128),
    "moves": (0, 1, 10, 100),
}
SIZES = {"layers": 2, "batch": 1, "length": 256}  # of the Llama type, where the sweep does not vary them
Point = tuple[str, int]  # the line of the plot, and the value on its x axis


def groups(sweep: str, most: int | None = None) -> Iterator[tuple[dict[str, int], dict[str, Point]]]:
    """Sizes of a model, and the methods to measure on it; of the sweep's values, at most so many."""
    values = SWEEPS[sweep][:most]
    if sweep == "rank":
        yield {}, {f"{mode} r={r}": (mode, r) for r in values for mode in MODES}
    elif sweep == "moves":
        # not alternate: its timed steps move by themselves, to take both orientations in turn
        yield {}, {f"{mode} r=5 after {n} moves": (mode, n) for n in values for mode in ("row", "column")}
    else:
        for value in values:
            methods = {f"{mode} r=5": (mode, value) for mode in MODES} | {"lora r=8": ("lora r=8", value)}
            yield {"width" if sweep == "width" else "layers": value}, methods


def measure(args: argparse.Namespace, sweep: str) -> list[dict[str, Any]]:
    """The points of a sweep."""
    points = []
    for sizes, methods in groups(sweep, 1 if args.smoke else None):
        sizes = SIZES | sizes
        if args.smoke:
            sizes |= {"layers": 1, "length": 16, "width": min(sizes.get("width", 64), 128)}
        settings = BenchSettings(
            models="llama",
            methods=list(methods),
            rounds=args.rounds,
            device=args.device,
            dtype="float32",
            threads=args.threads,
            keep_memory=args.device == "cpu",
            **sizes,
        )
        result = measure_shape(settings, settings.shapes()[0])
        if result.skipped:
            print(result.skipped)
        for row in result.rows[2:]:
            line, value = methods[row.method]
            points.append({"line": line, "value": value, "ratio": row.ratio, "low": row.low, "high": row.high})
        print(sweep, sizes, f"noise {result.noise:.3f}", *(f"{r.method} {r.ratio:.3f}" for r in result.rows[2:]))
    return points


class Allocations(TorchDispatchMode):
    """The largest tensor, in entries, that an operation returns on a storage of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {a.untyped_storage()._cdata for a in tree_leaves(args) if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor) and item.untyped_storage()._cdata not in given:
                self.largest = max(self.largest, item.numel())
        return result


def large_move(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Median seconds of a step and of a move on a large shape, without the copies that a comparison would need."""
    gc.collect()  # the model before this one
    shape = find_shape("llama-3b", batch=1, length=32, **({"layers": 1, "width": 128} if args.smoke else {}))
    model = make_model(shape).to(args.device)
    weight = max(p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight"))
    method = find_method(f"{mode} r=5")
    model = method.build(model, shape.family)
    gradients_to_inputs(model)
    optimizer = make_optimizer(method, model)
    assert optimizer is not None
    (mover,) = movers_of(model)
    batch = make_batch(shape, torch.device(args.device), torch.float32)
    steps, moves = [], []
    for _ in range(6):
        steps.append(sum(timed_step(lambda: step_loss(model, batch), optimizer)))
        begin = now()
        mover.move()
        moves.append(now() - begin)
    step_loss(model, batch).backward()
    with Allocations() as seen:
        optimizer.step()
        mover.move()
    row = {"mode": mode, "step_seconds": statistics.median(steps[1:]), "move_seconds": statistics.median(moves[1:])}
    print(row | {"largest_allocation": seen.largest, "largest_weight": weight})
    return row | {"largest_allocation": seen.largest, "largest_weight": weight}


def draw(path: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    """One panel per sweep: median with quartiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for number, sweep in enumerate(SWEEPS):
        axes = figure.add_subplot(2, 2, number + 1)
        lines = dict.fromkeys(p["line"] for p in results[sweep])
        for line in lines:
            points = sorted((p for p in results[sweep] if p["line"] == line), key=lambda p: p["value"])
            middle = [p["ratio"] for p in points]
            spread = [[p["ratio"] - p["low"] for p in points], [p["high"] - p["ratio"] for p in points]]
            axes.errorbar([p["value"] for p in points], middle, yerr=spread, marker="o", capsize=3, label=line)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(xlabel={"depth": "layers", "moves": "moves made before"}.get(sweep, sweep), ylabel="step time / floor")
        axes.set_xscale("symlog" if sweep == "moves" else "log", base=10 if sweep == "moves" else 2)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--only", nargs="+", choices=[*SWEEPS, "large-move"], help="these; the others stay as they were"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny models, to try the script")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    record = {
        "command": f"python benchmarks/scaling.py {' '.join(sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(BenchSettings(device=args.device)),
        "dtype": "float32",
        "rounds": args.rounds,
        "sizes": SIZES,
    }

    def save() -> None:
        (args.out / "scaling.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    earlier = args.out / "scaling.json"
    if args.only and earlier.exists():
        record = json.loads(earlier.read_text(encoding="utf-8")) | {"again": record["command"]}
    for sweep in SWEEPS:
        if not args.only or sweep in args.only:
            record[sweep] = measure(args, sweep)
            save()
    if all(sweep in record for sweep in SWEEPS):
        draw(args.out / "scaling.png", record)
    if not args.only or "large-move" in args.only:
        record["large move"] = []
        for mode in MODES:
            record["large move"].append(large_move(args, mode))
            save()


if __name__ == "__main__":
    main()
