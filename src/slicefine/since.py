"""What training changed since an optimizer step, as slices of plain weights, and the receiver that writes them.

Online reinforcement learning trains one copy of a model and generates with another. Between two pushes only the slices
in training change, so they are all that has to be sent: absolute values, which make the receiver's weights equal the
sender's bit for bit, whatever it received before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .delta import Delta
from .errors import ConfigError, UnsupportedError
from .functional import read_block, write_block
from .geometry import Slice, line_length
from .journal import Journal, Visit
from .layer import SliceLayer
from .quantised import plain_values
from .sharded import is_sharded
from .state import AdapterState
from .transfer import tensor_name

__all__ = ["apply_slices", "changed_since", "delta_since"]


def changed_since(visits: Sequence[Visit], step: int, starts: bool = False) -> list[Slice]:
    """Distinct slices that changed after optimizer step ``step``, in the order of their visits.

    Args:
        visits: of one weight, in the order in which they were made.
        step: 0 asks for everything that was visited.
        starts: a visit's beginning changes values, too (``start_values``), not only its steps.

    Example:
        >>> visits = [Visit(Slice("row", 0, 2), 1, 4), Visit(Slice("row", 2, 2), 5, 6)]
        >>> changed_since(visits, 4)
        [Slice(axis='row', start=2, width=2)]
    """
    found = [
        visit.slice
        for visit in visits
        if step == 0
        or (visit.last_step >= visit.first_step and visit.last_step > step)
        or (starts and visit.first_step > step)
    ]
    return list(dict.fromkeys(found))


def delta_since(model: nn.Module, step: int, adapter_name: str = "default", slices_only: bool = False) -> Delta:
    """Weights that training changed after optimizer step ``step``: ``{weight name: [(slice, values), ...]}``.

    The values are what stands in the dense weights, in their precision, when the adapter alone is active, whether it is
    now or not. Names and orientation are those of the base model's state dict, so that `apply_slices`, or anybody who
    knows rows and columns, can write them into a copy of the base.

    Args:
        model: with slices, made by `attach` or PEFT; the slices may be anywhere inside.
        step: the last optimizer step that the receiver has (`Mover.step` at that time); 0: it has the base only.
        adapter_name: whose slices.
        slices_only: leave out what else was trained (heads in ``modules_to_save``, ``bias``, ``train_rest``) instead of
            refusing.

    Returns:
        Values as lines ``(width, line length)``, on the weights' device; layers that did not change are left out.

    Raises:
        ConfigError: if the model has no such adapter, or if it is not at ``step`` yet.
        UnsupportedError: if what the receiver has was taken back by `undo`, or may be another run's, since slices were
            loaded and step=0 was not asked for afterwards; or if slices cannot say what changed:
            weights of additive slices or without values, transposed weights under a random mask, other parameters.

    Example:
        >>> from slicefine import attach
        >>> model = nn.Sequential(nn.Linear(3, 4))
        >>> tuner = attach(model, r=2, mode="row", interval=10)
        >>> [(name, [block for block, _ in blocks]) for name, blocks in delta_since(model, 0).items()]
        [('0.weight', [Slice(axis='row', start=0, width=2)])]
    """
    layers = list(_layers(model, adapter_name))
    if not slices_only:
        _refuse_others(model, adapter_name)
    _check_step(layers, step, adapter_name)
    for layer in layers if step == 0 else ():
        layer.states[adapter_name].journal.loaded = False
    result: Delta = {}
    for layer in layers:
        state = layer.states[adapter_name]
        blocks = changed_since(state.journal.visits, step, _anew(state))
        trained = dict(_trained(layer, adapter_name, blocks))
        if blocks:
            result[tensor_name(state.layer_name, layer.kind.parameter)] = [
                (_stored(layer, block), trained[block]) for block in blocks
            ]
    return result


def apply_slices(target: nn.Module | Mapping[str, Tensor], slices: Delta) -> None:
    """Write what `delta_since` gave into a plain copy of the base model; nothing is written if anything does not fit.

    Args:
        target: the copy, or its state dict; values are converted to its precision and device.
        slices: ``{weight name: [(slice, values as lines), ...]}``.

    Raises:
        ConfigError: for a name that the target lacks, or a slice or values that do not fit its weight.

    Example:
        >>> copy = {"0.weight": torch.zeros(2, 3)}
        >>> apply_slices(copy, {"0.weight": [(Slice("column", 1, 1), torch.ones(1, 2))]})
        >>> copy["0.weight"]
        tensor([[0., 1., 0.],
                [0., 1., 0.]])
    """
    if isinstance(target, nn.Module):
        target = dict(target.named_parameters(remove_duplicate=False))
    for name, blocks in slices.items():
        _check_fit(target, name, blocks)
    for name, blocks in slices.items():
        weight = target[name].detach()
        with torch.no_grad(), torch.inference_mode(weight.is_inference()):  # as engines' weights often are
            for block, values in blocks:
                write_block(weight, block, values.to(weight.device))


def _layers(model: nn.Module, adapter_name: str) -> Iterator[SliceLayer]:
    """Layers with the adapter, their weights up to date, or a sentence why slices cannot tell what changed there."""
    found = [m for m in model.modules() if isinstance(m, SliceLayer) and adapter_name in m.states]
    if not found:
        raise ConfigError(
            f"delta_since: no layer of this {type(model).__name__} has slices of an adapter {adapter_name!r}; wrap it "
            "first (get_peft_model or attach), or name the adapter that you train."
        )
    for layer in found:
        name = layer.states[adapter_name].layer_name
        if layer.packed is not None:
            raise UnsupportedError(f"delta_since: {name} has additive slices, so that no weight holds what they train.")
        if layer.kind.layout == "convolution" or layer.kind.stacked:
            raise UnsupportedError(
                f"delta_since: the weight of {name} is no matrix ({layer.kind.layout}), whose slices have names."
            )
        if layer.dense().device.type == "meta":
            raise UnsupportedError(f"delta_since: {name} has a weight without values (meta device); load it first.")
        layer.settle(adapter_name)
        yield layer


def _refuse_others(model: nn.Module, adapter_name: str) -> None:
    """Parameters that were trained whole are in no slice: a receiver would lack them in silence."""
    held = (
        m.states[adapter_name].biases for m in model.modules() if isinstance(m, SliceLayer) and adapter_name in m.states
    )
    biases = {id(tensor) for found in held if found is not None for tensor in found.parameters()}
    for name, parameter in model.named_parameters():
        trained = parameter.requires_grad or adapter_name in name.split(".") or id(parameter) in biases
        if "slicefine_active" not in name and trained:
            raise UnsupportedError(
                f"delta_since: {name} is trained, too, and not by slices, so slices do not carry it. Push such tensors "
                "as they are, and say slices_only=True here."
            )


def _check_step(layers: Sequence[SliceLayer], step: int, adapter_name: str) -> None:
    """Raise unless ``step`` lies in the past of these layers, and not in a past that was taken back."""
    states = [layer.states[adapter_name] for layer in layers]
    now = max(state.journal.step for state in states)
    if not 0 <= step <= now:
        raise ConfigError(
            f"delta_since: step={step}, but adapter {adapter_name!r} made {now} optimizer steps, so 0 <= step <= {now} "
            "is expected. After a load or an undo, write to a fresh copy of the base and say step=0."
        )
    if step and any(state.journal.loaded for state in states):
        raise UnsupportedError(
            f"delta_since: slices were loaded from a file, so nothing says what a receiver at step={step} holds. Write "
            "to a fresh copy of the base and say step=0 once; after that, steps count again."
        )
    gone = [visit for state in states for visit in state.journal.taken_back if _saw(visit, step, _anew(state))]
    if gone and step:
        raise UnsupportedError(
            f"delta_since: steps {gone[0].first_step} to {gone[0].last_step} were taken back by undo, so nothing says "
            f"what a receiver at step={step} holds. Write to a fresh copy of the base and say step=0; a receiver that "
            f"was last at step={gone[0].first_step - 1} may say that."
        )


def _anew(state: AdapterState) -> bool:
    """Whether a visit's beginning changes the weight, before any step."""
    return state.schedule.start_values != "pretrained"


def _saw(visit: Visit, step: int, starts: bool) -> bool:
    """Whether a receiver at ``step`` may hold values of a visit."""
    return visit.first_step - starts <= step <= max(visit.last_step, visit.first_step - 1)


def _trained(layer: SliceLayer, name: str, blocks: Sequence[Slice]) -> Iterator[tuple[Slice, Tensor]]:
    """Values of an adapter's slices as they are when it alone is in the weight."""
    journal: Journal = layer.states[name].journal
    if layer.applied == [name]:
        yield from ((block, read_block(layer.dense(), block)) for block in blocks)
    else:
        yield from journal.trained(layer.dense())


def _stored(layer: SliceLayer, block: Slice) -> Slice:
    """A slice in the orientation in which the base keeps the weight: a transposed weight's rows are its columns."""
    if not layer.transposed:
        return block
    if block.axis == "entries":
        raise UnsupportedError(
            f"delta_since: {layer.label} keeps its weight transposed (Conv1D), and a random mask has no name there."
        )
    return block._replace(axis="column" if block.axis == "row" else "row")


def _check_fit(target: Mapping[str, Tensor], name: str, blocks: Sequence[tuple[Slice, Tensor]]) -> None:
    """Raise `ConfigError` unless all blocks of one weight can be written."""
    if name not in target:
        raise ConfigError(
            f"apply_slices: the target has no weight {name!r}; it must be a plain copy of the base model (or its state "
            f"dict), without adapters. It has for example {list(target)[:3]}."
        )
    weight = target[name]
    if is_sharded(weight) or plain_values(weight) is not weight or not weight.is_floating_point():
        raise ConfigError(
            f"apply_slices: {name} is {type(weight).__name__} of {weight.dtype}, and slices are written into plain "
            "floating-point weights: not into quantised or sharded ones."
        )
    shape = tuple(weight.shape)
    for block, values in blocks:
        if len(shape) != 2:
            raise ConfigError(f"apply_slices: {name} has shape {shape}, expected a matrix; it is another model.")
        block.check((shape[0], shape[1]), f"apply_slices: {name}")
        lines = 1 if block.axis == "entries" else block.width
        length = block.width if block.axis == "entries" else line_length(block.axis, (shape[0], shape[1]))
        if tuple(values.shape) != (lines, length):
            raise ConfigError(
                f"apply_slices: {name}: values of shape {tuple(values.shape)} for {block} of a matrix {shape}, "
                f"expected {(lines, length)}; the target is a copy of another base model."
            )
