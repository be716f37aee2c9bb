"""Quantised layers of every format that runs here, small models of them, and their dense twins."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from slicefine.quantised import format_of


def bnb_8bit(layer: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=6.0
    )
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def bnb_4bit(kind: str, double: bool, dtype: torch.dtype | None = None) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        made = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=dtype or layer.weight.dtype,
            compress_statistics=double,
            quant_type=kind,
        )
        made.load_state_dict(layer.state_dict())
        return made.to("cpu")

    return make


def torchao(name: str, **settings: object) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        logging.getLogger("torchao").setLevel(logging.ERROR)
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
        from torchao import quantization
        from torchao.quantization.granularity import PerGroup

        if name == "IntxWeightOnlyConfig":
            settings["granularity"] = PerGroup(8)
        made = nn.Sequential(copy.deepcopy(layer))
        quantization.quantize_(made, getattr(quantization, name)(**settings))
        return made[0]

    return make


def hqq(layer: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=4, group_size=8)
    layer = copy.deepcopy(layer).requires_grad_(False)
    return HQQLinear(layer, settings, compute_dtype=layer.weight.dtype, device="cpu")


class ForwardOnly(nn.Module):
    """As GPTQ's and AWQ's layers are: packed integers, sizes and a forward; no weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scales = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (layer.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def values(self) -> Tensor:
        return self.qweight.to(self.scales.dtype) * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.values().to(x.dtype), self.bias)


class NoGradient(ForwardOnly):
    """A kernel for inference: what it returns has no history."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


FORMATS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bnb 8-bit": bnb_8bit,
    "nf4": bnb_4bit("nf4", double=False),
    "nf4, double": bnb_4bit("nf4", double=True),
    "fp4": bnb_4bit("fp4", double=False),
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int4": torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "hqq": hqq,
    "forward only": ForwardOnly,
}
PACKAGES = {"bnb": "bitsandbytes", "nf4": "bitsandbytes", "fp4": "bitsandbytes", "torchao": "torchao", "hqq": "hqq"}
SOME = ("bnb 8-bit", "nf4, double", "torchao int8", "forward only")  # one of each kind, where all would take long


def cases(names: object = tuple(FORMATS)) -> list[object]:
    """Formats for ``parametrize``; those whose library is not installed are skipped, with its name."""
    found = []
    for name in names:  # type: ignore[attr-defined]
        package = PACKAGES.get(name.split(" ")[0].rstrip(","))
        missing = package is not None and find_spec(package) is None
        found.append(pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed")))
    return found


def quantise(model: nn.Module, name: str, leave: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """Put layers of a format in the place of a model's linear ones."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path.rpartition(".")[2] not in leave:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, FORMATS[name](layer))
    return model


def dense_values(layer: nn.Module) -> Tensor:
    """A quantised layer's weight as fp32."""
    return layer.values().float() if isinstance(layer, ForwardOnly) else format_of(layer).dense(layer).float()


def dequantised(model: nn.Module) -> nn.Module:
    """The dense model that computes the same: nn.Linear layers with the values that the quantised ones stand for."""
    twin = copy.deepcopy(model)
    for path, layer in list(twin.named_modules()):
        if path and format_of(layer) is not None:
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight.data = dense_values(layer)
            if layer.bias is not None:
                plain.bias.data = layer.bias.detach().float().clone()
            parent, _, child = path.rpartition(".")
            setattr(twin.get_submodule(parent), child, plain)
    return twin
