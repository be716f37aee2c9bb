"""``Trainer``'s sharded checkpoints of adapters, read: accelerate reads into tensors of the shapes that it finds.

Those of a fresh model's slices are of one visit; a checkpoint's are of all visits until then.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from ..errors import AdapterFileError
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
        plugin, model = given.arguments["fsdp_plugin"], given.arguments["model"]
        folder = Path(given.arguments["input_dir"], f"pytorch_model_fsdp_{given.arguments['model_index']}")
        sharded = "SHARDED_STATE_DICT" in str(plugin.state_dict_type) and folder.is_dir()
        sliced = hasattr(model, "active_adapter") and any(isinstance(m, SliceLayer) for m in model.modules())
        if not (sharded and sliced and given.arguments.get("adapter_only")):
            return load(*args, **kwargs)
        given.arguments["accelerator"].wait_for_everyone()
        result = load_sharded_adapter(model, folder)
        given.arguments["accelerator"].wait_for_everyone()
        return result

    load_fsdp_model.slicefine = True  # type: ignore[attr-defined]
    trainer.load_fsdp_model = load_fsdp_model


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
