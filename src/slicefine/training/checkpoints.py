"""Whether a Trainer's checkpoint is whole: what a power cut tore, and what is no data, is found before it is loaded."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_pt_utils import safe_globals

from ..errors import AdapterFileError
from ..files.adapter import CONFIG, WEIGHTS, check_sealed, mend, read_config
from ..reading import read_json

__all__ = ["damaged"]

_NEVER_READ = "training_args.bin"  # the Trainer writes it and does not load it


def damaged(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as a sentence; None if every file in it can be read.

    Archives of tensors are compared with the check sums in them and opened as data alone (``weights_only``), an
    adapter's tensors with those in its configuration.

    Example:
        >>> damaged(Path("runs/mrpc/checkpoints/checkpoint-50"))  # doctest: +SKIP
    """
    mend(folder)
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        try:
            _check(file)
        except AdapterFileError as error:
            return str(error)
        except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
            return f"{file} cannot be read ({error}); it was not written to its end, or is damaged."
        except (zipfile.BadZipFile, pickle.UnpicklingError) as error:
            first = str(error).strip().partition("\n")[0]
            return f"{file} holds something else than tensors and plain values ({first})."
    return None


def _check(file: Path) -> None:
    if file.suffix == ".json":
        read_json(file)
    elif file.name == WEIGHTS and (file.parent / CONFIG).is_file():
        check_sealed(file.parent, read_config(file.parent))
    elif file.suffix == ".safetensors":
        with safe_open(file, framework="pt"):
            pass
    elif file.suffix in (".pt", ".pth", ".bin"):
        with zipfile.ZipFile(file) as archive:
            torn = archive.testzip()
        if torn is not None:
            raise ValueError(f"its part {torn} has another check sum")
        if file.name != _NEVER_READ:
            with safe_globals():  # type: ignore[no-untyped-call]
                torch.load(file, map_location="cpu", weights_only=True, mmap=True)
