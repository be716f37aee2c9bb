"""What a method leaves that is no PEFT adapter: its trained tensors in one file, and how to build it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import AdapterFileError
from ..reading import read_json
from .base import Base, Method, MethodLayer, options_of

__all__ = ["METHOD_FILE", "TENSORS_FILE", "load_tensors", "own_tensors", "save_tensors"]

TENSORS_FILE = "trained.safetensors"
METHOD_FILE = "method.json"
_VERSION = 1


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changed or the method drew: trainable parameters, and persistent buffers of the method's layers."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = model.state_dict()
    for path, layer in model.named_modules():
        if isinstance(layer, MethodLayer):
            prefix = f"{path}." if path else ""
            for name, _ in layer.named_buffers():
                inside = name == "base" or name.startswith("base.")
                if not inside and prefix + name in state:
                    trained[prefix + name] = state[prefix + name]
    return trained


def save_tensors(model: nn.Module, method: Method, options: dict[str, Any], folder: Path) -> None:
    """Write the two files into an existing folder."""
    tensors = {name: tensor.contiguous().cpu().clone() for name, tensor in own_tensors(model).items()}
    safetensors.torch.save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
    content = {"version": _VERSION, "method": method.name, "options": options}
    (folder / METHOD_FILE).write_text(json.dumps(content, indent=2) + "\n")


def load_tensors(base: Base, method: Method, folder: Path) -> nn.Module:
    """Build the method on a fresh base and put the file's tensors in.

    Raises:
        AdapterFileError: if a file is missing, corrupt, or does not fit the model.
    """
    for name in (METHOD_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            raise AdapterFileError(f"{folder / name} is missing; copy the whole folder, or train again.")
    try:
        content = read_json(folder / METHOD_FILE)
        tensors = safetensors.torch.load_file(folder / TENSORS_FILE)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{folder}: cannot be read ({error}); the file is corrupt. Train again.") from error
    if not isinstance(content, dict) or content.get("version") != _VERSION or content.get("method") != method.name:
        raise AdapterFileError(
            f"{folder / METHOD_FILE}: expected version {_VERSION} of {method.name}, got {content!r:.200}."
        )
    model = method.build(base, options_of(method, content.get("options", {})))
    own = own_tensors(model)
    wrong = sorted(own.keys() ^ tensors.keys()) or sorted(n for n in own if own[n].shape != tensors[n].shape)
    if wrong:
        raise AdapterFileError(
            f"{folder / TENSORS_FILE}: {', '.join(wrong[:3])} ({len(wrong)} in all) do not fit the model; the base is "
            "not the one it was trained on, or the file is damaged."
        )
    model.load_state_dict(tensors, strict=False)
    return model
