"""What `slicefine verify` finds: each part of a run, an adapter or a checkpoint, whole or with what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..errors import AdapterFileError, SliceFineError
from ..files.adapter import CONFIG, HUB_NAME, Adapter, find_adapter, read_adapter, read_config
from ..files.checkpoint import Checkpoint
from ..reading import read_json
from ..tuner import read_file
from .checkpoints import damaged
from .contents import read_contents

__all__ = ["Part", "verify"]


@dataclass(frozen=True)
class Part:
    """Something that is whole or not.

    Attributes:
        path: where it is.
        summary: what it is, if it is whole.
        error: what is wrong with it, or None.
        missing: whether there is nothing at all.
    """

    path: Path
    summary: str
    error: str | None = None
    missing: bool = False


def verify(name: str) -> list[Part]:
    """Every part of a folder: adapters, checkpoints, models, results, also one folder below; or a tuner's single file.

    Args:
        name: a folder, a ``.safetensors`` file of `slicefine.attach`, or a name on the hub.

    Example:
        >>> [part.summary for part in verify("runs/mrpc")]  # doctest: +SKIP
        ['24 layers in 121 tensors, checksums agree', 'a checkpoint', 'results']
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [_part(path, _tuner_file)]
    if not path.is_dir():
        part = _part(path, _adapter) if HUB_NAME.fullmatch(name) else Part(path, "", "no such file or folder.")
        return [replace(part, missing=part.error is not None)]
    checkpoints = sorted([*path.glob("checkpoints/checkpoint-*"), *path.glob("checkpoint-*")])
    parts = [_part(folder, _checkpoint) for folder in checkpoints if folder.is_dir()]
    for folder in (path, *sorted(path.iterdir())):
        if folder.is_dir() and not folder.name.startswith("checkpoint"):
            check = _kind(folder)
            parts += [_part(folder, check)] if check is not None else []
    if (path / "metrics.json").is_file():
        parts.append(_part(path / "metrics.json", _results))
    expected = "an adapter (adapter_config.json), a checkpoint (trainer_state.json), a model (config.json) or a run"
    return parts or [Part(path, "", f"nothing to check here: expected {expected}.", True)]


def _kind(folder: Path) -> Callable[[Path], str] | None:
    """How to check a folder, by what it holds."""
    if (folder / "trainer_state.json").is_file():
        return _checkpoint
    if (folder / CONFIG).is_file() or folder.name == "adapter":
        return _adapter
    if any(folder.glob("model*.safetensors*")) or (folder / "config.json").is_file():
        return _model
    return None


def _part(path: Path, check: Callable[[Path], str]) -> Part:
    try:
        return Part(path, check(path))
    except SliceFineError as error:
        return Part(path, "", str(error))


def _adapter(path: Path) -> str:
    config = read_config(find_adapter(path))
    if config.get("peft_type") != "SLICEFINE":  # a LoRA export, say: no checksums, but it can be read
        contents = read_contents(path)
        return f"an adapter of {config.get('peft_type')}, {len(contents.others)} tensors, readable"
    adapter = read_adapter(path)
    _check_finite(adapter)
    sealed = "checksums agree" if config.get("checksums") else "without checksums (an earlier version's)"
    return f"{len(adapter.layers)} layers and {len(adapter.others)} other tensors, {sealed}"


def _check_finite(adapter: Adapter) -> None:
    for name, layer in adapter.layers.items():
        for block, values in layer.values.items():
            _check_values(f"{adapter.folder}: {name}, {block.axis}s from {block.start}", values)
    for name, tensor in adapter.others.items():
        _check_values(f"{adapter.folder}: {name}", tensor)


def _check_values(where: str, values: Tensor) -> None:
    if values.is_floating_point() and not bool(values.isfinite().all()):
        raise AdapterFileError(f"{where}: holds NaN or infinite values; train again from an earlier checkpoint.")


def _tuner_file(path: Path) -> str:
    tensors, header = read_file(path)
    for name, tensor in tensors.items():
        _check_values(f"{path}: {name}", tensor)
    return f"{len(tensors)} tensors, {'checksums agree' if header.get('checksums') else 'without checksums'}"


def _checkpoint(path: Path) -> str:
    if not (path / "trainer_state.json").is_file():
        raise AdapterFileError(f"{path}: no trainer_state.json, which is written last; the checkpoint is not whole.")
    error = damaged(path)
    if error is not None:
        raise AdapterFileError(error)
    step = read_json(path / "trainer_state.json")
    return f"a checkpoint after step {step.get('global_step') if isinstance(step, dict) else 'unknown'}"


def _model(path: Path) -> str:
    read_json(path / "config.json")
    with Checkpoint(path) as model:
        names = model.names()
        for name in names:
            _check_values(f"{path}: {name}", model.tensor(name))
    return f"a model of {len(names)} tensors, readable; it has no checksums"


def _results(path: Path) -> str:
    read_json(path)
    return "results, readable"
