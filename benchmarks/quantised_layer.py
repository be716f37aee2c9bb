"""Cost of one quantised layer with slices beside it, as moves accumulate, and of LoRA r=8, over the same layer frozen.

Forward and backward of a single layer whose input wants a gradient, without an optimizer and without the model around
it; processor time of one thread.
Each call of a method stands between two calls of its own base layer, on the same weight in the same memory, and is
divided by their mean: what the machine does over seconds falls out. `ratio` is the median over the rounds with a
bootstrap interval of 95%; `bound` is the design's target: 1 + the share of the layer's products that the visited
lines' products are + 3%. "Kernels alone" is one autograd function with what a slice of columns cannot do without, so
what is above it is the price of adapters, checks and moves.

With glibc, keep freed memory in the process: else a dequantised weight's pages are given back and taken anew at every
call, which costs as much as slices do, once more and once less.

    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
    python benchmarks/quantised_layer.py --out benchmarks/results/quantised_layer.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import bootstrap
from torch import nn

from slicefine import SliceFineConfig, movers_of
from slicefine.layer import SliceLayer
from slicefine.quantised import format_of
from slicefine.training.report import environment

KINDS = ("4bit", "8bit", "int8", "int4", "float8")


def quantised(kind: str, width: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A square layer of random weights, quantised; it computes in ``dtype``."""
    torch.manual_seed(0)
    plain = nn.Linear(width, width, bias=False).to(dtype)
    if kind in ("int8", "int4", "float8"):
        from torchao import quantization
        from torchao.quantization.granularity import PerGroup

        settings = {
            "int8": lambda: quantization.Int8WeightOnlyConfig(),
            "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)),
            "float8": lambda: quantization.Float8WeightOnlyConfig(),
        }
        made = nn.Sequential(plain)
        quantization.quantize_(made, settings[kind]())
        return made[0].requires_grad_(False)
    import bitsandbytes as bnb

    if kind == "4bit":
        layer: nn.Module = bnb.nn.Linear4bit(width, width, bias=False, quant_type="nf4", compute_dtype=dtype)
    else:
        layer = bnb.nn.Linear8bitLt(width, width, bias=False, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    return layer.requires_grad_(False).to("cpu")


def sliced(base: nn.Module, mode: str, r: int, moves: int) -> nn.Module:
    config = SliceFineConfig(r=r, mode=mode, interval=10**9, target_modules=["0"])
    made = get_peft_model(nn.Sequential(base), config)  # type: ignore[arg-type]
    for visit in range(moves + 1):
        with torch.no_grad():  # as training does: lines that nothing was written to do not exist
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(1e-5 * torch.randn_like(parameter))
        if visit < moves:
            movers_of(made)[0].move()
    return made


class Bare(nn.Module):
    """What one slice of columns cannot do without: its lines in the dense weight, twice, and its own gradient.

    No adapters, no checks, no moves; the least that any implementation over these layers costs with these kernels.
    """

    def __init__(self, base: nn.Module, r: int) -> None:
        super().__init__()
        self.base_layer, self.known = base, format_of(base)
        rows, columns = base.out_features, base.in_features
        self.lines = nn.Parameter(1e-5 * torch.randn(r, rows))
        self.index, self.share = torch.arange(r), r / columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _Bare.apply(x, self.lines, self)  # type: ignore[no-untyped-call]
        return result

    def weight(self) -> torch.Tensor:
        weight: torch.Tensor = self.known.factor(self.base_layer)
        weight.narrow(1, 0, len(self.index)).add_(self.lines.detach().t())
        return weight


class _Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, lines: torch.Tensor, layer: Bare) -> torch.Tensor:
        ctx.layer, weight = layer, layer.weight()
        ctx.save_for_backward(x.index_select(-1, layer.index), weight if layer.known.keeps else None)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        to_lines = kept.t() @ gradient
        return gradient @ (ctx.layer.weight() if weight is None else weight), to_lines, None


def bound(model: nn.Module) -> float:
    layer = layer_of(model)
    if isinstance(layer, Bare):
        return 1.03 + layer.share
    assert isinstance(layer, SliceLayer)
    assert layer.packed is not None
    return 1.03 + layer.packed.numel() / (layer.shape[0] * layer.shape[1])


def layer_of(model: nn.Module) -> nn.Module:
    """The layer with its adapter: PEFT's model around it costs the same whatever is inside, and once per step."""
    return next(module for module in model.modules() if hasattr(module, "base_layer"))


def base_of(model: nn.Module) -> nn.Module:
    base: nn.Module = layer_of(model).base_layer  # type: ignore[assignment]
    return base


def call(model: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> float:
    began = time.process_time()
    model(x).backward(gradient)
    spent = time.process_time() - began
    x.grad = None
    for parameter in model.parameters():
        parameter.grad = None
    return spent


def measure(models: dict[str, nn.Module], x: torch.Tensor, gradient: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
    for number in range(2 + rounds):
        for name, model in models.items():
            around, layer = base_of(model), layer_of(model)
            three = (call(around, x, gradient), call(layer, x, gradient), call(around, x, gradient))
            if number >= 2:
                seconds[name].append(three)
    result = []
    for name, model in models.items():
        ratios = [2 * own / (before + after) for before, own, after in seconds[name]]
        found = bootstrap((numpy.array(ratios),), numpy.median, n_resamples=2000, rng=numpy.random.default_rng(0))
        row = {"method": name, "ratio": statistics.median(ratios), "interval": list(found.confidence_interval)}
        row |= {"bound": bound(model) if name != "lora r=8" else None}
        row |= {"frozen ms": 1e3 * statistics.median(t for before, _, after in seconds[name] for t in (before, after))}
        result.append(row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--moves", type=int, nargs="+", default=[0, 4, 8])
    parser.add_argument("--modes", nargs="+", default=["column", "alternate"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of inputs and products")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["4bit", "8bit", "int8"])
    chosen = parser.parse_args()
    dtype: torch.dtype = getattr(torch, chosen.dtype)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated without", UserWarning)
    record: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(chosen).items()}, **environment(), "layers": {}}
    for width in chosen.widths:
        shape = (chosen.tokens, width)
        x, gradient = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
        x.requires_grad_()
        for kind in chosen.kinds:
            base = quantised(kind, width, dtype)
            lora = LoraConfig(r=8, target_modules=["0"])
            least = f"column r={chosen.rank}, kernels alone"
            models: dict[str, nn.Module] = {
                "lora r=8": get_peft_model(nn.Sequential(copy.deepcopy(base)), lora),  # type: ignore[arg-type]
            }
            if dtype == torch.float32:
                models[least] = Bare(copy.deepcopy(base), chosen.rank)
            for mode in chosen.modes:
                for moves in chosen.moves:
                    name = f"{mode} r={chosen.rank}, {moves} moves"
                    models[name] = sliced(copy.deepcopy(base), mode, chosen.rank, moves)
            record["layers"][f"{kind} {width}"] = rows = measure(models, x, gradient, chosen.rounds)
            for row in rows:
                target = "" if row["bound"] is None else f"target {row['bound']:.3f}"
                low, high = row["interval"]
                text = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
                print(f"{kind:5} {width:5} {row['method']:26} {row['frozen ms']:7.1f} ms  {text} {target}", flush=True)
            chosen.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")  # a run may be stopped


if __name__ == "__main__":
    main()
