"""Sparse fine-tuning as SpIEL-AG: few entries of every weight are trained, and the least changed ones make room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..geometry import Slice, entry_indices
from .base import Base, Method, Options, numbers, wrap_layers
from .dense import ChangedLayer, added_dtype, check_range

__all__ = ["METHODS", "SparseChange", "SpielAdamW"]


class _SparseLinear(torch.autograd.Function):
    """Dense layer with changes added to single entries of its weight.

    The changed weight is put together again by backward: kept from forward on, it would be a second model.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        indices: Tensor,
        watch: Callable[[Tensor], None] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, values, indices)
        ctx.watch = watch
        return F.linear(x, _changed(weight, values, indices), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values, indices = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ _changed(weight, values, indices).to(rows.dtype)).view_as(x).to(x.dtype)
        dense = (rows.t() @ x.reshape(-1, x.shape[-1]).to(rows.dtype)).reshape(-1)
        if ctx.watch is not None:
            ctx.watch(dense)
        return grad_x, None, None, dense[indices].to(values.dtype), None, None


def _changed(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    copy = weight.clone(memory_format=torch.contiguous_format)
    copy.view(-1).index_add_(0, indices, values.to(copy.dtype))
    return copy


class SparseChange(ChangedLayer):
    """A dense layer with trained changes of single entries, which move to where gradients are large.

    Every ``every`` steps, gradients are watched for some steps: of as many candidates as there are trained entries,
    those of the largest gradient in the first backward. Then entries of the smallest change are dropped, and candidates
    of the largest summed gradient take their places, starting from zero change.

    Args:
        base: a dense layer.
        indices: flat positions in the weight ``(out, in)``, int64.
        every: steps between two choices.
        watched: steps during which gradients are summed.
        rate: share of entries that the second choice replaces; it falls linearly to 0. The first replaces them all.
    """

    indices: Tensor

    def __init__(self, base: nn.Module, indices: Tensor, every: int, watched: int, rate: float) -> None:
        super().__init__(base)
        self.values = nn.Parameter(torch.zeros(len(indices), dtype=added_dtype(self.weight)))
        self.register_buffer("indices", indices)
        self.every, self.watched, self.rate = every, watched, rate
        self.watching = True
        self.optimizer: SpielAdamW | None = None
        self._forget()

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``."""
        watch = self._watch if self.watching else None
        y: Tensor = _SparseLinear.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, self.values, self.indices, watch
        )
        return y

    def change(self) -> Tensor:
        """The entries' changes in a matrix of zeros."""
        zeros = torch.zeros(self.weight.shape, dtype=self.values.dtype, device=self.values.device)
        return _changed(zeros, self.values, self.indices)

    def after_step(self, step: int, steps: int) -> None:
        """Watch, choose, or do nothing; ``step`` counts from 1."""
        self.age += 1
        place = step % self.every
        if place == self.watched and self.candidates is not None:
            self.choose(1.0 if step == self.watched else self.rate * (1 - step / steps))
        self.watching = place < self.watched or place == self.every - 1
        if not self.watching:
            self._forget()

    def _forget(self) -> None:
        self.candidates: Tensor | None = None
        self.sums = self.squares = torch.empty(0)
        self.samples = self.age = 0

    def _watch(self, gradient: Tensor) -> None:
        """Sum what the candidates get; ``gradient`` is the whole weight's, flat."""
        if self.candidates is None:
            self.candidates = gradient.abs().topk(len(self.indices), sorted=False).indices
            self.sums = torch.zeros(len(self.indices), dtype=self.values.dtype, device=gradient.device)
            self.squares = self.sums.clone()
            self.samples = self.age = 0
        picked = gradient[self.candidates].to(self.sums.dtype)
        self.sums += picked
        self.squares += picked.square()
        self.samples += 1

    @torch.no_grad()
    def choose(self, share: float) -> None:
        """Drop a share of the entries for better candidates."""
        assert self.candidates is not None
        count = int(len(self.values) * share)
        dropped = self.values.abs().topk(count, largest=False).indices
        stays = torch.ones(len(self.values), dtype=torch.bool, device=self.values.device)
        stays[dropped] = False
        free = ~torch.isin(self.candidates, self.indices[stays])
        order = self.sums[free].abs().topk(min(count, int(free.sum()))).indices
        best = free.nonzero().squeeze(1)[order]
        leaving = self.indices[dropped]
        # an entry that is dropped and chosen at once stays as it is
        best = best[~torch.isin(self.candidates[best], leaving)]
        dropped = dropped[~torch.isin(leaving, self.candidates[free][order])][: len(best)]
        self.indices[dropped] = self.candidates[best]
        self.values[dropped] = 0.0
        if self.optimizer is not None:
            mean, square = self.sums[best] / self.samples, self.squares[best] / self.samples
            self.optimizer.start(self.values, dropped, mean, square, self.age)


class SpielAdamW(torch.optim.Optimizer):
    """AdamW in which every entry has an age of its own, so that an entry may begin anew.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: of the two moments.
        eps: added to the root of the second one.
        weight_decay: decoupled; it pulls a change towards the base's value.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["age"] = torch.ones_like(parameter)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        age, first, second = state["age"], state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(parameter.grad, 1 - beta1)
        second.lerp_(parameter.grad.square(), 1 - beta2)  # type: ignore[union-attr]
        root = (second.sqrt() + group["eps"]) / (1 - beta2**age).sqrt()
        parameter.addcdiv_(first / (1 - beta1**age), root, value=-group["lr"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        age += 1

    def start(self, parameter: Tensor, places: Tensor, mean: Tensor, square: Tensor, age: int) -> None:
        """Give entries moments as if their gradients had been followed for ``age`` steps.

        Args:
            parameter: whose entries.
            places: indices of the entries.
            mean: of their gradients.
            square: mean of their squared gradients.
            age: steps.
        """
        state = self.state[parameter]
        beta1, beta2 = next(g["betas"] for g in self.param_groups if any(p is parameter for p in g["params"]))
        state["exp_avg"][places] = mean * (1 - beta1**age)
        state["exp_avg_sq"][places] = square * (1 - beta2**age)
        state["age"][places] = float(age)


def _layers(model: nn.Module) -> Iterator[SparseChange]:
    return (layer for layer in model.modules() if isinstance(layer, SparseChange))


def _optimizer(model: nn.Module, options: Options, rate: float, decay: float) -> SpielAdamW:
    optimizer = SpielAdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=decay)
    for layer in _layers(model):
        layer.optimizer = optimizer
    return optimizer


def _after_step(model: nn.Module, step: int, steps: int) -> None:
    for layer in _layers(model):
        layer.after_step(step, steps)


def _check(options: Options) -> None:
    check_range("sft", options, "density", 1e-9, 1)
    check_range("sft", options, "rate", 0, 1)
    check_range("sft", options, "watched", 1, options["every"] - 2)


def _entries(rows: int, columns: int, options: Options) -> int:
    return max(1, int(options["density"] * rows * columns))


def _build(base: Base, options: Options) -> nn.Module:
    _check(options)
    generator = torch.Generator().manual_seed(base.seed)
    indices = {}
    for name, rows, columns in numbers(base):
        draw = int(torch.randint(2**31, (), generator=generator))
        indices[name] = entry_indices(Slice("entries", draw, _entries(rows, columns, options)), (rows, columns))
    every, watched, rate = int(options["every"]), int(options["watched"]), options["rate"]
    return wrap_layers(
        base, list(indices), lambda name, layer: SparseChange(layer, indices[name], every, watched, rate)
    )


def _count(base: Base, options: Options) -> int:
    _check(options)
    return sum(_entries(rows, columns, options) for _, rows, columns in numbers(base))


METHODS = (
    Method(
        name="sft",
        title="SFT (SpIEL-AG)",
        source="Ansell et al. 2024 (arXiv 2401.16405), compared with the authors' layer, selection and optimizer",
        formula="density x outputs x inputs per weight",
        build=_build,
        count=_count,
        differs="density is a share of the changed weights; in the authors' code, of the whole model",
        options={"density": 0.01, "every": 20, "watched": 5, "rate": 0.2},
        learning_rate=1e-4,
        additions="as trained, and as many indices",
        optimizer=_optimizer,
        after_step=_after_step,
    ),
)
