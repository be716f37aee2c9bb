"""Write an adapter's slices as a LoRA adapter, exactly, for PEFT, vLLM or llama.cpp."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .parsing import VerbParser, instantiate

__all__ = ["ExportSettings", "parser", "run"]

_DTYPES = ("float32", "bfloat16", "float16")

_EXAMPLES = (
    "slicefine export --adapter runs/mrpc/adapter --output runs/mrpc/lora",
    "slicefine export --adapter runs/chat/adapter --output served --to vllm --rank 32 --dtype bfloat16",
)


@dataclass
class ExportSettings:
    """Everything that `slicefine export` needs.

    Args:
        adapter: folder of a SliceFine adapter.
        output: folder of the LoRA adapter.
        to: whose loader it is for: lora (PEFT: one rank per layer), vllm or llama.cpp (one rank for all layers, no
            tensors beside the factors).
        model: the base model, if it is elsewhere than in training: a folder, or a name on the Hugging Face hub.
        rank: truncate to this rank by singular value decomposition; null keeps the change exact.
        dtype: of the factors: float32, bfloat16 or float16.
        overwrite: replace what is in the output folder.
    """

    adapter: str
    output: str
    to: str = "lora"
    model: str | None = None
    rank: int | None = None
    dtype: str = "float32"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is unknown; expected one of {', '.join(_DTYPES)}.")


def parser() -> VerbParser:
    """Options of `slicefine export`."""
    usage = "slicefine export --adapter DIR --output DIR [--to lora|vllm|llama.cpp] [--SETTING VALUE ...]"
    result = VerbParser(usage, "Write slices as a LoRA adapter that needs no slicefine.", _EXAMPLES)
    result.add_class_arguments(ExportSettings)
    return result


def run(chosen: Any) -> Any:
    """Export and say what was written."""
    import torch

    from ..files.adapter import read_adapter
    from ..files.export import export_lora
    from ..files.writing import check_target
    from ..training.bases import open_base
    from ..training.screen import quiet_libraries
    from ..units import size

    quiet_libraries()
    settings = ExportSettings(**instantiate(parser(), chosen))
    adapter = read_adapter(settings.adapter)
    needed = not all(layer.additive for layer in adapter.layers.values())  # differences tell all by themselves
    with open_base(adapter, settings.model) if needed else nullcontext() as base:
        used = [adapter.folder] if base is None else [adapter.folder, base.folder]
        target = check_target(settings.output, used, settings.overwrite)
        made = export_lora(adapter, base, target, settings.to, settings.rank, getattr(torch, settings.dtype))
    ranks = sorted(set(made.ranks.values()))
    print(f"{len(made.ranks)} layers, rank {' to '.join(str(rank) for rank in dict.fromkeys((ranks[0], ranks[-1])))}")
    if made.kept:
        least = min(made.kept, key=lambda layer: made.kept[layer])
        print(f"energy of the change that the smaller rank keeps: at least {made.kept[least]:.1%} ({least})")
    print(f"written to {Path(made.folder)} ({size(made.file_bytes)})")
    return {"output": str(made.folder), "ranks": made.ranks, "kept": made.kept, "file_bytes": made.file_bytes}
