"""DeepSpeed's ZeRO stages 1 and 2: every process holds the parameters whole, and a part of their flat fp32 masters.

DeepSpeed's optimizer steps the masters and copies them over the parameters, so what is written into a parameter has to
be written into its master, too. Each process writes the part that it holds; nothing is sent. DeepSpeed's step ends
after the one of the optimizer inside, which PyTorch's hooks see, so it has hooks of its own here. DeepSpeed is never
imported: what is looked for are the marks that it left on parameters.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .errors import UnsupportedError

__all__ = [
    "ZeroOptimizer",
    "is_partitioned",
    "master",
    "put_master",
    "refuse_stage_3",
    "refuse_unseen",
    "register_zero_step_hooks",
    "watch",
    "why_foreign",
]

WATCHED = {
    "deepspeed.runtime.zero.stage_1_and_2": "DeepSpeedZeroOptimizer",
    "deepspeed.runtime.bf16_optimizer": "BF16_Optimizer",
}
FLAT = ("Adafactor",)  # whole-tensor statistics would be those of all slices in one
TORCHS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
INSTEAD = "Use FSDP2 instead: fully_shard(model), or fsdp_version: 2 in accelerate's configuration."

_hooks: list[tuple[Callable[[ZeroOptimizer], Any], Callable[[ZeroOptimizer], Any]]] = []
_watched: set[type] = set()


class ZeroOptimizer:
    """An optimizer of ZeRO's stages 1 and 2, seen as one that holds the model's own parameters.

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
        groups = zip(self._own.optimizer.param_groups, self._groups, strict=True)
        return [{**group, "params": list(parameters)} for group, parameters in groups]

    @property
    def _groups(self) -> list[list[Tensor]]:
        """The model's parameters, by group."""
        found = self._own.bit16_groups if hasattr(self._own, "bit16_groups") else self._own.bf16_groups
        return cast("list[list[Tensor]]", found)

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
        pairs = zip(self._own.single_partition_of_fp32_groups, self._own.bit16_groups, strict=True)
        return [flat for flat, group in pairs if any(id(parameter) in ids for parameter in group)]

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
        if not hasattr(self._own, "bit16_groups"):
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
        inner = type(self.inner).__name__
        if getattr(self._own, "cpu_offload", False) and not isinstance(self.inner, TORCHS):
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


def refuse_stage_3(tensor: Tensor | None, label: str) -> None:
    """Raise `UnsupportedError` for a parameter that stage 3 spreads over processes."""
    if hasattr(tensor, "ds_id"):
        raise UnsupportedError(
            f"{label}: DeepSpeed's ZeRO stage 3 spreads the weights over processes as flat pieces, and slices are "
            "written into weights as rows and columns. Use ZeRO stage 2, which keeps the frozen weights whole and "
            "shards what slices add, or FSDP2 to shard the weights: fully_shard(model), or fsdp_version: 2 in "
            "accelerate's configuration."
        )


def why_foreign() -> str:
    """What to say beside that no optimizer holds the slices: at stage 0 DeepSpeed leaves no marks on parameters."""
    if "deepspeed" not in sys.modules:
        return ""
    return " DeepSpeed's stage 0 in bf16 or fp16 gives the optimizer flat copies of them: use ZeRO stage 2, or fp32."


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO stage 1 or 2 keeps a master of a parameter."""
    return hasattr(tensor, "_hp_mapping")


def master(parameter: Any) -> Tensor:
    """The fp32 master of a parameter, gathered: a copy, of the parameter's shape. Every process has to ask."""
    return cast(Tensor, parameter.get_full_hp_param())


def put_master(parameter: Any, values: Tensor | None = None) -> None:
    """Overwrite this process's part of a parameter's master.

    Args:
        parameter: that ZeRO keeps a master of.
        values: of its shape. None: the parameter's own, where they are not the master's, rounded.
    """
    mapping = parameter._hp_mapping
    if mapping is None:  # all of it is in other processes
        return
    kept = mapping.get_hp_fragment().data
    place = mapping.lp_fragment_address
    given = (parameter if values is None else values).detach().reshape(-1).narrow(0, place.start, place.numel)
    if values is None:
        given = torch.where(kept.to(given) == given, kept.to(torch.float64), given.to(torch.float64))
    kept.copy_(given)


def watch() -> None:
    """From now on call the registered hooks before and after each step of ZeRO's optimizers."""
    for module, name in WATCHED.items():
        found = getattr(sys.modules.get(module), name, None)
        if found is not None and found not in _watched:
            _watched.add(found)
            found.step = _with_hooks(found.step)


def register_zero_step_hooks(before: Callable[[ZeroOptimizer], Any], after: Callable[[ZeroOptimizer], Any]) -> None:
    """Call ``before`` and ``after`` around each step of ZeRO's optimizers, as PyTorch's step hooks are."""
    _hooks.append((before, after))


def refuse_unseen(optimizer: Optimizer, parameter: Any) -> None:
    """Raise `UnsupportedError` if ``optimizer`` stepped a parameter's master within no step that is watched."""
    mapping = parameter._hp_mapping
    if mapping is None or _inside:
        return
    place = mapping.get_hp_fragment().untyped_storage().data_ptr()
    if any(p.untyped_storage().data_ptr() == place for group in optimizer.param_groups for p in group["params"]):
        raise UnsupportedError(
            "DeepSpeed's ZeRO stepped before SliceFine saw a forward that was not compiled, or in a step of its own "
            f"kind (zenflow). Run the model once before torch.compile, or do not compile it. {INSTEAD}"
        )


_inside: list[Any] = []  # ZeRO optimizers that step right now


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
