"""What a training step costs: SliceFine beside the frozen floor, LoRA, the paper's Listing 1 and full fine-tuning.

All variants run interleaved in one process (A B C ... A B C ...); medians, quartiles and ratios to the floor's run of
the same round are reported, with the floor twice as a check of the noise. The floor is the unwrapped model with every
weight frozen and gradients flowing to the embeddings: no method that back-propagates through all layers can be faster.
Saved activations are counted with saved-tensor hooks: distinct storages that are not weights.

    python benchmarks/step_cost.py --rounds 15 --out benchmarks/results/step_cost_cpu.json
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, RobertaConfig, RobertaModel

import slicefine
from slicefine.reference import Listing1Linear

SHAPES: dict[str, tuple[int, int]] = {"roberta": (16, 128), "llama": (4, 256)}


def make_model(kind: str, layers: int, width: int) -> nn.Module:
    """A randomly initialised encoder or decoder without a head (logits would hide activations)."""
    torch.manual_seed(0)
    if kind == "roberta":
        config = RobertaConfig(
            num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return RobertaModel(config, add_pooling_layer=False)
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=(8 * width // 3) // 64 * 64,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, vocab_size=1000,
    )  # fmt: skip
    return LlamaModel(config)


def sliced(mode: str, r: int) -> Callable[[nn.Module], nn.Module]:
    def build(model: nn.Module) -> nn.Module:
        config = slicefine.SliceFineConfig(r=r, mode=mode, interval=10_000, target_modules="all-linear")
        return get_peft_model(model, config)

    return build


def lora(r: int) -> Callable[[nn.Module], nn.Module]:
    def build(model: nn.Module) -> nn.Module:
        return get_peft_model(model, LoraConfig(r=r, lora_dropout=0.0, target_modules="all-linear"))

    return build


def listing1(mode: str, r: int) -> Callable[[nn.Module], nn.Module]:
    def build(model: nn.Module) -> nn.Module:
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, Listing1Linear(module, mode, r))
        return model

    return build


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def full(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "floor": frozen,
    "floor (again)": frozen,
    "slicefine row r=5": sliced("row", 5),
    "slicefine column r=5": sliced("column", 5),
    "slicefine alternate r=5": sliced("alternate", 5),
    "slicefine row r=12": sliced("row", 12),
    "slicefine column r=12": sliced("column", 12),
    "slicefine alternate r=12": sliced("alternate", 12),
    "listing 1 row r=5": listing1("row", 5),
    "listing 1 column r=5": listing1("column", 5),
    "lora r=8": lora(8),
    "full": full,
}


class Variant:
    """One method on its own copy of the model, with a fused AdamW over what it trains."""

    def __init__(self, build: Callable[[nn.Module], nn.Module], base: nn.Module, inputs: Tensor) -> None:
        self.model = build(copy.deepcopy(base)).train()
        self.inputs = inputs
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None

    def step(self) -> tuple[float, float, float]:
        """Seconds of forward, backward, and optimizer with everything that hangs on it."""
        inputs = self.inputs.detach().requires_grad_()
        begin = time.perf_counter()
        loss = self.model(inputs_embeds=inputs).last_hidden_state.square().mean()
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return middle - begin, end - middle, time.perf_counter() - end

    def saved_bytes(self) -> int:
        """Bytes of distinct storages that the forward keeps for backward, weights not counted."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        found: dict[int, int] = {}
        keep = []

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
                keep.append(tensor)  # a freed storage's address would be counted once for two tensors
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.model(inputs_embeds=self.inputs.detach().requires_grad_()).last_hidden_state.square().mean()
        del loss
        return sum(found.values())


def quartiles(values: list[float]) -> list[float]:
    return [round(v, 4) for v in statistics.quantiles(values, n=4)]


def measure(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    batch, length = SHAPES[kind]
    base = make_model(kind, args.layers, args.width)
    inputs = torch.randn(batch, length, args.width, generator=torch.Generator().manual_seed(1))
    variants = {name: Variant(build, base, inputs) for name, build in METHODS.items()}
    saved = {name: v.saved_bytes() / 2**20 for name, v in variants.items()}
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in variants}
    for number in range(args.rounds + args.warmup):
        for name, variant in variants.items():
            gc.collect()
            measured = variant.step()
            if number >= args.warmup:
                times[name].append(measured)
    floor = [sum(t) for t in times["floor"]]
    rows = {}
    for name, variant in variants.items():
        totals = [sum(t) for t in times[name]]
        ratios = [a / b for a, b in zip(totals, floor, strict=True)]
        rows[name] = {
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_quartiles": quartiles(ratios),
            "seconds_median": round(statistics.median(totals), 4),
            "forward_median": round(statistics.median(t[0] for t in times[name]), 4),
            "backward_median": round(statistics.median(t[1] for t in times[name]), 4),
            "optimizer_median": round(statistics.median(t[2] for t in times[name]), 5),
            "saved_mib": round(saved[name], 1),
            "trainable": sum(p.numel() for p in variant.trained),
        }
    return {"model": kind, "batch": batch, "length": length, "layers": args.layers, "width": args.width, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = [measure(kind, args) for kind in args.models]
    for result in results:
        print(f"\n{result['model']}: {result['layers']} layers, width {result['width']}, batch {result['batch']} x "
              f"{result['length']}, fp32, {args.threads} threads, {args.rounds} rounds")  # fmt: skip
        print(f"{'method':26} {'/ floor':>8} {'quartiles':>22} {'saved MiB':>10} {'trainable':>11}")
        for name, row in result["rows"].items():
            low, _, high = row["ratio_quartiles"]
            print(f"{name:26} {row['ratio_median']:8.3f} {f'{low:.3f} - {high:.3f}':>22} {row['saved_mib']:10.1f} "
                  f"{row['trainable']:11,}")  # fmt: skip
    if args.out is not None:
        record = {
            "command": f"python benchmarks/step_cost.py --rounds {args.rounds} --threads {args.threads}",
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "results": results,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
