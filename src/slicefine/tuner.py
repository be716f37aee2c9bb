"""SliceFine on any ``nn.Module``, without PEFT: `attach`, train with any optimizer, `save`, `unload`."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .delta import Delta
from .errors import AdapterFileError, ConfigError
from .geometry import Slice
from .layer import SliceLayer
from .mover import Mover, MoveSettings, check_progress
from .schedule import Positions, Schedule
from .since import delta_since
from .transfer import check_tensors, file_tensors, load_tensors
from .weights import supports
from .window import make_window, places

__all__ = [
    "ADAPTER_VERSION",
    "FORMAT_VERSION",
    "SliceTuner",
    "attach",
    "linear_names",
    "match_layers",
    "matches",
    "share_visits",
    "shared_names",
    "warn_about_clamped",
]

FORMAT_VERSION = 2  # of a tuner's file; 2 tells additive slices apart, and has values to undo the last visits with
ADAPTER_VERSION = 2  # of an adapter folder in PEFT's layout; 2 has values to undo the last visits with
_NAME = "default"


class SliceTuner:
    """A model whose chosen layers train one slice each; made by `attach`.

    Attributes:
        model: the model, changed in place; use it as before.
        mover: moves the slices after optimizer steps.
    """

    def __init__(self, model: nn.Module, layers: dict[str, SliceLayer], mover: Mover) -> None:
        self.model, self.layers, self.mover = model, layers, mover

    @property
    def additive(self) -> bool:
        """Whether slices lie beside the weights, as differences, rather than in them."""
        return any(layer.packed is not None for layer in self.layers.values())

    def parameters(self) -> list[nn.Parameter]:
        """The persistent parameters to hand to an optimizer, one per layer."""
        return [layer.slicefine_active[_NAME] for layer in self.layers.values()]

    def move(self) -> None:
        """Freeze the active slices now and go on to the next ones."""
        self.mover.move()

    def undo(self, moves: int = 1) -> None:
        """Take back the last visits."""
        self.mover.undo(moves)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model with its original weights, bit for bit, for as long as the context lasts."""
        with ExitStack() as stack:
            for layer in self.layers.values():
                stack.enter_context(layer.reverted())
            yield

    def delta(self) -> Delta:
        """``{layer name: [(slice, trained - original), ...]}``, each entry counted once."""
        result: Delta = {}
        for name, layer in self.layers.items():
            with layer.reverted() as weight:
                result[name] = layer.deltas(_NAME, weight)
        return result

    def delta_since(self, step: int, slices_only: bool = False) -> Delta:
        """What changed after optimizer step ``step``, as values of the weights; see `slicefine.delta_since`."""
        return delta_since(self.model, step, _NAME, slices_only)

    def slices(self) -> dict[str, list[Slice]]:
        """Every slice that was visited, by layer: for the ``reserve=`` of a run that must keep out of them."""
        return {name: layer.states[_NAME].journal.slices() for name, layer in self.layers.items()}

    def unload(self, merge: bool = False) -> nn.Module:
        """Remove every trace: the base layers return with their original weights, or with the trained ones.

        Args:
            merge: keep the trained values in the weights.
        """
        for name, layer in self.layers.items():
            layer.apply_only([_NAME] if merge else [])
            layer.fold()
            _set_module(self.model, name, layer.base_layer)
        self.mover.layers = {}
        self.layers = {}
        return self.model

    def save(self, path: str | PathLike[str]) -> None:
        """Write the slices and their journal to one safetensors file."""
        tensors = {}
        for name, layer in self.layers.items():
            for kind, tensor in file_tensors(layer, _NAME).items():
                tensors[f"{name}.slicefine_{kind}"] = tensor.contiguous().cpu()
            tensors[f"{name}.slicefine_active"] = layer.slicefine_active[_NAME].detach().contiguous().cpu()
        header = {"version": FORMAT_VERSION, "additive": self.additive, "progress": self.mover.sound_progress()}
        metadata = {"format": "pt", "slicefine": json.dumps(header)}
        target = Path(path)
        aside = target.with_name(target.name + ".partial")
        try:
            safetensors.torch.save_file(tensors, aside, metadata=metadata)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)

    def load(self, path: str | PathLike[str]) -> None:
        """Replace the slices by those of a file that `save` wrote for the same layers.

        Raises:
            AdapterFileError: if the file is missing, corrupt, or was written for other layers, or if it holds
                differences from the base (``additive``) and this model's slices hold values, or the other way round.
        """
        tensors, header = _read_file(Path(path))
        additive = bool(header.get("additive", False))
        if additive != self.additive:
            raise AdapterFileError(
                f"{path}: written with additive={additive}, but this model's slices have additive={self.additive}; "
                f"attach with additive={additive}."
            )
        names = {key.rpartition(".slicefine_")[0] for key in tensors}
        if names != set(self.layers):
            odd = sorted(names ^ set(self.layers))[:3]
            raise AdapterFileError(
                f"{path}: the file's layers differ from the model's ({', '.join(odd)}, ...). Attach with the same "
                "target_modules, to the same base model, as when the file was written."
            )
        own: dict[str, dict[str, Tensor]] = {name: {} for name in self.layers}
        for key, tensor in tensors.items():
            name, _, kind = key.rpartition(".slicefine_")
            own[name][kind] = tensor
        progress = check_progress(header.get("progress"), str(path))
        for name, layer in self.layers.items():  # all of them are checked before the first one changes
            check_tensors(layer, _NAME, own[name])
        for name, layer in self.layers.items():
            load_tensors(layer, _NAME, own[name])
        self.mover.progress = progress


def attach(
    model: nn.Module,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] = (),
    r: int = 12,
    mode: str = "alternate",
    r_row: int | None = None,
    r_column: int | None = None,
    positions: Positions = "sweep",
    mask_fraction: float | None = None,
    seed: int = 0,
    history: int = 8,
    train_rest: bool = False,
    window: int | float | None = None,
    window_order: str = "top-down",
    window_dwell: str | Sequence[int] = "uniform",
    additive: bool = False,
    reserve: Mapping[str, Sequence[Slice]] | None = None,
    share: tuple[int, int] | None = None,
    start_values: str = "pretrained",
    **moves: Any,
) -> SliceTuner:
    """Train one slice of each chosen layer of any model, in place.

    Args:
        model: changed in place: chosen ``nn.Linear`` and ``Conv1D`` layers are wrapped, everything is frozen.
        target_modules: ``"all-linear"``, a regular expression for the full name, or name endings.
        exclude_modules: names to leave out, in the same notation.
        r, r_row, r_column: slice rank; one per orientation if given.
        mode: ``"row"``, ``"column"``, ``"alternate"`` or ``"random_mask"``.
        positions: see `Schedule`.
        mask_fraction: budget of the random mask.
        seed: of random positions and masks.
        history: how many moves can be undone.
        train_rest: leave ``requires_grad`` of all other parameters as it is (a new head, for example).
        window, window_order, window_dwell: train only a moving group of blocks; see `Window`.
        additive: leave the weights untouched and keep what slices change beside them, for weights that other processes
            share; each visited line then costs a little in every forward. Not for random masks. Weight decay then
            pulls towards the base's values instead of zero.
        reserve: ``{layer name: slices}`` that belong to others (`SliceTuner.slices` of an earlier run): this run keeps
            out of their rows and columns, and leaves entries as they are where a row crosses a column of theirs.
        share: ``(i, n)``: train the i-th of n parts of the positions (i from 0), beside n - 1 other runs.
        start_values: what a slice starts from; see `Schedule`.
        **moves: settings of `MoveSettings`: moves, interval, total_steps, minimum_steps, state_policy, rewarm_steps.

    Raises:
        ConfigError: for a setting that is wrong, or if no layer matches.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> tuner = attach(model, r=2, mode="row", interval=100)
        >>> sum(p.numel() for p in tuner.parameters())
        32
    """
    row, column = (r if rank is None else rank for rank in (r_row, r_column))
    settings = MoveSettings(**moves, window=make_window(window, window_order, window_dwell, seed))
    if not isinstance(history, int) or isinstance(history, bool) or history < 0:
        raise ConfigError(f"history={history!r} must be an integer of at least 0.")
    visits = share_visits(mode, share, settings)
    schedule = Schedule(mode, row, column, positions, mask_fraction, seed, reserve or {}, share, visits, start_values)
    if any(isinstance(module, SliceLayer) for module in model.modules()):
        raise ConfigError("attach: the model has slices already; unload them first.")
    if additive and mode == "random_mask":
        raise ConfigError("attach: mode='random_mask' trains scattered entries in place; it cannot be additive.")
    names = match_layers(model, target_modules, exclude_modules)
    if settings.window is not None:
        places(settings.window, names)  # refused before anything changes
    if schedule.reserve and set(schedule.reserve).isdisjoint(names):
        raise ConfigError(
            f"attach: reserve= speaks of {next(iter(schedule.reserve))!r}, ..., and none of its layers is trained here "
            f"({names[0]}, ...)."
        )
    layers = {}
    clamped: dict[str, int] = {}
    for name in names:
        layers[name] = SliceLayer(model.get_submodule(name), additive)
        found = schedule.clamped(layers[name].shape)
        clamped |= {} if found is None else {name: found[1]}
        layers[name].add_slice(_NAME, schedule, name, history)
        layers[name].apply_only([_NAME])
    if not train_rest:
        model.requires_grad_(False)
    for name, layer in layers.items():
        _set_module(model, name, layer)
    warn_about_clamped(clamped)
    mover = Mover(_NAME, layers, settings)
    if settings.total_steps is not None:
        mover.begin_run(settings.total_steps)
    return SliceTuner(model, layers, mover)


def match_layers(model: nn.Module, targets: str | Sequence[str], exclude: str | Sequence[str] = ()) -> list[str]:
    """Names of the supported layers that ``targets`` selects and ``exclude`` does not.

    As in PEFT, ``"all-linear"`` leaves a language model's output layer out.

    Raises:
        ConfigError: if nothing matches, or if a weight is shared with another layer.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)() if targets == "all-linear" else None
    names = [
        name
        for name, module in model.named_modules()
        if name and supports(module) and matches(name, targets) and not (exclude and matches(name, exclude))
        if module is not output
    ]
    if not names:
        some = [n for n, m in model.named_modules() if supports(m)][:5]
        raise ConfigError(
            f"target_modules={targets!r} matches no nn.Linear or Conv1D layer; this model has for example {some}."
        )
    for name in names:
        sharing = shared_names(model, model.get_submodule(name).weight)
        if len(sharing) > 1:
            raise ConfigError(
                f"{name}: its weight is tied to {', '.join(n for n in sharing if n != f'{name}.weight')}; training a "
                "slice of it would change both. Exclude the layer, or untie the weights first."
            )
    return names


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of a model's supported layers, for messages: ``["key", "query", "value"]``."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if supports(module)})


def shared_names(model: nn.Module, weight: Any) -> list[str]:
    """Names under which one parameter occurs in a model (more than one: tied)."""
    return [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]


def matches(name: str, targets: str | Sequence[str]) -> bool:
    """Whether a layer's full name is chosen by ``"all-linear"``, a regular expression, or name endings."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def share_visits(mode: str, share: tuple[int, int] | None, settings: MoveSettings) -> int | None:
    """Visits that each run of a share makes at most, where that has to be known; None where not, or where it is not."""
    if share is None or mode != "alternate":
        return None
    if settings.interval is None:
        return None if settings.moves is None else settings.moves + 1
    return None if settings.total_steps is None else settings.total_steps // settings.interval + 1


def warn_about_clamped(clamped: dict[str, int]) -> None:
    """List the thin layers that have fewer rows or columns than the rank asks for."""
    if clamped:
        some = ", ".join(f"{name} to {rank}" for name, rank in list(clamped.items())[:5])
        warnings.warn(
            f"SliceFine: the rank is larger than {len(clamped)} thin layers and was clamped there: {some}.",
            UserWarning,
            stacklevel=3,
        )


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and its header: version, additive, progress."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("slicefine", "null"))
            if not isinstance(header, dict) or not isinstance(header.get("version"), int):
                raise AdapterFileError(f"{path}: not written by slicefine (no version in its metadata).")
            if header["version"] > FORMAT_VERSION:
                raise AdapterFileError(
                    f"{path}: format version {header['version']} is newer than {FORMAT_VERSION}; update slicefine."
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, header
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise AdapterFileError(f"{path}: cannot be read as a safetensors file ({error}).") from error
