"""Give PEFT's test classes our parameters; their bodies run as they are."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from peft import PeftModel

from slicefine import movers_of

from .cases import NOT_APPLICABLE

__all__ = ["adapt", "moving_added_adapters", "with_moves"]

Tables = Mapping[str, list[Any]]


def adapt(base: type, tables: Tables, lora_named: tuple[str, ...] = ()) -> type:
    """Subclass of a PEFT test class whose ``parametrize`` lists are ours.

    Args:
        base: one of PEFT's test classes.
        tables: our values by argument names, without spaces.
        lora_named: tests without parameters that name ``LoraConfig`` but ask for nothing that only LoRA has; they
            get our configurations under that name. Every other test without our parameters is left out.
    """
    body: dict[str, Any] = {"__module__": __name__}
    for name, function in inspect.getmembers(base, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        body[name] = None  # hides the inherited test
        old = getattr(function, "pytestmark", [])
        marks = [_swap(mark, tables) for mark in old]
        if name in lora_named:
            for variant in tables["config_cls"]:
                body[f"{name}_{variant.__name__}"] = _copy(function, old, {"LoraConfig": variant})
        elif any(_asks_for_config(new) for new in marks if new not in old) and not any(
            fnmatchcase(name, pattern) for pattern in NOT_APPLICABLE
        ):
            body[name] = _copy(function, marks)
    return type(base.__name__, (base,), body)


def _names(mark: pytest.Mark) -> str:
    names = mark.args[0] if mark.name == "parametrize" else ""
    return ",".join(part.strip() for part in (names.split(",") if isinstance(names, str) else names))


def _asks_for_config(mark: pytest.Mark) -> bool:
    return "config_cls" in _names(mark) or "config0" in _names(mark)


def _swap(mark: pytest.Mark, tables: Tables) -> pytest.Mark:
    names = _names(mark)
    return pytest.mark.parametrize(names, tables[names]).mark if names in tables else mark


def _copy(function: Any, marks: list[pytest.Mark], names: Mapping[str, Any] | None = None) -> Any:
    """The same code under other marks, and with other global names if ``names`` are given."""
    scope = {**function.__globals__, **names} if names else function.__globals__
    code, defaults, closure = function.__code__, function.__defaults__, function.__closure__
    result = types.FunctionType(code, scope, function.__name__, defaults, closure)
    result.__kwdefaults__ = function.__kwdefaults__
    result.pytestmark = list(marks)  # type: ignore[attr-defined]
    return result


# -- moves ------------------------------------------------------------------------------------------------------------


def with_moves(module: types.ModuleType) -> types.ModuleType:
    """Let every adapter that ``module`` creates make its variant's moves, as a trained one would have made them."""
    for name in ("get_peft_model", "inject_adapter_in_model"):
        create = getattr(module, name, None)
        if create is not None and not hasattr(create, "__wrapped__"):
            setattr(module, name, _moving(create))
    return module


def _moving(create: Any) -> Any:
    @functools.wraps(create)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(create).bind(*args, **kwargs)
        bound.apply_defaults()
        result = create(*args, **kwargs)
        _move(result, bound.arguments["peft_config"], bound.arguments["adapter_name"])
        return result

    return wrapper


@contextmanager
def moving_added_adapters() -> Iterator[None]:
    """`PeftModel.add_adapter` moves too; a loaded adapter brings its own moves and does not."""
    add = PeftModel.add_adapter

    @functools.wraps(add)
    def add_adapter(self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        add(self, adapter_name, peft_config, *args, **kwargs)
        _move(self, peft_config, adapter_name)

    PeftModel.add_adapter = add_adapter
    try:
        yield
    finally:
        PeftModel.add_adapter = add


def _move(model: torch.nn.Module, config: Any, adapter: str) -> None:
    for mover in movers_of(model):
        layers = [layer for layer in mover.layers.values() if adapter in layer.states]
        if mover.name != adapter or not layers or layers[0].slicefine_active[adapter].is_meta:
            continue
        before = [list(layer.applied) for layer in layers]
        for layer in layers:
            layer.apply_only([adapter])
        for _ in range(getattr(config, "moves_made", 0)):
            mover.move()
            if not config.init_weights:
                for layer in layers:
                    _perturb(layer, adapter)
        for layer, names in zip(layers, before, strict=True):
            layer.apply_only(names)


def _perturb(layer: Any, adapter: str) -> None:
    """What training would do: other values in the active slice, written as an optimizer writes them."""
    parameter = layer.slicefine_active[adapter]
    with torch.no_grad():
        change = torch.zeros_like(parameter)
        block = layer.block(adapter)
        change[: block.shape[0], : block.shape[1]] = torch.randn_like(block) * 0.1
        parameter.add_(change)
