"""The one place that reaches into PEFT and transformers: a new method type, honest counts, the run's length.

PEFT's method type is a closed enumeration without plug-in discovery, so one member is added to it before the
official registration. Everything here is guarded for the day when the name exists upstream.
"""

from __future__ import annotations

import sys
from typing import Any

from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from ..layer import SliceLayer

__all__ = ["NAME", "install_trainer_callback", "register"]

NAME = "SLICEFINE"


def register(config: type, model: type) -> None:
    """Make the method known to PEFT; does nothing when it is known already."""
    if NAME not in PeftType.__members__:
        _add_member()
    if PeftType(NAME) in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model)
    _count_active_entries()


def _add_member() -> None:
    """Add ``PeftType.SLICEFINE``, a genuine member: it pickles, copies and compares like the others."""
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member


def _count_active_entries() -> None:
    """Let PEFT's own counter report active entries: padding is not trained, and no parameter is added."""
    count, show = PeftModel.get_nb_trainable_parameters, PeftModel.print_trainable_parameters

    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        trainable, total = count(self)
        for layer in self.modules():
            if not isinstance(layer, SliceLayer):
                continue
            for name, parameter in layer.slicefine_active.items():
                total -= parameter.numel()
                if parameter.requires_grad:
                    trainable -= parameter.numel() - layer.active_entries(name)
        return trainable, total

    def print_trainable_parameters(self: Any) -> None:
        show(self)
        layers = [layer for layer in self.modules() if isinstance(layer, SliceLayer)]
        beside = sum(layer.packed.numel() for layer in layers if layer.packed is not None)
        if any(layer.packed is not None for layer in layers):
            print(f"added params: {beside:,} (differences beside weights that are not written)")
        elif layers:
            print("added params: 0 (SliceFine trains slices of the base weights in place)")

    PeftModel.get_nb_trainable_parameters = get_nb_trainable_parameters  # type: ignore[method-assign]
    PeftModel.print_trainable_parameters = print_trainable_parameters  # type: ignore[method-assign]


def install_trainer_callback(callback: Any) -> None:
    """Add ``callback`` to the defaults of transformers' ``Trainer``, so that it tells a run's length by itself."""
    try:
        import transformers.trainer as trainer
    except ImportError:  # the Trainer's requirements are not installed: nobody will ask
        return
    if callback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(callback)
    for module in [m for n, m in list(sys.modules.items()) if n.startswith(("trl.", "sentence_transformers."))]:
        known = getattr(module, "DEFAULT_CALLBACKS", None)  # a list of their own, taken over by some libraries
        if isinstance(known, list) and callback not in known:
            known.append(callback)
