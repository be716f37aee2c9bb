"""How far a short run moves each kind of layer: rows, columns and LoRA beside each other, and where the energy lies.

Two measurements on the encoder of `accuracy_sweep.py`:

- *Energy*: the share of a layer's mean squared input that the first block of columns carries, in the order of index
  and in the order of input energy. A column slice can use only what flows through its coordinates.
- *Update scale*: after training, for each shape of layer, the change of the weight relative to the layer
  (``|dW| / |W|``, Frobenius), the change of the active entries relative to their own values, and what it does to the
  layer's output (``|x dW^T| / |x W^T|`` on 128 validation texts). Learning rates compare only through the last one.

    python benchmarks/update_scale.py --model MODEL_DIR --data GLUE_DIR --out benchmarks/results/update_scale.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accuracy_sweep import TARGETS, TASKS, build, collate, load_split, ordered_positions, scores
from torch import Tensor, nn
from transformers import AutoTokenizer, BertForSequenceClassification
from transformers.utils import logging

from slicefine.geometry import block_count, block_start
from slicefine.targets import match_layers

LENGTHS = {"sst2": 32, "qqp": 40, "qnli": 48}
RUNS: dict[str, dict[str, Any]] = {
    "12 rows": {"method": "slicefine", "lr": 2e-3, "slice": {"r": 12, "mode": "row"}},
    "12 columns": {"method": "slicefine", "lr": 3e-3, "slice": {"r": 12, "mode": "column"}},
    "12 columns, by input energy": {
        "method": "slicefine", "lr": 3e-3, "slice": {"r": 12, "mode": "column"}, "order": "input",
    },
    "LoRA r=8": {"method": "lora", "lr": 1e-3},
}  # fmt: skip

Batch = tuple[dict[str, Tensor], Tensor]


def kind(name: str) -> str:
    """The role of a layer in its block: query, key, value, attention output, intermediate, output."""
    last = name.split(".")[-2:]
    if last[-1] != "dense":
        return last[-1]
    return "attention output" if ".attention." in name else last[0]


def energy_shares(model: nn.Module, batches: list[Batch], r: int) -> dict[str, dict[str, float]]:
    """Share of the input's mean square in one block of ``r`` columns, by layer kind (mean over layers)."""
    names = match_layers(model, TARGETS)
    table = scores(model, names, batches, "input")
    position = ordered_positions(table, r, "column")
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        energy = table[name]["column"]
        total, size = float(energy.sum()), energy.numel()
        starts = [block_start(b, size, r) for b in range(block_count(size, r))]
        blocks = [float(energy[s : s + r].sum()) / total for s in starts]
        best = position(0, name, tuple(model.get_submodule(name).weight.shape)).start
        found[kind(name)]["first in order of index"].append(blocks[0])
        found[kind(name)]["first in order of energy"].append(blocks[starts.index(best)])
        found[kind(name)]["median block"].append(statistics.median(blocks))
    return {k: {what: round(100 * statistics.mean(v), 2) for what, v in rows.items()} for k, rows in found.items()}


def dense_changes(model: nn.Module, base: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """``trained - original`` of every target layer's weight, for slices and LoRA alike."""
    changes = {}
    for name in names:
        layer = model.get_submodule(name)
        if hasattr(layer, "get_delta_weight"):
            changes[name] = layer.get_delta_weight("default").detach()
        else:
            changes[name] = layer.base_layer.weight.detach() - base[f"{name}.weight"]
    return changes


def output_changes(
    model: nn.Module, base: dict[str, Tensor], changes: dict[str, Tensor], batch: Any
) -> dict[str, float]:
    """``|x dW^T| / |x W^T|`` of each layer on one batch, bias left out."""
    ratios: dict[str, float] = {}
    handles = []
    for name, change in changes.items():

        def look(module: nn.Module, args: Any, name: str = name, change: Tensor = change) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            ratios[name] = float((x @ change.T).norm() / (x @ base[f"{name}.weight"].T).norm())

        handles.append(model.get_submodule(name).register_forward_pre_hook(look))
    model.eval()
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return ratios


def train(run: dict[str, Any], model: nn.Module, batches: list[Batch]) -> nn.Module:
    torch.manual_seed(0)
    nn.init.normal_(model.classifier.weight, std=0.02)
    nn.init.zeros_(model.classifier.bias)
    model, groups, _ = build(run, model, len(batches), batches[:8])
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warm = max(1, len(batches) // 16)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, (len(batches) - s) / (len(batches) - warm))
    )
    model.train()
    for inputs, labels in batches:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        optimizer.step()
        schedule.step()
    return model


def summarise(changes: dict[str, Tensor], base: dict[str, Tensor], outputs: dict[str, float]) -> dict[str, Any]:
    """Means over the layers of one shape ``(out, in)``."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, change in changes.items():
        weight = base[f"{name}.weight"]
        touched = change != 0
        cell = found[" x ".join(map(str, weight.shape))]
        cell["dW / W"].append(float(change.norm() / weight.norm()))
        cell["dW / W, touched entries"].append(float(change.norm() / weight[touched].norm()))
        cell["output"].append(outputs[name])
    return {shape: {k: round(100 * statistics.mean(v), 2) for k, v in cell.items()} for shape, cell in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

    def fresh() -> nn.Module:
        return BertForSequenceClassification.from_pretrained(args.model, num_labels=2, **dropout)

    base = {k: v.clone() for k, v in fresh().state_dict().items()}
    names = match_layers(fresh(), TARGETS)
    record: dict[str, Any] = {
        "command": f"python benchmarks/update_scale.py --steps {args.steps} (percent everywhere)",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "energy": {},
        "scale": {},
    }
    for task in args.tasks:
        length = LENGTHS[task]
        rows, labels = load_split(
            args.data / task / "train.parquet", TASKS[task][0], tokenizer, 16 * args.steps, length
        )
        held, _ = load_split(args.data / task / "validation.parquet", TASKS[task][0], tokenizer, 128, length)
        batches = [
            (collate(rows[i : i + 16], tokenizer.pad_token_id, "cpu"), labels[i : i + 16])
            for i in range(0, len(rows), 16)
        ]
        probe = collate(held, tokenizer.pad_token_id, "cpu")
        model = fresh()
        model.requires_grad_(False)
        record["energy"][task] = {f"r={r}": energy_shares(model, batches[:8], r) for r in (5, 12)}
        record["scale"][task] = {}
        for title, run in RUNS.items():
            model = train(run, fresh(), batches)
            changes = dense_changes(model, base, names)
            outputs = output_changes(model, base, changes, probe)
            record["scale"][task][title] = summarise(changes, base, outputs)
            print(task, title, json.dumps(record["scale"][task][title]), flush=True)
        print(task, json.dumps(record["energy"][task]), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
