"""Results on disk: write them, and load them again for evaluating and merging."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import AdapterFileError, ConfigError
from ..files.adapter import find_adapter, first_line
from ..methods import Base, find, options_of
from ..methods.files import load_tensors, save_tensors
from ..reading import read_json
from ..tasks import Columns, DataSettings, Loaded, ModelSettings, Task, TaskSettings, get_task
from .session import Session

__all__ = ["RUN_FILE", "Trained", "load_trained", "read_run", "save_trained", "weight_bytes"]

RUN_FILE = "slicefine_run.json"  # what eval and merge need to know, beside the weights
FORMAT_VERSION = 1
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform")


class Trained:
    """A model that was loaded back.

    Attributes:
        model: the base with its adapter, or the whole model.
        task: the task, with its classes.
        loaded: base and processor.
        data: the data settings of the run.
    """

    def __init__(self, model: Any, task: Task, loaded: Loaded, data: DataSettings) -> None:
        self.model, self.task, self.loaded, self.data = model, task, loaded, data


def save_trained(session: Session, folder: Path) -> None:
    """Write model or adapter, processor, and the run file into an existing folder."""
    settings, method = session.settings, session.settings.chosen_method
    if method.saves == "adapter":
        for config in session.model.peft_config.values():
            config.base_model_name_or_path = session.loaded.model.config._name_or_path
        session.model.save_pretrained(folder, save_embedding_layers=False)  # embeddings are never trained
    elif method.saves == "tensors":
        save_tensors(session.model, method, options_of(method, settings.method.options), folder)
    else:
        session.model.save_pretrained(folder)
    tokenizer = getattr(session.loaded.processor, "backend_tokenizer", None)
    if tokenizer is not None:  # it keeps what its last call cut off, and rows that are cached on disk need no call
        tokenizer.no_truncation()
        tokenizer.no_padding()
    session.loaded.processor.save_pretrained(folder)
    content = {
        "version": FORMAT_VERSION,
        "adapter": method.saves == "adapter",
        "model": settings.as_dict()["model"],
        "data": settings.as_dict()["data"],
        "task": settings.as_dict()["task"],
        "method": settings.method.name,
        "seed": settings.training.seed,
        "targets": {name: getattr(settings.slice, name) for name in _TARGETS},
        "state": session.task.state(),
    }
    (folder / RUN_FILE).write_text(json.dumps(content, indent=2) + "\n")


def read_run(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """The run file of a results folder.

    It may come from anybody. So it never switches on code that a model brings along, whatever it says, and from the hub
    it names no files of this machine.

    Args:
        folder: the ``adapter`` folder of a run, or a name on the hub.
        trust_remote_code: the user's own word for that code.

    Raises:
        AdapterFileError: if the folder or the file is missing or corrupt.
    """
    given, folder = folder, find_adapter(folder)
    path = folder / RUN_FILE
    if not path.is_file() and (folder / "adapter" / RUN_FILE).is_file():
        path = folder / "adapter" / RUN_FILE  # the output folder was given instead of its adapter/
    if not path.is_file():
        raise AdapterFileError(
            f"{folder}: no {RUN_FILE} here. Give the adapter/ folder that `slicefine train` wrote; other adapters are "
            "loaded with peft.PeftModel.from_pretrained."
        )
    content = read_json(path)
    if not isinstance(content, dict) or content.get("version") != FORMAT_VERSION:
        raise AdapterFileError(f"{path}: expected version {FORMAT_VERSION}; update slicefine, or train again.")
    missing = {"adapter", "model", "data", "task", "state"} - content.keys()
    if missing:
        raise AdapterFileError(f"{path}: {', '.join(sorted(missing))} is missing; the file is corrupt. Train again.")
    odd = next((part for part in ("model", "data", "task") if not isinstance(content[part], dict)), None)
    if odd is not None:
        raise AdapterFileError(f"{path}: {odd} is no group of settings; the file is corrupt. Train again.")
    if not Path(given).expanduser().exists():
        _refuse_paths(path, content)
    model = {**content["model"], "trust_remote_code": trust_remote_code}
    return {**content, "model": model, "folder": path.parent}


def _refuse_paths(path: Path, content: dict[str, Any]) -> None:
    """Raise `AdapterFileError` if a run file from the hub names files outside of what came with it."""
    for part in ("model", "data"):
        for name, value in content[part].items():
            if isinstance(value, str) and (value.startswith(("/", "~", "\\")) or ".." in Path(value).parts):
                raise AdapterFileError(
                    f"{path}: {part}.{name}={value!r} names a file of this machine, and the adapter comes from the "
                    "hub; it is not followed. Download the folder, and name model and data yourself."
                )


def load_trained(folder: Path, model_path: str | None = None, trust_remote_code: bool = False) -> Trained:
    """Load a results folder into a fresh base.

    Args:
        folder: the ``adapter`` folder of a run.
        model_path: the base, if it is elsewhere now.
        trust_remote_code: run code that comes with the base; the run file cannot say so.

    Raises:
        AdapterFileError: if a file is missing, corrupt, or belongs to another base.
    """
    run = read_run(folder, trust_remote_code)
    folder = run["folder"]
    try:
        model_settings = ModelSettings(**run["model"])
        data = DataSettings(**{**run["data"], "columns": Columns(**run["data"]["columns"])})
        task_settings = TaskSettings(**run["task"])
        method = find(run.get("method", "full"))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{folder / RUN_FILE}: its settings make no sense ({error}). Train again.") from error
    if not run["adapter"] and method.saves == "model":
        model_settings = replace(model_settings, path=str(folder), config=None, revision=None, tokenizer=None)
    elif model_path is not None:
        model_settings = replace(model_settings, path=model_path)
    task = get_task(task_settings, model_settings, data)
    task.restore(run["state"])
    try:
        loaded = task.load()
    except ConfigError as error:
        raise AdapterFileError(_no_base(folder, model_settings.path, model_path, error)) from error
    model = loaded.model
    if run["adapter"]:
        model = _attach(model, folder)
    elif method.saves == "tensors":
        base = Base(model, tuple(loaded.new_modules), task_type=task.peft_task_type, seed=run["seed"], **run["targets"])
        model = load_tensors(base, method, folder)
    model.eval()
    return Trained(model, task, loaded, data)


def _no_base(folder: Path, path: str | None, given: str | None, error: BaseException) -> str:
    """What to say where the base does not load; the run may have named a folder as seen from another one."""
    if given is not None or path is None or Path(path).expanduser().is_dir():
        return str(error)
    return (
        f"{folder}: its base model was {path!r} in training. That is no folder as seen from here, and the hub does not "
        f"give it ({first_line(error.__cause__ or error)}). Say where the base is: --model DIR."
    )


def weight_bytes(folder: Path) -> int:
    """Size of the weight files in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _attach(base: Any, folder: Path) -> Any:
    from peft import PeftModel
    from safetensors import SafetensorError

    from .. import peft as _registered  # noqa: F401  (PEFT must know the method before it reads the file)

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise AdapterFileError(f"{folder / name} is missing; copy the whole adapter folder, or train again.")
    try:
        model = PeftModel.from_pretrained(base, str(folder))
        if getattr(model.active_peft_config, "peft_type", None) == "ADALORA":
            # PEFT 0.21 sets it when training only, and reads it wherever labels are given
            model.base_model.trainable_adapter_name = model.active_adapter  # type: ignore[assignment]
        return model
    except AdapterFileError:
        raise
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise AdapterFileError(
            f"{folder}: the adapter cannot be loaded ({error}). The file is corrupt, or the base is not the one it was "
            "trained on."
        ) from error
