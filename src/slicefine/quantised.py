"""Quantised layers: how they are told, what they compute in, and their weight as a dense matrix and back.

A quantised weight cannot hold single trained rows or columns, so slices lie beside it (`slicefine.packed`). Nothing of
a format's library is imported here before one of its layers is there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .errors import UnsupportedError

__all__ = [
    "Format",
    "Requantised",
    "dense_product",
    "format_of",
    "place_of",
    "plain_values",
    "prepare",
    "release",
    "requantise",
]

_TORCHAO = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
_OF_INPUTS = ("act_quant_kwargs", "activation_quantization", "act_pre_scale")  # what torchao does with a layer's inputs
_FLAG = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit, see `prepare`


@dataclass(frozen=True)
class Requantised:
    """What writing a change into a quantised weight cost.

    Attributes:
        weight: norm of the error as a share of the norm of the weight that was wanted, dequantised plus change.
        change: norm of the error as a share of the change's norm: above 1 more was lost than was trained.
    """

    weight: float
    change: float


class Format:
    """One way of keeping weights; this one only runs forward, as GPTQ's and AWQ's layers do.

    Attributes:
        name: for messages.
        keeps: whether the layer's own forward keeps the dense weight for its backward, or makes it there once more.
    """

    name = "forward-only"
    keeps = False

    def owns(self, layer: nn.Module) -> bool:
        """Whether ``layer`` keeps its weight so: nn.Linear's sizes, and integers or one-byte floats for a weight."""
        if type(layer) is nn.Linear:  # it could not run with such a weight
            return False
        sizes = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
        return all(type(size) is int for size in sizes) and any(_is_packed(tensor) for tensor in _tensors(layer))

    def dtype(self, layer: nn.Module) -> torch.dtype:
        """The precision of what lies beside the weight: the layer's compute dtype, or its bias', or fp32."""
        bias = getattr(layer, "bias", None)
        found = (getattr(layer, "compute_dtype", None), getattr(bias, "dtype", None))
        return next((d for d in found if isinstance(d, torch.dtype) and d.is_floating_point), torch.float32)

    def check(self, layer: nn.Module) -> None:
        """Raise `UnsupportedError` unless `dense` and `store` work."""
        raise UnsupportedError(
            f"{type(layer).__name__} only runs forward: its weight cannot be quantised anew, so slices cannot be "
            "merged into it. Keep the adapter beside it, or export it to LoRA (slicefine export)."
        )

    def multiplies(self, layer: nn.Module) -> bool:
        """Whether on a CPU the layer's output is now its fp32 input times `factor`, made anew for every forward."""
        return False

    def factor(self, layer: nn.Module) -> Tensor:
        """As `dense`, where the layer `multiplies`."""
        return self.dense(layer)

    def dense(self, layer: nn.Module) -> Tensor:
        """A new tensor with the weight as ``(out, in)`` floating-point values."""
        raise NotImplementedError

    def store(self, layer: nn.Module, weight: Tensor) -> None:
        """Quantise ``weight``, ``(out, in)``, and make it the layer's own, with the settings that it has."""
        raise NotImplementedError


class _Readable(Format):
    def check(self, layer: nn.Module) -> None:
        return


class _Bnb8bit(_Readable):
    name = "bitsandbytes 8-bit"

    def owns(self, layer: nn.Module) -> bool:
        return _weight_is(layer, "bitsandbytes", "Int8Params")

    def multiplies(self, layer: nn.Module) -> bool:
        return layer.training and self._scale(layer) is not None  # in evaluation inputs are quantised, too

    def dense(self, layer: nn.Module) -> Tensor:
        values, scale = _values(layer.weight), self._scale(layer)
        if scale is None:
            return values.clone()
        return values.to(torch.float32, copy=True).mul_(scale.to(values.device).unsqueeze(1).mul(1 / 127))

    def _scale(self, layer: nn.Module) -> Tensor | None:
        """Each row's largest value; None of a weight that is not quantised yet, or kept in half precision."""
        state: Tensor | None = _part(layer, "state").SCB
        return getattr(layer.weight, "SCB", None) if state is None else state

    def store(self, layer: nn.Module, weight: Tensor) -> None:
        old = _part(layer, "weight")
        made = type(old)(weight.cpu(), requires_grad=False, has_fp16_weights=old.has_fp16_weights)
        layer.weight = made.to(old.device)
        _part(layer, "state").reset_grads()


class _Bnb4bit(_Readable):
    name = "bitsandbytes 4-bit"

    def owns(self, layer: nn.Module) -> bool:
        return _weight_is(layer, "bitsandbytes", "Params4bit")

    def dtype(self, layer: nn.Module) -> torch.dtype:
        state = getattr(layer.weight, "quant_state", None)
        if getattr(layer, "compute_dtype", None) is None and state is not None:
            return _half(state.dtype)
        return super().dtype(layer)

    def multiplies(self, layer: nn.Module) -> bool:
        state = getattr(_part(layer, "weight"), "quant_state", None)
        if state is None or getattr(state, "packing_format_for_cpu", False):
            return False
        return getattr(layer, "compute_dtype", None) in (None, torch.float32)

    def factor(self, layer: nn.Module) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight = _part(layer, "weight")
        state = weight.quant_state
        if state.dtype != torch.float32:  # of the weight that was quantised; the product is taken in the input's
            state = copy.copy(state)
            state.dtype = torch.float32
        values: Tensor = dequantize_4bit(weight.detach(), state)
        return values

    def dense(self, layer: nn.Module) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight = _part(layer, "weight")
        if weight.quant_state is None:
            return _values(weight).clone()
        values: Tensor = dequantize_4bit(weight.detach(), weight.quant_state)
        return values

    def store(self, layer: nn.Module, weight: Tensor) -> None:
        old = _part(layer, "weight")
        state = old.quant_state
        made = type(old)(
            weight.to("cpu", _half(state.dtype)),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=layer,
        )
        layer.weight = made.to(old.device)


class _TorchAO(Format):
    name = "torchao"
    keeps = True

    def owns(self, layer: nn.Module) -> bool:
        return _weight_is(layer, "torchao")

    def dtype(self, layer: nn.Module) -> torch.dtype:
        return _half(_part(layer, "weight").dtype)

    def check(self, layer: nn.Module) -> None:
        kind = type(layer.weight).__name__
        if kind not in _TORCHAO:
            raise UnsupportedError(
                f"torchao's {kind} cannot be quantised anew from its own settings ({', '.join(_TORCHAO)} can), so "
                "slices cannot be merged into it. Keep the adapter beside it, or export it to LoRA (slicefine export)."
            )

    def multiplies(self, layer: nn.Module) -> bool:
        weight = _part(layer, "weight")
        if type(weight).__name__ not in _TORCHAO or any(getattr(weight, name, None) is not None for name in _OF_INPUTS):
            return False
        return _per_row(weight) or weight.dtype == torch.float32

    def factor(self, layer: nn.Module) -> Tensor:
        weight = _part(layer, "weight")
        if not _per_row(weight):
            return self.dense(layer)
        values: Tensor = weight.qdata.to(torch.float32)
        return values.mul_(weight.scale)  # what `dequantize` does, several times as fast

    def dense(self, layer: nn.Module) -> Tensor:
        values: Tensor = _part(layer, "weight").dequantize()
        return values

    def store(self, layer: nn.Module, weight: Tensor) -> None:
        old = _part(layer, "weight")
        made = _torchao_like(old, weight.to(old.device, old.dtype))
        layer.weight = nn.Parameter(made, requires_grad=False)


class _HQQ(_Readable):
    name = "HQQ"

    def owns(self, layer: nn.Module) -> bool:
        return hasattr(layer, "W_q") and hasattr(layer, "dequantize")

    def dense(self, layer: nn.Module) -> Tensor:
        values: Tensor = _part(layer, "dequantize")()
        return values.detach().clone()

    def store(self, layer: nn.Module, weight: Tensor) -> None:
        settings = copy.deepcopy(_part(layer, "quant_config"))
        del layer.W_q
        _part(layer, "quantize")(weight, **settings)


_FORMATS = (_Bnb8bit(), _Bnb4bit(), _TorchAO(), _HQQ(), Format())


def format_of(layer: nn.Module) -> Format | None:
    """How a layer keeps its quantised weight; None for every other layer.

    Example:
        >>> format_of(nn.Linear(2, 2)) is None
        True
    """
    return next((known for known in _FORMATS if known.owns(layer)), None)


def dense_product(layer: nn.Module, x: Tensor) -> Format | None:
    """The format of a layer whose output for ``x`` is ``x @ factor.T`` in fp32 and nothing else; None of all others.

    There slices may be added to the dense weight that a forward makes in any case. In half precision they may not:
    what they change is lost beside the weight's own values. Only CPUs: elsewhere some formats have kernels that
    make no dense weight.

    Args:
        layer: a quantised layer.
        x: its input.
    """
    if x.dtype != torch.float32 or type(x) is not Tensor or not x.is_cpu:
        return None
    own = layer.__dict__  # past nn.Module's lookups: every forward asks
    known = _of_types(type(layer), type(own["_parameters"].get("weight")))  # type: ignore[arg-type]
    if known is None or not known.multiplies(layer):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    watched = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    if watched or "forward" in own or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return None  # what they see is the layer's own
    return known


@cache
def _of_types(layer: type, weight: type) -> Format | None:
    """The format of a layer of that very class, whose forward is known, with such a weight."""
    libraries = [kind.__module__.partition(".")[0] for kind in (layer, weight)]
    if libraries != ["bitsandbytes"] * 2 and (layer is not nn.Linear or libraries[1] != "torchao"):
        return None
    named = {"Int8Params": _FORMATS[0], "Params4bit": _FORMATS[1], **dict.fromkeys(_TORCHAO, _FORMATS[2])}
    return named.get(weight.__name__)


def place_of(layer: nn.Module) -> Tensor:
    """The tensor that says on which device a layer is: its weight, or the first one that it has instead."""
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) else next(_tensors(layer))


def plain_values(tensor: Tensor) -> Tensor:
    """What a tensor stands for, to compare it: torchao's tensors know few operators; all others as they are."""
    kinds = type(tensor).__mro__
    return tensor.dequantize() if any(k.__module__.partition(".")[0] == "torchao" for k in kinds) else tensor


def prepare(layer: nn.Module) -> bool:
    """Keep a layer's weight as it is while slices train beside it; whether there was something to do.

    On some CPUs bitsandbytes packs a 4-bit weight anew at the first forward in evaluation mode, for inference: that
    layout has no backward, and the scales are rounded. It is switched off until `release`.
    """
    if not getattr(layer, _FLAG, False):
        return False
    setattr(layer, _FLAG, False)
    layer.__dict__["_slicefine_prepared"] = True
    if getattr(_part(layer, "weight").quant_state, "packing_format_for_cpu", False):
        layer.state_dict()  # unpacks it
    return True


def release(layer: nn.Module) -> None:
    """Undo `prepare`."""
    if layer.__dict__.pop("_slicefine_prepared", False):
        setattr(layer, _FLAG, True)


@torch.no_grad()
def requantise(layer: nn.Module, change: Any, write: bool = True) -> Requantised:
    """Write a change into a quantised weight: dequantise, add, quantise again with the same settings.

    Args:
        layer: a quantised layer.
        change: what is added, with ``add_to`` (`slicefine.packed.PackedDelta`).
        write: False leaves the weight as it is and only measures.

    Returns:
        The error, measured in fp32.

    Raises:
        UnsupportedError: if the format cannot be quantised anew.
    """
    known = format_of(layer)
    assert known is not None
    known.check(layer)
    before = known.dense(layer).float()
    wanted = before.clone()
    change.add_to(wanted)
    target = layer if write else copy.deepcopy(layer)
    known.store(target, wanted)
    error = float(torch.linalg.vector_norm(known.dense(target).float() - wanted))
    size, moved = float(torch.linalg.vector_norm(wanted)), float(torch.linalg.vector_norm(wanted - before))
    return Requantised(error / size if size else 0.0, error / moved if moved else 0.0)


def _torchao_like(old: Any, weight: Tensor) -> Tensor:
    """``weight`` in the format of ``old``, from the settings that a torchao tensor carries."""
    from torchao.quantization import MappingType, PerBlock

    block = tuple(old.block_size)
    zeros = getattr(old, "zero_point", None)
    mapping = MappingType.SYMMETRIC if zeros is None or not bool(zeros.any()) else MappingType.ASYMMETRIC
    settings: dict[str, Any] = {
        "Int8Tensor": {"granularity": PerBlock(block), "mapping_type": mapping},
        "Float8Tensor": {"granularity": PerBlock(block), "float8_dtype": old.qdata.dtype},
        "IntxUnpackedToInt8Tensor": {"block_size": block, "mapping_type": mapping},
    }[type(old).__name__]
    kept = (
        "act_quant_kwargs",
        "reduce_range",
        "mm_config",
        "kernel_preference",
        "target_dtype",
        "activation_quantization",
    )
    made: Tensor = type(old).from_hp(weight, **settings, **{n: getattr(old, n) for n in kept if hasattr(old, n)})
    return made


def _per_row(weight: Any) -> bool:
    """Whether torchao multiplies with the integers themselves, and then with a scale per row."""
    return type(weight).__name__ == "Int8Tensor" and weight.block_size[-1] == weight.qdata.shape[-1]


def _weight_is(layer: nn.Module, library: str, name: str | None = None) -> bool:
    """Whether a layer's weight is of a class of ``library``, called ``name``; by name, so that nothing is imported."""
    kinds = type(getattr(layer, "weight", None)).__mro__
    return any(k.__module__.partition(".")[0] == library and name in (None, k.__name__) for k in kinds)


def _is_packed(tensor: Tensor) -> bool:
    if nn.parameter.is_lazy(tensor):
        return False
    one_byte = tensor.is_floating_point() and tensor.element_size() == 1
    return tensor.dim() >= 2 and (one_byte or not (tensor.is_floating_point() or tensor.is_complex()))


def _tensors(layer: nn.Module) -> Iterator[Tensor]:
    yield from layer.parameters(recurse=False)
    yield from layer.buffers(recurse=False)


def _values(weight: Any) -> Tensor:
    values: Tensor = weight.detach()
    return values


def _half(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float16, torch.bfloat16, torch.float64) else torch.float32


def _part(layer: nn.Module, name: str) -> Any:
    """An attribute of a layer whose class is another library's."""
    return getattr(layer, name)
