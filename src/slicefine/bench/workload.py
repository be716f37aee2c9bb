"""One method on its own copy of a model: a step, and everything else that is measured or checked about it."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SliceFineError, UnsupportedError
from ..layer import SliceLayer
from ..mover import movers_of
from ..transfer import file_tensors
from .methods import Method, make_optimizer
from .shapes import loss_of, step_loss

__all__ = [
    "BenchError",
    "Workload",
    "enable_checkpointing",
    "gradients_to_inputs",
    "keep_freed_memory",
    "kept_bytes",
    "now",
    "state_bytes",
    "timed_step",
]


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # of glibc's malloc.h


class BenchError(SliceFineError, RuntimeError):
    """A method that is about to be timed does not compute what it should."""


def gradients_to_inputs(model: Any) -> Any:
    """Let gradients flow to the embeddings, which makes a frozen model the floor; the handle's ``remove()`` ends it."""
    return model.get_input_embeddings().register_forward_hook(lambda _, args, y: y.requires_grad_())


def enable_checkpointing(model: Any, reentrant: bool = False) -> None:
    """Recompute activations in the backward pass, under the name that this version of transformers has for it."""
    kwargs = {"use_reentrant": reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB, in all of this process: activations, not a large model's weights.

    By default it hands large blocks back to the system, and which of them depends on what was allocated before.

    Raises:
        UnsupportedError: if the C library has no ``mallopt``, or does not take a setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    most = 2**31 - 1  # of the C int that it takes
    wanted = {_M_MMAP_THRESHOLD: 2**25, _M_TRIM_THRESHOLD: most, _M_TOP_PAD: 2**28, _M_ARENA_MAX: 1}
    if mallopt is None or not all(mallopt(option, value) for option, value in wanted.items()):
        raise UnsupportedError("bench: this system's C library cannot be told to keep memory; leave keep_memory out.")


def kept_bytes(model: Any, forward: Callable[[], Any]) -> int:
    """Bytes of distinct storages that ``forward`` keeps for backward, the model's weights and buffers not counted."""
    weights = {t.untyped_storage().data_ptr() for t in _weights(model)}
    found: dict[int, int] = {}
    keep = []

    def pack(tensor: Tensor) -> None:
        """Count; nothing goes back to the graph, whose saved outputs would hold themselves and never be freed."""
        tensor = tensor.detach()
        if tensor.is_sparse:  # SHiRA's delta: values and indices, no storage of its own
            parts = (tensor._values(), tensor._indices())
            found[parts[0].data_ptr()] = sum(part.numel() * part.element_size() for part in parts)
            keep.append(tensor)
            return
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor)  # a freed storage's address would be counted once for two tensors

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        result = forward()
    del result
    return sum(found.values())


def state_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of an optimizer's state, as far as it exists."""
    states = () if optimizer is None else optimizer.state.values()
    tensors = (v for state in states for v in state.values())
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def now() -> float:
    """Seconds, once the device has done its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def timed_step(loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None) -> tuple[float, float, float]:
    """Seconds of forward, backward, and the optimizer with everything that hangs on it."""
    begin = now()
    loss = loss_of()
    middle = now()
    loss.backward()  # type: ignore[no-untyped-call]
    end = now()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return middle - begin, end - middle, now() - end


def _weights(model: Any) -> list[Tensor]:
    beside = [layer.packed for layer in model.modules() if isinstance(layer, SliceLayer) and layer.packed is not None]
    return [*model.parameters(), *model.buffers(), *(lines for packed in beside for lines in packed.tensors())]


class Workload:
    """A method, ready to be timed.

    Args:
        name, method: the method.
        base: the frozen model; it is copied.
        family: its family, for methods that name layers.
        batch: the inputs of every step.
        recompute: recompute activations in the backward pass: True for the re-entrant kind, None for not at all.
        compiled: run the model through ``torch.compile``.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        base: Any,
        family: str,
        batch: dict[str, Tensor],
        recompute: bool | None = None,
        compiled: bool = False,
    ) -> None:
        self.name, self.method, self.batch = name, method, batch
        self.base_bytes = sum(t.numel() * t.element_size() for t in _weights(base))
        self.model: Any = method.build(copy.deepcopy(base), family).train()
        if recompute is not None:
            enable_checkpointing(self.model, recompute)
        if method.to_inputs:
            gradients_to_inputs(self.model)
        self.optimizer = make_optimizer(method, self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.forward: Callable[..., Any] = torch.compile(self.model) if compiled else self.model
        self.device = next(iter(batch.values())).device
        # alternate mode's two orientations cost differently: row, column, column, row, row, and so on
        self.turns = method.slices and name.startswith("alternate")
        self._steps = 0

    # -- a step ---------------------------------------------------------------------------------------------------

    def step(self) -> tuple[float, float, float]:
        """Seconds of forward, backward, and the optimizer with everything that hangs on it."""
        self._steps += 1
        if self.turns and self._steps % 2 == 0:
            movers_of(self.model)[0].move()  # its own time is measured apart,
            timed_step(lambda: step_loss(self.forward, self.batch), self.optimizer)  # and a position has many steps
        return timed_step(lambda: step_loss(self.forward, self.batch), self.optimizer)

    def peak_step(self) -> int:
        """Bytes of device memory that one step needs beyond what is there before it (CUDA only)."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.step()
        return torch.cuda.max_memory_allocated(self.device) - before

    # -- sizes ----------------------------------------------------------------------------------------------------

    def trainable(self) -> int:
        """Entries that the optimizer changes now; padding does not count."""
        movers = movers_of(self.model)
        if movers:
            return sum(mover.active_entries() for mover in movers)
        return sum(p.numel() for p in self.trained)

    def saved_bytes(self) -> int:
        """Bytes that the forward keeps for backward; of alternate mode, the larger orientation's."""
        kept = kept_bytes(self.model, lambda: step_loss(self.forward, self.batch))
        if self.turns:
            movers_of(self.model)[0].move()
            kept = max(kept, kept_bytes(self.model, lambda: step_loss(self.forward, self.batch)))
        return kept

    def added_bytes(self) -> int:
        """Bytes of parameters and buffers beyond the base's while it trains."""
        return sum(t.numel() * t.element_size() for t in _weights(self.model)) - self.base_bytes

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state after a step."""
        return state_bytes(self.optimizer)

    def file_bytes(self) -> int:
        """Bytes of the file that a user keeps: the adapter, or what was trained."""
        if not hasattr(self.model, "peft_config"):
            visited = [
                tensor
                for mover in movers_of(self.model)
                for layer in mover.layers.values()
                for tensor in file_tensors(layer, mover.name).values()
            ]
            return sum(t.numel() * t.element_size() for t in (*self.trained, *visited))
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return sum(file.stat().st_size for file in Path(folder).iterdir())

    # -- what users do beside training ----------------------------------------------------------------------------

    def seconds_of(self, action: Callable[[], Any], times: int = 5) -> float:
        """Median seconds of an action, the first time left out."""
        seconds = []
        for _ in range(times + 1):
            begin = now()
            action()
            seconds.append(now() - begin)
        return sorted(seconds[1:])[times // 2]

    def extras(self) -> dict[str, float]:
        """Seconds of a move, of saving, and of switching the adapter off and on, where the method has them."""
        result: dict[str, float] = {}
        movers = movers_of(self.model)
        if movers:
            result["move"] = self.seconds_of(movers[0].move)
        if not hasattr(self.model, "peft_config"):
            return result
        with tempfile.TemporaryDirectory() as folder:
            result["save"] = self.seconds_of(lambda: self.model.save_pretrained(folder), times=3)
            result["load"] = self._load_seconds(folder)
        tuner = self.model.base_model

        def switch() -> None:
            tuner.disable_adapter_layers()
            tuner.enable_adapter_layers()

        def merge() -> None:
            tuner.merge_adapter()
            tuner.unmerge_adapter()

        # a slice's weight holds its values: off and on is what merging and unmerging is for LoRA
        action = switch if self.method.slices else merge
        with contextlib.suppress(AttributeError, NotImplementedError, ValueError):  # some methods cannot be merged
            result["switch"] = self.seconds_of(action)
        return result

    def _load_seconds(self, folder: str) -> float:
        begin = now()
        self.model.load_adapter(folder, "again")
        seconds = now() - begin
        self.model.delete_adapter("again")
        return seconds

    # -- correct before it is timed -------------------------------------------------------------------------------

    def check(self, expected: Tensor, gradients: dict[str, Tensor] | None) -> None:
        """Raise `BenchError` unless the method starts as the base and trains what it says.

        Args:
            expected: the base model's output on the batch.
            gradients: dense gradients of the base's weights by name, for slices; None leaves that check out.
        """
        output = self.forward(**self.batch)
        found = (output.logits if "labels" in self.batch else output.last_hidden_state).detach().float()
        error = float((found - expected).abs().max()) / float(expected.abs().max())
        tolerance = 1e-4 if next(self.model.parameters()).dtype == torch.float32 else 5e-2
        if not error <= tolerance:
            raise BenchError(f"{self.name}: its output differs from the base model's by {error:.1e} of the largest.")
        loss_of(output, self.batch).backward()  # type: ignore[no-untyped-call]
        reached = [p.grad for p in self.trained if p.grad is not None]
        if self.trained and (not reached or not all(bool(gradient.isfinite().all()) for gradient in reached)):
            raise BenchError(f"{self.name}: no gradient, or one that is not finite, reaches what it trains.")
        if self.method.slices and gradients is not None:
            self._check_slices(gradients)
        for parameter in self.trained:
            parameter.grad = None

    def _check_slices(self, gradients: dict[str, Tensor]) -> None:
        from ..functional import read_block

        (mover,) = movers_of(self.model)
        for name, block in mover.slices().items():
            layer = mover.layers[name]
            found = layer.slicefine_active[mover.name].grad
            dense = gradients[f"{name}.weight"]
            wanted = read_block(dense, block, layer.states[mover.name].index)
            if found is None:
                raise BenchError(f"{self.name}: {name} gets no gradient.")
            ours = found[: wanted.shape[0], : wanted.shape[1]].to(wanted.dtype)
            tolerance = 1e-3 if dense.dtype == torch.float32 else 5e-2
            if not torch.allclose(ours, wanted, rtol=tolerance, atol=tolerance * float(dense.abs().max())):
                raise BenchError(f"{self.name}: the gradient of {block} of {name} is not the dense gradient's.")
