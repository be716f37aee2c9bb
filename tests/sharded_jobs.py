"""What the processes of the tests of FSDP2 do; see `distributed_jobs`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import compare_versions
from torch import Tensor, nn

from core_helpers import batches, mlp, step
from distributed_jobs import (
    MODES,
    SAVED,
    STEPS,
    Found,
    adamw,
    facts,
    loop,
    peft_config,
    peft_loop,
    share,
    trainer_run,
    tune,
)
from peft_helpers import llama
from slicefine.errors import ContentError, UnsupportedError
from slicefine.geometry import Slice
from slicefine.journal import visit_table
from slicefine.transfer import expect_checkpoint
from slicefine.tuner import attach

# below 1.15 accelerate loses a part of FSDP2's checkpoints, which slicefine refuses to resume from
RESUMES = compare_versions("accelerate", ">=", "1.15")


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
    loop(model, adamw(tuner.parameters()), range(STEPS), rank, torch.distributed.get_world_size(), quiet=quiet)
    return _full(facts(tuner))


def fsdp2_four(rank: int, folder: Path) -> Found:
    """For four processes: of five rows the last holds none, of a slice's two lines the last two."""
    return _fsdp2(rank, "alternate", {})


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


def alone_rounded(name: str) -> Found:
    """The oracle of `fsdp2_precision`: autocast over fp32 weights, or bfloat16 weights."""
    dtype = PRECISIONS[name]
    model = mlp(dtype=dtype)
    tuner = attach(model, mode="alternate", r=2, interval=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "policy"):
        loop(model, sgd(tuner.parameters()), range(STEPS), dtype=dtype)
    return facts(tuner)


def fsdp2_variants(rank: int, folder: Path) -> Found:
    """What touches parameters or weights beside the plain step."""
    return {name: _fsdp2(rank, sharding={}, **settings) for name, settings in VARIANTS.items()}


def fsdp2_precision(rank: int, folder: Path) -> Found:
    """Computed in bfloat16 over fp32 shards; fp32 masters over bfloat16 shards. SGD: Adam would amplify rounding."""
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
        found[f"outputs, {reshard}"] = _outputs(x, y, reshard)
    model = fully_shard(mlp())
    for name, build in {
        "attached too late": lambda: attach(model, mode="row", r=2),
        "no values": _no_values,
        "fold": _fold,
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


def _outputs(x: Tensor, y: Tensor, reshard: bool) -> list[Tensor]:
    """Of a trained model, of it disabled, of it once more, and of the base; parameters stay gathered, or do not."""
    model, tuner = tune("alternate")
    _sharded(model, reshard_after_forward=reshard)
    step(model, adamw(tuner.parameters()), x, y)
    with torch.no_grad():
        trained = model(x)
        with tuner.disabled():
            plain = model(x)
        return [trained, plain, model(x), mlp()(x)]


def _no_values() -> None:
    """What accelerate asks for when it loads in little memory."""
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model, _ = tune("row")
    fully_shard(model)
    model.state_dict()


def _fold() -> None:
    from torch.distributed.fsdp import fully_shard

    model, tuner = tune("row", additive=True)
    fully_shard(model)
    tuner.layers["0"].fold()


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


def peft_biases(rank: int, folder: Path) -> Found:
    """Biases beside the slices; under DDP the second process begins with others, which rank 0's replace."""
    from torch.distributed.fsdp import fully_shard

    found: Found = {}
    for engine in ("ddp", "fsdp2"):
        model = biased_llama(offset=rank if engine == "ddp" else 0)
        if engine == "ddp":
            wrapped: nn.Module = nn.parallel.DistributedDataParallel(model)
        else:
            for block in model.base_model.model.model.layers:
                fully_shard(block)
            wrapped = fully_shard(model)
        losses = peft_loop(wrapped, rank, 2)
        found[engine] = {"losses": losses} | _full(bias_facts(model))
        model.save_pretrained(folder / f"biases-{engine}", is_main_process=rank == 0)
        with model.disable_adapter():  # while the trained values are not in the parameters
            model.save_pretrained(folder / f"biases-{engine}-off", is_main_process=rank == 0)
        loaded = biased_llama()
        if engine == "fsdp2":
            fully_shard(loaded)
        torch.distributed.barrier()
        loaded.load_adapter(folder / "biases-ddp-off", "default", is_trainable=True)
        found[f"{engine}, loaded"] = _full(bias_facts(loaded))
    return found


def biased_llama(offset: int = 0) -> nn.Module:
    from peft import get_peft_model

    base = llama(torch.float64, attention_bias=True)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.add_(offset if name.endswith("bias") else 0)
    return get_peft_model(base, replace(peft_config(), bias="all"))


def bias_facts(model: nn.Module) -> Found:
    """All biases as they are trained, and with the adapter off."""
    named = [(n, p) for n, p in model.named_parameters() if n.endswith("bias")]
    trained = [p.detach().clone() for _, p in named]
    with model.disable_adapter():
        return {"trained": trained, "off": [p.detach().clone() for _, p in named]}


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


def fsdp2_traffic(rank: int, folder: Path) -> Found:
    """Bytes of our own collectives in a step that does not move, and what a step that moves has more."""
    model, tuner = tune("row", interval=3)
    _sharded(model)
    optimizer = adamw(tuner.parameters())
    sent: list[int] = []
    for x, y in batches(6):
        sizes: list[int] = []
        (model(share(x, rank, 2)) - share(y, rank, 2)).square().mean().backward()
        with Gathered(sizes):
            optimizer.step()
        optimizer.zero_grad()
        sent.append(sum(sizes))
    assert sent[0] == sent[1] == sent[3] == sent[4]
    assert sent[2] == sent[5]
    return {"step": sent[0], "move": sent[2] - sent[0]}


def fsdp2_kept(rank: int, folder: Path) -> Found:
    """Parameters stay gathered between forward and backward."""
    return {mode: _fsdp2(rank, mode, {"reshard_after_forward": False}) for mode in ("row", "column")}


def trainer_fsdp2(rank: int, folder: Path) -> Found:
    """`Trainer` and accelerate's FSDP2 plugin."""
    return _plugin(folder / "trainer-fsdp2")


def trainer_fsdp2_resumed(rank: int, folder: Path) -> Found:
    return _plugin(folder / "trainer-fsdp2-again", str(folder / "trainer-fsdp2" / "checkpoint-3"))


def trainer_fsdp2_sharded(rank: int, folder: Path) -> Found:
    """With checkpoints in parts, one from each process."""
    return _plugin(folder / "trainer-sharded", kind="SHARDED")


def trainer_fsdp2_sharded_resumed(rank: int, folder: Path) -> Found:
    return _plugin(folder / "trainer-sharded-again", str(folder / "trainer-sharded" / "checkpoint-3"), "SHARDED")


def trainer_fsdp2_four(rank: int, folder: Path) -> Found:
    """Four processes go on from what two wrote."""
    found = {}
    for kind, name in (("FULL", "trainer-fsdp2"), ("SHARDED", "trainer-sharded")):
        found[kind] = _plugin(folder / f"{name}-four", str(folder / name / "checkpoint-3"), kind)
    return found


def peft_sharded_file(rank: int, folder: Path) -> Found:
    """What accelerate writes of an adapter with a head and biases, read into a fresh model, and into one with more."""
    import torch.distributed.checkpoint as dcp
    from peft import get_peft_model, get_peft_model_state_dict
    from torch.distributed.fsdp import fully_shard

    from slicefine.errors import AdapterFileError
    from slicefine.peft.sharded_checkpoints import load_sharded_adapter

    def make(heads: list[str]) -> nn.Module:
        config = replace(peft_config(), bias="all", modules_to_save=heads)
        model = get_peft_model(llama(torch.float64, attention_bias=True), config)
        fully_shard(model)
        return model

    model, path = make(["lm_head"]), folder / "in-parts"
    peft_loop(model, rank, 2)
    dcp.save({"model": get_peft_model_state_dict(model)}, checkpoint_id=path)
    loaded = make(["lm_head"])
    load_sharded_adapter(loaded, path)
    found = {"parameters": [], "visits": []}
    for each in (model, loaded):
        found["parameters"].append({name: _full(p.detach()) for name, p in each.named_parameters()})
        tables = [m.states["default"].journal.visits for m in each.modules() if hasattr(m, "states")]
        found["visits"].append([visit_table(visits) for visits in tables])
    try:
        load_sharded_adapter(make(["lm_head", "norm"]), path)
    except AdapterFileError as error:
        found["refused"] = str(error)
    return found


def _plugin(folder: Path, resume_from: str | None = None, kind: str = "FULL") -> Found:
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
        "state_dict_type": f"{kind}_STATE_DICT",
    }
    original = PartialState.__init__

    def pretend(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = pretend
    try:
        world = torch.distributed.get_world_size()
        return _full(trainer_run(folder, world, resume_from, ddp_backend="gloo", fsdp=True, fsdp_config=settings))
    finally:
        PartialState.__init__ = original
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_USE_FSDP", None)
