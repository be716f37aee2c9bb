"""Step time and kept activations of TRL's trainers with slices and with LoRA, and the bytes of a push to another copy.

Rounds go through all methods in turn, a short run each, and a cell is the median over rounds of (median step of this
run) / (median step of LoRA's run in the same round): what else the machine does hits all of them. A step is TRL's own,
from the start of its batch to the end of the optimizer's step: GRPO's contains generation. One model is the folder's,
the other has random weights of a Llama's shape.

    python benchmarks/trl_steps.py --tokenizer models/stories260k --out benchmarks/results/trl_steps.json
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
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from slicefine import SliceFineConfig, apply_slices, delta_since, movers_of
from slicefine.bench.shapes import SHAPES, make_model
from slicefine.bench.workload import kept_bytes
from slicefine.delta import Delta
from slicefine.training.report import environment

METHODS = ("lora r=8", "column r=12", "alternate r=12", "column r=5")
TEXT = "Once upon a time there was a little girl who went to the park with her dog and played until it was dark. "
WIDE = "llama 2 x 512"
WARM = 2  # steps of a run that are not timed


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *args: Any, **settings: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, *args: Any, **settings: Any) -> None:
        self.steps.append(time.perf_counter() - self.begin)


def config(method: str, task: str | None = "CAUSAL_LM") -> Any:
    kind, rank = method.split(" r=")
    if kind == "lora":
        return LoraConfig(r=int(rank), lora_alpha=16, target_modules="all-linear", task_type=task)
    return SliceFineConfig(r=int(rank), mode=kind, interval=3, target_modules="all-linear", task_type=task)


def wide(words: int) -> LlamaForCausalLM:
    """A Llama of two layers of width 512, large enough for matrix products to count."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 512}
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 2, "vocab_size": words}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def length(completions: list[str], **settings: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def make_trainer(kind: str, model: Any, tokenizer: Any, method: str, steps: int, folder: str, clock: Clock) -> Any:
    common = {"max_steps": steps + WARM, "per_device_train_batch_size": 4, "learning_rate": 1e-4, "report_to": []}
    common |= {"disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no", "logging_strategy": "no"}
    common |= {"gradient_checkpointing": False}
    shared = {"processing_class": tokenizer, "peft_config": config(method), "callbacks": [clock]}
    if kind == "sft":
        rows = Dataset.from_list([{"text": TEXT * 3}] * 64)
        return SFTTrainer(model, SFTConfig(folder, max_length=128, **common), train_dataset=rows, **shared)
    if kind == "dpo":
        rows = Dataset.from_list([{"prompt": TEXT, "chosen": TEXT, "rejected": TEXT[::-1][:60]}] * 64)
        return DPOTrainer(model, args=DPOConfig(folder, max_length=128, **common), train_dataset=rows, **shared)
    rows = Dataset.from_list([{"prompt": TEXT[:60]}] * 64)
    args = GRPOConfig(folder, num_generations=4, max_completion_length=32, beta=0.04, use_vllm=False, **common)
    return GRPOTrainer(model, length, args, train_dataset=rows, **shared)


class Kept:
    """Notes what the first forward of a run keeps for backward."""

    def __init__(self, trainer: Any) -> None:
        self.bytes, self.trainer, self.plain = 0, trainer, trainer.compute_loss
        trainer.compute_loss = self.compute_loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
        if not self.bytes:
            self.bytes = kept_bytes(model, lambda: self.plain(model, dict(inputs), *args, **settings))
        return self.plain(model, inputs, *args, **settings)


def run(kind: str, base: Callable[[], Any], tokenizer: Any, method: str, steps: int) -> tuple[float, int, int]:
    """``(median step in seconds, bytes kept for backward, moves)`` of one short run."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(kind, base(), tokenizer, method, steps, folder, clock)
        trainer.remove_callback(PrinterCallback)
        kept = Kept(trainer)
        trainer.train()
        movers = movers_of(trainer.model)
    return statistics.median(clock.steps[WARM:]), kept.bytes, movers[0].visits - 1 if movers else 0


def compare(kind: str, base: Callable[[], Any], tokenizer: Any, rounds: int, steps: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    rows: dict[str, Any] = {}
    for _ in range(rounds):
        for method in METHODS:
            seconds, kept, moves = run(kind, base, tokenizer, method, steps)
            times[method].append(seconds)
            rows[method] = {"kept MiB": round(kept / 2**20, 1), "moves per run": moves}
    for method in METHODS:
        ratios = [mine / other for mine, other in zip(times[method], times[METHODS[0]], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows[method] |= {"time / lora": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}
    return rows


# -- bytes of a push --------------------------------------------------------------------------------------------------


def size(slices: Delta) -> int:
    return sum(values.numel() * values.element_size() for blocks in slices.values() for _, values in blocks)


def lora_sizes(model: Any) -> dict[str, int]:
    """Of a push of LoRA's factors, in the base's precision, and of all weights after merging them."""
    itemsize = next(model.parameters()).element_size()
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    factors = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    return {"A and B": factors * itemsize, "merged": sum(m.base_layer.weight.numel() for m in layers) * itemsize}


def real_pushes(base: Callable[[], Any]) -> dict[str, Any]:
    """A push after each of nine steps with two moves, in bytes, checked against the trained model."""
    result: dict[str, Any] = {"LoRA r=8": lora_sizes(get_peft_model(base(), config(METHODS[0])))}
    ids = torch.randint(5, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    for method in METHODS[1:]:
        model, copy = get_peft_model(base(), config(method)), base()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        sizes = []
        for step in range(9):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            slices = delta_since(model, step)
            sizes.append(size(slices))
            apply_slices(copy, slices)
        merged = model.merge_and_unload().state_dict()
        equal = all(torch.equal(merged[name], tensor) for name, tensor in copy.state_dict().items())
        result[method] = {"bytes": sizes, "copy equals the merged model": equal}
    return result


def meta_pushes(shape: str) -> dict[str, Any]:
    """The same for a shape alone, in bf16: what is in training after a visit's first step, by orientation."""

    def base() -> Any:
        with torch.device("meta"):
            return make_model(SHAPES[shape]).to(torch.bfloat16)

    result: dict[str, Any] = {"LoRA r=8": lora_sizes(get_peft_model(base(), config(METHODS[0], None)))}
    for method in METHODS[1:]:
        kinds = ("row", "column") if "alternate" in method else ("column",)
        sizes = []
        for kind in kinds:
            model = get_peft_model(base(), config(f"{kind} {method.split()[1]}", None))
            sizes.append(2 * movers_of(model)[0].active_entries())
        result[method] = {"bytes": sizes}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a small Llama and its tokenizer")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="the folder's model and SFT only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    models = {
        args.tokenizer.name: lambda: AutoModelForCausalLM.from_pretrained(args.tokenizer),
        WIDE: lambda: wide(len(tokenizer)),
    }
    kinds = ("sft", "dpo", "grpo")
    if args.smoke:
        kinds = kinds[:1]
        del models[WIDE]
    steps = {
        name: {kind: compare(kind, base, tokenizer, args.rounds, args.steps) for kind in kinds}
        for name, base in models.items()
    }
    pushes = {args.tokenizer.name: real_pushes(models[args.tokenizer.name]), "llama-3b, bf16": meta_pushes("llama-3b")}
    content = {**environment(), "rounds": args.rounds, "steps": steps, "pushes": pushes}
    print(json.dumps(content, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
