"""What the processes of the distributed tests do: one spawn runs a list of jobs, each rank writes what it found.

Run by `launch` (two processes with gloo), never by pytest itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core_helpers import batches, mlp
from peft_helpers import llama
from slicefine import SliceFineConfig, movers_of
from slicefine.journal import visit_table
from slicefine.tuner import SliceTuner, attach

STEPS, SAVED = 8, 5  # optimizer steps in all, and when a checkpoint is written: inside a visit
MODES = ("row", "column", "alternate", "random_mask")

Found = dict[str, Any]
Job = Callable[[int, Path], Found]


# -- starting processes -------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch(jobs: Sequence[str], folder: Path, world: int = 2) -> dict[str, list[Found]]:
    """Run functions of this module in ``world`` processes; per job what each rank returned, in the order of ranks."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    processes = [
        context.Process(target=_work, args=(rank, world, port, list(jobs), folder), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    for process in processes:
        process.kill()
    return {job: [torch.load(folder / f"{job}-{rank}.pt", weights_only=False) for rank in range(world)] for job in jobs}


def _work(rank: int, world: int, port: int, jobs: list[str], folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for job in jobs:
        try:
            found = globals()[job](rank, folder)
        except Exception:
            found = {"failed": traceback.format_exc()}
        torch.save(found, folder / f"{job}-{rank}.pt")
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# -- one training loop for one process and for several ------------------------------------------------------------


def share(x: Tensor, rank: int, world: int) -> Tensor:
    """This rank's rows of a batch."""
    rows = x.shape[0] // world
    return x[rank * rows : (rank + 1) * rows]


def loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    rank: int = 0,
    world: int = 1,
    after: Callable[[int], None] = lambda step: None,
    quiet: Callable[[bool], Any] = lambda last: contextlib.nullcontext(),
) -> None:
    """Two micro-batches per step, gradients clipped.

    Args:
        model: called with a rank's rows.
        optimizer: of its slices.
        steps: which steps of the run; each has batches of its own.
        rank, world: of this process.
        after: called with the number of steps done.
        quiet: a context that keeps gradients local unless the micro-batch is the last one of its step.
    """
    data = batches(2 * STEPS)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number in steps:
        for micro in range(2):
            x, y = (share(part, rank, world) for part in data[2 * number + micro])
            with quiet(micro == 1):
                ((model(x) - y).square().mean() / 2).backward()
        nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
        optimizer.zero_grad()
        after(number + 1)


def tune(mode: str, **settings: Any) -> tuple[nn.Sequential, SliceTuner]:
    """`mlp` with slices that move after every second step."""
    model = mlp()
    return model, attach(model, **{"mode": mode, "r": 2, "interval": 2, "history": 2, **settings})


def adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)


def facts(tuner: SliceTuner) -> Found:
    """What a trajectory left: weights, visits, originals, and the weights without it."""
    layers = tuner.layers.values()
    found: Found = {
        "weights": [layer.weight.detach().clone() for layer in layers],
        "visits": [visit_table(layer.states["default"].journal.visits) for layer in layers],
        "active": [layer.slicefine_active["default"].detach().clone() for layer in layers],
    }
    with tuner.disabled():
        found["originals"] = [layer.weight.detach().clone() for layer in layers]
    return found


def alone(mode: str, **settings: Any) -> Found:
    """The oracle: one process, no wrapper."""
    model, tuner = tune(mode, **settings)
    loop(model, adamw(tuner.parameters()), range(STEPS))
    return facts(tuner)


# -- DDP ----------------------------------------------------------------------------------------------------------


def _replicated(model: nn.Module) -> tuple[nn.Module, Callable[[bool], Any]]:
    wrapped = nn.parallel.DistributedDataParallel(model)
    return wrapped, lambda last: contextlib.nullcontext() if last else wrapped.no_sync()


def ddp(rank: int, folder: Path) -> Found:
    """Every mode; rank 0 writes a checkpoint on the way."""
    found: Found = {}
    for mode in MODES:
        model, tuner = tune(mode)
        optimizer = adamw(tuner.parameters())

        def save(step: int, mode: str = mode, tuner: SliceTuner = tuner, optimizer: Any = optimizer) -> None:
            if step == SAVED and rank == 0:
                checkpoint(tuner, optimizer, folder / f"two-{mode}")

        wrapped, quiet = _replicated(model)
        loop(wrapped, optimizer, range(STEPS), rank, 2, save, quiet)
        found[mode] = facts(tuner)
    return found


def ddp_resumed(rank: int, folder: Path) -> Found:
    """Two processes go on from what one process wrote."""
    found: Found = {}
    for mode in MODES:
        model, tuner, optimizer = resume(mode, folder / f"one-{mode}")
        wrapped, quiet = _replicated(model)
        loop(wrapped, optimizer, range(SAVED, STEPS), rank, 2, quiet=quiet)
        found[mode] = facts(tuner)
    return found


def ddp_unlike(rank: int, folder: Path) -> Found:
    """Ranks that attach to different base weights: DDP gives all of them rank 0's."""
    model = mlp(seed=rank)
    tuner = attach(model, mode="alternate", r=2, interval=2)
    wrapped, quiet = _replicated(model)
    loop(wrapped, adamw(tuner.parameters()), range(STEPS), rank, 2, quiet=quiet)
    return facts(tuner)


def checkpoint(tuner: SliceTuner, optimizer: torch.optim.Optimizer, path: Path) -> None:
    tuner.save(path.with_suffix(".safetensors"))
    torch.save(optimizer.state_dict(), path.with_suffix(".optimizer"))


def resume(mode: str, path: Path) -> tuple[nn.Module, SliceTuner, torch.optim.Optimizer]:
    model, tuner = tune(mode)
    tuner.load(path.with_suffix(".safetensors"))
    optimizer = adamw(tuner.parameters())
    optimizer.load_state_dict(torch.load(path.with_suffix(".optimizer")))
    return model, tuner, optimizer


# -- FSDP2 --------------------------------------------------------------------------------------------------------


def _sharded(model: nn.Sequential, **settings: Any) -> Callable[[bool], Any]:
    """Every layer a unit of its own, and the root; returns the context that keeps gradients local."""
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, **settings)
    root = fully_shard(model, **settings)

    def quiet(last: bool) -> Any:
        root.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    return quiet


def _full(found: Any) -> Any:
    """Sharded tensors in what `facts` found, gathered."""
    if isinstance(found, dict):
        return {key: _full(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_full(value) for value in found]
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def _fsdp2(rank: int, mode: str, sharding: Found, **settings: Any) -> Found:
    model, tuner = tune(mode, **settings)
    quiet = _sharded(model, **sharding)
    loop(model, adamw(tuner.parameters()), range(STEPS), rank, 2, quiet=quiet)
    return _full(facts(tuner))


def fsdp2(rank: int, folder: Path) -> Found:
    """Every mode, parameters gathered again for backward; mlp's sizes 11 and 5 are odd."""
    return {mode: _fsdp2(rank, mode, {"reshard_after_forward": True}) for mode in MODES}


def fsdp2_kept(rank: int, folder: Path) -> Found:
    """Parameters stay gathered between forward and backward."""
    return {mode: _fsdp2(rank, mode, {"reshard_after_forward": False}) for mode in ("row", "column")}


# -- Trainer ------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Forty-eight short texts of random tokens."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, 32, (48, 8), generator=torch.Generator().manual_seed(4))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trainer_run(folder: Path, world: int, resume_from: str | None = None, **settings: Any) -> Found:
    """PEFT and `Trainer`, six steps of eight rows in two micro-batches, moves after every second step."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    config = SliceFineConfig(r=2, mode="alternate", interval=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config)
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4 // world,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.02,
        "max_grad_norm": 0.5,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }
    trainer = Trainer(model, TrainingArguments(**{**arguments, **settings}), train_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume_from)
    (mover,) = movers_of(model)
    tables = {name: visit_table(layer.states["default"].journal.visits) for name, layer in mover.layers.items()}
    weights = {name: layer.weight.detach().clone() for name, layer in mover.layers.items()}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"visits": tables, "weights": weights, "losses": losses}


def trainer_ddp(rank: int, folder: Path) -> Found:
    return trainer_run(folder / "trainer-two", 2, ddp_backend="gloo")


def trainer_ddp_resumed(rank: int, folder: Path) -> Found:
    return trainer_run(folder / "trainer-again", 2, str(folder / "trainer-one" / "checkpoint-3"), ddp_backend="gloo")
