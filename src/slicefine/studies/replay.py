"""A loss as a function of one slice, without running the blocks below the slice again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.collect import slice_function
from ..errors import ConfigError, DataError, NumericalError
from ..geometry import Slice
from ..weights import supports
from ..window import block_paths

__all__ = ["Replay"]


class Replay:
    """A model's mean loss over fixed batches; blocks that do not depend on what changes give what they gave before.

    A block below the changed layer has the same outputs as before, so that its forward can be skipped. This holds for
    models whose blocks run once each, one after the other, and keep no state; that is tested, and all blocks are run
    if it does not hold.

    Args:
        model: in evaluation mode.
        batches: with labels.
        keep: number of batches whose block outputs are kept in memory at most; others run all blocks.
    """

    def __init__(self, model: nn.Module, batches: Sequence[dict[str, Tensor]], keep: int = 64) -> None:
        self.model, self.batches = model, list(batches)
        self.blocks = _blocks(model)
        self._keep = keep
        self._kept = self._run()
        self._weights = [len(batch["labels"]) / sum(len(b["labels"]) for b in self.batches) for batch in self.batches]
        self.skips = bool(self._kept) and self._same()

    def loss(self) -> float:
        """Mean loss over all rows, at the weights as they are.

        Raises:
            NumericalError: if it is not finite.
        """
        with torch.no_grad():
            value = float(sum(w * self._loss(batch) for w, batch in zip(self._weights, self.batches, strict=True)))
        if value - value != 0:
            raise NumericalError(f"the model's mean loss is {value}; check its weights and the labels.")
        return value

    def of_slice(self, layer: str, block: Slice) -> Callable[[Tensor], Tensor]:
        """The mean loss as a function of one slice's values, differentiable twice."""
        functions = [slice_function(self.model, batch, layer, block) for batch in self.batches]
        below = self._below(layer)

        def function(values: Tensor) -> Tensor:
            total: Tensor = torch.zeros((), device=values.device)
            for number, (weight, own) in enumerate(zip(self._weights, functions, strict=True)):
                with self._skipping(number, below):
                    total = total + weight * own(values)
            return total

        return function

    def fit(self, modules: Sequence[str], steps: int, rate: float) -> None:
        """Train new modules alone with AdamW, one batch per step in turn, the rate falling to zero along a cosine."""
        parameters = [p for name in modules for p in self.model.get_submodule(name).parameters()]
        if not parameters or steps == 0:
            return
        frozen = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        self.model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        below = min((self._below(name) for name in modules), default=0)
        for step in range(steps):
            number = step % len(self.batches)
            with self._skipping(number, below):
                loss = self._loss(self.batches[number])
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
        for parameter, flag in frozen.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        if below < len(self.blocks):  # what was trained lies below some block
            self._kept = self._run()

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor | None = self.model(**batch).loss
        if loss is None:
            raise DataError("the model gives no loss; the rows need labels.")
        return loss

    def _below(self, layer: str) -> int:
        """How many blocks do not depend on a module: those before its own, or all if it follows them."""
        names = [name for name, _ in self.model.named_modules()]
        own = next((n for n, block in enumerate(self.blocks) if layer == block or layer.startswith(f"{block}.")), None)
        if own is not None or not self.blocks:
            return own or 0
        return len(self.blocks) if names.index(layer) > names.index(self.blocks[-1]) else 0

    @contextmanager
    def _skipping(self, number: int, below: int) -> Iterator[None]:
        """The lowest blocks give what they gave for batch ``number`` without running."""
        if not self.skips or number >= len(self._kept):
            below = 0
        modules = [self.model.get_submodule(name) for name in self.blocks[:below]]
        for module, result in zip(modules, self._kept[number] if below else (), strict=False):
            module.forward = _constant(result)
        try:
            yield
        finally:
            for module in modules:
                del module.forward  # the class's own again

    def _run(self) -> list[list[Any]]:
        """What the blocks give, batch by batch; nothing if they do not run one after the other, once each."""
        found = []
        for batch in self.batches[: self._keep] if self.blocks else ():
            own = _outputs(self.model, batch, self.blocks)
            if own is None:
                return []
            found.append(own)
        return found

    @torch.no_grad()
    def _same(self) -> bool:
        self.skips = True
        whole = float(self._loss(self.batches[0]))
        for below in {1, len(self.blocks)}:
            with self._skipping(0, below):
                if abs(float(self._loss(self.batches[0])) - whole) > 1e-6 * abs(whole):
                    return False
        return True


def _blocks(model: nn.Module) -> list[str]:
    try:
        found = block_paths(name for name, module in model.named_modules() if supports(module))
    except ConfigError:
        return []
    plain = all("forward" not in vars(model.get_submodule(name)) for name in found)
    return found if plain else []


@torch.no_grad()
def _outputs(model: nn.Module, batch: dict[str, Tensor], blocks: Sequence[str]) -> list[Any] | None:
    """What each block gives for a batch; None unless each one runs exactly once."""
    found: list[tuple[str, Any]] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _a, result, name=name: found.append((name, result)))
        for name in blocks
    ]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [result for _, result in found] if [name for name, _ in found] == list(blocks) else None


def _constant(result: Any) -> Callable[..., Any]:
    return lambda *_, **__: result
