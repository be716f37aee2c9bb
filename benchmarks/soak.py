"""Thousands of moves on a small model: does memory stay flat, does a step stay as fast, are the weights still right?

Slices alternate between rows and columns and go around every matrix many times. The fast path runs first, alone, while
memory is looked at: the process's resident memory, the bytes of all tensors alive, the journals' values, the adapter
file. Then the slow twin (`slicefine.reference`) makes the same steps, and all weights are compared.

    python benchmarks/soak.py --moves 2000 --interval 3 --width 16 --out benchmarks/results/soak.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slicefine import SliceTuner, attach
from slicefine.reference import ReferenceSliceLinear, run
from slicefine.schedule import Schedule
from slicefine.training.report import environment

NAME, RANK, BATCHES = "default", 3, 20
# at the usual 1e-8 two copies of the twin that begin 1e-15 apart are 0.05 apart after 10,000 steps (results/soak.md)
EPSILON = 1e-3
KEYS = ("resident", "tensors", "originals", "file")


def make_model(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, 8)]
    return nn.Sequential(*layers).double()


def make_batches(width: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((16, width), (16, 8))
    return [
        tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[misc]
        for _ in range(BATCHES)
    ]


def losses(model: nn.Module, data: list[tuple[Tensor, Tensor]], steps: int) -> Iterator[Callable[[], Tensor]]:
    for number in range(steps):
        x, y = data[number % len(data)]
        yield lambda x=x, y=y: (model(x) - y).square().mean()  # type: ignore[misc]


def optimizer_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01, eps=EPSILON)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensor_bytes() -> int:
    """Bytes of all tensors alive, each storage once."""
    gc.collect()
    found = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter)]  # no fake ones of a compiler
    sizes = {}
    for tensor in found:
        with contextlib.suppress(RuntimeError):  # one that a compiler left without a storage
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def look(tuner: SliceTuner, folder: str) -> dict[str, int]:
    """What there is after some moves."""
    path = Path(folder, "slices.safetensors")
    tuner.save(path)
    journals = [layer.states[NAME].journal for layer in tuner.layers.values()]
    return {
        "move": tuner.mover.visits - 1,
        "resident": resident(),
        "tensors": tensor_bytes(),
        "originals": sum(v.nbytes for journal in journals for v in journal._originals.values()),
        "rows of the journals": sum(len(journal.visits) for journal in journals),
        "file": path.stat().st_size,
    }


def fast(moves: int, interval: int, width: int, count: int) -> tuple[SliceTuner, list[float], list[dict[str, int]]]:
    """The library's own loop, with the processor time of every step and ``count`` looks."""
    model, data = make_model(width), make_batches(width)
    tuner = attach(model, mode="alternate", r=RANK, interval=interval)
    optimizer = optimizer_of(tuner.parameters())
    seconds, looks = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, loss in enumerate(losses(model, data, moves * interval), start=1):
            began = time.process_time()
            optimizer.zero_grad()
            torch.autograd.backward(loss())
            optimizer.step()
            seconds.append(time.process_time() - began)
            if number % interval == 0:
                tuner.mover.note(loss=0.0)
            if number % (interval * max(1, moves // count)) == 0:
                looks.append(look(tuner, folder))
    return tuner, seconds, looks


def twin(moves: int, interval: int, width: int) -> dict[str, Tensor]:
    """The weights after the reference's steps."""
    model, data = make_model(width).requires_grad_(False), make_batches(width)
    layers = {}
    for name, module in list(model.named_children()):
        if isinstance(module, nn.Linear):
            layers[name] = ReferenceSliceLinear(module, Schedule("alternate", RANK, RANK), name)
            setattr(model, name, layers[name])
    optimizer = optimizer_of([layer.part_T for layer in layers.values()])
    run(layers, optimizer, losses(model, data, moves * interval), interval)
    return {name: layer.weight().detach() for name, layer in layers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=2000)
    parser.add_argument("--interval", type=int, default=5, help="steps between moves")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--looks", type=int, default=20, help="how often memory is looked at")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tuner, seconds, looks = fast(args.moves, args.interval, args.width, args.looks)
    expected = twin(args.moves, args.interval, args.width)
    found = {name: layer.dense() for name, layer in tuner.layers.items()}
    part = max(1, len(seconds) // 10)
    first, last = looks[len(looks) // 10], looks[-1]
    moved = max(1, last["move"] - first["move"])
    record: dict[str, Any] = {
        "moves": tuner.mover.visits - 1,
        "steps": len(seconds),
        "times around the largest matrix": round(args.moves * RANK / (2 * 2 * args.width), 1),
        "bytes per move": {
            key: (last[key] - first[key]) / moved for key in ("resident", "tensors", "originals", "file")
        },
        "step, last tenth / first tenth": statistics.median(seconds[-part:]) / statistics.median(seconds[:part]),
        "largest difference from the twin": max(float((found[n] - expected[n]).abs().max()) for n in found),
        "largest weight": max(float(weight.abs().max()) for weight in expected.values()),
        "equal at default tolerances": all(torch.allclose(found[n], expected[n], rtol=1e-7, atol=1e-7) for n in found),
        "looks": looks,
        **environment(),
        "settings": {**vars(args), "out": args.out.name},
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in record.items() if key != "looks"}, indent=1, default=str))


if __name__ == "__main__":
    main()
