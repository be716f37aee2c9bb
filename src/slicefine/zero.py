"""DeepSpeed's ZeRO: each process holds a part of the flat fp32 masters, and at stage 3 of the parameters, too.

DeepSpeed's optimizer steps the masters and copies them over the parameters, so what is written into a parameter has to
be written into its master, too. Each process writes the part that it holds; nothing is sent. DeepSpeed's step ends
after the one of the optimizer inside, which PyTorch's hooks see, so it has hooks of its own here. DeepSpeed is never
imported: what is looked for are the marks that it left on parameters.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from .errors import UnsupportedError

__all__ = [
    "Piece",
    "ZeroOptimizer",
    "check_spread",
    "full_shape",
    "has_master",
    "is_spread",
    "look_at",
    "master",
    "pieces",
    "put_master",
    "refuse_unseen",
    "register_gathered_hook",
    "register_zero_step_hooks",
    "watch",
    "why_foreign",
]

WATCHED = {
    "deepspeed.runtime.zero.stage_1_and_2": "DeepSpeedZeroOptimizer",
    "deepspeed.runtime.zero.stage3": "DeepSpeedZeroOptimizer_Stage3",
    "deepspeed.runtime.bf16_optimizer": "BF16_Optimizer",
}
FLAT = ("Adafactor",)  # whole-tensor statistics would be those of all slices in one
TORCHS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
INSTEAD = "Use FSDP2 instead: fully_shard(model), or fsdp_version: 2 in accelerate's configuration."

_hooks: list[tuple[Callable[[ZeroOptimizer], Any], Callable[[ZeroOptimizer], Any]]] = []
_gathered: list[Callable[[nn.Module, dict[str, Any]], Any]] = []
_watched: set[type] = set()


class ZeroOptimizer:
    """An optimizer of ZeRO, seen as one that holds the model's own parameters.

    Args:
        engine_optimizer: DeepSpeed's.
    """

    def __init__(self, engine_optimizer: Any) -> None:
        self._own = engine_optimizer

    @property
    def inner(self) -> Optimizer:
        """The optimizer that steps the flat masters."""
        return cast(Optimizer, self._own.optimizer)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As of any optimizer, with the model's parameters."""
        groups = self._own.optimizer.param_groups
        if self._spreads:  # a group may be stepped part by part
            groups = [groups[self._own.sub_group_to_group_id[part]] for part in range(len(self._groups))]
        return [{**group, "params": list(held)} for group, held in zip(groups, self._groups, strict=True)]

    @property
    def _groups(self) -> list[list[Tensor]]:
        """The model's parameters, by the flat master that they are in."""
        kinds = ("fp16_groups",) if self._spreads else ("bit16_groups", "bf16_groups")
        found = next(getattr(self._own, kind) for kind in kinds if hasattr(self._own, kind))
        return cast("list[list[Tensor]]", found)

    @property
    def _spreads(self) -> bool:
        """Whether it is stage 3's."""
        return hasattr(self._own, "sub_group_to_group_id")

    @property
    def left_out(self) -> bool:
        """Whether the last step was left out, since gradients were not finite; nothing has changed then."""
        return bool(self._own.overflow)

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, so that steps are left out now and then as a matter of course."""
        return bool(getattr(self._own, "dynamic_loss_scale", False))

    def partitions(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """This process's flat masters of the groups that hold ``parameters``."""
        ids = {id(parameter) for parameter in parameters}
        kind = "fp32_partitioned_groups_flat" if self._spreads else "single_partition_of_fp32_groups"
        pairs = zip(getattr(self._own, kind), self._groups, strict=True)
        return [flat for flat, group in pairs if any(id(parameter) in ids for parameter in group)]

    def _check_spread(self) -> None:
        """As `check`, for stage 3."""
        own = self._own
        offload = own.parameter_offload
        quantised = "zero_quantized_weights, zero_quantized_nontrainable_weights"
        found = {
            f"of the kind {type(own).__name__}": type(own).__name__ != WATCHED["deepspeed.runtime.zero.stage3"],
            "with optimizer state on NVMe (offload_optimizer)": own.swap_optimizer,
            "with offload_optimizer's ratio": own.offload_optimizer and own.partial_offload != 1.0,
            f"with {quantised}": offload.zero_quantized_weights or offload.zero_quantized_nontrainable_weights,
        }
        for what in (what for what, there in found.items() if there):
            raise UnsupportedError(
                f"SliceFine does not work with DeepSpeed's ZeRO stage 3 {what}. Leave that setting out. {INSTEAD}"
            )

    def forget_links(self) -> None:
        """State of the optimizer inside was dropped: DeepSpeed looks it up again after its next step."""
        self._own._hp_optimizer_states_linked = False

    def check(self, slices: Iterable[Tensor], resets: bool, window: bool) -> None:
        """Raise `UnsupportedError` for settings under which slices would not be trained as without DeepSpeed.

        Args:
            slices: the parameters of the adapter that is trained.
            resets: moves give the new slices fresh optimizer state.
            window: some layers wait while others train.
        """
        ids = {id(parameter) for parameter in slices}
        held = [[id(parameter) in ids for parameter in group] for group in self._groups]
        if not any(any(own) for own in held):
            return
        name = type(self._own).__name__
        if not self._spreads and not hasattr(self._own, "bit16_groups"):
            raise UnsupportedError(
                f"SliceFine does not work with DeepSpeed's {name}, which bf16 with another precision for accumulated "
                "gradients brings (data_types.grad_accum_dtype), or bf16 at stage 0. Use ZeRO stage 2 and leave "
                f"data_types out. {INSTEAD}"
            )
        if getattr(self._own, "zenflow", False) or getattr(self._own, "torch_autocast_gradscaler", None) is not None:
            raise UnsupportedError(
                "SliceFine does not work with DeepSpeed's zenflow, nor with its torch_autocast in float16: they step "
                "parameters at times that nobody else learns of. Leave them out, or use bf16."
            )
        if self._spreads:
            self._check_spread()
        inner = type(self.inner).__name__
        offloads = getattr(self._own, "offload_optimizer" if self._spreads else "cpu_offload", False)
        if offloads and not isinstance(self.inner, TORCHS):
            raise UnsupportedError(
                f"SliceFine does not work with {inner} under DeepSpeed's offload_optimizer: whether a move starts its "
                'state anew is not tested. Set "zero_force_ds_cpu_optimizer": false with an optimizer of PyTorch, or '
                "leave offload_optimizer out: slices have little state."
            )
        if inner in FLAT:
            raise UnsupportedError(
                f"SliceFine does not work with {inner} under ZeRO, which makes one flat parameter of all slices, and "
                f"{inner} averages over whole parameters. Use AdamW, or FSDP2."
            )
        for own in held if resets else ():
            if any(own) and not all(own):
                raise UnsupportedError(
                    f"ZeRO keeps one step count per parameter group, and a group of {inner} holds {sum(own)} slices "
                    f"and {len(own) - sum(own)} other parameters (modules_to_save, a head), so a move could not start "
                    "the slices' state anew. Give the slices a group of their own (with Trainer: override its "
                    'create_optimizer, since it ignores optimizers= under DeepSpeed), set state_policy="keep", or use '
                    "FSDP2."
                )
        if window:
            raise UnsupportedError(
                "window= does not work under DeepSpeed's ZeRO, whose optimizer steps (and decays) all slices, those "
                "outside the window, too. Train all layers at once, or use FSDP2."
            )


class Piece(NamedTuple):
    """What one process holds of a parameter that lies flat in several: its values, and where the first of them lies."""

    values: Tensor
    first: int


def is_spread(tensor: object) -> bool:
    """Whether stage 3 spreads a parameter over processes, in flat pieces."""
    return hasattr(tensor, "ds_id")


def full_shape(tensor: Tensor) -> torch.Size:
    """A tensor's shape; of one that stage 3 spreads, and that shows none of its entries, as if it were gathered."""
    return cast(torch.Size, getattr(tensor, "ds_shape", tensor.shape))


def look_at(module: nn.Module, name: str) -> Any:
    """The parameter ``module.name``; what is looked at in a forward by another way stage 3 gathers there and then."""
    return module._parameters.get(name) if name in module._parameters else getattr(module, name)


def pieces(parameter: Any) -> list[Piece]:
    """This process's piece of a spread parameter; a second one, of all entries, while DeepSpeed has it gathered."""
    if parameter.ds_status.name == "INFLIGHT" and hasattr(parameter, "_z3_optimizer"):
        # gathered ahead for a later layer, which would not see what is written to the piece now
        parameter._z3_optimizer.module.ds_inflight_param_registry.pop(parameter).wait()
    kept = parameter.ds_tensor.data
    first = kept.numel() * parameter.ds_zero_partition_rank
    own = Piece(kept[: max(0, parameter.ds_numel - first)], first)  # the last ones are padded
    return [own, Piece(parameter.data.view(-1), 0)] if parameter.ds_status.name == "AVAILABLE" else [own]


def check_spread(tensor: Any, label: str) -> None:
    """Raise `UnsupportedError` for pieces that are more than a process's share of a parameter's values."""
    if not is_spread(tensor):
        return
    found = {
        "weights on NVMe (offload_param, ZeRO-Infinity)": tensor.nvme_swapper is not None,
        "quantised weights (zero_quantized_weights, zero_quantized_nontrainable_weights)": (
            hasattr(tensor.ds_tensor, "ds_quant_scale")
        ),
        "a second copy of the weights in each node (zero_hpz_partition_size)": (
            tensor.ds_zero_param_process_group is not None
        ),
    }
    for what in (what for what, there in found.items() if there):
        raise UnsupportedError(
            f"{label}: SliceFine writes slices into the pieces of weights that ZeRO stage 3 leaves in each process, "
            f"and does not work with {what}. Leave that setting out."
        )


def why_foreign() -> str:
    """What to say beside that no optimizer holds the slices: at stage 0 DeepSpeed leaves no marks on parameters."""
    if "deepspeed" not in sys.modules:
        return ""
    return " DeepSpeed's stage 0 in bf16 or fp16 gives the optimizer flat copies of them: use ZeRO stage 2, or fp32."


def has_master(tensor: Any) -> bool:
    """Whether ZeRO keeps a master of a parameter."""
    if hasattr(tensor, "_hp_mapping"):
        return True
    own = getattr(tensor, "_z3_optimizer", None)
    return own is not None and own.get_param_id(tensor) in own.grad_position


def master(parameter: Any) -> Tensor:
    """The fp32 master of a parameter, gathered: a copy, of the parameter's shape. Every process has to ask."""
    own = parameter._z3_optimizer if is_spread(parameter) else None
    return cast(Tensor, parameter.get_full_hp_param() if own is None else own.get_full_hp_param(parameter))


def put_master(parameter: Any, values: Tensor, rounded: bool = False) -> None:
    """Overwrite this process's part of a parameter's master.

    Args:
        parameter: that ZeRO keeps a master of.
        values: of its shape.
        rounded: they came from the parameter, which holds the master, rounded: an entry that still does stays.
    """
    part = _part_of_master(parameter)
    if part is None:  # all of it is in other processes
        return
    kept = part.values
    given = values.detach().reshape(-1).narrow(0, part.first, kept.numel()).to(kept.device)
    if rounded:
        given = torch.where(kept.to(given) == given, kept.to(torch.float64), given.to(torch.float64))
    kept.copy_(given)


def _part_of_master(parameter: Any) -> Piece | None:
    if is_spread(parameter):
        own, piece = parameter._z3_optimizer, pieces(parameter)[0]
        group, start, _ = own.grad_position[own.get_param_id(parameter)]
        flat = own.fp32_partitioned_groups_flat[group].data
        return Piece(flat.narrow(0, start, piece.values.numel()), piece.first)
    mapping = parameter._hp_mapping
    return None if mapping is None else Piece(mapping.get_hp_fragment().data, mapping.lp_fragment_address.start)


def watch() -> None:
    """From now on call the registered hooks: around ZeRO's steps, and after a whole model was gathered."""
    for module, name in WATCHED.items():
        found = getattr(sys.modules.get(module), name, None)
        if found is not None and found not in _watched:
            _watched.add(found)
            found.step = _with_hooks(found.step)
    engine = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
    if engine is not None and engine not in _watched:
        _watched.add(engine)
        engine._zero3_consolidated_16bit_state_dict = _with_rest(engine._zero3_consolidated_16bit_state_dict)


def register_zero_step_hooks(before: Callable[[ZeroOptimizer], Any], after: Callable[[ZeroOptimizer], Any]) -> None:
    """Call ``before`` and ``after`` around each step of ZeRO's optimizers, as PyTorch's step hooks are."""
    _hooks.append((before, after))


def register_gathered_hook(hook: Callable[[nn.Module, dict[str, Any]], Any]) -> None:
    """Call ``hook`` in every process with a model that stage 3 gathered, to add what are no parameters or buffers.

    Its second argument is the model's state dict, which only the first process's caller gets.
    """
    _gathered.append(hook)


def refuse_unseen(optimizer: Optimizer, parameter: Any) -> None:
    """Raise `UnsupportedError` if ``optimizer`` stepped a parameter's master within no step that is watched."""
    part = None if _inside else _part_of_master(parameter)
    if part is None:
        return
    place = part.values.untyped_storage().data_ptr()
    if any(p.untyped_storage().data_ptr() == place for group in optimizer.param_groups for p in group["params"]):
        raise UnsupportedError(
            "DeepSpeed's ZeRO stepped before SliceFine saw a forward that was not compiled, or in a step of its own "
            f"kind (zenflow). Run the model once before torch.compile, or do not compile it. {INSTEAD}"
        )


_inside: list[Any] = []  # ZeRO optimizers that step right now


def _with_rest(gather: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeed's way to gather a whole model walks through parameters and buffers; a slice's journal is neither."""

    @functools.wraps(gather)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = gather(self, *args, **kwargs)
        for hook in _gathered:
            hook(self.module, {} if found is None else found)
        return found

    return hooked


def _with_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _inside and _inside[-1] is self:  # a subclass's step calls this one
            return step(self, *args, **kwargs)
        if not hasattr(self, "_slicefine_view"):
            self._slicefine_view = ZeroOptimizer(self)
        for before, _ in _hooks:
            before(self._slicefine_view)
        _inside.append(self)
        try:
            result = step(self, *args, **kwargs)
        finally:
            _inside.pop()
        for _, after in _hooks:
            after(self._slicefine_view)
        return result

    return hooked
