"""Degrading the frozen backbone on purpose: global magnitude pruning and new random weights (paper, Appendix D)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, NumericalError
from ..geometry import Slice
from ..initial import initial_matrix

__all__ = ["prune", "reinitialise"]


def prune(
    weights: Mapping[str, Tensor], share: float, keep: Mapping[str, Sequence[Slice]] | None = None
) -> dict[str, Tensor]:
    """Set the smallest ``share`` of all entries to zero, by magnitude over all weights together (Figure 9).

    Args:
        weights: by name; biases and norms are kept by leaving them out.
        share: p in [0, 1].
        keep: slices that are trained: their entries are neither pruned nor counted.

    Returns:
        New tensors; of equal magnitudes at the threshold those that come first go.

    Raises:
        ConfigError: for a share out of range, or if there is nothing to prune.
        NumericalError: for NaN weights.

    Example:
        >>> prune({"fc": torch.tensor([[3.0, -1.0], [2.0, -4.0]])}, 0.5)["fc"]
        tensor([[ 3.,  0.],
                [ 0., -4.]])
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"prune: share={share!r} must lie in [0, 1]: the part of the weights that becomes zero.")
    frozen = {name: _frozen(weight, (keep or {}).get(name, ())) for name, weight in weights.items()}
    sizes = [weight.detach().float().abs()[frozen[name]] for name, weight in weights.items()]
    if not sum(map(len, sizes)):
        raise ConfigError("prune: there is no frozen weight to prune.")
    joined = torch.cat(sizes)
    if bool(joined.isnan().any()):
        raise NumericalError("prune: there are NaN weights.")
    count = round(share * len(joined))
    gone = torch.zeros(len(joined), dtype=torch.bool)
    if count:
        threshold = torch.kthvalue(joined, count).values
        gone = joined < threshold
        ties = torch.nonzero(joined == threshold).flatten()[: count - int(gone.sum())]
        gone[ties] = True
    result = {}
    parts = torch.split(gone, [len(size) for size in sizes])
    for (name, weight), part in zip(weights.items(), parts, strict=True):
        pruned = weight.detach().clone()
        pruned[frozen[name]] = torch.where(part, torch.zeros((), dtype=weight.dtype), pruned[frozen[name]])
        result[name] = pruned
    return result


def reinitialise(weights: Mapping[str, Tensor], kind: str = "lecun", seed: int = 0) -> dict[str, Tensor]:
    """New random values of the same shapes: a backbone without any pretraining (Appendix D.2).

    Args:
        weights: matrices, or tensors whose dimensions after the first are all inputs, by name.
        kind: see `slicefine.initial.standard_deviation`.
        seed: of the draw.
    """
    result = {}
    for name, weight in weights.items():
        drawn = initial_matrix(kind, (weight.shape[0], weight[0].numel()), name, seed)
        result[name] = drawn.reshape(weight.shape).to(weight.dtype)
    return result


def _frozen(weight: Tensor, blocks: Sequence[Slice]) -> Tensor:
    mask = torch.ones(weight.shape, dtype=torch.bool)
    for block in blocks:
        part = slice(block.start, block.start + block.width)
        if block.axis == "row":
            mask[part] = False
        elif block.axis == "column":
            mask[:, part] = False
        else:
            raise ConfigError("prune: a random mask cannot be kept; give row or column slices.")
    return mask
