"""Three tasks, one after the other, on one encoder: what each keeps when others come on top, together, and taken back.

For cola, mrpc and sst2 in this order, and for each method: every task's validation metric when trained alone on the
base, on top of the tasks before it, after the later ones came on top, in one composed model, and the largest
difference of logits after the later ones were taken off again (0 is bit-identical). Every task has a head of its own.

- reserved, reserved-alternate: slices that keep out of what earlier tasks trained (``reserve=``), and ``compose``.
- overlapping: the same columns for every task; composed by the mean, and by the sum of the changes.
- continued: one adapter that moves on from task to task; taken back with ``undo``.
- lora: merged before the next task; composed by PEFT's ``add_weighted_adapter``; taken back by unmerging.

    python benchmarks/sequence.py --model MODEL_DIR --data GLUE_DIR --out benchmarks/results/sequence.jsonl

Finished (method, seed) pairs in the file are skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accuracy_sweep import TARGETS, TASKS, collate, load_split, metric
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, BertForSequenceClassification
from transformers.utils import logging

from slicefine import SliceFineConfig, energy_positions, movers_of
from slicefine.files.adapter import read_adapter, write_adapter
from slicefine.files.checkpoint import Checkpoint
from slicefine.files.compose import compose

METHODS = ("reserved", "reserved-alternate", "overlapping", "continued", "lora")
# steps of 16 rows and longest text, as in docs/results/real_input.md, and that table's rates
LENGTHS = {"cola": (640, 24), "mrpc": (240, 48), "sst2": (200, 40)}
RATES = {"slices": 2e-3, "lora": 5e-4}
MOVES, RANK, LORA_RANK, BATCH = 3, 12, 8, 16


class Run:
    """One method with one seed.

    Attributes:
        result: what was found, filled in by `all`.
    """

    def __init__(self, args: argparse.Namespace, method: str, seed: int, folder: Path) -> None:
        self.args, self.method, self.seed, self.folder = args, method, seed, folder
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.data = {task: self._load(task) for task in LENGTHS}
        self.heads: dict[str, dict[str, Tensor]] = {}
        self.result: dict[str, Any] = {"method": method, "seed": seed}

    def _load(self, task: str) -> tuple[Any, Any]:
        columns, length = TASKS[task][0], LENGTHS[task][1]
        files = [Path(self.args.data) / task / f"{split}.parquet" for split in ("train", "validation")]
        limits = (32, 32) if self.args.smoke else (None, None)
        train, validation = (
            load_split(file, columns, self.tokenizer, limit, length) for file, limit in zip(files, limits, strict=True)
        )
        return train, validation

    def steps(self, task: str) -> int:
        return 4 if self.args.smoke else LENGTHS[task][0]

    def base(self) -> Any:
        dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        model = BertForSequenceClassification.from_pretrained(self.args.model, num_labels=2, **dropout)
        return model.eval()

    def new_head(self, model: Any) -> None:
        torch.manual_seed(self.seed)
        nn.init.normal_(model.classifier.weight, std=0.02)
        nn.init.zeros_(model.classifier.bias)
        model.classifier.requires_grad_(True)

    def batches(self, task: str, count: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        rows, labels = self.data[task][0]
        generator = torch.Generator().manual_seed(1000 + self.seed)
        picked: list[int] = []
        for _ in range(count):
            if len(picked) < BATCH:
                picked = torch.randperm(len(rows), generator=generator).tolist()
            now, picked = picked[:BATCH], picked[BATCH:]
            yield collate([rows[i] for i in now], self.tokenizer.pad_token_id, "cpu"), labels[now]

    def adapt(self, model: Any, task: str, reserve: list[Path]) -> Any:
        """The model with a new adapter for a task, its head trainable."""
        self.new_head(model)
        if self.method == "lora":
            config: Any = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, target_modules=TARGETS)
        else:
            visits = MOVES + 1
            inputs = [batch for batch, _ in self.batches(task, 1 if self.args.smoke else 8)]
            config = SliceFineConfig(
                r=RANK,
                mode="alternate" if self.method == "reserved-alternate" else "column",
                moves=None if self.method == "continued" else MOVES,
                interval=math.ceil(self.steps(task) / visits) if self.method == "continued" else None,
                minimum_steps=1,
                total_steps=None if self.method == "continued" else self.steps(task),
                positions=energy_positions(model, inputs, r=RANK, target_modules=TARGETS),
                reserve=[str(folder) for folder in reserve] or None,
                target_modules=TARGETS,
                history=(MOVES + 1) * len(LENGTHS) + 1,
            )
        adapted = get_peft_model(model, config)
        model.classifier.requires_grad_(True)
        return adapted

    def train(self, model: Any, task: str) -> None:
        total, rate = self.steps(task), RATES["lora" if self.method == "lora" else "slices"]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
        warm = max(1, int(0.06 * total))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min((s + 1) / warm, max(0.0, (total - s) / max(1, total - warm)))
        )
        model.train()
        for inputs, labels in self.batches(task, total):
            loss = nn.functional.cross_entropy(model(**inputs).logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            schedule.step()
        model.eval()
        self.heads[task] = {k: v.clone() for k, v in _plain(model).classifier.state_dict().items()}

    def logits(self, model: Any, task: str, head: dict[str, Tensor] | None = None) -> Tensor:
        """Of the validation set, with the task's own head."""
        _plain(model).classifier.load_state_dict(head or self.heads[task])
        rows, _ = self.data[task][1]
        with torch.no_grad():
            parts = [
                model(**collate(rows[i : i + 256], self.tokenizer.pad_token_id, "cpu")).logits
                for i in range(0, len(rows), 256)
            ]
        return torch.cat(parts)

    def score(self, logits: Tensor, task: str) -> float:
        return metric(TASKS[task][1], logits.argmax(-1), self.data[task][1][1])

    def all(self) -> dict[str, Any]:
        if self.method != "continued":
            self.alone_and_composed()
        self.one_after_the_other()
        return self.result

    def alone_and_composed(self) -> None:
        folders, alone, heads = [], {}, {}
        for task in LENGTHS:
            model = self.adapt(self.base(), task, folders if self.method.startswith("reserved") else [])
            self.train(model, task)
            alone[task] = self.score(self.logits(model, task), task)
            heads[task] = self.heads[task]
            model.peft_config["default"].base_model_name_or_path = str(self.args.model)
            model.save_pretrained(self.folder / f"alone-{task}")
            folders.append(self.folder / f"alone-{task}")
        self.result["alone"] = alone
        self.result["file bytes"] = [(folder / "adapter_model.safetensors").stat().st_size for folder in folders]
        for name, model in self.composed(folders):
            self.result[name] = {task: self.score(self.logits(model, task, heads[task]), task) for task in LENGTHS}

    def composed(self, folders: list[Path]) -> Iterator[tuple[str, Any]]:
        if self.method == "lora":
            names = list(LENGTHS)
            model = PeftModel.from_pretrained(self.base(), folders[0], adapter_name=names[0])
            for name, folder in zip(names[1:], folders[1:], strict=True):
                model.load_adapter(folder, adapter_name=name)
            model.add_weighted_adapter(names, [1.0] * len(names), "all", combination_type="cat")
            model.set_adapter("all")
            yield "composed", model.eval()
            return
        for policy in ("refuse",) if self.method.startswith("reserved") else ("mean", "sum"):
            with Checkpoint(Path(self.args.model)) as files:
                whole = compose([read_adapter(folder) for folder in folders], files, policy)
            write_adapter(whole, self.folder / policy)
            model = PeftModel.from_pretrained(self.base(), self.folder / policy).eval()
            yield "composed" if policy == "refuse" else f"composed by {policy}", model

    def one_after_the_other(self) -> None:
        """Each task on top of those before it; then what each is worth, and what taking the later ones off restores."""
        folders: list[Path] = []
        on_top, off, seen = {}, {}, {}
        model: Any = self.base()
        for number, task in enumerate(LENGTHS):
            earlier = list(LENGTHS)[:number]
            if self.method == "continued" and number:
                self.new_head(_plain(model))
                (mover,) = movers_of(model)  # it moved on after the last step
                mover.settings.interval = math.ceil(self.steps(task) / (MOVES + 1))
                mover.begin_run(self.steps(task))
            else:
                model = self.adapt(model, task, folders if self.method.startswith("reserved") else [])
            before = dict(seen)
            self.train(model, task)
            seen = {name: self.logits(model, name) for name in [*earlier, task]}
            on_top[task] = self.score(seen[task], task)
            if self.method == "lora" and earlier:
                model.merge_adapter()
                model.unmerge_adapter()
                with model.disable_adapter():
                    off[task] = self.difference(model, before)
            elif self.method != "continued" and earlier:
                with model.disable_adapter():
                    off[task] = self.difference(model, before)
            if number == 0:
                first = dict(seen)
            if self.method != "continued":
                model.save_pretrained(self.folder / f"top-{task}")
                folders.append(self.folder / f"top-{task}")
                if number + 1 < len(LENGTHS):
                    model = model.merge_and_unload()
        self.result["on top"] = on_top
        self.result["after the later ones"] = {name: self.score(seen[name], name) for name in LENGTHS}
        if self.method == "continued":
            (mover,) = movers_of(model)
            mover.undo(mover.visits - (MOVES + 1))
            off["all later ones"] = self.difference(model, first)
        self.result["largest difference of logits with them off"] = off

    def difference(self, model: Any, before: dict[str, Tensor]) -> float:
        return max(float((self.logits(model, name) - logits).abs().max()) for name, logits in before.items())


def _plain(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="four steps per task, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="SliceFine")
    done = set()
    if args.out.exists():
        done = {(row["method"], row["seed"]) for row in map(json.loads, args.out.read_text().splitlines())}
    for seed in args.seeds:
        for method in args.methods:
            if (method, seed) not in done:
                with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
                    result = Run(args, method, seed, Path(folder)).all()
                with args.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(json.dumps(result))


if __name__ == "__main__":
    main()
