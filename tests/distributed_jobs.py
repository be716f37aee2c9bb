"""What the processes of the distributed tests do: one spawn runs a list of jobs, each rank writes what it found.

Run by `launch` (two processes with gloo), never by pytest itself.
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
from typing import Any

import torch
from torch import Tensor, nn

from core_helpers import batches, mlp, step
from peft_helpers import llama
from slicefine import SliceFineConfig, movers_of
from slicefine.errors import ContentError, UnsupportedError
from slicefine.geometry import Slice
from slicefine.journal import visit_table
from slicefine.transfer import expect_checkpoint
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


def alone_rounded(name: str) -> Found:
    """The oracle of `fsdp2_precision`: autocast over fp32 weights, or bfloat16 weights."""
    dtype = PRECISIONS[name]
    model = mlp(dtype=dtype)
    tuner = attach(model, mode="alternate", r=2, interval=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "policy"):
        loop(model, sgd(tuner.parameters()), range(STEPS), dtype=dtype)
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


VARIANTS: dict[str, Found] = {
    "rewarm": {"mode": "alternate", "state_policy": "rewarm", "rewarm_steps": 3},
    "keep": {"mode": "alternate", "state_policy": "keep"},
    "reserve": {"mode": "column", "reserve": {"0": [Slice("row", 3, 2)], "4": [Slice("row", 1, 2)]}},
    "random": {"mode": "row", "positions": "random", "r": 1},
    "zeros": {"mode": "row", "start_values": "zero"},
    "additive": {"mode": "alternate", "additive": True},
    "window": {"mode": "row", "window": 1},
}


PRECISIONS = {"policy": torch.float32, "master": torch.bfloat16}


def fsdp2_variants(rank: int, folder: Path) -> Found:
    """What touches parameters or weights beside the plain step."""
    return {name: _fsdp2(rank, sharding={}, **settings) for name, settings in VARIANTS.items()}


def fsdp2_precision(rank: int, folder: Path) -> Found:
    """Computed in bfloat16 over fp32 shards; and fp32 masters over bfloat16 shards. By SGD: Adam amplifies rounding."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    found: Found = {}
    for name, dtype in PRECISIONS.items():
        model = mlp(dtype=dtype)
        tuner = attach(model, mode="alternate", r=2, interval=2)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        quiet = _sharded(model, mp_policy=policy) if name == "policy" else _sharded(model)
        loop(model, sgd(tuner.parameters()), range(STEPS), rank, 2, quiet=quiet, dtype=dtype)
        found[name] = _full(facts(tuner))
    return found


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=5.0)


def fsdp2_saves(rank: int, folder: Path) -> Found:
    """A checkpoint of slices and optimizer, a sharded one of the whole model, and what they left undisturbed."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

    model, tuner = tune("alternate")
    quiet = _sharded(model)
    optimizer = adamw(tuner.parameters())

    def save(step: int) -> None:
        if step == SAVED:
            tuner.save(folder / "sharded.safetensors")
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "dcp")
            full = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_state_dict(model, optimizer, options=full)[1]
            whole = get_model_state_dict(model, options=full)
            if rank == 0:
                torch.save({"model": whole, "optimizer": state}, folder / "full.pt")

    loop(model, optimizer, range(STEPS), rank, 2, save, quiet)
    return _full(facts(tuner))


def from_dcp(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Read a sharded checkpoint into a fresh model, on any number of processes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    sizes = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    known = {key.removeprefix("model."): entry.size for key, entry in sizes.items() if key.startswith("model.")}
    expect_checkpoint(model, known)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def fsdp2_resumed(rank: int, folder: Path) -> Found:
    """From one process's file, read before and after sharding; and from the sharded checkpoint."""
    found: Found = {}
    for name in ("before", "after"):
        model, tuner = tune("alternate")
        quiet = None
        if name == "after":
            quiet = _sharded(model)
        tuner.load(folder / "one-alternate.safetensors")
        quiet = quiet or _sharded(model)
        optimizer = adamw(tuner.parameters())
        state = torch.load(folder / "one-alternate.optimizer")
        _load_sharded_state(optimizer, state)
        loop(model, optimizer, range(SAVED, STEPS), rank, 2, quiet=quiet)
        found[name] = _full(facts(tuner))
    model, tuner = tune("alternate")
    quiet = _sharded(model)
    optimizer = adamw(tuner.parameters())
    from_dcp(model, optimizer, folder / "dcp")
    loop(model, optimizer, range(SAVED, STEPS), rank, 2, quiet=quiet)
    return found | {"dcp": _full(facts(tuner))}


def _load_sharded_state(optimizer: torch.optim.Optimizer, state: Found) -> None:
    """A plain optimizer state over sharded parameters."""
    from torch.distributed.tensor import distribute_tensor

    parameters = optimizer.param_groups[0]["params"]
    for i, entry in state["state"].items():
        mesh, placements = parameters[i].device_mesh, parameters[i].placements
        for key in ("exp_avg", "exp_avg_sq"):
            entry[key] = distribute_tensor(entry[key], mesh, placements)
    optimizer.load_state_dict(state)


def fsdp2_guards(rank: int, folder: Path) -> Found:
    """Another adapter's content between forward and backward: restored in time, and not."""
    from torch.distributed.fsdp import fully_shard

    x, y = (share(part, rank, 2) for part in batches(1)[0])
    found: Found = {}
    for reshard in (True, False):
        gradients = []
        for disturb in (False, True):
            model, tuner = tune("alternate")
            _sharded(model, reshard_after_forward=reshard)
            loss = (model(x) - y).square().mean()
            if disturb:
                with tuner.disabled(), torch.no_grad():
                    model(x)
            loss.backward()
            gradients.append([_full(p.grad) for p in tuner.parameters()])
        found[f"restored, {reshard}"] = gradients
        loss = (model(x) - y).square().mean()
        tuner.move()
        try:
            loss.backward()
        except ContentError as error:
            found[f"moved, {reshard}"] = str(error)
    with torch.no_grad():
        trained = model(x)
        with tuner.disabled():
            plain = model(x)
        again = model(x)
    found["outputs"] = [trained, plain, again, mlp()(x).detach()]
    model = fully_shard(mlp())
    for name, build in {
        "attached too late": lambda: attach(model, mode="row", r=2),
        "ignored": lambda: _ignored(x, y),
        "fsdp1": lambda: _fsdp1(x),
        "fsdp1 with original parameters": lambda: _fsdp1(x, use_orig_params=True),
        "tensor parallel": lambda: _tensor_parallel("0", late=False, x=x),
        "tensor parallel later": lambda: _tensor_parallel("0.base_layer", late=True, x=x),
    }.items():
        try:
            build()
        except UnsupportedError as error:
            found[name] = str(error)
    return found


def _ignored(x: Tensor, y: Tensor) -> None:
    from torch.distributed.fsdp import fully_shard

    model, tuner = tune("row")
    fully_shard(model, ignored_params=set(tuner.parameters()))
    step(model, adamw(tuner.parameters()), x, y)


def _fsdp1(x: Tensor, **settings: Any) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, _ = tune("row")
    model.requires_grad_(True)
    FullyShardedDataParallel(model, device_id=torch.device("cpu"), **settings)(x)


def _tensor_parallel(name: str, late: bool, x: Tensor) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = mlp()
    if late:
        attach(model, mode="row", r=2)
    parallelize_module(model, init_device_mesh("cpu", (2,)), {name: ColwiseParallel()})
    if not late:
        attach(model, mode="row", r=2)
    model[0](x)


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


def peft_fsdp2(rank: int, folder: Path) -> Found:
    """PEFT's model in a plain loop, sharded per block; the adapter is saved by all ranks, written by the first."""
    from peft import get_peft_model
    from torch.distributed.fsdp import fully_shard

    model = get_peft_model(llama(), peft_config())
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    found = peft_loop(model, rank, 2)
    gathered: list[int] = []
    with Gathered(gathered):
        model.save_pretrained(folder / "peft-two", is_main_process=rank == 0)
    return {"losses": found, "largest": max(gathered)}


class Gathered:
    """Notes how many bytes each collective of `torch.distributed.all_reduce` and all-gathers moves."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __enter__(self) -> None:
        self.original = torch.distributed.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sizes.append(tensor.numel() * tensor.element_size())
            return self.original(tensor, *args, **kwargs)

        torch.distributed.all_reduce = counted

    def __exit__(self, *error: Any) -> None:
        torch.distributed.all_reduce = self.original


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


def trainer_fsdp2(rank: int, folder: Path) -> Found:
    """`Trainer` and accelerate's FSDP2 plugin."""
    return _plugin(folder / "trainer-fsdp2")


def trainer_fsdp2_resumed(rank: int, folder: Path) -> Found:
    return _plugin(folder / "trainer-fsdp2-again", str(folder / "trainer-fsdp2" / "checkpoint-3"))


def _plugin(folder: Path, resume_from: str | None = None) -> Found:
    """Accelerate takes its FSDP plugin on GPUs only, and DDP on a CPU: here it is told that these are GPUs."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    settings = {
        "version": 2,
        "reshard_after_forward": True,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "cpu_ram_efficient_loading": False,
        "state_dict_type": "FULL_STATE_DICT",
    }
    original = PartialState.__init__

    def pretend(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = pretend
    try:
        return _full(trainer_run(folder, 2, resume_from, ddp_backend="gloo", fsdp=True, fsdp_config=settings))
    finally:
        PartialState.__init__ = original
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_USE_FSDP", None)


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
