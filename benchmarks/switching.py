"""Two adapters on one resident base: what a switch costs, what it leaves of the base, and what their files hold.

Every method's two adapters get random values of the same size (training is not the point), after the moves that a run
makes. Slices switch by ``set_adapter``, which swaps rows and columns. Merged LoRA and SHiRA switch by unmerging one and
merging the other; unmerged LoRA switches for free and pays in every forward. Methods run interleaved.

    python benchmarks/switching.py --out benchmarks/results/switching.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn

from slicefine import SliceFineConfig, movers_of
from slicefine.bench.shapes import find_shape, make_model
from slicefine.training.report import environment

NAMES = ("first", "second")
TARGETS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"


def sliced(model: nn.Module, mode: str, r: int, moves: int) -> Any:
    made = None
    for number, name in enumerate(NAMES):
        config = SliceFineConfig(
            r=r, mode=mode, interval=10**6, seed=number, target_modules=TARGETS, positions="random"
        )
        made = get_peft_model(model, config, adapter_name=name) if made is None else made
        if number:
            made.add_adapter(name, config)
        made.set_adapter(name)
        (mover,) = (m for m in movers_of(made) if m.name == name)
        for move in range(moves + 1):
            with torch.no_grad():
                for layer in mover.layers.values():
                    layer.block(name).add_(0.01 * torch.randn_like(layer.block(name)))
                    layer.slicefine_active[name].add_(0)  # a write that the layer sees
                    layer.settle(name)
            for layer in mover.layers.values():
                layer.states[name].journal.count_step()
            if move < moves:
                mover.move()
    return made


def stock(model: nn.Module, config: Any) -> Any:
    made = get_peft_model(model, config, adapter_name=NAMES[0])
    made.add_adapter(NAMES[1], config)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if ("lora_B" in key) or "shira" in key:
                parameter.copy_(0.01 * torch.randn_like(parameter))
    return made


def weights(model: Any) -> list[Tensor]:
    own = (p for n, p in model.named_parameters() if "base_layer.weight" in n)
    return [p.detach().clone() for p in own]


def merged_switch(model: Any) -> Callable[[str], None]:
    def switch(name: str) -> None:
        model.unmerge_adapter()
        model.merge_adapter([name])

    return switch


def build(kind: str, base: nn.Module, count: int) -> tuple[Any, Callable[[str], None], list[Tensor]]:
    """A model with two adapters, the function that switches it, and its base weights."""
    original = [p.detach().clone() for n, p in base.named_parameters() if _is_target(n)]
    if kind.startswith("slices"):
        _, mode, r, moves = kind.split()
        model = sliced(base, mode, int(r), int(moves))
        return model, model.set_adapter, original
    if kind.startswith("lora"):
        model = stock(base, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    else:  # as many entries as the slices have in training
        per_layer = sum(sum(p.shape) for p in original)
        model = stock(base, ShiraConfig(r=max(1, round(count / per_layer)), target_modules=TARGETS))
    if "unmerged" in kind:
        return model, model.set_adapter, original
    model.merge_adapter([NAMES[1]])
    return model, merged_switch(model), original


def _is_target(name: str) -> bool:
    import re

    return name.endswith(".weight") and re.fullmatch(TARGETS, name.removesuffix(".weight")) is not None


def file_bytes(model: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[NAMES[1]], save_embedding_layers=False)
        return (Path(folder) / NAMES[1] / "adapter_model.safetensors").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    shape = find_shape("roberta", layers=args.layers, width=args.width)
    kinds = [
        "slices alternate 5 8",
        "slices row 5 8",
        "slices column 5 8",
        "slices column 12 8",
        "slices alternate 5 0",
        "lora r=8 merged",
        "lora r=8 unmerged",
        "shira merged",
    ]
    built, rows, count = {}, {}, 0
    for kind in kinds:
        torch.manual_seed(0)
        model, switch, original = build(kind, make_model(shape), count)
        movers = movers_of(model)
        active = (
            movers[0].active_entries()
            if movers
            else sum(p.numel() for n, p in model.named_parameters() if NAMES[1] in n)
        )
        count = count or active
        built[kind] = (model, switch, original)
        rows[kind] = {"in training": active, "file bytes": file_bytes(model), "times": []}
        switch(NAMES[0])
    for _ in range(args.rounds):
        for kind, (_, switch, _) in built.items():
            for name in reversed(NAMES):
                begin = time.perf_counter()
                switch(name)
                rows[kind]["times"].append(time.perf_counter() - begin)
    layers = len(next(iter(built.values()))[2])
    for kind, (model, _, original) in built.items():
        row = rows[kind]
        times = sorted(row.pop("times"))
        row["switch ms"] = 1000 * statistics.median(times)
        row["quartiles ms"] = [1000 * times[len(times) // 4], 1000 * times[3 * len(times) // 4]]
        row["per layer us"] = 1000 * row["switch ms"] / layers
        if "unmerged" not in kind:
            if kind.startswith("slices"):
                with model.disable_adapter():
                    back = weights(model)
            else:
                model.unmerge_adapter()
                back = weights(model)
            pairs = list(zip(back, original, strict=True))
            row["base changed by"] = max(float((a - b).abs().max()) for a, b in pairs)
        print(kind, json.dumps(row))
    if args.out is not None:
        content = {
            "date": time.strftime("%Y-%m-%d"),
            "layers": layers,
            "sizes": [args.layers, args.width],
            **environment(),
        }
        args.out.write_text(json.dumps(content | {"rounds": args.rounds, "methods": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
