"""What the mover has to know of optimizers: whose state can be reset at a move and how, and which are refused."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .errors import UnsupportedError
from .sharded import is_sharded, whole
from .zero import ZeroOptimizer

__all__ = [
    "creates_state",
    "held_by_some_optimizer",
    "refuse_optimizer",
    "reset_optimizer_state",
    "reset_optimizer_states",
]

# optimizer state that starts at zero: zeroing it in place equals a fresh state and keeps captured graphs valid
ZERO_STATE = frozenset(
    {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_inf",
        "square_avg",
        "grad_avg",
        "momentum_buffer",
        "exp_avg_sq_row",
        "exp_avg_sq_col",
        "row_var",
        "col_var",
        "variance",
    }
)
# whole-tensor statistics would mix the padding of an oblong alternate block into the update
FACTORED = ("Adafactor",)
REFUSED = {
    "LBFGS": "it evaluates the loss several times per step and keeps a history across moves",
    "SparseAdam": "it needs sparse gradients",
    "Muon": "it orthogonalises whole matrices, which a slice of a matrix is not",
}


def refuse_optimizer(optimizer: Optimizer | ZeroOptimizer, padded: Sequence[str]) -> None:
    """Raise `UnsupportedError` for an optimizer that cannot train slices.

    Args:
        optimizer: that holds slices.
        padded: layers whose parameter is padded, since rows and columns take turns in it.
    """
    name = type(optimizer.inner if isinstance(optimizer, ZeroOptimizer) else optimizer).__name__
    reason = REFUSED.get(name)
    if reason is not None:
        raise UnsupportedError(f"SliceFine does not work with {name}: {reason}. Use AdamW, SGD or Adafactor.")
    if name in FACTORED and padded:
        raise UnsupportedError(
            f"{name} averages over a whole parameter, and mode='alternate' pads the parameter of oblong layers "
            f"such as {padded[0]}. Use mode='row' or mode='column' with {name}, or another optimizer."
        )


def held_by_some_optimizer(ids: set[int]) -> bool:
    """Whether an optimizer that is alive holds one of the parameters; looked for once, among all objects."""
    optimizers = [found for found in gc.get_objects() if issubclass(type(found), Optimizer)]
    return any(id(p) in ids for found in optimizers for group in found.param_groups for p in group["params"])


def reset_optimizer_states(optimizer: Optimizer | ZeroOptimizer, parameters: Iterable[Tensor]) -> None:
    """Give parameters the optimizer state of new ones; under ZeRO this process's part of the groups that hold them."""
    if not isinstance(optimizer, ZeroOptimizer):
        for parameter in parameters:
            reset_optimizer_state(optimizer, parameter)
        return
    state = optimizer.inner.state
    for flat in optimizer.partitions(parameters):
        had = flat in state
        reset_optimizer_state(optimizer.inner, flat)
        if had and flat not in state:
            optimizer.forget_links()


def reset_optimizer_state(optimizer: Optimizer, parameter: Tensor) -> None:
    """Give one parameter the optimizer state of a new one: moments, Adam's step count, quantised states.

    State that starts at zero is zeroed in place; anything else is dropped, so that the optimizer rebuilds it.
    Keeping the step count would make Adam's first update about three times too large.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    tensors = {key: value for key, value in state.items() if value is not None}
    known = all(key in ZERO_STATE and _zeroes_in_place(value) for key, value in tensors.items())
    damped = any(group.get("dampening", 0) for group in optimizer.param_groups)  # SGD: its first step is undamped
    if isinstance(optimizer, torch.optim.Adagrad):  # it creates its state once, in its constructor
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        state["sum"].fill_(group["initial_accumulator_value"])
        state["step"].zero_()
        return
    if not known or damped:
        optimizer.state.pop(parameter)
        return
    for key, value in tensors.items():
        if isinstance(value, Tensor):
            value.zero_()
        else:
            state[key] = 0


def _zeroes_in_place(value: object) -> bool:
    """Whether zeros can be written into a piece of state; tensor subclasses of quantised states may refuse them."""
    if not isinstance(value, Tensor):
        return True
    return value.is_floating_point() and (type(value) in (Tensor, torch.nn.Parameter) or is_sharded(value))


def creates_state(optimizer: Optimizer, parameters: list[Tensor]) -> bool:
    """Whether a step was one that torch.distributed.checkpoint makes to create state: no rate, zeros as gradients."""
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    if any((isinstance(rate, Tensor) and rate.device.type != "cpu") or float(rate) != 0.0 for rate in rates):
        return False
    gradients = [parameter.grad for parameter in parameters]
    return not any(bool(gradient.any()) for gradient in whole([g for g in gradients if g is not None]))
