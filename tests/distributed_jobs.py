"""What the processes of the distributed tests do: one spawn runs a list of jobs, each rank writes what it found.

Run by `launch` (two processes with gloo, or four), never by pytest itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from core_helpers import batches, mlp
from peft_helpers import llama
from slicefine import SliceFineCallback, SliceFineConfig, movers_of
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


def launch(jobs: Sequence[Job], folder: Path, world: int = 2) -> dict[str, list[Found]]:
    """Run jobs in ``world`` processes; by their names what each rank returned, in the order of ranks."""
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
    names = [job.__name__ for job in jobs]
    return {n: [torch.load(folder / f"{n}-{rank}.pt", weights_only=False) for rank in range(world)] for n in names}


def _work(rank: int, world: int, port: int, jobs: list[Job], folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for job in jobs:
        try:
            found = job(rank, folder)
        except Exception:
            found = {"failed": traceback.format_exc()}
        torch.save(found, folder / f"{job.__name__}-{rank}.pt")
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
    dtype: torch.dtype = torch.float64,
) -> None:
    """Two micro-batches per step, gradients clipped.

    Args:
        model: called with a rank's rows.
        optimizer: of its slices.
        steps: which steps of the run; each has batches of its own.
        rank, world: of this process.
        after: called with the number of steps done.
        quiet: a context that keeps gradients local unless the micro-batch is the last one of its step.
        dtype: of the inputs.
    """
    data = batches(2 * STEPS)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number in steps:
        for micro in range(2):
            x, y = (share(part, rank, world).to(dtype) for part in data[2 * number + micro])
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


def ddp_four(rank: int, folder: Path) -> Found:
    """For four processes, each with one row of a batch."""
    model, tuner = tune("alternate")
    wrapped, quiet = _replicated(model)
    loop(wrapped, adamw(tuner.parameters()), range(STEPS), rank, 4, quiet=quiet)
    return facts(tuner)


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


# -- a pipeline ---------------------------------------------------------------------------------------------------


def pipeline(rank: int, folder: Path) -> Found:
    """Two stages of a pipeline with two micro-batches, each with slices and an optimizer of its own."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    whole = mlp()
    stage = nn.Sequential(OrderedDict([(str(i), whole[i]) for i in (range(2) if rank == 0 else range(2, 5))]))
    tuner = attach(stage, mode="alternate", r=2, interval=2)
    schedule = ScheduleGPipe(
        PipelineStage(stage, rank, 2, torch.device("cpu")), 2, loss_fn=lambda out, y: (out - y).square().mean()
    )
    optimizer = adamw(tuner.parameters())
    for x, y in batches(STEPS):
        schedule.step(x) if rank == 0 else schedule.step(target=y)
        optimizer.step()
        optimizer.zero_grad()
    return facts(tuner)


# -- Trainer ------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Forty-eight short texts of random tokens."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, 32, (48, 8), generator=torch.Generator().manual_seed(4))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trainer_run(
    folder: Path, world: int, resume_from: str | None = None, callbacks: Sequence[Any] = (), **settings: Any
) -> Found:
    """PEFT and `Trainer`, six steps of eight rows in two micro-batches, moves after every second step."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(llama(), peft_config())
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
    trainer = Trainer(
        model, TrainingArguments(**{**arguments, **settings}), train_dataset=Rows(), callbacks=list(callbacks)
    )
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


def epoch_order(rank: int, folder: Path) -> Found:
    """The random state at an epoch's start of processes that drew unlike numbers, kept and brought back."""
    state = SimpleNamespace(global_step=3, max_steps=8, epoch=1.5, log_history=[], stateful_callbacks={})
    kept = {}
    for kind in ("unlike", "alike"):
        torch.manual_seed(rank if kind == "unlike" else 0)
        first = SliceFineCallback()
        first.any_model = True
        before = torch.get_rng_state()
        first.on_epoch_begin(None, state, None)
        state.stateful_callbacks = {"SliceFineCallback": first.state()}
        torch.rand(5)
        again = SliceFineCallback()
        again.any_model = True
        again.on_train_begin(None, state, None)
        again.on_epoch_begin(None, state, None)
        kept[kind] = (len(first.epoch_began), torch.equal(torch.get_rng_state(), before))
    return kept


def peft_config() -> SliceFineConfig:
    return SliceFineConfig(r=2, mode="alternate", interval=2, target_modules="all-linear", task_type="CAUSAL_LM")


def peft_loop(model: nn.Module, rank: int, world: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    ids = Rows().ids
    losses = []
    for number in range(7):
        own = share(ids[4 * number : 4 * number + 4], rank, world)
        loss = model(input_ids=own, labels=own).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# -- a process that dies ------------------------------------------------------------------------------------------


def die(folder: Path) -> None:
    """Under torchrun: the second process is killed after the fourth step, one step after the checkpoint."""
    from transformers import TrainerCallback

    class Die(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4 and args.process_index == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer_run(folder, 2, callbacks=[Die()], ddp_backend="gloo")


if __name__ == "__main__":
    die(Path(sys.argv[1]))
