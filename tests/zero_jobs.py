"""What the processes of the tests of DeepSpeed's ZeRO do; see `distributed_jobs`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from distributed_jobs import Found, Rows, share
from peft_helpers import gpt2, llama
from slicefine import SliceFineConfig, movers_of
from slicefine.errors import NumericalError, UnsupportedError
from slicefine.journal import visit_table
from slicefine.sharded import full
from slicefine.zero import is_spread, master

MODES = ("row", "column", "alternate", "random_mask")
STEPS, SAVED = 9, 5  # moves after every second step: four of them; checkpoint and end lie inside a visit


def zero_config(stage: int, bf16: bool = False, **zero: Any) -> Found:
    """The least that `Trainer` needs; torch's optimizer, since DeepSpeed's own would have to be compiled."""
    return {
        "zero_optimization": {"stage": stage, **zero},
        "bf16": {"enabled": bf16},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untrusted_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def run(
    folder: Path,
    world: int,
    mode: str,
    zero: Found | None = None,
    resume_from: Path | None = None,
    callbacks: Any = (),
    slices: Found | None = None,
    model: Any = None,
    spoil: int | None = None,
    own_groups: bool = False,
    **settings: Any,
) -> Found:
    """PEFT and `Trainer`, nine steps of eight rows in two micro-batches, gradients clipped.

    A ``model`` that is a path is loaded as users do who gave a configuration of stage 3: in pieces from the start.
    """
    from peft import get_peft_model

    config = SliceFineConfig(
        **{
            "r": 2,
            "mode": mode,
            "interval": 2,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            **(slices or {}),
        }
    )
    arguments: Found = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4 // world,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.02,
        "max_grad_norm": 0.5,
        "weight_decay": 0.1,
        "max_steps": STEPS,
        "save_steps": SAVED,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "optim": "adamw_torch",
    }
    arguments |= settings
    with contextlib.nullcontext() if zero is None else pretend():
        if zero is not None:
            arguments |= {"deepspeed": zero, "use_cpu": False}
        made = TrainingArguments(**arguments)  # first: it tells from_pretrained of stage 3
        if isinstance(model, Path):
            model = transformers.LlamaForCausalLM.from_pretrained(model)
            assert all(is_spread(parameter) for parameter in model.parameters())
        model = get_peft_model(llama() if model is None else model, config)
        if spoil is not None:
            spoil_forward(model, spoil)
        kind = _OwnGroups if own_groups else Trainer
        trainer = kind(model, made, train_dataset=Rows(), callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        stage = None if zero is None else zero["zero_optimization"]["stage"]
        kinds = {1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}
        assert stage is None or type(trainer.model_wrapped.optimizer).__name__ == kinds[stage]
        trainer.save_model(str(folder / "end"))
    return facts(model) | {"losses": [e["loss"] for e in trainer.state.log_history if "loss" in e]}


def facts(model: Any) -> Found:
    (mover,) = movers_of(model)
    layers = mover.layers.items()
    found: Found = {
        "visits": {name: visit_table(layer.states["default"].journal.visits) for name, layer in layers},
        "weights": {name: full(layer.base_weight).detach().clone() for name, layer in layers},
        "active": {name: layer.values("default").detach().clone() for name, layer in layers},
        "skipped": mover.skipped,
    }
    with model.disable_adapter():
        found["originals"] = {name: full(layer.base_weight).detach().clone() for name, layer in layers}
    return found


class _OwnGroups(Trainer):
    """A group for slices, and one for what is trained beside them."""

    def create_optimizer(self, model: Any = None) -> torch.optim.AdamW:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        groups = [[p for name, p in trained.items() if ("slicefine_" in name) == ours] for ours in (True, False)]
        self.optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=0.02, weight_decay=0.1)
        return self.optimizer


@contextlib.contextmanager
def pretend() -> Iterator[None]:
    """Accelerate takes DeepSpeed where it finds a GPU: here it is told that gloo is what GPUs here speak."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = PartialState._prepare_backend
    variables, has_bf16 = dict(os.environ), transformers.training_args.is_torch_bf16_gpu_available
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    try:
        yield
    finally:
        PartialState._prepare_backend = original
        transformers.training_args.is_torch_bf16_gpu_available = has_bf16
        os.environ.clear()
        os.environ.update(variables)
        AcceleratorState._reset_state(reset_partial_state=True)


def spoil_forward(model: nn.Module, number: int) -> None:
    """From the given forward on (counted from 0) the logits of one, or, negative, of all of them are NaN."""
    calls = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls.append(1)
        bad = len(calls) - 1 == number or number < 0
        return output * float("nan") if bad else output

    model.get_submodule("base_model.model.lm_head").register_forward_hook(hook)


class Look(TrainerCallback):
    """After every step: parameter, master, weight and the optimizer's state agree."""

    def __init__(self) -> None:
        self.odd: list[str] = []
        self.apart = 0  # entries of masters that are not their parameters', as fp32 masters of bfloat16 have

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        (mover,) = movers_of(model)
        for name, layer in mover.layers.items():
            parameter, visit = layer.slicefine_active["default"], layer.states["default"].journal.visits[-1]
            values = layer.values("default")
            whole, block = master(parameter), layer.weight_block("default")
            kept = values.to(layer.dense().dtype).to(values)
            moved = visit.last_step < visit.first_step
            checks = {
                "the parameter is the master, rounded": torch.equal(whole.to(values), values),
                "the weight holds the parameter": torch.equal(block, kept),
                "DeepSpeed gathers the weight for its layer alone": id(layer.base_weight)
                not in layer.__dict__.get("_external_params", {}),
                "a new slice's master is the weight": not moved or torch.equal(whole, block.float()),
            }
            for key in ("exp_avg", "exp_avg_sq"):
                spread = is_spread(parameter)
                moments = (
                    parameter._z3_optimizer.get_full_hp_param(parameter, key)
                    if spread
                    else parameter.get_full_hp_param(key)
                )
                checks[f"{key} is new with the slice only"] = bool(moments.any()) != moved
            self.odd += [f"{state.global_step} {name}: not so: {text}" for text, good in checks.items() if not good]
            self.apart += int((whole != values.float()).sum())


def zero2(rank: int, folder: Path) -> Found:
    """Every mode, with a look at all parts after each step."""
    found: Found = {}
    for mode in MODES:
        look = Look()
        found[mode] = run(folder / f"zero2-{mode}", 2, mode, zero_config(2), callbacks=[look]) | {"odd": look.odd}
    return found


def zero1(rank: int, folder: Path) -> Found:
    return run(folder / "zero1", 2, "alternate", zero_config(1))


def zero2_resumed(rank: int, folder: Path) -> Found:
    """Of what `zero2` left in the middle of a visit."""
    checkpoint = folder / "zero2-alternate" / f"checkpoint-{SAVED}"
    return run(folder / "zero2-again", 2, "alternate", zero_config(2), resume_from=checkpoint)


VARIANTS: dict[str, Found] = {
    "additive": {"additive": True},  # the first of all: nothing else has told that DeepSpeed is to be watched
    "rewarm": {"state_policy": "rewarm", "rewarm_steps": 3, "interval": 4},
    "keep": {"state_policy": "keep"},
    "zeros": {"start_values": "zero"},
}


def zero2_variants(rank: int, folder: Path) -> Found:
    """What touches parameters beside the plain step."""
    return {
        name: run(folder / f"zero2-{name}", 2, "alternate", zero_config(2), slices=settings)
        for name, settings in VARIANTS.items()
    }


def zero2_offload(rank: int, folder: Path) -> Found:
    """Masters and optimizer state in the CPU's memory, stepped by torch's AdamW; and resumed."""
    look, zero = Look(), zero_config(2, offload_optimizer={"device": "cpu"})
    whole = run(folder / "zero2-offload", 2, "alternate", zero, callbacks=[look])
    checkpoint = folder / "zero2-offload" / f"checkpoint-{SAVED}"
    again = run(folder / "zero2-offload-again", 2, "alternate", zero, resume_from=checkpoint)
    return {"whole": whole, "again": again, "odd": look.odd}


HEAD: Found = {"slices": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]}}


def zero2_head(rank: int, folder: Path) -> Found:
    """A head in a parameter group of its own."""
    return run(folder / "zero2-head", 2, "alternate", zero_config(2), own_groups=True, **HEAD)


SGD: Found = {"optim": "sgd", "learning_rate": 2.0}  # Adam would amplify rounding


def zero2_bf16(rank: int, folder: Path) -> Found:
    """bfloat16 weights and slices under DeepSpeed's fp32 masters; and resumed."""
    found: Found = {}
    for name, settings in {"sgd": SGD, "adamw": {}}.items():
        look = Look() if name == "adamw" else None
        result = run(
            folder / f"zero2-bf16-{name}",
            2,
            "alternate",
            zero_config(2, bf16=True),
            callbacks=[] if look is None else [look],
            model=llama().bfloat16(),
            bf16=True,
            **settings,
        )
        found[name] = result | ({} if look is None else {"odd": look.odd, "apart": look.apart})
    found["resumed"] = run(
        folder / "zero2-bf16-again",
        2,
        "alternate",
        zero_config(2, bf16=True),
        resume_from=folder / "zero2-bf16-adamw" / f"checkpoint-{SAVED}",
        model=llama().bfloat16(),
        bf16=True,
    )
    return found


def zero2_skips(rank: int, folder: Path) -> Found:
    """A step whose gradients are NaN in one process alone; and a run of nothing else."""
    zero = zero_config(2)
    found = run(
        folder / "zero2-skips",
        2,
        "alternate",
        zero,
        spoil=4 if rank == 1 else 10**6,
        slices={"on_nonfinite": "skip"},
        lr_scheduler_type="constant",
    )
    try:
        run(folder / "zero2-lost", 2, "row", zero, spoil=-1, max_steps=25, save_strategy="no")
    except NumericalError as error:
        found["lost"] = str(error)
    return found


def zero2_accelerate(rank: int, folder: Path) -> Found:
    """A loop of one's own with accelerate."""
    from accelerate import Accelerator, DeepSpeedPlugin

    sizes = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 0.5}
    plugin = DeepSpeedPlugin(hf_ds_config=zero_config(2) | sizes)
    with pretend():
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        return loop(Accelerator(deepspeed_plugin=plugin), rank, 2)


def loop(accelerator: Any, rank: int, world: int, saves: Path | None = None, reads: Path | None = None) -> Found:
    """Steps, all that one may do between them, and what is there in the end.

    Args:
        accelerator: of this process.
        rank, world: of this process.
        saves: where a checkpoint goes, after `SAVED` steps.
        reads: a checkpoint to go on from, after two steps that it makes undone.
    """
    from peft import get_peft_model

    model = get_peft_model(llama(), SliceFineConfig(r=2, mode="alternate", interval=2, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    found, ids = model, Rows().ids
    model, optimizer = accelerator.prepare(model, optimizer)
    for number in (0, 1, *range(SAVED, STEPS)) if reads is not None else range(STEPS):
        if number == SAVED and saves is not None:
            accelerator.save_state(str(saves))
        if number == SAVED and reads is not None:
            accelerator.load_state(str(reads))
        own = share(ids[4 * number : 4 * number + 4], rank, world)
        accelerator.backward(model(input_ids=own, labels=own).loss)
        if world == 1:
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    state = {"state": accelerator.get_state_dict(model)} if saves is not None else {}
    return facts(found) | state


# -- stage 3 ------------------------------------------------------------------------------------------------------


def zero3_config(bf16: bool = False, **zero: Any) -> Found:
    """Nothing stays gathered; small models do by default."""
    return zero_config(3, bf16, **({"stage3_param_persistence_threshold": 0} | zero))


def zero3(rank: int, folder: Path) -> Found:
    """As `zero2`."""
    found: Found = {}
    for mode in MODES:
        look = Look()
        every = {"save_steps": 1} if mode == "alternate" else {}
        result = run(folder / f"zero3-{mode}", 2, mode, zero3_config(), callbacks=[look], **every)
        found[mode] = result | {"odd": look.odd}
    return found


def zero3_resumed(rank: int, folder: Path) -> Found:
    """Of what `zero3` left in the middle of a visit, and right after a move."""
    return {
        str(saved): run(
            folder / f"zero3-again-{saved}",
            2,
            "alternate",
            zero3_config(),
            resume_from=folder / "zero3-alternate" / f"checkpoint-{saved}",
        )
        for saved in (SAVED - 1, SAVED)
    }


def zero3_variants(rank: int, folder: Path) -> Found:
    return {
        name: run(folder / f"zero3-{name}", 2, "alternate", zero3_config(), slices=settings)
        for name, settings in VARIANTS.items()
    }


SETTINGS: dict[str, Found] = {
    "kept whole": {"stage3_param_persistence_threshold": 1e5},
    "offload_param": {"offload_param": {"device": "cpu"}},
    "offload_optimizer": {"offload_optimizer": {"device": "cpu"}},
    "small groups": {"sub_group_size": 64},
}


def zero3_settings(rank: int, folder: Path) -> Found:
    """Other settings of DeepSpeed's; and layers that are not Llama's."""
    found: Found = {}
    for name, settings in SETTINGS.items():
        look = Look()
        result = run(folder / f"zero3-{name}", 2, "alternate", zero3_config(**settings), callbacks=[look])
        found[name] = result | {"odd": look.odd}
    for name, settings in LAYERS.items():
        found[name] = run(folder / f"zero3-{name}", 2, "alternate", zero3_config(), **made(settings))
    return found


def sober_gpt2() -> nn.Module:
    """Without dropout, which draws other numbers in each process."""
    model = gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


LAYERS: dict[str, Found] = {
    "transposed": {"model": sober_gpt2, "slices": {"target_modules": ["c_attn", "c_proj", "c_fc"]}},
    "embedding": {"slices": {"target_modules": ["embed_tokens", "v_proj"]}},
    "checkpointing": {"gradient_checkpointing": True},
    "head": HEAD | {"own_groups": True},
}


def made(settings: Found) -> Found:
    """Settings of `run` with the model made, if they have one."""
    return settings | ({"model": settings["model"]()} if "model" in settings else {})


def zero3_bf16(rank: int, folder: Path) -> Found:
    """As `zero2_bf16`; and a model that comes in pieces from its files."""
    if rank == 0:
        llama().bfloat16().save_pretrained(folder / "bf16-base")
    torch.distributed.barrier()
    found: Found = {}
    for name, settings in {"sgd": SGD, "adamw": {}, "loaded": {}, "resumed": {}}.items():
        look = None if name == "sgd" else Look()
        result = run(
            folder / f"zero3-bf16-{name}",
            2,
            "alternate",
            zero3_config(bf16=True),
            callbacks=[] if look is None else [look],
            model=folder / "bf16-base" if name == "loaded" else llama().bfloat16(),
            bf16=True,
            resume_from=folder / "zero3-bf16-adamw" / f"checkpoint-{SAVED}" if name == "resumed" else None,
            **settings,
        )
        found[name] = result | ({} if look is None else {"odd": look.odd, "apart": look.apart})
    return found


def zero3_loaded(rank: int, folder: Path) -> Found:
    """A model that comes in pieces from its files, trained and resumed."""
    if rank == 0:
        llama().save_pretrained(folder / "base")
    torch.distributed.barrier()
    checkpoint = folder / "zero3-loaded" / f"checkpoint-{SAVED}"
    kinds = {"loaded": None, "again": checkpoint}
    found = {
        name: run(folder / f"zero3-{name}", 2, "alternate", zero3_config(), model=folder / "base", resume_from=saved)
        for name, saved in kinds.items()
    }
    with pretend():
        arguments = TrainingArguments(str(folder / "zero3-on"), deepspeed=zero3_config(), report_to=[])
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
        model = PeftModel.from_pretrained(model, folder / "zero3-loaded" / "end", is_trainable=True)
        assert arguments.deepspeed is not None  # alive: transformers remembers it by a weak reference
    return found | {"from the adapter": facts(model)}


def zero3_accelerate(rank: int, folder: Path) -> Found:
    """A loop of one's own; its checkpoint holds the weights, too, with the slices in them."""
    from accelerate import Accelerator, DeepSpeedPlugin

    sizes = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 0.5}
    found: Found = {}
    for name in ("whole", "again"):
        with pretend():
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
            config = zero3_config(stage3_gather_16bit_weights_on_model_save=True) | sizes
            plugin = DeepSpeedPlugin(hf_ds_config=config)
            places = {"saves" if name == "whole" else "reads": folder / "zero3-state"}
            found[name] = loop(Accelerator(deepspeed_plugin=plugin), rank, 2, **places)
    return found


def between(model: Any, folder: Path, rank: int, write: Any) -> Found:
    """What may be done with a trained model between its steps, beside training it."""
    (mover,) = movers_of(model)
    layer = next(iter(mover.layers.values()))
    found: Found = {"delta": layer.get_delta_weight("default")}
    found["counts"] = torch.tensor(model.get_nb_trainable_parameters())
    model.save_pretrained(str(folder), is_main_process=rank == 0)
    ids = Rows().ids[:2]
    with torch.no_grad():
        found["logits"] = model(input_ids=ids).logits.clone()
        with model.disable_adapter():
            found["base logits"] = model(input_ids=ids).logits.clone()
        for layer in mover.layers.values():
            write(layer.slicefine_active["default"])
        found["written logits"] = model(input_ids=ids).logits.clone()
    mover.restart()
    mover.undo()
    found["undone"] = facts(model)
    return found


def zero3_between(rank: int, folder: Path) -> Found:
    import deepspeed

    def write(parameter: Tensor) -> None:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if rank == 0:
                parameter.add_(0.05)

    callback = Between(folder / "zero3-between" / "own", rank, write)
    run(folder / "zero3-between", 2, "alternate", zero3_config(), callbacks=[callback])
    return callback.found


class Between(TrainerCallback):
    """At the end of training, while the engine is there, do what `between` does."""

    def __init__(self, folder: Path, rank: int = 0, write: Any = lambda parameter: parameter.add_(0.05)) -> None:
        self.folder, self.rank, self.write = folder, rank, write
        self.found: Found = {}

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found = between(model, self.folder, self.rank, self.write)


def zero3_skips(rank: int, folder: Path) -> Found:
    return run(
        folder / "zero3-skips",
        2,
        "alternate",
        zero3_config(),
        spoil=4 if rank == 1 else 10**6,
        slices={"on_nonfinite": "skip"},
        lr_scheduler_type="constant",
    )


def zero_refused(rank: int, folder: Path) -> Found:
    """What stays refused, by name."""
    cases: dict[str, Found] = {
        "window": {"slices": {"window": 1}},
        "adafactor": {"optim": "adafactor"},
        "accumulation in fp32": {
            "zero": zero_config(1, bf16=True) | {"data_types": {"grad_accum_dtype": "fp32"}},
            "model": llama().bfloat16(),
            "bf16": True,
        },
        "head": dict(HEAD),
    }
    return refusals(folder, cases, zero_config(2))


def refusals(folder: Path, cases: dict[str, Found], plain: Found) -> Found:
    """What each run is refused with."""
    found: Found = {}
    for name, settings in cases.items():
        zero = settings.pop("zero", plain)
        try:
            run(folder / f"refused-{name}", 2, "row", zero, max_steps=3, save_strategy="no", **settings)
        except UnsupportedError as error:
            found[name] = str(error)
    return found


class Late(TrainerCallback):
    """Once the engine has the model: another adapter, and an adapter's file."""

    def __init__(self, act: str, folder: Path) -> None:
        self.act, self.folder = act, folder

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.act == "slices":
            model.add_adapter("late", SliceFineConfig(r=2, mode="row", interval=2, target_modules="all-linear"))
        else:
            file = load_file(self.folder / "zero3-row" / "end" / "adapter_model.safetensors")
            set_peft_model_state_dict(model, file)


def zero3_refused(rank: int, folder: Path) -> Found:
    """What stays refused at stage 3, by name; after `zero3`."""
    cases: dict[str, Found] = {
        "window": {"slices": {"window": 1}},
        "adafactor": {"optim": "adafactor"},
        "head": dict(HEAD),
        "late slices": {"callbacks": [Late("slices", folder)]},
        "late file": {"callbacks": [Late("file", folder)]},
    }
    return refusals(folder, cases, zero3_config())
