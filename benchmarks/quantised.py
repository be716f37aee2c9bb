"""Step time over quantised bases as moves accumulate: slices against the frozen model and LoRA r=8 on the same base.

A Llama of random weights is loaded quantised by transformers, once per method; all methods of a base run interleaved,
and a ratio is the median over the rounds of the method's step over the frozen model's step in the same round. Frozen
means that nothing trains and gradients flow to the embeddings' output. `bound` is the design's target: 1 + the share of
the frozen products that the visited lines' products are + 3%. `loss` is before and after the warm-up and the rounds'
steps on one batch, with AdamW; every method has its own learning rate (`LORA_RATE`, `RATE`).

    python benchmarks/quantised.py --out benchmarks/results/quantised.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from slicefine import SliceFineConfig, movers_of
from slicefine.layer import SliceLayer
from slicefine.tasks.models import load_model
from slicefine.tasks.settings import ModelSettings
from slicefine.training.report import environment

KINDS = ("4bit", "8bit", "int8")
LORA_RATE, RATE = 1e-3, 1e-3
Step = dict[str, Any]


def save_base(folder: Path, width: int, layers: int) -> None:
    torch.manual_seed(0)
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    size = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=256, tie_word_embeddings=False, **size, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)


def load(folder: Path, kind: str) -> Any:
    model = load_model(AutoModelForCausalLM, ModelSettings(path=str(folder), quantize=kind)).model
    model.requires_grad_(False)
    model.enable_input_require_grads()  # as every method's backward goes down to the embeddings
    return model.train()


def visit(model: Any) -> None:
    """Give the active slices values, as training does: lines that nothing was written to do not exist."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-5 * torch.randn_like(parameter))


def sliced(model: Any, mode: str, r: int, moves: int) -> Any:
    made = get_peft_model(model, SliceFineConfig(r=r, mode=mode, interval=10**9, task_type="CAUSAL_LM"))
    for _ in range(moves):
        visit(made)
        movers_of(made)[0].move()
    return made


def methods(kind: str, folder: Path, r: int, moves: list[int], modes: list[str]) -> dict[str, Any]:
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    made = {"frozen": load(folder, kind), "lora r=8": get_peft_model(load(folder, kind), lora)}
    for mode in modes:
        for count in moves:
            made[f"{mode} r={r}, {count} moves"] = sliced(load(folder, kind), mode, r, count)
    return made


def share(model: Any) -> float:
    """The products with lines beside the weights over the products with the weights."""
    found = [module for module in model.modules() if isinstance(module, SliceLayer)]
    whole = sum(math.prod(layer.shape) for layer in found)
    return sum(layer.packed.numel() for layer in found if layer.packed is not None) / whole if whole else 0.0


def one_step(model: Any, ids: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> tuple[float, float]:
    began = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began, float(loss.detach())


def measure(models: dict[str, nn.Module], ids: torch.Tensor, rounds: int, warm_up: int) -> list[Step]:
    optimizers: dict[str, torch.optim.Optimizer | None] = {"frozen": None}
    for name, model in models.items():
        trained = [p for p in model.parameters() if p.requires_grad]
        rate = LORA_RATE if name.startswith("lora") else RATE
        optimizers.setdefault(name, torch.optim.AdamW(trained, lr=rate, weight_decay=0.0) if trained else None)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    losses: dict[str, list[float]] = {name: [] for name in models}
    for number in range(warm_up + rounds):
        for name, model in models.items():
            spent, loss = one_step(model, ids, optimizers[name])
            losses[name].append(loss)
            if number >= warm_up:
                seconds[name].append(spent)
    result = []
    for name, model in models.items():
        ratios = [own / floor for own, floor in zip(seconds[name], seconds["frozen"], strict=True)]
        quarter = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        row = {"method": name, "ms": 1e3 * statistics.median(seconds[name]), "ratio": statistics.median(ratios)}
        row |= {"quartiles": [quarter[0], quarter[2]], "visited share": share(model)}
        row |= {"bound": 1.03 + row["visited share"] if ", " in name else None}
        result.append(row | {"loss": [losses[name][0], losses[name][-1]]})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--moves", type=int, nargs="+", default=[0, 4, 8])
    parser.add_argument("--modes", nargs="+", default=["column", "alternate"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated without", UserWarning)
    ids = torch.randint(0, 256, (4, chosen.tokens // 4), generator=torch.Generator().manual_seed(0))
    record: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(chosen).items()}, **environment(), "bases": {}}
    with tempfile.TemporaryDirectory() as folder:
        save_base(Path(folder), chosen.width, chosen.layers)
        for kind in chosen.kinds:
            models = methods(kind, Path(folder), chosen.rank, chosen.moves, chosen.modes)
            record["bases"][kind] = measure(models, ids, chosen.rounds, warm_up=2)
            for row in record["bases"][kind]:
                bound = "" if row["bound"] is None else f"(target {row['bound']:.3f})"
                print(f"{kind:5} {row['method']:26} {row['ms']:8.1f} ms  {row['ratio']:.3f} {bound}", flush=True)
            chosen.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")  # a run may be stopped


if __name__ == "__main__":
    main()
