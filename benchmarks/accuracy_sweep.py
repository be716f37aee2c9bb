"""Which settings of SliceFine reach what accuracy: a sweep over rates, modes, ranks, moves, positions and policies.

Every run fine-tunes the same pretrained encoder on one text-classification task and reports the metric on the
*validation* split (test data is never read here). Runs come from a JSON-lines plan; finished ones are skipped, so an
interrupted sweep goes on where it stopped. Several worker processes share one device.

    python benchmarks/accuracy_sweep.py --model MODEL_DIR --data GLUE_DIR --plan plan.jsonl --out results.jsonl \
        --workers 12 --device cuda

A plan line: {"task": "sst2", "method": "slicefine", "lr": 0.003, "seed": 0, "slice": {"r": 5, "mode": "row"}}
Methods: slicefine, lora (PEFT), full, head. Optional keys: head_lr, column_rate (learning-rate factor of column
slices in alternate mode), weight_decay, dropout, epochs, rows, batch, max_length, order ("input" | "gradient" |
"weight": positions by score).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

TASKS: dict[str, tuple[tuple[str, ...], str]] = {
    "sst2": (("sentence",), "accuracy"),
    "cola": (("sentence",), "matthews"),
    "mrpc": (("sentence1", "sentence2"), "accuracy"),
    "rte": (("sentence1", "sentence2"), "accuracy"),
    "qnli": (("question", "sentence"), "accuracy"),
    "qqp": (("question1", "question2"), "accuracy"),
}
TARGETS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"


def load_split(
    path: Path, columns: tuple[str, ...], tokenizer: Any, limit: int | None, length: int = 128
) -> tuple[list[Any], Tensor]:
    frame = pd.read_parquet(path)
    if limit is not None and len(frame) > limit:
        frame = frame.sample(limit, random_state=0)
    texts = [list(frame[c].astype(str)) for c in columns]
    encoded = tokenizer(*texts, truncation=True, max_length=length)
    keys = ("input_ids", "token_type_ids")
    rows = [{k: encoded[k][i] for k in keys} for i in range(len(frame))]
    return rows, torch.tensor(frame["label"].to_numpy())


def collate(rows: list[Any], pad: int, device: str) -> dict[str, Tensor]:
    width = 8 * math.ceil(max(len(r["input_ids"]) for r in rows) / 8)
    ids = torch.full((len(rows), width), pad)
    kinds = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n], kinds[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), torch.tensor(row["token_type_ids"]), 1
    return {"input_ids": ids.to(device), "token_type_ids": kinds.to(device), "attention_mask": mask.to(device)}


def metric(kind: str, predicted: Tensor, labels: Tensor) -> float:
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    score = matthews_corrcoef if kind == "matthews" else accuracy_score
    return 100 * float(score(labels.numpy(), predicted.numpy()))


def scores(model: nn.Module, names: list[str], batches: list[Any], kind: str) -> dict[str, dict[str, Tensor]]:
    """Score of each row and column of each layer: input energy (columns), gradient or weight norm (both)."""
    result: dict[str, dict[str, Tensor]] = defaultdict(dict)
    handles = []
    for name in names:
        layer = model.get_submodule(name)
        if kind == "gradient":
            layer.weight.requires_grad_(True)
        elif kind == "input":

            def hook(module: nn.Module, args: Any, name: str = name) -> None:
                energy = args[0].detach().reshape(-1, args[0].shape[-1]).square().sum(0)
                result[name]["column"] = result[name].get("column", 0) + energy

            handles.append(layer.register_forward_pre_hook(hook))
    model.train()
    for inputs, labels in batches:
        loss = nn.functional.cross_entropy(model(**inputs).logits, labels)
        if kind == "gradient":
            loss.backward()
    for handle in handles:
        handle.remove()
    for name in names:
        weight = model.get_submodule(name).weight
        if kind == "input":
            result[name]["row"] = torch.zeros(weight.shape[0])  # no preference: the sweep's order
        else:
            square = (weight.grad if kind == "gradient" else weight.detach()).square()
            result[name] = {"row": square.sum(1), "column": square.sum(0)}
        weight.grad = None
        weight.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return result


def ordered_positions(table: dict[str, dict[str, Tensor]], r: int, mode: str) -> Any:
    """A position function that visits blocks in the order of their score, best first."""
    from slicefine import Slice
    from slicefine.geometry import block_count, block_start

    orders: dict[tuple[str, str], list[int]] = {}
    for name, by_axis in table.items():
        for axis, score in by_axis.items():
            size = score.numel()
            width = min(r, size)
            starts = [block_start(b, size, width) for b in range(block_count(size, width))]
            sums = [float(score[s : s + width].sum()) for s in starts]
            orders[name, axis] = [
                s for _, s in sorted(zip(sums, starts, strict=True), key=lambda pair: (-pair[0], pair[1]))
            ]

    def position(visit: int, layer: str, shape: tuple[int, int]) -> Any:
        axis = ("row", "column")[visit % 2] if mode == "alternate" else mode
        turn = visit // 2 if mode == "alternate" else visit
        order = orders[layer, axis]
        return Slice(axis, order[turn % len(order)], min(r, shape[0] if axis == "row" else shape[1]))

    return position


def build(run: dict[str, Any], base: nn.Module, total: int, calibration: list[Any]) -> tuple[nn.Module, list[Any], Any]:
    """Model, parameter groups and tuner of one run."""
    method, lr = run["method"], run["lr"]
    head = [p for n, p in base.named_parameters() if n.startswith("classifier")]
    head_group = {"params": head, "lr": run.get("head_lr") or lr}
    if method == "full":
        base.requires_grad_(True)
        rest = [p for n, p in base.named_parameters() if not n.startswith("classifier")]
        return base, [{"params": rest, "lr": lr}, head_group], None
    base.requires_grad_(False)
    for p in head:
        p.requires_grad_(True)
    if method == "head":
        return base, [head_group], None
    if method == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        r = run.get("r", 8)
        config = LoraConfig(r=r, lora_alpha=run.get("alpha", 2 * r), target_modules=TARGETS, lora_dropout=0.0)
        base = inject_adapter_in_model(config, base)
        for p in head:
            p.requires_grad_(True)
        own = [p for n, p in base.named_parameters() if "lora_" in n]
        return base, [{"params": own, "lr": lr}, head_group], None
    from slicefine import attach
    from slicefine.targets import match_layers

    settings = {"r": 5, "mode": "alternate", "moves": 8, **run["slice"]}
    if run.get("order"):
        names = match_layers(base, TARGETS)
        table = scores(base, names, calibration, run["order"])
        settings["positions"] = ordered_positions(table, settings["r"], settings["mode"])
        for p in head:
            p.requires_grad_(True)
    tuner = attach(base, target_modules=TARGETS, total_steps=total, train_rest=False, **settings)
    for p in head:
        p.requires_grad_(True)
    return base, [{"params": tuner.parameters(), "lr": lr}, head_group], tuner


def train(run: dict[str, Any], base: nn.Module, data: Any, device: str, pad: int) -> dict[str, Any]:
    import warnings

    warnings.filterwarnings("ignore", message="SliceFine")
    torch.manual_seed(run["seed"])
    nn.init.normal_(base.classifier.weight, std=0.02)
    nn.init.zeros_(base.classifier.bias)
    (rows, labels), (val_rows, val_labels) = data
    batch, epochs = run.get("batch", 32), run.get("epochs", 4)
    per_epoch = len(rows) // batch
    total = per_epoch * epochs
    generator = torch.Generator().manual_seed(1000 + run["seed"])

    def _by_length(indices: list[int]) -> list[int]:
        return sorted(indices, key=lambda j: len(rows[j]["input_ids"]))

    def batches() -> Any:
        order = torch.randperm(len(rows), generator=generator).tolist()
        group = 8 * batch  # rows of similar length share a batch: less padding, the same rows for every method
        order = [j for i in range(0, len(order), group) for j in _by_length(order[i : i + group])]
        starts = torch.randperm(per_epoch, generator=generator).tolist()
        for i in starts:
            picked = order[i * batch : (i + 1) * batch]
            yield collate([rows[j] for j in picked], pad, device), labels[picked].to(device)

    calibration = [b for b, _ in zip(batches(), range(8), strict=False)] if run.get("order") else []
    model, groups, tuner = build(run, base, total, calibration)
    optimizer = torch.optim.AdamW(groups, weight_decay=run.get("weight_decay", 0.0), fused=device == "cuda")
    warm = max(1, int(0.06 * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, max(0.0, (total - s) / (total - warm)))
    )
    ratio = run.get("column_rate")
    curve, losses = [], torch.zeros((), device=device)
    start, step = time.perf_counter(), 0
    for _ in range(epochs):
        model.train()
        for inputs, target in batches():
            if ratio and tuner is not None:  # another rate for column slices, where modes alternate
                axis = next(iter(tuner.mover.slices().values())).axis
                scale = ratio if axis == "column" else 1.0
                optimizer.param_groups[0]["lr"] = schedule.get_last_lr()[0] * scale
            loss = nn.functional.cross_entropy(model(**inputs).logits, target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
            optimizer.step()
            schedule.step()
            losses += loss.detach()
            step += 1
        if step < total:  # one look at validation, at the end: nothing is chosen by epoch
            continue
        model.eval()
        with torch.no_grad():
            predicted = torch.cat(
                [
                    model(**collate(val_rows[i : i + 256], pad, device)).logits.argmax(-1).cpu()
                    for i in range(0, len(val_rows), 256)
                ]
            )
        curve.append(round(metric(TASKS[run["task"]][1], predicted, val_labels), 3))
    trainable = sum(p.numel() for g in groups for p in g["params"])
    return {
        **run,
        "final": curve[-1],
        "train_loss": round(float(losses) / step, 4),
        "steps": total,
        "moves": tuner.mover.visits - 1 if tuner else None,
        "trainable": trainable,
        "seconds": round(time.perf_counter() - start, 2),
    }


def worker(number: int, args: argparse.Namespace, plan: list[dict[str, Any]], queue: Any, results: Any) -> None:
    torch.set_num_threads(1)
    from transformers import AutoTokenizer, BertForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pristine = BertForSequenceClassification.from_pretrained(args.model, num_labels=2).state_dict()
    cache: dict[Any, Any] = {}
    while True:
        index = queue.get()
        if index is None:
            return
        run = plan[index]
        key = (run["task"], run.get("rows", 2560), run.get("max_length", 128))
        if key not in cache:
            columns = TASKS[run["task"]][0]
            folder = Path(args.data) / run["task"]
            cache[key] = (
                load_split(folder / "train.parquet", columns, tokenizer, key[1], key[2]),
                load_split(folder / "validation.parquet", columns, tokenizer, None, key[2]),
            )
        rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), run.get("dropout", 0.0))
        config = BertForSequenceClassification.config_class.from_pretrained(args.model, num_labels=2, **rates)
        base = BertForSequenceClassification(config)
        base.load_state_dict(pristine)
        try:
            results.put(train(run, base.to(args.device), cache[key], args.device, tokenizer.pad_token_id))
        except Exception as error:  # one bad run must not end the sweep; it is reported
            results.put({**run, "error": f"{type(error).__name__}: {error}"[:300]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--plan", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no new run after this many seconds")
    args = parser.parse_args()
    begin = time.perf_counter()
    plan = [json.loads(line) for line in Path(args.plan).read_text().splitlines() if line.strip()]
    out = Path(args.out)
    finished = {
        json.dumps(json.loads(x).get("plan"), sort_keys=True)
        for x in (out.read_text().splitlines() if out.exists() else [])
    }
    open_runs = [i for i, run in enumerate(plan) if json.dumps(run, sort_keys=True) not in finished]
    context = torch.multiprocessing.get_context("spawn")
    queue, results = context.Queue(2), context.Queue()
    processes = [
        context.Process(target=worker, args=(n, args, plan, queue, results), daemon=True) for n in range(args.workers)
    ]
    for process in processes:
        process.start()
    import threading

    sent = []

    def feed() -> None:
        for i in open_runs:
            if time.perf_counter() - begin > args.seconds:
                break
            queue.put(i)
            sent.append(i)
        for _ in processes:
            queue.put(None)

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    count = 0
    with out.open("a") as file:
        while feeder.is_alive() or count < len(sent):
            try:
                record = results.get(timeout=1.0)
            except Exception:
                continue
            base = {k: v for k, v in record.items() if any(k in run for run in plan)}
            record["plan"] = base
            file.write(json.dumps(record) + "\n")
            file.flush()
            count += 1
    print(f"{count} runs in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
