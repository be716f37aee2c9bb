"""SliceFine as one method among others: every variant of the tables is a choice of its options."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..biases import BIAS_NAMES
from .base import Base, Method, Options, numbers
from .whole import biases

__all__ = ["METHODS", "build_slices"]

# as SliceFineConfig names them
_OPTIONS = {
    "r": 5,
    "mode": "alternate",
    "r_row": None,
    "r_column": None,
    "positions": "sweep",
    "start_values": "pretrained",
    "mask_fraction": None,
    "moves": 8,
    "interval": None,
    "minimum_steps": 50,
    "state_policy": "reset",
    "rewarm_steps": 10,
    "on_nonfinite": "raise",
    "window": None,
    "window_order": "top-down",
    "window_dwell": "uniform",
    "reserve": None,
    "share": None,
    "seed": None,
    "rank_pattern": None,
    "whole_heads": False,
    "bias": "none",
    "coupled": False,
    "target_parameters": None,
}


def build_slices(base: Base, options: Options) -> nn.Module:
    """The model as ``get_peft_model`` gives it with a `SliceFineConfig`."""
    from peft import get_peft_model

    from ..peft import SliceFineConfig

    chosen: dict[str, Any] = {name: value for name, value in options.items() if name in _OPTIONS}
    chosen["seed"] = base.seed if chosen.get("seed") is None else chosen["seed"]
    config = SliceFineConfig(
        **{**chosen, "rank_pattern": dict(chosen.get("rank_pattern") or {})},
        task_type=base.task_type,
        target_modules=base.target_modules,
        exclude_modules=base.exclude_modules,
        layers_to_transform=base.layers_to_transform,
        modules_to_save=list(base.head) or None,
    )
    model: nn.Module = get_peft_model(base.model, config)  # type: ignore[arg-type]
    return model


def _count(base: Base, options: Options) -> int:
    row, column = (options["r"] if options[name] is None else options[name] for name in ("r_row", "r_column"))
    total = 0
    for _, outputs, inputs in numbers(base):
        if options["mode"] == "random_mask":
            fraction = options["mask_fraction"]
            total += min(row, outputs) * inputs if fraction is None else round(fraction * outputs * inputs)
        elif options["mode"] == "column":
            total += min(column, inputs) * outputs
        else:
            total += min(row, outputs) * inputs  # alternating slices begin with rows
    return total + sum(parameter.numel() for parameter in _biases(base, options["bias"]))


def _biases(base: Base, which: str) -> list[nn.Parameter]:
    if which == "none":
        return []
    layers = {f"{layer}.{name}" for layer in base.targets() for name in BIAS_NAMES}
    return [parameter for name, parameter in biases(base).items() if which == "all" or name in layers]


METHODS = (
    Method(
        name="slicefine",
        title="SliceFine",
        source="arXiv 2510.08513",
        formula="rows r * inputs, columns r * outputs per weight, at a time; bias: the biases",
        build=build_slices,
        count=_count,
        options=_OPTIONS,
        learning_rate=3e-3,
        saves="adapter",
        additions="0",
    ),
)
