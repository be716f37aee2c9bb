"""A base model's weights on disk, read line by line: what an adapter needs of them is a few rows and columns."""

from __future__ import annotations

import re
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AdapterFileError, ConfigError, UnsupportedError
from ..functional import read_block
from ..geometry import Slice
from ..reading import read_json
from ..state import same_base
from .adapter import Adapter, LayerFile, first_line

__all__ = ["Checkpoint", "find_checkpoint", "kind_of", "model_folder", "replaced"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# tables that are looked up rather than multiplied, and heads over the vocabulary, by a part of the name
_NOT_LAYERS = re.compile(r"embed|^wte$|^wpe$|^shared$|^lm_head$|^predictions$|relative_attention_bias")
_TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # transformers' Conv1D: (in, out)
_TRANSPOSED = ("c_attn", "c_proj", "c_fc", "q_attn")


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
    return model_folder(name, revision)


def model_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a model's weights: a local one, or the Hugging Face hub's, whose weights are downloaded.

    Args:
        name: a folder or a name on the hub.
        revision: branch, tag or commit on the hub.

    Raises:
        AdapterFileError: if there is no such folder, and the hub has none or cannot be reached.
    """
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


def kind_of(layer: str) -> str:
    """What a layer is within its block: its name after the last number.

    Example:
        >>> kind_of("bert.encoder.layer.3.attention.self.query"), kind_of("pooler.dense")
        ('attention.self.query', 'pooler.dense')
    """
    return re.split(r"(?:^|\.)\d+\.", layer)[-1]


MATRICES = ("linear", "hidden", "packed", "embedding")  # layouts of weights that files keep as they are used


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

    def key(self, layer: str, tensor: str = "") -> str:
        """The name under which the files keep a layer's weight (``tensor``, or ``LAYER.weight``).

        A task's model has a prefix before the base's own names, or lacks it: both are tried.

        Raises:
            AdapterFileError: if no name fits, or several do.
        """
        wanted = tensor or f"{layer}.weight"
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

    def linear_layers(self) -> tuple[list[str], list[str]]:
        """The layers whose weight is a matrix that inputs are multiplied with, in the order of the blocks.

        Only headers are read, so this goes by shape and name: two dimensions, ``NAME.weight``, and no part of the name
        that says embedding or head over the vocabulary. Integers (quantised weights) and stacks of matrices are not
        here.

        Returns:
            The layers' names, and those of matrices that were left out because of their names.

        Raises:
            AdapterFileError: if a file cannot be read, or lacks a tensor that the index names.
        """
        layers = [
            key.removesuffix(".weight") for key in self._where if key.endswith(".weight") and self._is_matrix(key)
        ]
        layers.sort(key=_natural)
        excluded = [name for name in layers if any(_NOT_LAYERS.search(part) for part in name.split("."))]
        return [name for name in layers if name not in set(excluded)], excluded

    def matrix(self, layer: str) -> Tensor:
        """A layer's whole weight, ``(out, in)``, in fp32 or fp64; nothing else is read, and nothing is kept.

        Raises:
            AdapterFileError: if there is no such layer.
        """
        whole: Tensor = self._part(f"{layer}.weight")[:]
        if whole.dtype != torch.float64:
            whole = whole.float()
        turned = self._model_type in _TRANSPOSED_MODELS and layer.rpartition(".")[2] in _TRANSPOSED
        return whole.t() if turned else whole

    def tensor(self, key: str) -> Tensor:
        """One tensor as it is stored, by its full name.

        Raises:
            AdapterFileError: if there is none, or it cannot be read.
        """
        self._part(key)
        whole: Tensor = self._open(key).get_tensor(key)
        return whole

    def originals(self, name: str, layer: LayerFile) -> dict[Slice, Tensor]:
        """What the base holds in each slice of a layer, as lines, in the precision that it had in training.

        Under differences that lay beside the weight (`LayerFile.additive`) it is the file's precision.

        Raises:
            AdapterFileError: if the weight has another shape or other values than it had then.
        """
        key = self.key(name, layer.tensor)
        part = self._part(key)
        shape = tuple(part.get_shape())
        if layer.layout not in MATRICES:
            raise UnsupportedError(
                f"{key} is no matrix ({layer.layout}, {shape}), and files are written line by line. Load base and "
                "adapter with PEFT, and save what merge_and_unload() gives."
            )
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

    def _is_matrix(self, key: str) -> bool:
        part = self._part(key)
        return len(part.get_shape()) == 2 and "F" in part.get_dtype()

    @cached_property
    def _model_type(self) -> str | None:
        config = self.folder / "config.json"
        if not config.is_file():
            return None
        try:
            kind: str | None = read_json(config).get("model_type")
        except AttributeError as error:
            raise AdapterFileError(f"{config}: not a readable model configuration ({error}).") from error
        return kind

    def _part(self, key: str) -> Any:
        if key not in self._where:
            raise AdapterFileError(f"{self.folder}: there is no tensor {key!r}; it has {', '.join(self.names()[:5])}.")
        try:
            return self._open(key).get_slice(key)
        except SafetensorError as error:
            where = self.folder / self._where[key]
            raise AdapterFileError(f"{where}: tensor {key!r} cannot be read ({error}).") from error

    def _open(self, key: str) -> Any:
        name = self._where[key]
        if name not in self._files:
            self._files[name] = self._stack.enter_context(_open(self.folder / name))
        return self._files[name]

    def _read_index(self) -> dict[str, str]:
        index = self.folder / _INDEX
        if index.is_file() and not (self.folder / _SINGLE).is_file():  # transformers prefers the single file, too
            try:
                weights = read_json(index)["weight_map"]
                names = {str(key): str(name) for key, name in weights.items()}
            except (KeyError, TypeError, AttributeError) as error:
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


def replaced(base: Checkpoint | None, name: str, layer: LayerFile) -> dict[Slice, Tensor]:
    """`Checkpoint.originals`; differences replaced zeros, so they need no base.

    Raises:
        ConfigError: for values without a base.
        AdapterFileError: if the base is not the adapter's.
    """
    if layer.additive:
        return {block: torch.zeros_like(values, dtype=layer.dtype) for block, values in layer.values.items()}
    if base is None:
        raise ConfigError(f"{name}: the adapter's slices hold values, so their base's weights are needed.")
    return base.originals(name, layer)


def _natural(name: str) -> list[tuple[int, str]]:
    """``layer.2`` before ``layer.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _lines(part: Any, block: Slice, layer: LayerFile) -> Tensor:
    """A block of a stored weight as lines, read alone."""
    if block.axis == "entries":
        whole: Tensor = part[:].t() if layer.transposed else part[:]
        return read_block(whole, block).to(layer.dtype)
    end = block.start + block.width
    along_rows = (block.axis == "row") != layer.transposed
    values: Tensor = part[block.start : end] if along_rows else part[:, block.start : end].t()
    return values.to(values.dtype if layer.additive else layer.dtype).contiguous()  # beside: in a precision of its own


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{path}: cannot be read as a safetensors file ({error}).") from error
