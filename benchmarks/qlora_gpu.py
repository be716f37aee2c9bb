"""SliceFine against QLoRA (LoRA over nf4) on the shape of a Llama-3.2-3B: step time and peak memory, in one run.

Weights are random (nothing is downloaded) and quantised to nf4 with double quantisation on the device; one resident
base serves all methods. In every round each method is attached, warmed up, timed and taken off again, so that methods
are interleaved. Peak memory is what the device allocated while a method ran, base included.

    python benchmarks/qlora_gpu.py --out benchmarks/results/qlora_gpu.json

`--smoke` runs a tiny shape on any device, to see that everything works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from slicefine import SliceFineConfig, movers_of
from slicefine.training.report import environment

LLAMA_3B = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def nf4(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
    )
    made.load_state_dict(layer.state_dict())
    return made.to(layer.weight.device)


def make_base(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**shape)).to(dtype)
    for name, layer in list(model.named_modules()):
        if name.rpartition(".")[2] in TARGETS:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nf4(layer, dtype))
    model.is_loaded_in_4bit = True  # what PEFT's LoRA asks for
    model.requires_grad_(False)
    return model.train()


def lora(r: int) -> Callable[[Any], Any]:
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS, task_type="CAUSAL_LM")
    return lambda base: get_peft_model(base, config)


def visit(model: Any) -> None:
    """Give the active slices values, as training does: lines that nothing was written to do not exist."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-5 * torch.randn_like(parameter))


def slices(mode: str, r: int, moves: int) -> Callable[[Any], Any]:
    def make(base: Any) -> Any:
        config = SliceFineConfig(r=r, mode=mode, interval=10**9, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        for _ in range(moves):
            visit(model)
            movers_of(model)[0].move()
        return model

    return make


METHODS: dict[str, Callable[[Any], Any]] = {
    "qlora r=8": lora(8),
    "qlora r=16": lora(16),
    "column r=12": slices("column", 12, 0),
    "column r=12, 8 moves": slices("column", 12, 8),
    "alternate r=12": slices("alternate", 12, 0),
    "alternate r=12, 8 moves": slices("alternate", 12, 8),
}


def waited(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run_once(make: Callable[[Any], Any], base: Any, ids: torch.Tensor, steps: int, checkpointing: bool) -> Any:
    """Seconds per step, peak bytes (None without a GPU), parameters trained, and the first and last loss."""
    device, model = ids.device, make(base)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seconds, losses = [], []
    for _ in range(steps + 2):
        began = waited(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(waited(device) - began)
        losses.append(float(loss.detach()))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    count, _ = model.get_nb_trainable_parameters()
    model.unload()
    return statistics.median(seconds[2:]), peak, count, (losses[0], losses[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing for all methods")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, two short rounds")
    chosen = parser.parse_args()
    if chosen.smoke:
        chosen.batch, chosen.length, chosen.steps, chosen.rounds = 2, 16, 1, 2
    elif not torch.cuda.is_available():
        parser.error("this shape needs a GPU; --smoke runs anywhere")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = TINY if chosen.smoke else LLAMA_3B
    warnings.filterwarnings("ignore", ".*num_hidden_layers.*", UserWarning)
    base = make_base(shape, device, dtype)
    ids = torch.randint(0, shape["vocab_size"], (chosen.batch, chosen.length), device=device)
    found: dict[str, list[Any]] = {name: [] for name in METHODS}
    for _ in range(chosen.rounds):
        for name, make in METHODS.items():
            found[name].append(run_once(make, base, ids, chosen.steps, chosen.checkpointing))
    reference = [result[0] for result in found["qlora r=8"]]
    rows = []
    for name, results in found.items():
        ratios = [result[0] / other for result, other in zip(results, reference, strict=True)]
        peaks = [result[1] for result in results]
        row = {"method": name, "seconds": statistics.median(r[0] for r in results), "ratio": statistics.median(ratios)}
        row |= {"ratios": ratios, "peak bytes": None if None in peaks else max(peaks), "trained": results[0][2]}
        rows.append(row | {"loss": results[-1][3]})
        peak = "" if row["peak bytes"] is None else f"{row['peak bytes'] / 2**30:.2f} GiB"
        print(f"{name:26} {1e3 * row['seconds']:9.1f} ms  {row['ratio']:.3f} of qlora r=8  {peak}", flush=True)
    record = {"settings": {k: str(v) for k, v in vars(chosen).items()}, "shape": shape, **environment(), "rows": rows}
    chosen.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
