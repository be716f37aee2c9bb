"""What replaces the lists in PEFT's ``parametrize`` marks, and which tests are expected to fail, and why."""

from __future__ import annotations

import os
from dataclasses import field, make_dataclass
from typing import Any, NamedTuple

import pytest
from peft import LoraConfig

from slicefine import SliceFineConfig
from slicefine.errors import UnsupportedError

from .models import folder

__all__ = ["EXCLUDED", "FULL", "METHOD", "NOT_APPLICABLE", "VARIANTS", "Excluded", "tables"]

FULL = os.environ.get("SLICEFINE_PEFT_FULL", "0") == "1"
METHOD = os.environ.get("SLICEFINE_PEFT_METHOD", "slicefine")
MOVES = 3


def _variant(mode: str, moves: int) -> type:
    """A `SliceFineConfig` with other defaults. With moves: some at once, then one after each optimizer step."""
    name = "".join(part.capitalize() for part in mode.split("_")) + ("Moved" if moves else "")
    fields: list[Any] = [("mode", str, field(default=mode)), ("r", int, field(default=2))]
    if moves:
        fields.append(("interval", "int | None", field(default=1)))
    made = make_dataclass(name, fields, bases=(SliceFineConfig,), namespace={"moves_made": moves})
    made.__module__ = __name__
    globals()[name] = made  # so that instances can be pickled
    return made


_MODES = ("row", "column", "alternate", "random_mask")
if METHOD == "lora":
    VARIANTS: list[type] = [LoraConfig]
elif FULL:
    VARIANTS = [_variant(mode, moves) for mode in _MODES for moves in (0, MOVES)]
else:
    VARIANTS = [_variant("alternate", MOVES)]

_MLP: list[tuple[str, str, dict[str, Any]]] = [
    ("regular expression", "MLP", {"target_modules": "lin0"}),
    ("first", "MLP", {"target_modules": ["lin0"]}),
    ("thin", "MLP", {"target_modules": ["lin1"]}),
    ("both", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("large rank", "MLP", {"target_modules": ["lin0", "lin1"], "r": 7}),
    ("all-linear", "MLP", {"target_modules": "all-linear"}),
    ("modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("rank pattern", "MLP", {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin0": 3}}),
    ("layer norm", "MLP_LayerNorm", {"target_modules": ["lin0", "lin1"]}),
    ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Conv1D and linear", "EmbConv1D", {"target_modules": ["conv1d", "lin0"]}),
    ("trainable tokens", "EmbConv1D", {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}}),
    ("linear beside convolution", "Conv2d", {"target_modules": ["lin0"]}),
]
_SMOKE = ("both", "Conv1D and linear", "modules_to_save")
_ACTIVE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    # rank 6: the test's ReLU is dead for the first hidden units, so narrow column slices of lin1 change nothing
    ("different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"], "r": 6}),
    ("overlapping", {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]}),
    (
        "trainable tokens same",
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0, 1, 2]}},
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [3, 4, 5, 6]}},
    ),
    (
        "trainable tokens different",
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0, 1, 2]}},
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [3, 4, 5, 6]}},
    ),
]


def tables(task: str = "", models: tuple[str, ...] = (), targets: list[str] | None = None) -> dict[str, list[Any]]:
    """Our lists by the argument names of PEFT's marks.

    Args:
        task: the configurations' ``task_type``.
        models: names of local models (the first one only in the smoke subset).
        targets: ``target_modules``; None takes the method's default for the architecture.
    """
    init = {"init_lora_weights" if METHOD == "lora" else "init_weights": False}
    plain: dict[str, Any] = {"task_type": task, "target_modules": targets}
    configs = [plain, plain | {"trainable_token_indices": [0, 1, 3]}][: 2 if FULL else 1]
    active = [
        (name, "lora+trainable_tokens" if "tokens" in name else "slices", v, first | init, second | init)
        for name, first, second in _ACTIVE
        for v in VARIANTS
    ]
    mixed = [("same", v(target_modules=["lin0"], **init), v(target_modules=["lin0"], r=4, **init)) for v in VARIANTS]
    return {
        "test_name,model_id,config_cls,config_kwargs": [
            (n, m, v, k) for n, m, k in _MLP if FULL or n in _SMOKE for v in VARIANTS
        ],
        "config_cls,config_kwargs": [(v, kwargs) for kwargs in configs for v in VARIANTS],
        "config_cls": VARIANTS,
        "model_id": [pytest.param(folder(m), id=m) for m in (models if FULL else models[:1])],
        "test_name,tuner_method,config_cls,config_kwargs_1,config_kwargs_2": active,
        "test_name,config0,config1": mixed,
    }


# Tests that carry a configuration but look into another method's insides, by pattern; they never run.
NOT_APPLICABLE = {
    "test_add_weighted_adapter_cat_with_rank_pattern": "ignores its config_cls and builds LoRA adapters only",
    "test_default_target_modules_list_of_str": "patches LoRA's and DeLoRA's own tables of default layers",
    "test_default_target_modules_str": "patches LoRA's and DeLoRA's own tables of default layers",
    "test_mixed_adapter_batches_lora_*": "needs LoRA on embeddings and convolutions",
    "test_mixed_adapter_batches_*_raises": "expects LoRA's own refusals; ours are tested in test_peft_config.py",
    "test_prompt_*": "is parametrised with prompt learning methods",
}


class Excluded(NamedTuple):
    """A test that must fail with this very error (a pass would be reported): the claim is checked at each run."""

    test: str  # pattern of the test's name with its parameters
    error: type[BaseException]
    reason: str


EXCLUDED = [
    *(
        Excluded(test, UnsupportedError, "refused by name: adapters that share one dense weight cannot share a batch")
        for test in (
            "test_mixed_adapter_batches_different_target_layers*",
            "test_mixed_adapter_batches_mlp*",
            "test_mixed_adapter_batches_multiple_modules_to_save*",
            "test_mixed_adapter_batches_partly_overlapping_target_layers*",
        )
    ),
    Excluded(
        "test_only_params_are_updated*",
        AssertionError,
        "asks that base_layer.weight stays constant in training; SliceFine trains slices of that very weight, in place",
    ),
]
