"""An adapter folder's content as plain data: `Adapter`. Everything else here takes one and gives one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checksums import check_keys, check_tensor, checksum, read_checksums
from ..delta import KINDS, pack_values, unpack
from ..durable import finish, standing
from ..errors import AdapterFileError, ConfigError
from ..functional import pad_block
from ..geometry import AXES, Slice
from ..journal import Visit, read_table, split_history
from ..reading import read_json
from ..state import SampledEntry, read_sample
from ..transfer import BESIDE as DIFFERENCES
from ..tuner import ADAPTER_VERSION
from .writing import atomic_folder

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Adapter",
    "LayerFile",
    "check_sealed",
    "files_beside",
    "mend",
    "owned_slices",
    "read_adapter",
    "seal",
    "write_adapter",
]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LARGEST = 2**33  # entries of a matrix; what is larger is no weight
# what may lie beside an adapter: how to prepare its input, and what `slicefine eval` needs
BESIDE = frozenset(
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "preprocessor_config.json",
        "processor_config.json",
        "slicefine_run.json",
    ]
)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_MARK = ".slicefine_"
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class LayerFile:
    """One layer's slices.

    Attributes:
        shape: ``(rows, columns)`` of its weight: output units, input features.
        transposed: the base stores that weight as ``(in, out)`` (transformers' ``Conv1D``).
        visits: where the slice was, and when.
        values: what the weight holds in each visited slice, as lines, in the order of first visit.
        sample: a few of the base's values, which tell it from other models.
        dtype: the weight's precision in training; finished slices are stored in it.
        room: shape of the persistent parameter, which holds the last slice.
        before: for each visit what undoing it needs (`Journal.history`), None where the history does not reach.
        layout: how the base holds the matrix (`slicefine.weights.WeightKind`), where that is no plain layer's way.
        tensor: the weight's full name there; empty means ``NAME.weight``.
        path: the module's place in the trained model, where the layer is named otherwise.
        additive: the values are differences that lay beside the weight (a quantised one, say), not what it holds.
    """

    shape: tuple[int, int]
    transposed: bool
    visits: list[Visit]
    values: dict[Slice, Tensor]
    sample: list[SampledEntry]
    dtype: torch.dtype
    room: tuple[int, int]
    before: list[Tensor | None]
    additive: bool = False
    layout: str = "linear"
    tensor: str = ""
    path: str = ""


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, read whole (it is small).

    Attributes:
        folder: where it is.
        config: its ``adapter_config.json``.
        layers: the sliced layers by name.
        others: all other tensors by their full names, such as a head.
    """

    folder: Path
    config: dict[str, Any]
    layers: dict[str, LayerFile] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder.

    Raises:
        AdapterFileError: if a file is missing, corrupt, of another method, or written by a newer slicefine.
    """
    path = find_adapter(folder)
    mend(path)
    config = read_config(path)
    version = config.get("format_version", ADAPTER_VERSION)
    if not isinstance(version, int) or version > ADAPTER_VERSION:
        raise AdapterFileError(
            f"{path}: format version {version}, and this slicefine reads up to {ADAPTER_VERSION}; update slicefine."
        )
    if config.get("peft_type") != "SLICEFINE":
        raise AdapterFileError(
            f"{path}: an adapter of {config.get('peft_type')}, not of SliceFine; give a SliceFine adapter's folder."
        )
    tensors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in _checked_tensors(path, config):
        name, mark, kind = key.rpartition(_MARK)
        if not mark:
            others[key] = tensor
        elif kind not in ("active", *KINDS, DIFFERENCES):
            raise AdapterFileError(f"{path / WEIGHTS}: unknown tensor {key}; update slicefine.")
        else:
            tensors.setdefault(name.removeprefix(_PREFIX), {})[kind] = tensor
    weights = config.get("weights") or {}
    if not isinstance(weights, dict):
        raise AdapterFileError(f"{path / CONFIG}: what it says of the weights makes no sense; the file is corrupt.")
    layers = {}
    names = {facts["path"]: name for name, facts in weights.items() if isinstance(facts, dict) and "path" in facts}
    for path_in_model, own in tensors.items():
        name = str(names.get(path_in_model, path_in_model))
        facts = weights.get(name)
        if facts is None:
            raise AdapterFileError(
                f"{path / CONFIG}: says nothing of the weight of {name}; it was written by an early version. Load it "
                "with peft.PeftModel.from_pretrained and save it again."
            )
        layers[name] = _layer(path / WEIGHTS, name, own, facts)
    if not layers:
        raise AdapterFileError(f"{path / WEIGHTS}: holds no slices; the file is incomplete.")
    return Adapter(path, config, layers, others)


def write_adapter(adapter: Adapter, target: Path, beside: Path | None = None) -> None:
    """Write an adapter folder; it appears whole or not at all.

    Args:
        adapter: the content.
        target: the folder.
        beside: a folder whose other files (tokenizer, run file) go with it.
    """
    tensors = {key: tensor.contiguous() for key, tensor in adapter.others.items()}
    config = {**adapter.config, "layout": {}, "weights": {}, "format_version": ADAPTER_VERSION}
    for name, layer in adapter.layers.items():
        own = pack_values(layer.visits, layer.values, layer.before)
        config["layout"][name] = {kind: list(tensor.shape) for kind, tensor in own.items()}
        sample = [list(entry) for entry in layer.sample]
        facts: dict[str, Any] = {"shape": list(layer.shape), "transposed": layer.transposed}
        facts |= {"additive": True} if layer.additive else {"sample": sample}
        facts |= {"layout": layer.layout, "tensor": layer.tensor} if layer.tensor else {}
        facts |= {"path": layer.path} if layer.path else {}
        config["weights"][name] = facts | {"dtype": str(layer.dtype).removeprefix("torch.")}
        own = {kind: t.to(layer.dtype) if t.is_floating_point() else t for kind, t in own.items()}
        active = layer.values[layer.visits[-1].slice]
        own["active"] = pad_block(active, layer.room)
        own |= {DIFFERENCES: torch.empty(0)} if layer.additive else {}
        path = layer.path or name
        tensors |= {f"{_PREFIX}{path}{_MARK}{kind}": tensor.contiguous() for kind, tensor in own.items()}
    with atomic_folder(target) as aside:
        for file in () if beside is None else files_beside(beside):
            shutil.copyfile(file, aside / file.name)
        safetensors.torch.save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        seal(aside)


def files_beside(folder: Path) -> list[Path]:
    """The files of an adapter's folder that go where it goes: the tokenizer's, and what `slicefine eval` needs.

    Raises:
        AdapterFileError: if one is a link to somewhere else: it could be anything of this machine.
    """
    found = sorted(file for file in folder.iterdir() if file.is_file() and file.name in BESIDE)
    home = folder.resolve()
    if home.parent.name == "snapshots":  # the hub's cache: files are links to ../../blobs
        home = home.parents[1]
    for file in found:
        if not file.resolve().is_relative_to(home):
            raise AdapterFileError(f"{file}: a link to a file outside of the adapter's folder; it is not followed.")
    return found


def seal(folder: Path) -> None:
    """Note in an adapter folder's configuration what its tensors are: the checksum of each, as the file has it."""
    if not (folder / WEIGHTS).is_file():
        return
    with open_weights(folder) as file:
        checksums = {key: checksum(file.get_tensor(key)) for key in sorted(file.keys())}
    config = {**read_config(folder), "checksums": checksums}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_sealed(folder: Path, config: dict[str, Any]) -> None:
    """Raise `AdapterFileError` unless an adapter folder's tensors are those that were saved with its configuration."""
    for _ in _checked_tensors(folder, config):
        pass


def mend(folder: Path) -> None:
    """Before reading: put files in place that a crash while saving kept from it."""
    with suppress(OSError):  # read only: then the checksums tell
        finish(folder)


def owned_slices(reserve: Any) -> dict[str, list[list[Any]]] | None:
    """What adapters trained: ``{layer: [[axis, start, width], ...]}``, from their folders (one, or several).

    Args:
        reserve: folders, or such a mapping already, or None.

    Raises:
        AdapterFileError: if a folder holds no SliceFine adapter.
        ConfigError: for anything else.
    """
    if reserve is None:
        return None
    result: dict[str, list[list[Any]]] = {}
    if isinstance(reserve, Mapping):
        try:
            for layer, blocks in reserve.items():
                made = [Slice(str(axis), int(start), int(width)) for axis, start, width in blocks]
                if not all(s.axis in AXES[:2] and s.start >= 0 and s.width > 0 for s in made):
                    raise ValueError(f"{layer}: {blocks}")
                result[str(layer)] = [list(block) for block in made]
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"reserve: expected folders of adapters, or {{layer: [[axis, start, width], ...]}} ({error})."
            ) from error
        return result
    folders = [reserve] if isinstance(reserve, (str, Path)) else reserve
    if not isinstance(folders, Sequence) or not all(isinstance(folder, (str, Path)) for folder in folders):
        raise ConfigError(f"reserve={reserve!r}: expected folders of adapters, or the slices of each layer.")
    for folder in folders:
        for name, layer in read_adapter(folder).layers.items():
            blocks = [list(block) for block in layer.values if block.axis != "entries"]
            if len(blocks) < len(layer.values):
                raise ConfigError(f"reserve: {folder} has random masks, whose entries lie all over; nothing is free.")
            known = result.setdefault(name, [])
            known += [block for block in blocks if block not in known]
    return result


def find_adapter(folder: str | Path) -> Path:
    """The folder itself, or the ``adapter`` folder inside a run's output; ``user/name`` is fetched from the hub.

    Raises:
        AdapterFileError: if there is no such folder, and the hub has none or cannot be reached.
    """
    path = Path(folder).expanduser()
    path = standing(path)
    if not path.exists() and HUB_NAME.fullmatch(str(folder)):
        return _fetched(str(folder))
    if not (path / CONFIG).is_file() and (path / "adapter" / CONFIG).is_file():
        return path / "adapter"
    return path


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", WEIGHTS, "*.txt", "*.model", "README.md"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterFileError(
            f"{name}: no such folder, and the hub does not give it ({first_line(error)}). Give the "
            "folder of an adapter, or its name on the hub."
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """An adapter folder's configuration.

    Raises:
        AdapterFileError: if it is missing or no JSON object.
    """
    file = path / CONFIG
    if not file.is_file():
        raise AdapterFileError(f"{file} is missing; give the folder of an adapter in PEFT's layout.")
    config = read_json(file)
    if not isinstance(config, dict):
        raise AdapterFileError(f"{file}: expected a JSON object, got {type(config).__name__}; the file is corrupt.")
    return config


def open_weights(path: Path) -> Any:
    """An adapter folder's tensors, opened lazily.

    Raises:
        AdapterFileError: if the file is missing or corrupt. Pickle files are not read.
    """
    file = path / WEIGHTS
    if not file.is_file():
        raise AdapterFileError(f"{file} is missing; copy the whole adapter folder, or train again.")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{file}: cannot be read as a safetensors file ({error}); it is corrupt.") from error


def _checked_tensors(path: Path, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an adapter folder by their full names, each compared with its checksum."""
    where = str(path / WEIGHTS)
    checksums = read_checksums(config.get("checksums"), str(path / CONFIG))
    with open_weights(path) as file:
        names = sorted(file.keys())
        check_keys(set(names), checksums, where)
        for key in names:
            tensor = file.get_tensor(key)
            check_tensor(key, tensor, checksums, where)
            yield key, tensor


def _layer(file: Path, name: str, tensors: dict[str, Tensor], facts: Any) -> LayerFile:
    for kind in ("active", "journal"):
        if kind not in tensors:
            raise AdapterFileError(f"{file}: layer {name} has no {kind} tensor; the file is incomplete.")
    try:
        rows, columns = (int(size) for size in facts["shape"])
        if not (rows > 0 and columns > 0 and rows * columns <= _LARGEST):
            raise ValueError(f"a matrix of {rows} x {columns}")
        transposed = bool(facts["transposed"])
        dtype, additive = _DTYPES[facts["dtype"]], bool(facts.get("additive", False))
        if additive != (DIFFERENCES in tensors):
            raise ValueError("it says something else than the tensors of values or differences")
        layout = str(facts.get("layout", "linear"))
        tensor, path = str(facts.get("tensor", "")), str(facts.get("path", ""))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise AdapterFileError(f"{file.parent / CONFIG}: what it says of {name}'s weight makes no sense.") from error
    values = unpack(tensors, tensors["active"], (rows, columns), name)
    visits = read_table(tensors["journal"])
    room = (int(tensors["active"].shape[0]), int(tensors["active"].shape[1]))
    if visits[-1].slice.axis != "entries" and room[1] not in (rows, columns):
        raise AdapterFileError(
            f"{file}: {name}'s active block has lines of {room[1]}, which do not fit a weight of {rows} x {columns}."
        )
    before = split_history(tensors["journal"], tensors.get("before"))
    sample = read_sample(facts, (rows, columns), name)
    return LayerFile(
        (rows, columns), transposed, visits, values, sample, dtype, room, before, additive, layout, tensor, path
    )
