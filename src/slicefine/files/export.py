"""Slices to a LoRA adapter and back: exact factors in the layout that PEFT and LoRA runtimes load."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..errors import AdapterFileError, ConfigError, UnsupportedError
from ..geometry import Slice
from ..journal import Journal, visit_table
from ..lora import exact_rank, lora_factors, read_factors, truncate
from ..packed import PackedDelta
from .adapter import CONFIG, WEIGHTS, Adapter, LayerFile, open_weights, read_config
from .checkpoint import Checkpoint, replaced
from .writing import atomic_folder

__all__ = ["RUNTIMES", "Exported", "Runtime", "changes", "export_lora", "read_lora"]

_BIASES: dict[str, Any] = {"all": "all", "slicefine_only": "lora_only"}  # whose files name biases alike
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Runtime:
    """What a loader of LoRA adapters asks for.

    Attributes:
        uniform: it takes one rank for all layers from the configuration.
        most: the largest rank that it takes; None: any.
        heads: it loads tensors beside the factors, such as a new classification head.
    """

    uniform: bool
    most: int | None
    heads: bool


RUNTIMES = {
    "lora": Runtime(uniform=False, most=None, heads=True),  # PEFT itself: a rank per layer (rank_pattern)
    # max_lora_rank takes 1, 8, 16, 32, 64, 128, 256, 320 or 512; scaling is lora_alpha / r of the configuration, and
    # modules_to_save must be empty (vllm/config/lora.py, vllm/lora/peft_helper.py)
    "vllm": Runtime(uniform=True, most=512, heads=False),
    # one alpha for all layers, divided by each factor's own rank (convert_lora_to_gguf.py, llama-adapter.h)
    "llama.cpp": Runtime(uniform=True, most=None, heads=False),
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        ranks: of every layer as written.
        kept: share of the change's energy that a smaller rank kept, per layer; 1.0 is exact.
        file_bytes: size of the weight file.
    """

    folder: Path
    ranks: dict[str, int]
    kept: dict[str, float]
    file_bytes: int


def changes(adapter: Adapter, base: Checkpoint | None) -> Iterator[tuple[str, LayerFile, list[tuple[Slice, Tensor]]]]:
    """Every layer with its slices' changes in fp32 or wider, each entry counted once, also where blocks cross.

    Args:
        adapter: the slices, which hold values, or differences (`LayerFile.additive`).
        base: the weights that values replace; only their rows and columns are read. None will do for differences.
    """
    _refuse_masks(adapter)
    for name, layer in adapter.layers.items():
        wide = torch.promote_types(layer.dtype, torch.float32)
        originals = PackedDelta(layer.shape, wide, torch.device("cpu"))
        for block, lines in replaced(base, name, layer).items():
            originals.write(block, lines)
        journal = Journal()
        journal.load(visit_table(layer.visits), {block: values.to(wide) for block, values in layer.values.items()})
        yield name, layer, journal.deltas(originals)


def export_lora(
    adapter: Adapter,
    base: Checkpoint | None,
    target: Path,
    to: str = "lora",
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Exported:
    """Write a LoRA adapter with the same effect, which needs no slicefine to load.

    Args:
        adapter: the slices.
        base: the weights that they were trained on; None will do for differences (`LayerFile.additive`).
        target: folder to write; it appears whole or not at all.
        to: whose loader it is for, one of `RUNTIMES`.
        rank: truncate to this rank by singular value decomposition; None keeps the change exact.
        dtype: of the factors.

    Raises:
        ConfigError: for an unknown runtime, or a rank above what it takes.
        UnsupportedError: for random masks, and for heads where the runtime loads none.
        AdapterFileError: if the base is not the adapter's.
    """
    if to not in RUNTIMES:
        raise ConfigError(f"to={to!r} is unknown; expected one of {', '.join(RUNTIMES)}.")
    runtime = RUNTIMES[to]
    _refuse_masks(adapter)
    if adapter.others and not runtime.heads:
        raise UnsupportedError(
            f"{to} loads no tensors beside the factors, and this adapter has {len(adapter.others)} "
            f"({next(iter(adapter.others))}, ...). Merge it into its base instead (slicefine merge)."
        )
    unusual = [name for name, layer in adapter.layers.items() if layer.layout != "linear"]
    if unusual:
        layout = adapter.layers[unusual[0]].layout
        raise UnsupportedError(
            f"export: {unusual[0]} ({layout}; {len(unusual)} such layers) is no linear layer, and LoRA's loaders know "
            "factors of linear layers. Load base and adapter with PEFT, and save what merge_and_unload() gives."
        )
    needed = {name: exact_rank(list(layer.values), layer.shape) for name, layer in adapter.layers.items()}
    most = max(needed.values(), default=0)
    if runtime.most is not None and min(most, rank or most) > runtime.most:
        raise ConfigError(
            f"{to} takes ranks up to {runtime.most}, and the exact one is {most}, the rows and columns touched in all "
            f"moves. Truncate with rank={runtime.most} (which reports the energy kept), or merge the adapter into its "
            "base (slicefine merge)."
        )
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    kept: dict[str, float] = {}
    for name, layer, parts in changes(adapter, base):
        A, B = lora_factors(parts, layer.shape)
        if rank is not None:
            A, B, kept[name] = truncate(A, B, rank)
        factors[name] = (A, B)
    ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
    if runtime.uniform:
        most = max(ranks.values(), default=1)
        factors = {name: _widened(A, B, most) for name, (A, B) in factors.items()}
        ranks = dict.fromkeys(ranks, most)
    tensors = dict(adapter.others)
    for name, (A, B) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.to(dtype).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.to(dtype).contiguous()
    with atomic_folder(target) as aside:
        safetensors.torch.save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps(_lora_config(adapter, ranks), indent=2) + "\n", encoding="utf-8")
    return Exported(target, ranks, kept, (target / WEIGHTS).stat().st_size)


def _refuse_masks(adapter: Adapter) -> None:
    for name, layer in adapter.layers.items():
        if any(block.axis == "entries" for block in layer.values):
            raise UnsupportedError(
                f"{name}: a random mask's entries lie in all rows and columns, so no small LoRA factors hold them. "
                "Merge the adapter into its base instead (slicefine merge)."
            )


def read_lora(folder: Path) -> dict[str, list[tuple[Slice, Tensor]]]:
    """The changes in a LoRA adapter that `export_lora` wrote without truncation: ``{layer: [(slice, change), ...]}``.

    Raises:
        AdapterFileError: if it is no LoRA adapter, or if its factors are not slices.
    """
    config = read_config(folder)
    if config.get("peft_type") != "LORA":
        raise AdapterFileError(f"{folder}: an adapter of {config.get('peft_type')}, not of LoRA.")
    found: dict[str, dict[str, Tensor]] = {}
    with open_weights(folder) as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            match = _KEY.fullmatch(key)
            if match is not None:
                found.setdefault(match[1], {})[match[2]] = file.get_tensor(key)
    result = {}
    for name, factors in found.items():
        slices = None if len(factors) < 2 else read_factors(factors["A"], factors["B"])
        if slices is None:
            raise AdapterFileError(
                f"{folder}: the factors of {name} are no slices (rows or columns times one-hot vectors); only exact "
                "exports of slicefine are read back."
            )
        result[name] = slices
    return result


def _widened(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors filled up with zeros to a larger rank."""
    missing = rank - A.shape[0]
    return torch.cat([A, A.new_zeros(missing, A.shape[1])]), torch.cat([B, B.new_zeros(B.shape[0], missing)], dim=1)


def _lora_config(adapter: Adapter, ranks: dict[str, int]) -> dict[str, Any]:
    """PEFT's configuration of a LoRA adapter whose scaling, alpha / r, is 1 in every layer."""
    from peft import LoraConfig

    most = max(ranks.values(), default=1)
    single = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    source = adapter.config
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=sorted(ranks),
        rank_pattern=single,
        alpha_pattern=dict(single),
        fan_in_fan_out=any(layer.transposed for layer in adapter.layers.values()),
        bias=_BIASES.get(source.get("bias", "none"), "none"),
        modules_to_save=source.get("modules_to_save"),
        trainable_token_indices=source.get("trainable_token_indices"),
        task_type=source.get("task_type"),
        base_model_name_or_path=source.get("base_model_name_or_path"),
        revision=source.get("revision"),
        inference_mode=True,
    )
    made: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    made["target_modules"] = sorted(ranks)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in made.items()}
