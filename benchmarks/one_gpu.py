"""torch.compile, CUDA graphs and FSDP2 over moves, on one device: is it the eager run, and what does a step take?

The same model and batches are trained by each engine over several moves. Reported are the slices' visits, the largest
difference of a loss, the weights' difference as a share of what eager training changed, how often the compiler made a
graph, the median step (steps that compile left out) and, on a GPU, the peak of allocated memory.

    python benchmarks/one_gpu.py --out benchmarks/results/one_gpu.json

`--smoke` runs a tiny shape, on any device, with a compiler's back end that makes no code.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import slicefine
from slicefine.bench.shapes import Shape, find_shape, make_batch, make_model, step_loss
from slicefine.bench.workload import now
from slicefine.training.report import environment

MODES = ("row", "column", "alternate")
Engine = Callable[[Any], Any]


def sharded(model: Any) -> Any:
    for block in model.layers:
        fully_shard(block)
    return fully_shard(model)


def engines(smoke: bool) -> dict[str, Engine]:
    backend = {"backend": "aot_eager"} if smoke else {}
    graphs = backend or {"mode": "reduce-overhead"}  # CUDA graphs, on a GPU
    return {
        "eager": lambda model: model,
        "compiled": lambda model: torch.compile(model, **backend),
        "CUDA graphs": lambda model: torch.compile(model, **graphs),
        "FSDP2": sharded,
        "FSDP2, compiled": lambda model: torch.compile(sharded(model), **backend),
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().to("cpu", copy=True)  # a copy on the device would count in the peak


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [whole(p) for n, p in model.named_parameters() if n.endswith("weight") and p.dim() == 2]


def graphs_made() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def train(shape: Shape, engine: Engine, mode: str, settings: argparse.Namespace) -> dict[str, Any]:
    """One run: losses, seconds, visits, and the weights before and after."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    model: Any = make_model(shape).to(device, dtype)
    tuner = slicefine.attach(model, mode=mode, r=settings.rank, interval=settings.interval)
    before = weights(model)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    forward = engine(model)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-3, weight_decay=0.01)
    seconds, losses = [], []
    for step in range(settings.steps):
        batch = make_batch(shape, device, dtype, seed=step)
        began, made = now(), graphs_made()
        loss = step_loss(forward, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if graphs_made() == made and step > 1:
            seconds.append(now() - began)
    return {
        "losses": losses,
        "ms": 1e3 * statistics.median(seconds) if seconds else math.nan,
        "graphs": graphs_made(),
        "visits": tuner.mover.visits,
        "peak bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "before": before,
        "after": weights(model),
    }


def distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in zip(first, second, strict=True)))


def compared(run: dict[str, Any], eager: dict[str, Any]) -> dict[str, Any]:
    """A run's row: what it did, beside the eager one."""
    changed = distance(eager["before"], eager["after"])
    return {
        "ms": run["ms"],
        "ratio": run["ms"] / eager["ms"],
        "graphs": run["graphs"],
        "visits": run["visits"],
        "peak bytes": run["peak bytes"],
        "loss difference": max(abs(a - b) for a, b in zip(run["losses"], eager["losses"], strict=True)),
        "weight difference": distance(run["after"], eager["after"]) / changed,
        "losses": [run["losses"][0], run["losses"][-1]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="llama-160m", help="a shape of the Llama family (slicefine bench --help)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--interval", type=int, default=8)
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--engines", nargs="+", default=list(engines(False)))
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--smoke", action="store_true")
    settings = parser.parse_args()
    sizes = {"layers": 2, "width": 64, "batch": 2, "length": 8} if settings.smoke else {}
    shape = find_shape(settings.model, **sizes)
    record = {"settings": {k: str(v) for k, v in vars(settings).items()}, **environment(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        kind = "nccl" if settings.device == "cuda" else "gloo"
        torch.distributed.init_process_group(kind, init_method=f"file://{folder}/store", rank=0, world_size=1)
        for mode in settings.modes:
            eager = None
            for name, engine in engines(settings.smoke).items():
                if name not in ("eager", *settings.engines):
                    continue
                run = train(shape, engine, mode, settings)
                eager = eager or run
                row = {"mode": mode, "engine": name, **compared(run, eager)}
                record["rows"].append(row)
                print(
                    f"{mode:9} {name:16} {row['ms']:8.1f} ms  {row['ratio']:.3f}  {row['graphs']} graphs  "
                    f"{row['visits']} visits  weights {row['weight difference']:.1e}",
                    flush=True,
                )
                record["date"] = time.strftime("%Y-%m-%d")
                settings.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
