"""What the processes of the tests of DeepSpeed's ZeRO do; see `distributed_jobs`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distributed_jobs import Found, Rows
from peft_helpers import llama
from slicefine import SliceFineConfig, movers_of
from slicefine.journal import visit_table

MODES = ("row", "column", "alternate", "random_mask")
STEPS, SAVED = 8, 5  # moves after every second step: three of them; the checkpoint lies inside a visit


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
    **settings: Any,
) -> Found:
    """PEFT and `Trainer`, eight steps of eight rows in two micro-batches, gradients clipped."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

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
    if world > 1:
        arguments["ddp_backend"] = "gloo"
    if zero is not None:
        arguments["deepspeed"] = zero
    trainer = Trainer(model, TrainingArguments(**arguments), train_dataset=Rows(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
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


def zero2(rank: int, folder: Path) -> Found:
    return {mode: run(folder / f"zero2-{mode}", 2, mode, zero_config(2)) for mode in MODES}
