"""Interrupted runs, gone on with, beside uninterrupted ones: everything that they leave is compared bit for bit.

Each run is a process of its own, forked from this one: the whole run, the run that is interrupted (by a signal, an
exception, or SIGKILL, inside an optimizer step), and the run that goes on. Settings and points are drawn from one seed.
Compared are the adapter's files, weights, optimizer state and all that is measured, but for times, memory
and the command.

    python benchmarks/resume.py --runs 64 --points 4 --out benchmarks/results/resume.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from slicefine import SliceFineConfig, attach
from slicefine.peft import StopOnSignal
from slicefine.training.report import environment
from slicefine.training.run import train
from slicefine.training.session import Session
from slicefine.training.settings import TrainSettings

Case = dict[str, Any]
WORDS = ["good", "fine", "bad", "poor", "the", "film", "was", "very"]
ASIDE = ("train_seconds", "seconds_per_step", "peak_memory_bytes", "output", "command", "date", "settings")
KINDS = ("SIGINT", "SIGTERM", "exception", "SIGKILL")


class PulledError(Exception):
    """The exception that interrupts a run."""


def pull(kind: str) -> None:
    """Interrupt this process."""
    if kind == "exception":
        raise PulledError
    os.kill(os.getpid(), getattr(signal, kind))


class Interrupt(TrainerCallback):
    """Interrupts a Trainer inside an optimizer step: between micro-batches, beside the step, or while evaluating."""

    def __init__(self, point: Case | None) -> None:
        self.point = point

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._maybe("micro", state.global_step + 1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._maybe("before", state.global_step + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._maybe("after", state.global_step + 1)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._maybe("evaluation", state.global_step)

    def _maybe(self, place: str, step: int) -> None:
        if self.point is not None and (self.point["place"], self.point["step"]) == (place, step):
            kind, self.point = self.point["kind"], None
            pull(kind)


# -- `slicefine train` --------------------------------------------------------------------------------------------


def draw_slices(draw: random.Random) -> Case:
    """Settings of slices that move every few steps."""
    mode = draw.choice(["row", "column", "alternate", "alternate", "random_mask"])
    return {
        "r": 2,
        "mode": mode,
        "interval": draw.choice([2, 3, 4]),
        "positions": draw.choice(["sweep", "random"]),
        "state_policy": draw.choice(["reset", "rewarm", "rewarm", "keep"]),
        "rewarm_steps": 3,
        "window": draw.choice([None, None, 1]),
        "seed": draw.randrange(100),
    }


def draw_train(draw: random.Random) -> Case:
    """A recipe: sixteen steps or so in two epochs."""
    evaluate = draw.choice(["epoch", "epoch", "steps", "no"])
    slices = draw_slices(draw)
    slices["positions"] = draw.choice([slices["positions"], "energy"])
    training = {
        "epochs": 2,
        "batch_size": draw.choice([2, 4]),
        "gradient_accumulation": draw.choice([1, 2]),
        "max_steps": draw.choice([None, None, 13]),
        "learning_rate": 0.01,
        "evaluate": evaluate,
        "evaluate_steps": 3 if evaluate == "steps" else None,
        "evaluate_before": False,
        "load_best": draw.random() < 0.7,
        "save_steps": draw.choice([1, 2, 3, 5]),
        "save_limit": draw.choice([1, 2]),
        "logging_steps": draw.choice([1, 3, 4]),
        "group_by_length": draw.random() < 0.6,
        "workers": draw.choice([0, 0, 0, 1]),
        "bf16": draw.random() < 0.25,
        "schedule": draw.choice(["linear", "cosine"]),
        "weight_decay": draw.choice([0.0, 0.1]),
        "optimizer": draw.choice(["adamw_torch", "adamw_torch", "sgd"]),
    }
    if evaluate != "no" and training["load_best"]:
        training["early_stopping"] = draw.choice([None, 1, 2])
    method = {"name": draw.choice(["slicefine"] * 6 + ["lora", "full"])}
    return {"slice": slices, "training": training, "method": method, "model": {"dropout": draw.choice([0.0, 0.1])}}


def run_train(case: Case, base: Path, folder: Path, point: Case | None, again: bool) -> None:
    """One `slicefine train`, interrupted or not."""
    settings = TrainSettings(quiet=True, output=str(folder / "run"), verify=False)
    settings.model.path, settings.data.path = str(base / "bert"), str(base / "data")
    for group, values in case.items():
        part = getattr(settings, group)
        setattr(settings, group, replace(part, **values))
    original = Session.trainer

    def watched(self: Session, *args: Any) -> Any:
        trainer = original(self, *args)
        trainer.add_callback(Interrupt(point))
        return trainer

    Session.trainer = watched  # type: ignore[method-assign]
    whole = any((folder / "run" / "checkpoints").glob("checkpoint-*"))
    train(replace(settings, resume=again and whole, overwrite=True))


def found_train(folder: Path) -> Case:
    """The adapter's files and the metrics."""
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    return files_of(folder / "run" / "adapter") | measured(metrics)


def measured(report: Case) -> Case:
    """All that was measured, but for times."""
    history = [
        {k: v for k, v in entry.items() if not k.endswith(("runtime", "_per_second"))} for entry in report["history"]
    ]
    for entry in (report.get("before"), report.get("after")):
        assert entry is None or "runtime" not in str(entry)
    return {key: value for key, value in report.items() if key not in (*ASIDE, "history")} | {"history": history}


def files_of(folder: Path) -> Case:
    """Files by name."""
    return {path.name: content(path) for path in sorted(folder.iterdir()) if path.name != "training_args.bin"}


def content(path: Path) -> Any:
    """Of JSON and headers what they say: tokenizers and safetensors write them in any order."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {"header": file.metadata()} | {name: file.get_tensor(name) for name in names}
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


# -- Trainer and PEFT in a script ---------------------------------------------------------------------------------


def draw_script(draw: random.Random) -> Case:
    """A script with `Trainer`, evaluations and a bf16 base among them."""
    evaluate = draw.choice(["no", "steps"])
    arguments = {
        "per_device_train_batch_size": draw.choice([2, 4]),
        "gradient_accumulation_steps": draw.choice([1, 2]),
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "save_steps": draw.choice([1, 2, 3]),
        "logging_steps": 1,
        "max_grad_norm": 0.5,
        "eval_strategy": evaluate,
        "eval_steps": 1 if evaluate == "steps" else None,
        "train_sampling_strategy": draw.choice(["random", "group_by_length"]),
        "lr_scheduler_type": draw.choice(["linear", "constant"]),
        "bf16": draw.random() < 0.3,
    }
    arguments["eval_steps"] = arguments["save_steps"] if evaluate == "steps" else None
    arguments["load_best_model_at_end"] = evaluate == "steps"
    half = draw.random() < 0.3
    return {"slice": draw_slices(draw) | {"history": draw.choice([1, 8])}, "arguments": arguments, "half": half}


def llama(half: bool = False) -> nn.Module:
    """Two blocks with dropout in attention."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    config = LlamaConfig(**size, num_attention_heads=2, attention_dropout=0.1, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return model.to(torch.bfloat16) if half else model


class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Texts of random tokens and of four lengths."""

    def __init__(self) -> None:
        draw = random.Random(4)
        self.rows = [[draw.randrange(3, 32) for _ in range(4 + i % 4)] for i in range(32)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[i]}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded with token 0, which is not in the loss."""
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def last_whole(folder: Path) -> str | None:
    """The newest checkpoint of a Trainer that is whole: its state is written last."""
    whole = [path for path in folder.glob("checkpoint-*") if readable(path / "trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def readable(path: Path) -> bool:
    with suppress(OSError, ValueError):
        return bool(json.loads(path.read_text()))
    return False


def run_script(case: Case, base: Path, folder: Path, point: Case | None, again: bool) -> None:
    """What a user's script does."""
    model = get_peft_model(
        llama(case["half"]), SliceFineConfig(**case["slice"], target_modules="all-linear", task_type="CAUSAL_LM")
    )
    arguments = TrainingArguments(
        str(folder / "run"), use_cpu=True, disable_tqdm=True, report_to=[], save_total_limit=2, **case["arguments"]
    )
    data = Rows()
    callbacks = [StopOnSignal(say=lambda text: None), Interrupt(point)]
    trainer = Trainer(model, arguments, collate, data, torch.utils.data.Subset(data, range(8)), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=last_whole(folder / "run") if again else None)
    if trainer.is_world_process_zero():
        model.save_pretrained(folder / "adapter")
        facts = measured({"history": trainer.state.log_history, "best": trainer.state.best_global_step})
        for entry in facts["history"]:
            entry.pop("train_loss", None)  # of the steps since the resume, as transformers says it
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.save(facts | {"weights": weights, "optimizer": trainer.optimizer.state_dict()}, folder / "facts.pt")


def found_script(folder: Path) -> Case:
    facts: Case = torch.load(folder / "facts.pt", weights_only=True)
    return files_of(folder / "adapter") | facts


# -- a loop of one's own, in one process or two -------------------------------------------------------------------


def draw_loop(draw: random.Random) -> Case:
    """Twelve steps of a small network."""
    return {
        "slice": draw_slices(draw) | {"window": None, "history": draw.choice([1, 8])},
        "steps": 12,
        "micro": draw.choice([1, 2]),
        "save": draw.choice([1, 2, 3]),
        "optimizer": draw.choice(["AdamW", "SGD", "Adagrad"]),
        "dtype": draw.choice(["float32", "float32", "bfloat16"]),
    }


def network(dtype: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 5)]
    return nn.Sequential(*layers).to(getattr(torch, dtype))


def run_loop(case: Case, base: Path, folder: Path, point: Case | None, again: bool, engine: str = "") -> None:
    """A plain loop that keeps a checkpoint of its own: slices, optimizer, random state, step."""
    rank = torch.distributed.get_rank() if engine else 0
    model = network(case["dtype"])
    tuner = attach(model, **case["slice"])
    start = 0
    path = folder / "checkpoint"
    if again and path.is_dir():
        tuner.load(path / "slices.safetensors")
        start = json.loads((path / "step.json").read_text())
    run, quiet = parallel(model, engine)
    optimizer = make_optimizer(case, tuner.parameters())
    torch.manual_seed(1 + rank)
    if start:
        load_optimizer(optimizer, torch.load(path / f"optimizer-{rank}.pt", weights_only=False))
        torch.set_rng_state(torch.load(path / f"random-{rank}.pt", weights_only=True))
    losses: list[float] = json.loads((path / "losses.json").read_text()) if start else []
    for step in range(start, case["steps"]):
        for micro in range(case["micro"]):
            x, y = (t.to(getattr(torch, case["dtype"])) for t in batch(step, micro, rank))
            with quiet(micro == case["micro"] - 1):
                loss = (run(x) - y).square().mean()
                loss.backward()
            losses.append(float(loss))
            maybe(point, "micro" if micro < case["micro"] - 1 else "before", step + 1)
        optimizer.step()
        optimizer.zero_grad()
        maybe(point, "after", step + 1)
        if (step + 1) % case["save"] == 0:
            keep(path, tuner, optimizer, step + 1, losses, rank, engine)
    tuner.save(folder / "slices.safetensors")
    weights = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    if rank == 0:
        torch.save({"weights": weights, "losses": losses}, folder / "facts.pt")


def make_optimizer(case: Case, parameters: Any) -> torch.optim.Optimizer:
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    }
    return kinds[case["optimizer"]](parameters)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Case) -> None:
    """Into sharded parameters, too: the state that was saved has this process's shards already."""
    optimizer.load_state_dict(state)


def parallel(model: nn.Module, engine: str) -> tuple[nn.Module, Callable[[bool], Any]]:
    """The model under DDP or FSDP2, and the context that keeps gradients local but for the last micro-batch."""
    if engine == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        return wrapped, lambda last: nullcontext() if last else wrapped.no_sync()
    if engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            if any(True for _ in layer.parameters()):
                fully_shard(layer)
        root: Any = fully_shard(model)

        def quiet(last: bool) -> Any:
            root.set_requires_gradient_sync(last)
            return nullcontext()

        return model, quiet
    return model, lambda last: nullcontext()


def batch(step: int, micro: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return torch.randn(4, 6, generator=generator), torch.randn(4, 5, generator=generator)


def maybe(point: Case | None, place: str, step: int) -> None:
    if point is not None and (point["place"], point["step"]) == (place, step):
        pull(point["kind"])


def keep(path: Path, tuner: Any, optimizer: Any, step: int, losses: list[float], rank: int, engine: str) -> None:
    """Write a checkpoint aside, then let it take the old one's place."""
    aside = path.with_name("aside")
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier(engine)
    if engine == "fsdp2" or rank == 0:
        tuner.save(aside / "slices.safetensors")
    torch.save(optimizer.state_dict(), aside / f"optimizer-{rank}.pt")
    torch.save(torch.get_rng_state(), aside / f"random-{rank}.pt")
    if rank == 0:
        (aside / "step.json").write_text(str(step))
        (aside / "losses.json").write_text(json.dumps(losses))
    barrier(engine)
    if rank == 0:
        old = path.with_name("old")
        shutil.rmtree(old, ignore_errors=True)
        if path.is_dir():
            path.rename(old)
        aside.rename(path)
    barrier(engine)


def barrier(engine: str) -> None:
    if engine:
        torch.distributed.barrier()


def whole(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().clone()


def found_loop(folder: Path) -> Case:
    facts: Case = torch.load(folder / "facts.pt", weights_only=True)
    return facts | {"slices.safetensors": content(folder / "slices.safetensors")}


# -- processes ----------------------------------------------------------------------------------------------------

MODES: dict[str, tuple[Any, Any, Any, int]] = {  # how to draw settings, run, read what is left, processes
    "train": (draw_train, run_train, found_train, 1),
    "script": (draw_script, run_script, found_script, 1),
    "loop": (draw_loop, run_loop, found_loop, 1),
    "ddp": (draw_loop, lambda *job: run_loop(*job, engine="ddp"), found_loop, 2),
    "fsdp2": (draw_loop, lambda *job: run_loop(*job, engine="fsdp2"), found_loop, 2),
    "ddp script": (draw_script, run_script, found_script, 2),
}


def in_processes(work: Callable[[], None], count: int, log: Path) -> int:
    """Run work in forked processes; returns the status of the one that ended worst, as a shell says it."""
    port = free_port()
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os._exit(_work(work, rank, count, port, log))
        children.append(child)
    statuses = []
    left = set(children)
    while left:
        child, status = os.wait()
        left.discard(child)
        code = os.waitstatus_to_exitcode(status)
        statuses.append(128 - code if code < 0 else code)
        if code != 0:  # the others would wait for it: what a launcher does
            time.sleep(0.5 if code < 128 else 5.0) if left and code in (130, 143) else None
            for other in left:
                with suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
    return max(statuses, key=lambda status: (status not in (0, 137), status))


def _work(work: Callable[[], None], rank: int, count: int, port: int, log: Path) -> int:
    try:
        sys.stdout = sys.stderr = open(log, "a")  # noqa: SIM115
        torch.set_num_threads(1)
        if count > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ["LOCAL_WORLD_SIZE"] = str(count)
            torch.distributed.init_process_group("gloo")
        set_seed(0)
        work()
        return 0
    except PulledError:
        return 3
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 4
    finally:
        sys.stderr.flush()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def draw_point(draw: random.Random, mode: str, case: Case) -> Case:
    """Where and how a run is interrupted; a loop of one's own has nobody to listen to signals."""
    kinds = KINDS if mode in ("train", "script", "ddp script") else KINDS[2:]
    settings = case.get("training") or case.get("arguments") or case
    parts = settings.get("gradient_accumulation") or settings.get("gradient_accumulation_steps") or settings["micro"]
    places = ["before", "after"] + ["micro"] * (parts > 1)
    if settings.get("evaluate", settings.get("eval_strategy", "no")) != "no":
        places.append("evaluation")
    place, steps = draw.choice(places), steps_of(mode, case)
    every = settings.get("evaluate_steps") or settings.get("eval_steps") or steps // 2
    step = draw.randrange(1, steps + 1)
    return {
        "kind": draw.choice(kinds),
        "place": place,
        "step": min(steps, -(-step // every) * every) if place == "evaluation" else step,
    }


EXPECTED = {"SIGINT": 130, "SIGTERM": 143, "exception": 3, "SIGKILL": 137}


def compare(mode: str, case: Case, points: list[Case], base: Path, folder: Path) -> list[Case]:
    """The uninterrupted run, and for each point the interrupted one: what differs."""
    _, run, found, count = MODES[mode]
    log = folder / "log"

    def made(name: str, point: Case | None, again: bool) -> int:
        (folder / name).mkdir(parents=True, exist_ok=True)
        return in_processes(lambda: run(case, base, folder / name, point, again), count, log)

    status = made("whole", None, False)
    if status:
        raise RuntimeError(f"{mode} {case}: the uninterrupted run ended with {status}\n{log.read_text()}")
    expected = found(folder / "whole")
    results = []
    for number, point in enumerate(points):
        name = f"part-{number}"
        first = made(name, point, False)
        reached = first == EXPECTED[point["kind"]]
        status = made(name, None, True) if first else 0
        if (first and not reached) or status:
            results.append({"point": point, "differs": [f"status {first}, then {status}", log.read_text()[-2000:]]})
            continue
        here = found(folder / name)
        results.append({"point": point, "reached": reached, "differs": differences(expected, here)})
        shutil.rmtree(folder / name)
    return results


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Names of what differs, by however little."""
    if isinstance(one, dict) and isinstance(other, dict):
        missing = [f"{name}/{key}" for key in one.keys() ^ other.keys()]
        return missing + [
            d for key in one.keys() & other.keys() for d in differences(one[key], other[key], f"{name}/{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{name}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    else:
        same = type(one) is type(other) and (one == other or (one != one and other != other))
    return [] if same else [name]


# -- what is needed, and the whole ---------------------------------------------------------------------------------


def prepare(base: Path) -> None:
    """A tiny BERT with its tokenizer, and reviews of several lengths."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(
        BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=32, initializer_range=0.2, **size)
    ).save_pretrained(base / "bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=32, **names).save_pretrained(base / "bert")
    (base / "data").mkdir()
    for split, count in (("train", 32), ("validation", 8)):
        rows = [{"text": f"{WORDS[i % 4]} film {'very ' * (i * 7 % 5)}", "label": i % 4 // 2} for i in range(count)]
        (base / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def steps_of(mode: str, case: Case) -> int:
    if "steps" in case:
        return int(case["steps"])
    size, parts = (
        (case["training"]["batch_size"], case["training"]["gradient_accumulation"])
        if mode == "train"
        else (case["arguments"]["per_device_train_batch_size"], case["arguments"]["gradient_accumulation_steps"])
    )
    made = 2 * (32 // (size * parts * MODES[mode][3]))
    return min(made, case["training"]["max_steps"] or made) if mode == "train" else made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--points", type=int, default=4, help="interruptions of each run's settings")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    draw, names = random.Random(chosen.seed), chosen.modes.split(",")
    rows: list[Case] = []
    began = time.time()
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        for number in range(chosen.runs):
            mode = names[number % len(names)]
            case = MODES[mode][0](draw)
            points = [draw_point(draw, mode, case) for _ in range(chosen.points)]
            folder = Path(place) / str(number)
            for result in compare(mode, case, points, Path(place), folder):
                rows.append({"mode": mode, "case": case, **result})
                if result["differs"]:
                    print(number, mode, result, case, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            write(chosen, rows, began)
            print(
                f"{number + 1}/{chosen.runs} {mode}: {sum(not r['differs'] for r in rows)} of {len(rows)}", flush=True
            )


def write(chosen: argparse.Namespace, rows: list[Case], began: float) -> None:
    """What was found so far."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        found = counts.setdefault(row["mode"], Counter())
        found["points"] += 1
        found["same"] += not row["differs"]
        found[f"by {row['point']['kind']}"] += bool(row.get("reached"))
        found["ended before"] += not row.get("reached")
    record = {**environment(), "seed": chosen.seed, "seconds": time.time() - began, "counts": counts, "points": rows}
    chosen.out.write_text(json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
