"""The slow twin: Listing 1 and Algorithm 1 written down plainly, to compare every fast path with.

It shares nothing with the fast path but the positions (`slicefine.schedule`, pure functions of integers): no hook, no
custom backward, no write into the dense weight while a slice trains, no journal. Autograd does all the work.

Where the paper is wrong or silent, this is what is done here:

- Algorithm 1, lines 9-11 and 18, add every increment to both ``dW`` and ``W0`` and then output their sum, which counts
  it twice. Here the trained slice is put back into the full weight once.
- Listing 1 makes new ``nn.Parameter`` objects at each move, which the optimizer never sees. Here one parameter per
  layer lives as long as the layer; a move changes its values, and `run` says what becomes of its optimizer state.
- Listing 1 leaves the bounds of row slices undefined. Here position 0, the last block and rank = size are ordinary
  cases: the frozen parts may be empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .geometry import Slice, entry_indices
from .schedule import Schedule, slice_at

__all__ = ["Listing1Linear", "ReferenceSliceLinear", "run"]


class ReferenceSliceLinear(nn.Module):
    """A linear layer of three parts, of which the middle one is trained (Appendix L, Listing 1).

    ``W`` is ``(out, in)``; ``x`` is ``(..., in)``. Rows: ``y = cat(x A^T, x T^T, x B^T)``; columns:
    ``y = x_A A^T + x_T T^T + x_B B^T``; random mask (Appendix K): ``y = x (W + M * U)^T`` with a dense ``M * U``.

    Attributes:
        full: the frozen weight ``W``; what it holds at the active slice is not used.
        part_T: the trained values as lines, ``(lines, line length)``; rows of ``W`` for a row slice, columns of ``W``
            for a column slice. It is larger than the active block where one shape has to serve both orientations.

    Example:
        >>> layer = ReferenceSliceLinear(nn.Linear(4, 6), Schedule(mode="row", row_rank=2))
        >>> layer.go_to(Slice("row", 4, 2))
        >>> layer(torch.ones(3, 4)).shape
        torch.Size([3, 6])
    """

    full: Tensor

    def __init__(self, base: nn.Linear, schedule: Schedule, name: str = "") -> None:
        super().__init__()
        self.schedule, self.name = schedule, name
        self.register_buffer("full", base.weight.detach().clone())
        self.bias = None if base.bias is None else base.bias.detach().clone()
        shape = schedule.block_shape((base.out_features, base.in_features))
        self.part_T = nn.Parameter(torch.zeros(shape, dtype=base.weight.dtype))
        self.visit = 0
        self.active = slice_at(schedule, 0, self.shape, name)
        self._load()

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)`` of the weight."""
        return self.full.shape[0], self.full.shape[1]

    def lines(self) -> Tensor:
        """The trained part without padding: ``(rank, in)`` for rows, ``(rank, out)`` for columns, ``(1, entries)``."""
        rows, columns = self.shape
        if self.active.axis == "entries":
            return self.part_T
        return self.part_T[: self.active.width, : columns if self.active.axis == "row" else rows]

    def weight(self) -> Tensor:
        """The full weight with the active slice in it, as a new tensor that autograd can follow."""
        start, end = self.active.start, self.active.start + self.active.width
        if self.active.axis == "row":
            return torch.cat([self.full[:start], self.lines(), self.full[end:]], dim=0)
        if self.active.axis == "column":
            return torch.cat([self.full[:, :start], self.lines().t(), self.full[:, end:]], dim=1)
        indices = entry_indices(self.active, self.shape)
        mask = torch.zeros(self.full.numel(), dtype=self.full.dtype).index_fill(0, indices, 1.0)
        values = torch.zeros_like(mask).index_put((indices,), self.part_T.reshape(-1))
        return self.full * (1 - mask).reshape(self.shape) + (mask * values).reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Listing 1's forward: three products, the bias added once."""
        start, end = self.active.start, self.active.start + self.active.width
        if self.active.axis == "row":
            parts = (self.full[:start], self.lines(), self.full[end:])
            y = torch.cat([F.linear(x, part) for part in parts], dim=-1)
        elif self.active.axis == "column":
            y = F.linear(x[..., :start], self.full[:, :start])
            y = y + F.linear(x[..., start:end], self.lines().t())
            y = y + F.linear(x[..., end:], self.full[:, end:])
        else:
            y = F.linear(x, self.weight())
        return y if self.bias is None else y + self.bias

    def go_to(self, block: Slice) -> None:
        """Commit the active slice, once, and load another one (Algorithm 1, lines 9-12, corrected)."""
        self.full = self.weight().detach().clone()
        self.active = block
        self._load()

    def move(self) -> None:
        """Go to the schedule's next slice."""
        self.visit += 1
        self.go_to(slice_at(self.schedule, self.visit, self.shape, self.name))

    def _load(self) -> None:
        start, end = self.active.start, self.active.start + self.active.width
        with torch.no_grad():
            self.part_T.zero_()
            if self.active.axis == "row":
                self.lines().copy_(self.full[start:end])
            elif self.active.axis == "column":
                self.lines().copy_(self.full[:, start:end].t())
            else:
                self.lines().copy_(self.full.reshape(-1)[entry_indices(self.active, self.shape)])


class Listing1Linear(nn.Module):
    """Listing 1 as printed, with its missing row bounds filled in: what its forward costs is measured against this.

    Args:
        base: the layer whose weight is split; the parts are copies.
        mode: ``"row"`` or ``"column"``.
        rank: width of the trained part.
    """

    def __init__(self, base: nn.Linear, mode: str, rank: int) -> None:
        super().__init__()
        self.mode, self.rank = mode, rank
        self.bias = base.bias
        self.reinit_from_full(base.weight.detach(), 0)

    def reinit_from_full(self, full: Tensor, position: int) -> None:
        """Split ``full`` at ``position`` into new parameters; an optimizer built before does not know them."""
        axis = 0 if self.mode == "row" else 1
        size = full.shape[axis]
        position = min(position, size - self.rank)
        self.a_end, self.t_end = position, position + self.rank
        self.part_A = nn.Parameter(full.narrow(axis, 0, position).clone(), requires_grad=False)
        self.part_T = nn.Parameter(full.narrow(axis, position, self.rank).clone(), requires_grad=True)
        self.part_B = nn.Parameter(full.narrow(axis, self.t_end, size - self.t_end).clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Three ``F.linear`` calls and a sum (columns) or ``cat`` (rows)."""
        if self.mode == "column":
            y = (
                F.linear(x[..., : self.a_end], self.part_A)
                + F.linear(x[..., self.a_end : self.t_end], self.part_T)
                + F.linear(x[..., self.t_end :], self.part_B)
            )
        else:
            y = torch.cat([F.linear(x, self.part_A), F.linear(x, self.part_T), F.linear(x, self.part_B)], dim=-1)
        return y + (self.bias if self.bias is not None else 0.0)


def run(
    layers: Mapping[str, ReferenceSliceLinear],
    optimizer: torch.optim.Optimizer,
    losses: Iterable[Callable[[], Tensor]],
    interval: int,
    state_policy: str = "reset",
    rewarm_steps: int = 10,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Algorithm 1: one optimizer step per loss; after steps ``interval``, ``2 * interval``, ... move every layer.

    Args:
        layers: by name; each one's ``part_T`` is in ``optimizer``.
        optimizer: plain ``torch.optim.SGD`` or ``AdamW``.
        losses: functions that run the forward pass of one step and return its loss.
        interval: steps between moves (the paper's N).
        state_policy: what becomes of the optimizer's state at a move: ``"reset"`` forgets it; ``"rewarm"`` also
            scales the update of the k-th step after a move by ``k / rewarm_steps``; ``"keep"`` leaves it.
        rewarm_steps: length of that ramp.
        after_step: called with the step's number (1 is the first), before a move.
    """
    for step, loss in enumerate(losses, start=1):
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        before = {name: layer.part_T.detach().clone() for name, layer in layers.items()}
        optimizer.step()
        moved, since_move = divmod(step - 1, interval)
        for name, layer in layers.items():
            if state_policy == "rewarm" and moved > 0 and since_move + 1 < rewarm_steps:
                share = (since_move + 1) / rewarm_steps
                layer.part_T.data = before[name] + share * (layer.part_T.detach() - before[name])
            _clear_padding(layer)
        if after_step is not None:
            after_step(step)
        if step % interval == 0:
            for layer in layers.values():
                layer.move()
                if state_policy != "keep":
                    optimizer.state.pop(layer.part_T, None)


def _clear_padding(layer: ReferenceSliceLinear) -> None:
    """Entries of ``part_T`` beyond the active block are not part of the model: they stay zero under every policy."""
    inside = torch.zeros_like(layer.part_T)
    if layer.active.axis == "entries":
        return
    inside[: layer.active.width, : layer.lines().shape[1]] = 1
    layer.part_T.data.mul_(inside)
