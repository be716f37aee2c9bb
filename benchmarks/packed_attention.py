"""A real pretrained ViT whose attention is packed (nn.MultiheadAttention), trained on flowers through `in_proj_weight`.

The model is a state dict of a small ViT trained on CIFAR-10: patches of 4, width 128, six post-norm blocks of
``nn.TransformerEncoder``. Each method trains the new head beside its own part: nothing, slices of the packed
projections, slices of all layers, PEFT's LoRA on the attention modules, or everything. The rate of each is chosen on a
sixth of the train rows (seed 0); the test rows are read once per seed with that rate.

    python benchmarks/packed_attention.py --model VIT_CIFAR10.pth --data FLOWERS12 --out packed_attention.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from slicefine import attach

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10's, as in its pretraining
RANK, LORA_RANK, BATCH, MOVES = 12, 8, 16, 3


class ViT(nn.Module):
    """The pretrained model's architecture; names as in its state dict."""

    def __init__(self, classes: int, width: int = 128, depth: int = 6, hidden: int = 256) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 4, stride=4)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 65, width))
        block = nn.TransformerEncoderLayer(width, 8, hidden, dropout=0.0, activation="gelu", batch_first=True)
        self.transformer = nn.TransformerEncoder(block, depth)
        self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, pixels: Tensor) -> Tensor:
        """``(batch, 3, 32, 32)`` to ``(batch, classes)``."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.mlp_head(self.transformer(x)[:, 0])


def pretrained(file: Path, classes: int) -> ViT:
    """The pretrained model with a new head."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    model = ViT(classes)
    head = model.mlp_head[1].state_dict()
    model.load_state_dict({**state, **{f"mlp_head.1.{name}": tensor for name, tensor in head.items()}})
    return model


def prepare(model: ViT, method: str, steps: int) -> nn.Module:
    """Freeze the model and make one method's part trainable, beside the head."""
    if method == "full":
        return model
    model.requires_grad_(False)
    options: dict[str, Any] = {"r": RANK, "mode": "alternate", "moves": MOVES, "total_steps": steps, "train_rest": True}
    if method == "in_proj":
        attach(model, target_modules=["self_attn"], minimum_steps=1, **options)
    elif method == "all":
        attach(model, exclude_modules=["mlp_head.1"], minimum_steps=1, **options)
    elif method == "lora":
        wrapped = get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=16, target_modules=["self_attn"]))
        wrapped.base_model.model.mlp_head.requires_grad_(True)
        return wrapped
    model.mlp_head.requires_grad_(True)
    return model


METHODS = {  # rates to choose from
    "head": (1e-3, 3e-3, 1e-2),
    "in_proj": (3e-4, 1e-3, 3e-3),
    "all": (3e-4, 1e-3, 3e-3),
    "lora": (3e-4, 1e-3, 3e-3),
    "full": (1e-4, 3e-4, 1e-3),
}


def load(folder: Path, split: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Pictures ``(rows, 3, 32, 32)``, normalised, and labels."""
    rows = load_dataset("parquet", data_files={split: str(folder / f"{split}.parquet")}, split=split)
    rows = rows.shuffle(seed=0).select(range(min(limit or len(rows), len(rows))))
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    pixels = []
    for picture in rows["image"]:
        small = picture.convert("RGB").resize((32, 32))
        values = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
        pixels.append((values / 255 - mean) / std)
    return torch.stack(pixels), torch.tensor(rows["label"])


def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Share of pictures told right, in percent."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in pixels.split(64)])
    model.train()
    return 100 * float((found == labels).float().mean())


def run(make: Callable[[], ViT], method: str, rate: float, seed: int, train: Any, test: Any, steps: int) -> dict:
    """Train once and measure."""
    torch.manual_seed(seed)
    model = prepare(make(), method, steps)
    head = [p for n, p in model.named_parameters() if p.requires_grad and "mlp_head" in n]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and "mlp_head" not in n]
    groups = [{"params": head, "lr": rate if method in ("head", "full") else 3e-3}]
    groups += [{"params": rest, "lr": rate}] if rest else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = train
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        picked = torch.randint(len(labels), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(pixels[picked]), labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "accuracy": accuracy(model, *test),
        "trainable at a time": sum(p.numel() for p in rest),
        "first loss": statistics.mean(losses[:10]),
        "last loss": statistics.mean(losses[-10:]),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--limit", type=int, help="rows of each split, for a quick look")
    args = parser.parse_args()
    torch.backends.mha.set_fastpath_enabled(False)  # it reads the weights past PEFT's LoRA, as if there were none
    train, test = load(args.data, "train", args.limit), load(args.data, "test", args.limit)
    classes = int(train[1].max()) + 1
    base = pretrained(args.model, classes)
    held = len(train[1]) // 6
    fit, validation = tuple(t[held:] for t in train), tuple(t[:held] for t in train)

    def make() -> ViT:
        return copy.deepcopy(base)

    search, results = [], []
    for method, rates in METHODS.items():
        own = [run(make, method, rate, 0, fit, validation, args.steps) for rate in rates]
        search += own
        best = max(own, key=lambda found: found["accuracy"])["rate"]
        results += [run(make, method, best, seed, fit, test, args.steps) for seed in args.seeds]
        values = [found["accuracy"] for found in results if found["method"] == method]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{method:8} rate {best:g}  test {statistics.mean(values):.1f} +- {spread:.1f}", flush=True)
    record = {
        "versions": {"torch": torch.__version__, "peft": peft.__version__},
        "device": f"cpu ({torch.get_num_threads()} threads)",
        "steps": args.steps,
        "search": search,
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
