"""What flushing and checksums cost: saving and loading one adapter with and without them.

python benchmarks/file_overhead.py --out benchmarks/results/file_overhead.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from slicefine import attach, tuner


def main() -> None:
    """Interleaved rounds; medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(chosen.width, chosen.width) for _ in range(chosen.layers)))
    trained = attach(model, r=12, mode="alternate", interval=1, minimum_steps=1)
    for _ in range(8):
        trained.move()
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "t.safetensors")
        for _ in range(chosen.rounds):
            for name, patches in {
                "as it is": [],
                "without flushing": [mock.patch("os.fsync")],
                "without either": [mock.patch("os.fsync"), *_unchecked()],
            }.items():
                with ExitStack() as stack:
                    for patch in patches:
                        stack.enter_context(patch)
                    times.setdefault(f"save, {name}", []).append(_seconds(lambda: trained.save(file)))
                    times.setdefault(f"load, {name}", []).append(_seconds(lambda: trained.load(file)))
        size = file.stat().st_size
    record = {
        "command": "python benchmarks/file_overhead.py --out benchmarks/results/file_overhead.json",
        "date": date.today().isoformat(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in ("slicefine", "torch", "safetensors")},
        "file bytes": size,
        "layers": chosen.layers,
        "rounds": chosen.rounds,
        "median seconds": {name: statistics.median(found) for name, found in times.items()},
    }
    chosen.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["median seconds"], indent=1))


def _unchecked() -> list[mock._patch[object]]:
    return [mock.patch.object(tuner, "checksum", return_value="0" * 64), mock.patch.object(tuner, "check_tensor")]


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
