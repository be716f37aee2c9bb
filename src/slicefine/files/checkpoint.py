"""A base model's weights on disk, read line by line: what an adapter needs of them is a few rows and columns."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AdapterFileError
from ..functional import read_block
from ..geometry import Slice
from ..state import same_base
from .adapter import Adapter, LayerFile, first_line

__all__ = ["Checkpoint", "find_checkpoint"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def find_checkpoint(adapter: Adapter, model: str | None = None) -> Path:
    """The folder of an adapter's base model: a local one, or the Hugging Face hub's, whose weights are downloaded.

    Args:
        adapter: it names the base that it was trained on, and its revision.
        model: a folder or a name on the hub instead.

    Raises:
        AdapterFileError: if there is no such folder, and the hub has none or cannot be reached.
    """
    name = model or adapter.config.get("base_model_name_or_path")
    revision = adapter.config.get("revision") if model is None else None
    if not name:
        raise AdapterFileError(f"{adapter.folder}: the adapter does not name its base model; give it with --model.")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.safetensors", "*.safetensors.index.json", "*.json"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterFileError(
            f"base model {name!r}: no such folder, and the hub does not give it ({first_line(error)}). Name "
            "the folder where its weights are (--model)."
        ) from error


class Checkpoint:
    """The safetensors files of a model folder, opened for reading parts of single tensors.

    Args:
        folder: with ``model.safetensors``, or shards and their index.

    Raises:
        AdapterFileError: if the folder has none, or if a file cannot be read.

    Example:
        >>> with Checkpoint(Path("models/minilm")) as base:  # doctest: +SKIP
        ...     base.originals("encoder.layer.0.output.dense", layer)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._where = self._read_index()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._where)

    def files(self) -> list[str]:
        """Names of the weight files."""
        return sorted(set(self._where.values()))

    def key(self, layer: str) -> str:
        """The name under which the files keep a layer's weight.

        A task's model has a prefix before the base's own names, or lacks it: both are tried.

        Raises:
            AdapterFileError: if no name fits, or several do.
        """
        wanted = f"{layer}.weight"
        parts = wanted.split(".")
        for at in range(len(parts) - 1):  # without leading parts: bert.encoder... -> encoder...
            if ".".join(parts[at:]) in self._where:
                return ".".join(parts[at:])
        found = [key for key in self._where if key.endswith(f".{wanted}")]
        if len(found) != 1:
            raise AdapterFileError(
                f"{self.folder}: {len(found)} of its tensors could be the weight of {layer}; it is not the base model "
                "that the adapter was trained on, or it names its weights differently."
            )
        return found[0]

    def originals(self, name: str, layer: LayerFile) -> dict[Slice, Tensor]:
        """What the base holds in each slice of a layer, as lines, in the precision that it had in training.

        Raises:
            AdapterFileError: if the weight has another shape or other values than it had then.
        """
        key = self.key(name)
        part = self._open(key).get_slice(key)
        shape = tuple(part.get_shape())
        if shape != (layer.shape[::-1] if layer.transposed else layer.shape):
            raise AdapterFileError(
                f"{self.folder}: {key} has shape {shape}, and the adapter was trained on {layer.shape}"
                f"{', transposed' if layer.transposed else ''}. Give the folder of its own base model."
            )
        places = [(e.column, e.row) if layer.transposed else (e.row, e.column) for e in layer.sample]
        found = [float(part[at : at + 1, to : to + 1].item()) for at, to in places]
        if not same_base(layer.sample, found):
            entry = layer.sample[0]
            raise AdapterFileError(
                f"{self.folder}: the weight of {name} is not the one that the adapter was trained on (it has "
                f"{found[0]:.6g} at row {entry.row}, column {entry.column}, not {entry.value}). Give the folder of its "
                "own base model."
            )
        return {block: _lines(part, block, layer) for block in layer.values}

    def _open(self, key: str) -> Any:
        name = self._where[key]
        if name not in self._files:
            self._files[name] = self._stack.enter_context(_open(self.folder / name))
        return self._files[name]

    def _read_index(self) -> dict[str, str]:
        index = self.folder / _INDEX
        if index.is_file() and not (self.folder / _SINGLE).is_file():  # transformers prefers the single file, too
            try:
                weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                names = {str(key): str(name) for key, name in weights.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise AdapterFileError(f"{index}: not a readable index of shards ({error}).") from error
            for name in names.values():
                if Path(name).name != name:
                    raise AdapterFileError(f"{index}: {name!r} is not a file of this folder; it is not followed.")
            return names
        if not (self.folder / _SINGLE).is_file():
            raise AdapterFileError(
                f"{self.folder}: no {_SINGLE} and no {_INDEX} here. Give the folder of the base model, saved with "
                "save_pretrained (safetensors)."
            )
        self._files[_SINGLE] = self._stack.enter_context(_open(self.folder / _SINGLE))
        return dict.fromkeys(self._files[_SINGLE].keys(), _SINGLE)


def _lines(part: Any, block: Slice, layer: LayerFile) -> Tensor:
    """A block of a stored weight as lines, read alone."""
    if block.axis == "entries":
        whole: Tensor = part[:].t() if layer.transposed else part[:]
        return read_block(whole, block).to(layer.dtype)
    end = block.start + block.width
    along_rows = (block.axis == "row") != layer.transposed
    values: Tensor = part[block.start : end] if along_rows else part[:, block.start : end].t()
    return values.to(layer.dtype).contiguous()


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{path}: cannot be read as a safetensors file ({error}).") from error
