"""An adapter written into a copy of its base's files: only the lines that it changed are touched, on disk."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AdapterFileError, UnsupportedError
from ..geometry import Slice, entry_indices
from ..reading import parse_json
from .adapter import Adapter
from .checkpoint import Checkpoint
from .writing import atomic_folder

__all__ = ["StoredTensor", "merge_files", "missing_modules", "stored_tensors"]

_PREFIX = "base_model.model."
# what does not belong to a checkpoint of safetensors: other formats of the same weights would keep the base's values
_SKIPPED = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class StoredTensor:
    """Where one tensor lies in a safetensors file: its bytes can be rewritten in place.

    Attributes:
        file: the file.
        dtype: of the values.
        shape: of the tensor.
        offset: of its first byte in the file.
    """

    def __init__(self, file: Path, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> None:
        self.file, self.dtype, self.shape, self.offset = file, dtype, shape, offset

    def bytes(self) -> Tensor:
        """The tensor's bytes, ``(..., bytes per value)``, mapped from the file: writing to them writes to the file."""
        whole = torch.from_file(str(self.file), shared=True, size=self.file.stat().st_size, dtype=torch.uint8)
        shape = (*self.shape, self.dtype.itemsize)
        return whole[self.offset : self.offset + math.prod(shape)].view(shape)

    def write(self, block: Slice, lines: Tensor, transposed: bool = False) -> None:
        """Overwrite a block of a weight, rounded to the file's precision.

        Args:
            block: rows, columns or entries of the weight ``(out, in)``.
            lines: their values.
            transposed: the file keeps that weight as ``(in, out)``.
        """
        values, stored = _bytes(lines.to(self.dtype)), self.bytes()
        if transposed:
            stored = stored.transpose(0, 1)
        if block.axis == "row":
            stored.narrow(0, block.start, block.width).copy_(values)
        elif block.axis == "column":
            stored.narrow(1, block.start, block.width).copy_(values.transpose(0, 1))
        else:
            indices = entry_indices(block, (stored.shape[0], stored.shape[1]))
            stored[indices // stored.shape[1], indices % stored.shape[1]] = values[0]

    def write_all(self, tensor: Tensor) -> None:
        """Overwrite the whole tensor, rounded to the file's precision."""
        self.bytes().copy_(_bytes(tensor.to(self.dtype)))


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Every floating-point tensor of a safetensors file by name.

    Raises:
        AdapterFileError: if its header cannot be read.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= file.stat().st_size - 8:
                raise ValueError(f"a header of {length} bytes")
            header = parse_json(stream.read(length), str(file))
        found = {}
        for name, facts in header.items():
            if name != "__metadata__" and facts["dtype"] in _DTYPES:
                shape = tuple(int(size) for size in facts["shape"])
                found[name] = StoredTensor(file, _DTYPES[facts["dtype"]], shape, 8 + length + facts["data_offsets"][0])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{file}: cannot be read as a safetensors file ({error}).") from error
    return found


def missing_modules(adapter: Adapter, base: Checkpoint) -> list[str]:
    """Tensors of an adapter beside its slices, such as a new head, that its base's files have no place for."""
    names = set(base.names())
    return [key for key in adapter.others if _home(key, adapter, base) not in names]


def merge_files(adapter: Adapter, base: Checkpoint, target: Path) -> list[str]:
    """Write the base's folder with the adapter's values in it: the same files, shards, precision and tokenizer.

    The weight files are copied and patched on disk, so memory stays near the adapter's size, whatever the base's.

    Args:
        adapter: the slices; tensors beside them must have a place in the base (`missing_modules`).
        base: the weights that they were trained on.
        target: folder to write; it appears whole or not at all.

    Returns:
        The precisions that values were rounded to, where the base's files keep less than training had.

    Raises:
        UnsupportedError: if the adapter has tensors that the base's files have no place for.
        AdapterFileError: if the base is not the adapter's.
    """
    missing = missing_modules(adapter, base)
    if missing:
        raise UnsupportedError(
            f"merge: the adapter brings {len(missing)} tensors that the files of {base.folder} have no place for "
            f"({_plain(missing[0])}, ...): a new head makes another model class. Load base and adapter with PEFT and "
            "write merge_and_unload().save_pretrained(folder)."
        )
    for name, layer in adapter.layers.items():
        base.originals(name, layer)  # refuses another base before anything is copied
    rounded = set()
    with atomic_folder(target) as aside:
        for file in sorted(base.folder.iterdir()):
            if file.is_file() and _belongs(file.name, base.files()):
                shutil.copyfile(file, aside / file.name)
        places: dict[str, StoredTensor] = {}
        for file_name in base.files():
            places |= stored_tensors(aside / file_name)
        for name, layer in adapter.layers.items():
            place = _place(places, base.key(name, layer.tensor), base)
            under = base.originals(name, layer) if layer.additive else {}
            for block, lines in layer.values.items():
                whole = lines.double() + under[block].double() if layer.additive else lines
                place.write(block, whole, layer.transposed)
            if place.dtype.itemsize < layer.dtype.itemsize:
                rounded.add(str(place.dtype).removeprefix("torch."))
        for key, tensor in adapter.others.items():
            place = _place(places, _home(key, adapter, base), base)
            if place.shape != tuple(tensor.shape):
                raise AdapterFileError(
                    f"{base.folder}: {_plain(key)} has shape {place.shape}, the adapter's has {tuple(tensor.shape)}; "
                    "give the folder of its own base model."
                )
            place.write_all(tensor)
    return sorted(rounded)


def _belongs(name: str, weights: list[str]) -> bool:
    """Whether a file of the base's folder goes along: not weights that are left unpatched, nor what lists them."""
    if name.endswith(".safetensors"):
        return name in weights
    if name.endswith(".index.json"):
        return len(weights) > 1
    return not name.endswith(_SKIPPED)


def _place(places: dict[str, StoredTensor], key: str, base: Checkpoint) -> StoredTensor:
    if key not in places:
        raise AdapterFileError(f"{base.folder}: {key} is kept in a precision that slices cannot be written in.")
    return places[key]


def _home(key: str, adapter: Adapter, base: Checkpoint) -> str:
    """Where the base's files keep a tensor that an adapter brings.

    Biases are the base's own, so that a prefix before their names is let pass, as of sliced weights; a head is not.
    """
    plain = _plain(key)
    if adapter.config.get("bias", "none") == "none" or not plain.endswith("bias") or plain in base.names():
        return plain
    try:
        return base.key("", plain)
    except AdapterFileError:  # of a new head
        return plain


def _plain(key: str) -> str:
    """The base model's own name of a tensor that an adapter brings."""
    return key.removeprefix(_PREFIX).replace(".base_layer.", ".")


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes, ``(..., bytes per value)``."""
    flat = tensor.detach().cpu().contiguous()
    return flat.unsqueeze(-1).view(torch.uint8)
