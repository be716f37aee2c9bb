"""What the processes of the tests of DeepSpeed's ZeRO do; see `distributed_jobs`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from distributed_jobs import Found, Rows, share
from peft_helpers import llama
from slicefine import SliceFineConfig, movers_of
from slicefine.errors import NumericalError, UnsupportedError
from slicefine.journal import visit_table
from slicefine.zero import master

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
    """PEFT and `Trainer`, nine steps of eight rows in two micro-batches, gradients clipped."""
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
    model = get_peft_model(llama() if model is None else model, config)
    if spoil is not None:
        spoil_forward(model, spoil)
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
        kind = _OwnGroups if own_groups else Trainer
        trainer = kind(model, TrainingArguments(**arguments), train_dataset=Rows(), callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        assert zero is None or type(trainer.model_wrapped.optimizer).__name__ == "DeepSpeedZeroOptimizer"
        trainer.save_model(str(folder / "end"))
    return facts(model) | {"losses": [e["loss"] for e in trainer.state.log_history if "loss" in e]}


def facts(model: Any) -> Found:
    (mover,) = movers_of(model)
    layers = mover.layers.items()
    found: Found = {
        "visits": {name: visit_table(layer.states["default"].journal.visits) for name, layer in layers},
        "weights": {name: layer.weight.detach().clone() for name, layer in layers},
        "active": {name: layer.values("default").detach().clone() for name, layer in layers},
        "skipped": mover.skipped,
    }
    with model.disable_adapter():
        found["originals"] = {name: layer.base_weight.detach().clone() for name, layer in layers}
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
            whole, block = master(parameter), layer.weight_block("default")
            moved = visit.last_step < visit.first_step
            checks = {
                "the parameter is the master, rounded": torch.equal(whole.to(parameter), parameter),
                "the weight holds the parameter": torch.equal(block, parameter),
                "a new slice's master is the weight": not moved or torch.equal(whole, block.float()),
            }
            for key in ("exp_avg", "exp_avg_sq"):
                moments = parameter.get_full_hp_param(key)
                checks[f"{key} is new with the slice only"] = bool(moments.any()) != moved
            self.odd += [f"{state.global_step} {name}: not so: {text}" for text, good in checks.items() if not good]
            self.apart += int((whole != parameter.float()).sum())


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
    "rewarm": {"state_policy": "rewarm", "rewarm_steps": 3, "interval": 4},
    "keep": {"state_policy": "keep"},
    "zeros": {"start_values": "zero"},
    "additive": {"additive": True},
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


def loop(accelerator: Any, rank: int, world: int) -> Found:
    from peft import get_peft_model

    model = get_peft_model(llama(), SliceFineConfig(r=2, mode="alternate", interval=2, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    found, ids = model, Rows().ids
    model, optimizer = accelerator.prepare(model, optimizer)
    for number in range(STEPS):
        own = share(ids[4 * number : 4 * number + 4], rank, world)
        accelerator.backward(model(input_ids=own, labels=own).loss)
        if world == 1:
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return facts(found)


def zero_refused(rank: int, folder: Path) -> Found:
    """What stays refused, by name."""
    cases: dict[str, Found] = {
        "stage 3": {"zero": zero_config(3)},
        "window": {"slices": {"window": 1}},
        "adafactor": {"optim": "adafactor"},
        "accumulation in fp32": {
            "zero": zero_config(1, bf16=True) | {"data_types": {"grad_accum_dtype": "fp32"}},
            "model": llama().bfloat16(),
            "bf16": True,
        },
        "head": dict(HEAD),
    }
    found: Found = {}
    for name, settings in cases.items():
        zero = settings.pop("zero", zero_config(2))
        try:
            run(folder / f"refused-{name}", 2, "row", zero, max_steps=3, save_strategy="no", **settings)
        except UnsupportedError as error:
            found[name] = str(error)
    return found
