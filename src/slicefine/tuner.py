"""SliceFine on any ``nn.Module``, without PEFT: `attach`, train with any optimizer, `save`, `unload`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed import get_rank

from .checksums import check_keys, check_tensor, checksum, read_checksums
from .coupling import check_coupled, fitted, structure
from .delta import Delta
from .durable import replacing
from .errors import AdapterFileError, ConfigError, nearest
from .geometry import Slice
from .guards import check_frozen, refuse_not_finite
from .layer import SliceLayer
from .mover import Mover
from .pace import MoveSettings, check_progress
from .quantised import Requantised
from .reading import parse_json
from .schedule import Positions, Schedule
from .sharded import is_sharded
from .since import delta_since
from .targets import match_layers, match_parameters, set_module
from .transfer import check_tensors, file_tensors, load_tensors
from .weights import lies_beside
from .window import make_window, places

__all__ = [
    "ADAPTER_VERSION",
    "FORMAT_VERSION",
    "SliceTuner",
    "attach",
    "merge_errors",
    "read_file",
    "share_visits",
    "warn_about_clamped",
    "warn_about_lost",
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
        return [cast(nn.Parameter, layer.parameter(_NAME)) for layer in self.layers.values()]

    def move(self) -> None:
        """Freeze the active slices now and go on to the next ones."""
        self.mover.move()

    def undo(self, moves: int = 1) -> None:
        """Take back the last visits."""
        self.mover.undo(moves)

    def restart(self) -> None:
        """Take back what the current visit trained; see `slicefine.Mover.restart`."""
        self.mover.restart()

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
            merge: keep the trained values in the weights. Quantised weights are quantised anew, which loses a part of
                them: a warning says how much, and `merge_errors` before.

        Raises:
            UnsupportedError: if a weight's format cannot be quantised anew.
            ContentError: if something else changed frozen entries during the training (`slicefine.accept_weights`).
            NumericalError: if slices that are to be merged are NaN or infinite. Nothing has changed after an error.
        """
        check_frozen(self.layers.values(), "unload")
        if merge:
            refuse_not_finite({name: layer.values(_NAME) for name, layer in self.layers.items()}, "unload")
        for layer in self.layers.values() if merge else ():
            layer.check_fold()  # all of them before the first one changes
        lost: dict[str, Requantised] = {}
        for name, layer in self.layers.items():
            layer.apply_only([_NAME] if merge else [])
            found = layer.fold()
            lost |= {} if found is None else {name: found}
        own = {id(layer) for layer in self.layers.values()}
        for name, module in reversed(list(self.model.named_modules())):  # what lies inside comes out first
            if id(module) in own:
                set_module(self.model, name, cast(SliceLayer, module).unwrapped())
        warn_about_lost(lost)
        self.mover.layers = {}
        self.layers = {}
        return self.model

    def save(self, path: str | PathLike[str]) -> None:
        """Write the slices and their journal to one safetensors file.

        Under FSDP2 every process has to call it: the slices are gathered, and the first process writes.

        Raises:
            ConfigError: if the file cannot be written; an earlier one is still there then.
            ContentError: if something else changed frozen entries during the training (`slicefine.accept_weights`).
            NumericalError: if a slice is NaN or infinite (`restart`). Nothing is written after an error.
        """
        check_frozen(self.layers.values(), f"save {path}")
        tensors = {}
        for name, layer in self.layers.items():
            for kind, tensor in file_tensors(layer, _NAME).items():
                tensors[f"{name}.slicefine_{kind}"] = tensor.contiguous().cpu()
            tensors[f"{name}.slicefine_active"] = layer.values(_NAME).contiguous().cpu()
        refuse_not_finite(tensors, f"save {path}")
        if any(is_sharded(layer.parameter(_NAME)) for layer in self.layers.values()) and get_rank() != 0:
            return
        beside = [name for name, layer in self.layers.items() if layer.packed is not None]
        header = {"version": FORMAT_VERSION, "additive": self.additive, "progress": self.mover.sound_progress()}
        if beside and len(beside) < len(self.layers):
            header["beside"] = beside  # of a model of which some layers are quantised
        header["checksums"] = {key: checksum(tensor) for key, tensor in tensors.items()}
        metadata = {"format": "pt", "slicefine": json.dumps(header)}
        with replacing(Path(path)) as part:
            safetensors.torch.save_file(tensors, part, metadata=metadata)

    def load(self, path: str | PathLike[str]) -> None:
        """Replace the slices by those of a file that `save` wrote for the same layers.

        Raises:
            AdapterFileError: if the file is missing, corrupt, or was written for other layers, or if it holds
                differences from the base (``additive``) and this model's slices hold values, or the other way round.
        """
        tensors, header = read_file(Path(path))
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
        beside = set(_named(header.get("beside", list(self.layers) if additive else []), str(path)))
        odd_one = next((n for n, layer in self.layers.items() if (layer.packed is not None) != (n in beside)), None)
        if odd_one is not None:
            raise AdapterFileError(
                f"{path}: {odd_one} holds {'differences' if odd_one in beside else 'values'} in the file and "
                f"{'values' if odd_one in beside else 'differences'} here: other layers are quantised. Quantise as "
                "when the file was written."
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
    target_parameters: Sequence[str] = (),
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
    additive: bool | None = None,
    reserve: Mapping[str, Sequence[Slice]] | None = None,
    share: tuple[int, int] | None = None,
    start_values: str = "pretrained",
    whole_heads: bool = False,
    coupled: bool = False,
    **moves: Any,
) -> SliceTuner:
    """Train one slice of each chosen layer of any model, in place.

    Args:
        model: changed in place: chosen layers are wrapped, everything is frozen.
        target_modules: ``"all-linear"`` (``nn.Linear``, ``Conv1D``, and both projections of ``nn.MultiheadAttention``),
            a regular expression for the full name, or name endings. Embeddings and convolutions are trained if named.
        exclude_modules: names to leave out, in the same notation.
        target_parameters: endings of the names of single parameters, such as the weights of experts that are stored in
            one piece (experts, out, in): ``["experts.down_proj"]``. They come on top of ``target_modules``; give
            ``target_modules=[]`` for them alone.
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
            pulls towards the base's values instead of zero. None does so for quantised layers, which need it.
        reserve: ``{layer name: slices}`` that belong to others (`SliceTuner.slices` of an earlier run): this run keeps
            out of their rows and columns, and leaves entries as they are where a row crosses a column of theirs.
        share: ``(i, n)``: train the i-th of n parts of the positions (i from 0), beside n - 1 other runs.
        start_values: what a slice starts from; see `Schedule`.
        whole_heads: slices of attention's projections are whole heads: ranks are rounded up to the head size.
        coupled: train both sides of the same hidden units at a time, with ``r_row``: rows of up with the columns of
            down, rows of values with the columns of outputs.
        **moves: settings of `MoveSettings`: moves, interval, total_steps, minimum_steps, state_policy, rewarm_steps,
            on_nonfinite.

    Raises:
        ConfigError: for a setting that is wrong, or if no layer matches.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> tuner = attach(model, r=2, mode="row", interval=100)
        >>> sum(p.numel() for p in tuner.parameters())
        32
    """
    row, column = (r if rank is None else rank for rank in (r_row, r_column))
    unknown = sorted(moves.keys() - {field.name for field in dataclasses.fields(MoveSettings)})
    if unknown:
        known = [*inspect.signature(attach).parameters, *(field.name for field in dataclasses.fields(MoveSettings))]
        raise ConfigError(f"attach got an unexpected keyword argument {unknown[0]!r}: {nearest(unknown[0], known)}")
    settings = MoveSettings(**moves, window=make_window(window, window_order, window_dwell, seed))
    if not isinstance(history, int) or isinstance(history, bool) or history < 0:
        raise ConfigError(f"history={history!r} must be an integer of at least 0.")
    visits = share_visits(mode, share, settings)
    schedule = Schedule(mode, row, column, positions, mask_fraction, seed, reserve or {}, share, visits, start_values)
    target_parameters = [target_parameters] if isinstance(target_parameters, str) else target_parameters
    if not isinstance(model, nn.Module):
        raise ConfigError(f"attach: expected a torch.nn.Module, got {type(model).__name__}; load the model first.")
    if any(isinstance(module, SliceLayer) for module in model.modules()):
        raise ConfigError("attach: the model has slices already; unload them first.")
    if additive and mode == "random_mask":
        raise ConfigError("attach: mode='random_mask' trains scattered entries in place; it cannot be additive.")
    names = match_layers(model, target_modules, exclude_modules) if target_modules or not target_parameters else []
    parameters = match_parameters(model, target_parameters, exclude_modules, names)
    names += parameters
    if settings.window is not None:
        places(settings.window, names)  # refused before anything changes
    if schedule.reserve and set(schedule.reserve).isdisjoint(names):
        raise ConfigError(
            f"attach: reserve= speaks of {next(iter(schedule.reserve))!r}, ..., and none of its layers is trained here "
            f"({names[0]}, ...)."
        )
    asked = structure(model, whole_heads, coupled)
    layers: dict[str, SliceLayer] = {}
    inside: dict[str, SliceLayer] = {}  # by the module's place: several parameters of one module lie one in another
    clamped: dict[str, int] = {}
    for name in names:
        lies_beside(model.get_submodule(name.rpartition(".")[0] if name in parameters else name), additive, name)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for name in names:
            path, parameter = (name.rpartition(".")[0], name.rpartition(".")[2]) if name in parameters else (name, None)
            layers[name] = SliceLayer(inside.get(path, model.get_submodule(path)), additive, parameter)
            inside[path] = layers[name]
            own = fitted(schedule, asked.get(name), name, layers[name].shape)
            found = layers[name].fitted(own, name).clamped(layers[name].shape)
            clamped |= {} if found is None else {name: found[1]}
            layers[name].add_slice(_NAME, own, name, history)
            layers[name].apply_only([_NAME])
        check_coupled({name: (layer.states[_NAME].schedule, layer.shape) for name, layer in layers.items()}, asked)
    except Exception:  # the model is as it was
        for layer in reversed(layers.values()):
            layer.apply_only([])
            layer.unwrapped()
        for weight in trained:
            weight.requires_grad_(True)
        raise
    if not train_rest:
        model.requires_grad_(False)
    for path, layer in inside.items():
        set_module(model, path, layer)
    warn_about_clamped(clamped)
    mover = Mover(_NAME, layers, settings)
    if settings.total_steps is not None:
        mover.begin_run(settings.total_steps)
    return SliceTuner(model, layers, mover)


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


def merge_errors(model: nn.Module) -> dict[str, Requantised]:
    """What merging the applied slices into quantised weights would lose, by layer; nothing is changed.

    Args:
        model: with slices, from `attach` or PEFT; layers whose weights are not quantised lose nothing and are left out.

    Raises:
        UnsupportedError: if a weight's format cannot be quantised anew.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SliceLayer)}
    found = {name: layer.fold(write=False) for name, layer in layers.items() if layer.quantised}
    return {name: lost for name, lost in found.items() if lost is not None}


def warn_about_lost(lost: Mapping[str, Requantised]) -> None:
    """Say what quantised weights lost when they took slices in."""
    if not lost:
        return
    worst = max(lost, key=lambda name: lost[name].change)
    weight, change = (statistics.median(getattr(one, what) for one in lost.values()) for what in ("weight", "change"))
    warnings.warn(
        f"SliceFine: {len(lost)} quantised weights took the slices in and were quantised anew. The error is "
        f"{weight:.2g} of the weight and {change:.2g} of what was trained (medians; at most {lost[worst].change:.2g}, "
        f"{worst}). Keep the adapter beside the base, or export it to LoRA, to lose nothing.",
        UserWarning,
        stacklevel=3,
    )


def _named(found: Any, where: str) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise AdapterFileError(f"{where}: what it says of layers beside their weights makes no sense; it is corrupt.")
    return found


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file that `SliceTuner.save` wrote, and its header: version, additive, progress, checksums.

    Raises:
        AdapterFileError: if it is missing or corrupt, or if a tensor is not what was saved.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = parse_json((file.metadata() or {}).get("slicefine", "null"), str(path))
            if not isinstance(header, dict) or not isinstance(header.get("version"), int):
                raise AdapterFileError(f"{path}: not written by slicefine (no version in its metadata).")
            if header["version"] > FORMAT_VERSION:
                raise AdapterFileError(
                    f"{path}: format version {header['version']} is newer than {FORMAT_VERSION}; update slicefine."
                )
            checksums = read_checksums(header.get("checksums"), str(path))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{path}: cannot be read as a safetensors file ({error}).") from error
    check_keys(set(tensors), checksums, str(path))
    for key, tensor in tensors.items():
        check_tensor(key, tensor, checksums, str(path))
    return tensors, header
