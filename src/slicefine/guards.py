"""Looks that are taken now and then, not at every step: are the slices finite, and did nobody else write the weights?

A look reads from the device once, for all layers together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .errors import ContentError, NumericalError
from .fingerprint import fingerprint
from .layer import SliceLayer
from .sharded import full, sharded_parameter, whole
from .state import Frozen

__all__ = [
    "accept_weights",
    "all_finite",
    "check_frozen",
    "not_finite",
    "refuse_not_finite",
    "remember",
]


def all_finite(gradients: list[Tensor]) -> bool:
    """Whether no gradient has a NaN or infinite entry; processes that share sharded ones agree."""
    values = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    largest = torch.nn.utils.get_total_norm(values, norm_type=torch.inf)
    return bool(full(largest).isfinite())


def not_finite(layers: Mapping[str, SliceLayer], adapter_name: str) -> list[str]:
    """Names of layers whose active slice is NaN or infinite in the precision of the weight that takes it in."""
    blocks = whole([layer.parameter(adapter_name) for layer in layers.values()])
    here = {
        name: block.to(layer.dense().dtype)
        for (name, layer), block in zip(layers.items(), blocks, strict=True)
        if not block.is_meta
    }
    return _names_of(here)


def refuse_not_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `NumericalError` if one of the tensors that go into a file is NaN or infinite."""
    bad = _names_of({name: t for name, t in tensors.items() if t.is_floating_point() and not t.is_meta})
    if bad:
        raise NumericalError(
            f"{where}: {bad[0]} ({len(bad)} tensors in all) is NaN or infinite, so nothing is written. Take back what "
            "the current visit trained (restart of the tuner or of slicefine.movers_of(model)[0]) and save then, or "
            "train anew with a lower learning rate."
        )


def _names_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Which of the tensors are not finite."""
    flags = [tensor.isfinite().all() for tensor in tensors.values()]
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    return [name for name, good in zip(tensors, finite, strict=True) if not good]


def remember(layers: Iterable[SliceLayer]) -> None:
    """Take the fingerprints of weights that have none yet, with their originals in place."""
    for layer in layers:
        if layer.frozen is None:
            layer.frozen = _look(layer)


def _look(layer: SliceLayer) -> Frozen:
    weight = layer.base_weight
    apart = layer.packed is not None or sharded_parameter(layer._owner, layer.kind.parameter) is not None
    if apart or weight.is_meta:
        return Frozen(None, weight.dtype)
    with layer.reverted():
        return Frozen(fingerprint(layer.base_weight), weight.dtype)


def check_frozen(layers: Iterable[SliceLayer], doing: str) -> None:
    """Raise `ContentError` if something else changed entries that no slice trained, since training began.

    Args:
        layers: to look at; those that were not trained in this process are passed by.
        doing: what is not done then, for the message.
    """
    known, found = [], []
    for layer in layers:
        before = layer.frozen
        if before is None or before.fingerprint is None or before.dtype != layer.base_weight.dtype:
            continue
        now = _look(layer).fingerprint
        if now is not None:  # else FSDP2 took the weight over
            known.append(layer.label)
            found.append((now.cpu(), before.fingerprint.cpu()))
    changed = [label for label, (now, before) in zip(known, found, strict=True) if not torch.equal(now, before)]
    if changed:
        raise ContentError(
            f"{doing}: since training began, something else changed entries of the weight of {changed[0]} "
            f"({len(changed)} layers in all) that no slice trained: another library, an optimizer that holds the "
            "weight, an average of all parameters, or an in-place operation. Slices belong to the weights as they "
            "were. Put those back, or, if the change is meant, call slicefine.accept_weights(model): from then on the "
            "weights as they are now count as the base."
        )


def accept_weights(model: nn.Module) -> None:
    """Take the frozen weights as they are now for the base, after something else changed them on purpose.

    Slices that are saved from now on belong to the changed base, so save that, too.

    Example:
        >>> from slicefine import attach
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> tuner = attach(model, r=1, mode="row", interval=10)
        >>> accept_weights(model)
    """
    for module in model.modules():
        if isinstance(module, SliceLayer):
            module.forget_frozen()
