"""``Trainer``'s checkpoints of adapters under FSDP2, read.

In parts, accelerate reads into tensors of the shapes that it finds: those of a fresh model's slices are of one visit, a
checkpoint's are of all visits until then. Before its version 1.15 it loses a part of them, which is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
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
    """Let ``transformers.trainer`` read FSDP2's checkpoints of slices; for other models nothing changes."""
    _install(trainer, "load_fsdp_model", _load_model)
    _install(trainer, "load_fsdp_optimizer", _load_optimizer)


def _install(trainer: Any, name: str, ours: Callable[[Callable[[], Any], dict[str, Any]], Any]) -> None:
    load = getattr(trainer, name, None)
    if load is None or hasattr(load, "slicefine"):
        return
    names = inspect.signature(load)

    @functools.wraps(load)
    def loading(*args: Any, **kwargs: Any) -> Any:
        given = names.bind(*args, **kwargs)
        given.apply_defaults()
        model = given.arguments["model"]
        sliced = hasattr(model, "active_adapter") and any(isinstance(m, SliceLayer) for m in model.modules())
        if sliced and given.arguments.get("adapter_only"):
            return ours(lambda: load(*args, **kwargs), given.arguments)
        return load(*args, **kwargs)

    loading.slicefine = True  # type: ignore[attr-defined]
    setattr(trainer, name, loading)


def _load_model(load: Callable[[], Any], given: dict[str, Any]) -> Any:
    accelerator = given["accelerator"]
    folder = Path(given["input_dir"], f"pytorch_model_fsdp_{given['model_index']}")
    if not (_in_parts(given) and folder.is_dir()):
        refuse_before("1.15", accelerator, "reads an adapter on rank 0 only (FULL_STATE_DICT)")
        return load()
    accelerator.wait_for_everyone()
    result = load_sharded_adapter(given["model"], folder)
    accelerator.wait_for_everyone()
    return result


def _load_optimizer(load: Callable[[], Any], given: dict[str, Any]) -> Any:
    if _in_parts(given):
        refuse_before("1.13", given["accelerator"], "leaves the optimizer's state out (SHARDED_STATE_DICT)")
    return load()


def _in_parts(given: dict[str, Any]) -> bool:
    return "SHARDED_STATE_DICT" in str(given["fsdp_plugin"].state_dict_type)


def refuse_before(version: str, accelerator: Any, what: str) -> None:
    """Refuse a checkpoint of which accelerate would lose a part without a word.

    Args:
        version: of accelerate that is needed, under FSDP2 with several processes.
        accelerator: accelerate's.
        what: earlier versions do.

    Raises:
        UnsupportedError: below that version.
    """
    if accelerator.is_fsdp2 and accelerator.num_processes > 1 and compare_versions("accelerate", "<", version):
        raise UnsupportedError(
            f"a checkpoint under FSDP2: accelerate before {version} {what}, for any PEFT method; "
            f"{accelerate.__version__} is installed. Install accelerate {version} or newer before the run begins."
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
