"""Small models and comparisons that the core's tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slicefine.geometry import Slice, entry_indices


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three linear layers, wide, tall and square, so that alternate mode pads in both directions."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 5, bias=False), nn.Tanh(), nn.Linear(5, 5)).to(
        dtype
    )


def batches(count: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Inputs and regression targets for `mlp`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(4, 3, 6, generator=generator, dtype=dtype),
            torch.randn(4, 3, 5, generator=generator, dtype=dtype),
        )
        for _ in range(count)
    ]


def losses(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Iterator[Callable[[], Tensor]]:
    """One function per batch that runs ``model`` and returns its mean squared error."""
    for x, y in data:
        yield lambda x=x, y=y: (model(x) - y).square().mean()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One plain training step."""
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()


class Allocations(TorchDispatchMode):
    """Records the number of entries of the largest tensor that an operation returns on a storage of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {a.untyped_storage()._cdata for a in tree_leaves(args) if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor) and item.untyped_storage()._cdata not in given:
                self.largest = max(self.largest, item.numel())
        return result


def slice_mask(block: Slice, shape: tuple[int, int]) -> Tensor:
    """Boolean matrix that is true on a slice's entries, filled line by line."""
    mask = torch.zeros(shape, dtype=torch.bool)
    if block.axis == "row":
        mask[block.start : block.start + block.width] = True
    elif block.axis == "column":
        mask[:, block.start : block.start + block.width] = True
    else:
        mask.view(-1)[entry_indices(block, shape)] = True
    return mask


def lines_of(dense: Tensor, block: Slice) -> Tensor:
    """A slice of a dense matrix as lines, indexed plainly."""
    if block.axis == "row":
        return dense[block.start : block.start + block.width]
    if block.axis == "column":
        return dense[:, block.start : block.start + block.width].t()
    return dense.reshape(-1)[entry_indices(block, (dense.shape[0], dense.shape[1]))].unsqueeze(0)
