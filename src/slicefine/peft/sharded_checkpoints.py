"""``Trainer``'s checkpoints of adapters under FSDP2, read.

In parts, accelerate reads into tensors of the shapes that it finds: those of a fresh model's slices are of one visit, a
checkpoint's are of all visits until then. Before its version 1.15 it loses a part of them, which is refused.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import compare_versions
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from ..errors import AdapterFileError, UnsupportedError
from ..layer import SliceLayer

__all__ = ["install_sharded_loading"]

_MARK = ".slicefine_"
_PREFIX = "model."  # of accelerate's own


def install_sharded_loading(trainer: Any) -> None:
    """Let ``transformers.trainer`` read sharded checkpoints of slices; for other models nothing changes."""
    load = getattr(trainer, "load_fsdp_model", None)
    if load is None or hasattr(load, "slicefine"):
        return
    names = inspect.signature(load)

    @functools.wraps(load)
    def load_fsdp_model(*args: Any, **kwargs: Any) -> Any:
        given = names.bind(*args, **kwargs)
        given.apply_defaults()
        plugin, accelerator, model = (given.arguments[name] for name in ("fsdp_plugin", "accelerator", "model"))
        sliced = hasattr(model, "active_adapter") and any(isinstance(m, SliceLayer) for m in model.modules())
        if not (sliced and given.arguments.get("adapter_only")):
            return load(*args, **kwargs)
        refuse_old_accelerate(accelerator)
        folder = Path(given.arguments["input_dir"], f"pytorch_model_fsdp_{given.arguments['model_index']}")
        if "SHARDED_STATE_DICT" not in str(plugin.state_dict_type) or not folder.is_dir():
            return load(*args, **kwargs)
        accelerator.wait_for_everyone()
        result = load_sharded_adapter(model, folder)
        accelerator.wait_for_everyone()
        return result

    load_fsdp_model.slicefine = True  # type: ignore[attr-defined]
    trainer.load_fsdp_model = load_fsdp_model


def refuse_old_accelerate(accelerator: Any) -> None:
    """Refuse to resume where accelerate would lose a part of the checkpoint without a word.

    Raises:
        UnsupportedError: below accelerate 1.15, under FSDP2 with several processes.
    """
    if accelerator.is_fsdp2 and accelerator.num_processes > 1 and compare_versions("accelerate", "<", "1.15"):
        raise UnsupportedError(
            f"resume under FSDP2 with accelerate {accelerate.__version__}: before 1.13 it leaves the optimizer's state "
            "out (SHARDED_STATE_DICT), before 1.15 it reads an adapter on rank 0 only (FULL_STATE_DICT). Install "
            "accelerate 1.15 or newer for runs that are to be resumed. What this one trained is in its checkpoint's "
            "adapter_model.safetensors: PeftModel.from_pretrained reads it, and a new run can begin there."
        )


def load_sharded_adapter(model: Any, folder: Path) -> Any:
    """Read the active adapter's tensors from a sharded checkpoint, on any number of processes.

    Raises:
        AdapterFileError: if the checkpoint lacks one of them, or holds slices that the model does not train.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(folder)
    known = {
        key.removeprefix(_PREFIX): facts
        for key, facts in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(_PREFIX)
    }
    wanted: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    wanted = {key: tensor for key, tensor in wanted.items() if _MARK not in key}  # heads: sharded as they are here
    lacking = sorted(wanted.keys() - known.keys())
    if lacking:
        raise AdapterFileError(
            f"{folder}: the checkpoint lacks {lacking[0]} ({len(lacking)} tensors in all). Resume with the "
            "configuration that the run began with."
        )
    device = next(model.parameters()).device
    for key, facts in known.items():
        if _MARK in key and isinstance(facts, TensorStorageMetadata):
            wanted[key] = torch.empty(facts.size, dtype=facts.properties.dtype, device=device)
    load({"model": wanted}, storage_reader=reader)
    return set_peft_model_state_dict(model, wanted, adapter_name=model.active_adapter)
