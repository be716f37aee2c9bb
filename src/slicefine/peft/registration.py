"""The one place that reaches into PEFT and transformers: method type, honest counts, whole files, the run's length.

PEFT's method type is a closed enumeration without plug-in discovery, so one member is added to it before the
official registration. Everything here is guarded for the day when the name exists upstream.
"""

from __future__ import annotations

import functools
import inspect
import shutil
import sys
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from ..durable import replacing_files
from ..files.adapter import CONFIG, WEIGHTS, check_sealed, mend, read_config, seal
from ..layer import SliceLayer
from .sharded_checkpoints import install_sharded_loading

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
    _save_whole()
    _check_before_loading()


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
                total -= layer.room(name).numel()
                if parameter.requires_grad:
                    trainable -= layer.room(name).numel() - layer.active_entries(name)
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


def _save_whole() -> None:
    """Let `PeftModel.save_pretrained` replace an adapter's files together, and note the tensors' checksums.

    PEFT writes weights and configuration one after the other into the folder itself. For models without slices nothing
    changes.
    """
    save = PeftModel.save_pretrained
    names = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> None:
        given = names.bind(self, save_directory, *args, **kwargs).arguments
        main = given.get("is_main_process", True)
        sliced = any(config.peft_type == NAME for config in self.peft_config.values())
        if not (sliced and main) or Path(save_directory).is_file():  # a file: PEFT says so
            save(self, save_directory, *args, **kwargs)
            return
        with replacing_files(Path(save_directory)) as aside:
            card = Path(save_directory, "README.md")
            if card.is_file():  # PEFT adds to it
                shutil.copyfile(card, aside / card.name)
            save(self, str(aside), *args, **kwargs)
            for file in aside.rglob(CONFIG):
                seal(file.parent)
            written = [file.parent.relative_to(aside) for file in aside.rglob(CONFIG)]
        if not given.get("safe_serialization", True):  # an older file would be read instead of the pickle
            for part in written:
                Path(save_directory, part, WEIGHTS).unlink(missing_ok=True)
        _forget_files(self)

    PeftModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def _forget_files(model: Any) -> None:
    """Of a file's content its configuration alone tells; what stays in the model may begin another training."""
    for config in model.peft_config.values():
        if config.peft_type == NAME:
            config.layout = config.weights = config.progress = config.checksums = None


def _check_before_loading() -> None:
    """Let `PeftModel.load_adapter` compare an adapter's tensors with their checksums first, where it is a folder.

    Straight from the hub PEFT downloads the files while it loads them; there `slicefine verify` checks them.
    """
    load = PeftModel.load_adapter

    @functools.wraps(load)
    def load_adapter(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        folder = Path(str(model_id), kwargs.get("subfolder") or "")
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            mend(folder)
            config = read_config(folder)
            if config.get("peft_type") == NAME:
                check_sealed(folder, config)
        found = load(self, model_id, *args, **kwargs)
        _forget_files(self)
        return found

    PeftModel.load_adapter = load_adapter  # type: ignore[method-assign]


def install_trainer_callback(callback: Any) -> None:
    """Add ``callback`` to the defaults of transformers' ``Trainer``, so that it tells a run's length by itself.

    And let it read its sharded checkpoints.
    """
    try:
        import transformers.trainer as trainer
    except ImportError:  # the Trainer's requirements are not installed: nobody will ask
        return
    install_sharded_loading(trainer)
    if callback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(callback)
    for module in [m for n, m in list(sys.modules.items()) if n.startswith(("trl.", "sentence_transformers."))]:
        known = getattr(module, "DEFAULT_CALLBACKS", None)  # a list of their own, taken over by some libraries
        if isinstance(known, list) and callback not in known:
            known.append(callback)
