"""Random sequences of everything that can be done with slices, beside a dense model with plain full-matrix arithmetic.

A rule trains, moves, undoes, restarts, saves, loads, copies, casts, switches, adds, deletes, disables, merges or
unloads; after each one the weights are compared with a reference that keeps a dense copy of every matrix for every
adapter and visit, and updates masked entries by the optimizer's formula. Training is compared at default tolerances,
since dense gradients add up in another order; everything else bit for bit.

    python benchmarks/state_machine.py --sequences 10000 --seed 0 --out benchmarks/results/state_machine.json
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import json
import shutil
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from slicefine import (
    ContentError,
    NumericalError,
    Slice,
    SliceFineConfig,
    UnsupportedError,
    accept_weights,
    attach,
    movers_of,
)
from slicefine.geometry import entry_indices
from slicefine.layer import SliceLayer
from slicefine.schedule import Schedule, slice_at
from slicefine.training.report import environment

RANK, INTERVAL, HISTORY = 2, 3, 3
RATE, DECAY, MOMENTUM, BETAS, EPSILON = 0.02, 0.05, 0.9, (0.9, 0.99), 1e-3
MODES = ("row", "column", "alternate", "random_mask")
EXECUTED: Counter[str] = Counter()  # rules, over all sequences
NAMES = ("default", "second", "third")


# -- small models -----------------------------------------------------------------------------------------------------


class Linears(nn.Module):
    """A linear layer and one whose weight is transposed."""

    targets = ("first", "last")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), Conv1D(4, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.nn.functional.one_hot(tokens, 7)[..., :6].to(self.first.bias.dtype)
        result: Tensor = self.last(torch.tanh(self.first(x)))
        return result


class Lookup(nn.Module):
    """An embedding below a linear layer."""

    targets = ("table", "last")

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(7, 6), nn.Linear(6, 4, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.table(tokens)))
        return result


class Packed(nn.Module):
    """Attention with one weight for query, key and value, and an output projection that is used without a call."""

    targets = ("mix", "mix.out_proj", "last")

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(7, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        result: Tensor = self.last(x + self.mix(x, x, x, need_weights=False)[0])
        return result


KINDS: dict[str, type[nn.Module]] = {"linear": Linears, "embedding": Lookup, "packed": Packed}


def tensor_of(model: nn.Module, name: str) -> nn.Parameter:
    """The weight of a plain model's layer."""
    layer = model.get_submodule(name)
    return layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight  # type: ignore[return-value]


def matrix_of(model: nn.Module, name: str) -> Tensor:
    """The same as ``(out, in)``."""
    weight = tensor_of(model, name).detach()
    return weight.t() if isinstance(model.get_submodule(name), Conv1D) else weight


def mask_of(block: Slice, shape: torch.Size) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    lines = slice(block.start, block.start + block.width)
    if block.axis == "row":
        mask[lines] = True
    elif block.axis == "column":
        mask[:, lines] = True
    else:
        mask.view(-1)[entry_indices(block, (shape[0], shape[1]))] = True
    return mask


# -- the reference ----------------------------------------------------------------------------------------------------


class Visit:
    """One stay: each layer's slice, the steps, and a copy of every matrix from when it began."""

    def __init__(self, blocks: dict[str, Slice], first: int, before: dict[str, Tensor]) -> None:
        self.blocks, self.first, self.last = blocks, first, first - 1
        self.before = {name: matrix.clone() for name, matrix in before.items()}


class DenseAdapter:
    """An adapter as full matrices.

    Args:
        mode: where its slices go.
        base: the matrices that its slices start from: weights, or zeros beside weights.
    """

    def __init__(self, mode: str, base: dict[str, Tensor]) -> None:
        self.schedule = Schedule(mode, RANK, RANK)
        self.trained = {name: matrix.clone() for name, matrix in base.items()}
        self.visits: list[Visit] = []
        self.kept = 0  # visits that the history reaches back
        self.forget_moments()
        self.begin()

    @property
    def step(self) -> int:
        return self.visits[-1].last

    def forget_moments(self) -> None:
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.count = 0

    def begin(self) -> None:
        blocks = {
            name: slice_at(self.schedule, len(self.visits), (matrix.shape[0], matrix.shape[1]), name)
            for name, matrix in self.trained.items()
        }
        self.visits.append(Visit(blocks, 1 + (self.step if self.visits else 0), self.trained))
        self.kept = min(HISTORY, self.kept + 1)
        self.forget_moments()

    def undo(self) -> None:
        self.trained = {name: matrix.clone() for name, matrix in self.visits.pop().before.items()}
        self.kept -= 1
        self.forget_moments()

    def restart(self) -> None:
        last = self.visits[-1]
        self.trained = {name: matrix.clone() for name, matrix in last.before.items()}
        last.last = last.first - 1
        self.forget_moments()

    def update(self, optimizer: str, gradients: dict[str, Tensor]) -> None:
        """One step of SGD with momentum or AdamW on the entries of the active slices."""
        self.count += 1
        for name, gradient in gradients.items():
            mask = mask_of(self.visits[-1].blocks[name], gradient.shape)
            first, second = self.moments.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
            value = self.trained[name]
            if optimizer == "sgd":
                first = MOMENTUM * first + gradient + DECAY * value
                new = value - RATE * first
            else:
                first = BETAS[0] * first + (1 - BETAS[0]) * gradient
                second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
                size = (second / (1 - BETAS[1] ** self.count)).sqrt() + EPSILON
                new = value * (1 - RATE * DECAY) - RATE * first / (1 - BETAS[0] ** self.count) / size
            self.moments[name] = first, second
            self.trained[name] = torch.where(mask, new, value)
        self.visits[-1].last += 1

    def cast(self, dtype: torch.dtype) -> None:
        self.trained = {name: matrix.to(dtype) for name, matrix in self.trained.items()}
        for visit in self.visits:
            visit.before = {name: matrix.to(dtype) for name, matrix in visit.before.items()}
        self.forget_moments()


# -- the machine ------------------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """What both ways of use have in common; subclasses say how a model gets its slices."""

    model: Any
    modes: dict[str, str]

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        mode=st.sampled_from(MODES),
        optimizer=st.sampled_from(["sgd", "adamw"]),
        beside=st.sampled_from([False, False, False, True]),
        seed=st.integers(0, 3),
    )
    def start(self, kind: str, mode: str, optimizer: str, beside: bool, seed: int) -> None:
        EXECUTED["sequences"] += 1
        self.kind, self.optimizer, self.seed = kind, optimizer, seed
        self.beside = beside and kind == "linear" and mode != "random_mask"
        self.folder = Path(tempfile.mkdtemp())
        torch.manual_seed(seed)
        self.plain = KINDS[kind]().double()  # the base, and what the reference computes with
        self.targets: tuple[str, ...] = self.plain.targets  # type: ignore[assignment]
        for name in self.targets:
            nn.init.normal_(tensor_of(self.plain, name), std=0.4)
        self.batches = torch.Generator().manual_seed(seed)
        self.active = "default"
        self.modes = {"default": mode}
        self.rebase()
        self.model = self.wrap(copy.deepcopy(self.plain), mode)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)
        self.__dict__.clear()
        if EXECUTED["sequences"] % 10 == 0:
            gc.collect()  # models are cycles, and every mover alive looks at every optimizer's step

    def rebase(self) -> None:
        """Forget all adapters but a new one on the base as it is."""
        self.weights = {name: matrix_of(self.plain, name).clone() for name in self.targets}
        zeros = {name: torch.zeros_like(matrix) for name, matrix in self.weights.items()}
        self.base = zeros if self.beside else self.weights
        self.adapters = {self.active: DenseAdapter(self.modes[self.active], self.base)}
        self.saved: list[tuple[str, Path, DenseAdapter]] = []
        self.applied, self.merged, self.trained_here = True, False, False
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    # how a model gets slices

    def wrap(self, model: nn.Module, mode: str) -> Any:
        raise NotImplementedError

    def save_to(self, path: Path) -> None:
        raise NotImplementedError

    def load_new(self, path: Path, mode: str) -> Any:
        raise NotImplementedError

    def unwrap(self, merge: bool) -> nn.Module:
        raise NotImplementedError

    # what is looked at

    @property
    def adapter(self) -> DenseAdapter:
        return self.adapters[self.active]

    @property
    def trains(self) -> bool:
        return self.applied and not self.merged

    def layers(self) -> dict[str, SliceLayer]:
        found = {m.states[self.active].layer_name: m for m in self.model.modules() if isinstance(m, SliceLayer)}
        assert sorted(found) == sorted(self.targets)
        return found

    def mover(self) -> Any:
        return self.layers()[self.targets[0]].states[self.active].mover

    @invariant()
    def weights_are_as_expected(self) -> None:
        if not hasattr(self, "model"):
            return
        expected = self.adapter.trained if self.applied else self.base
        for name, layer in self.layers().items():
            every = Slice("row", 0, layer.shape[0])
            here = layer.packed.read(every) if layer.packed is not None else layer.dense()
            assert torch.equal(here, expected[name]), name
            if self.beside:
                stored = layer.base_weight.t() if layer.transposed else layer.base_weight
                assert torch.equal(stored, self.weights[name]), name
        mover = self.mover()
        assert (mover.step, mover.visits) == (self.adapter.step, len(self.adapter.visits))
        slices = {name: layer.states[self.active].journal.active for name, layer in self.layers().items()}
        assert slices == self.adapter.visits[-1].blocks
        tokens = torch.arange(6).view(2, 3)
        with torch.no_grad():
            assert_close(self.model(tokens), self.reference(tokens))

    def reference(self, tokens: Tensor) -> Tensor:
        """The plain model's output with the weights that are expected; gradients arrive in `plain`."""
        expected = self.adapter.trained if self.applied else self.base
        for name in self.targets:
            matrix = expected[name] + self.weights[name] if self.beside else expected[name]
            weight = tensor_of(self.plain, name)
            weight.data.copy_(matrix.t() if isinstance(self.plain.get_submodule(name), Conv1D) else matrix)
        result: Tensor = self.plain(tokens)
        return result

    def restore_plain(self) -> None:
        for name in self.targets:
            matrix = self.weights[name]
            weight = tensor_of(self.plain, name)
            weight.data.copy_(matrix.t() if isinstance(self.plain.get_submodule(name), Conv1D) else matrix)

    # training

    def own_optimizer(self) -> torch.optim.Optimizer:
        """The active adapter's optimizer, which lives as long as its parameters do."""
        if self.active not in self.optimizers:
            parameters = [layer.parameter(self.active) for layer in self.layers().values()]
            self.optimizers[self.active] = (
                torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
                if self.optimizer == "sgd"
                else torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY, betas=BETAS, eps=EPSILON)
            )
            self.adapter.forget_moments()
        return self.optimizers[self.active]

    def backward(self) -> Tensor:
        tokens = torch.randint(7, (2, 3), generator=self.batches)
        goals = torch.randn(2, 3, 4, generator=self.batches, dtype=torch.float64)
        loss: Tensor = (self.model(tokens) - goals).square().mean()
        torch.autograd.backward(loss)
        self.plain.zero_grad()
        torch.autograd.backward((self.reference(tokens) - goals).square().mean())
        return loss

    @precondition(lambda self: self.trains)
    @rule(steps=st.integers(1, 4))
    def train(self, steps: int) -> None:
        EXECUTED["train"] += 1
        optimizer = self.own_optimizer()
        for _ in range(steps):
            optimizer.zero_grad()
            self.backward()
            gradients = {name: tensor_of(self.plain, name).grad for name in self.targets}
            plain = {
                name: gradient.t() if isinstance(self.plain.get_submodule(name), Conv1D) else gradient
                for name, gradient in gradients.items()
                if gradient is not None
            }
            self.adapter.update(self.optimizer, plain)
            optimizer.step()
            self.take_over()
            if self.adapter.step % INTERVAL == 0:
                self.adapter.begin()
        self.trained_here = True

    def take_over(self) -> None:
        """Trained values agree up to rounding; from here on the reference has the very bits."""
        for name, layer in self.layers().items():
            every = Slice("row", 0, layer.shape[0])
            here = layer.packed.read(every) if layer.packed is not None else layer.dense()
            assert_close(here, self.adapter.trained[name])
            outside = ~mask_of(self.adapter.visits[-1].blocks[name], here.shape)
            assert torch.equal(here[outside], self.adapter.trained[name][outside]), name
            self.adapter.trained[name] = here.clone()

    @precondition(lambda self: self.trains)
    @rule()
    def move(self) -> None:
        EXECUTED["move"] += 1
        self.mover().move()
        self.adapter.begin()

    @precondition(lambda self: self.trains)
    @rule(moves=st.integers(1, 3))
    def undo(self, moves: int) -> None:
        EXECUTED["undo"] += 1
        if moves > min(len(self.adapter.visits) - 1, self.adapter.kept):
            self.refused(UnsupportedError, "undo: ", lambda: self.mover().undo(moves))
            return
        self.mover().undo(moves)
        for _ in range(moves):
            self.adapter.undo()

    @precondition(lambda self: self.trains)
    @rule()
    def restart(self) -> None:
        EXECUTED["restart"] += 1
        if self.adapter.kept == 0:
            self.refused(UnsupportedError, "restart: the history does not hold", self.mover().restart)
            return
        self.mover().restart()
        self.adapter.restart()

    @precondition(lambda self: self.trains and self.adapter.kept > 0)
    @rule()
    def meet_nan(self) -> None:
        """A step with a NaN gradient: nothing is saved, and a restart brings the visit's beginning back."""
        EXECUTED["nan"] += 1
        optimizer, self.trained_here = self.own_optimizer(), True
        optimizer.zero_grad()
        self.backward()
        layer = self.layers()[self.targets[-1]]
        gradient = layer.parameter(self.active).grad
        assert gradient is not None
        gradient[0, 0] = float("nan")
        last_of_visit = (self.adapter.step + 1) % INTERVAL == 0
        if last_of_visit:
            self.refused(NumericalError, "so it is not committed", optimizer.step)
        else:
            optimizer.step()
        self.refused(NumericalError, "so nothing is written", lambda: self.save_to(self.folder / "nan"))
        self.refused(NumericalError, "so it is not committed", self.mover().move)
        self.mover().restart()
        self.adapter.restart()

    @rule(entry=st.integers(0, 10**6))
    def tamper(self, entry: int) -> None:
        """A write by somebody else is seen once training began, and not before."""
        EXECUTED["tamper"] += 1
        layer = self.layers()[self.targets[0]]
        if layer.packed is not None:
            return
        taken = torch.zeros(layer.shape, dtype=torch.bool)
        for adapter in self.adapters.values():
            for visit in adapter.visits:
                taken |= mask_of(visit.blocks[self.targets[0]], taken.shape)
        free = (~taken).nonzero()
        if len(free) == 0:
            return
        row, column = free[entry % len(free)].tolist()
        matrix = layer.dense()
        assert isinstance(matrix, Tensor)
        before = matrix[row, column].clone()
        matrix[row, column] += 0.25
        if self.trained_here:
            self.refused(ContentError, "something else changed entries", lambda: self.save_to(self.folder / "odd"))
            self.refused(ContentError, "something else changed entries", lambda: self.unwrap(False))
        else:
            self.save_to(self.folder / "odd")
        matrix[row, column] = before

    @precondition(lambda self: self.trained_here)
    @rule()
    def accept(self) -> None:
        EXECUTED["accept"] += 1
        accept_weights(self.model)
        self.trained_here = False

    def refused(self, kind: type[Exception], message: str, work: Any) -> None:
        with pytest.raises(kind, match=message):
            work()

    # files and copies

    @rule()
    def save(self) -> None:
        EXECUTED["save"] += 1
        path = self.folder / str(len(self.saved))
        self.save_to(path)
        self.saved.append((self.active, path, copy.deepcopy(self.adapter)))

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 10**6))
    def load(self, which: int) -> None:
        """A file's adapter in a new model."""
        EXECUTED["load"] += 1
        name, path, adapter = self.saved[which % len(self.saved)]
        saved = self.saved
        self.active = name
        self.restore_plain()
        self.rebase()
        self.saved = [entry for entry in saved if entry[0] == name]
        self.adapters = {name: copy.deepcopy(adapter)}
        self.adapter.forget_moments()
        self.modes = {name: self.modes[name]}
        self.model = self.load_new(path, self.modes[name])

    def as_new(self, model: Any) -> None:
        """Go on with another model object: optimizers hold parameters of the old one."""
        self.model = model
        self.optimizers = {}
        for adapter in self.adapters.values():
            adapter.forget_moments()

    @rule()
    def copy(self) -> None:
        EXECUTED["copy"] += 1
        self.as_new(copy.deepcopy(self.model))

    @rule()
    def pickle(self) -> None:
        EXECUTED["pickle"] += 1
        buffer = io.BytesIO()
        torch.save(self.model, buffer)
        buffer.seek(0)
        self.as_new(torch.load(buffer, weights_only=False))

    @precondition(lambda self: self.batches is not None and next(self.plain.parameters()).dtype == torch.float64)
    @rule()
    def cast(self) -> None:
        """To another precision; originals and trained values alike."""
        EXECUTED["cast"] += 1
        self.restore_plain()
        self.plain = self.plain.float()
        self.as_new(self.model.float())
        self.weights = {name: matrix.float() for name, matrix in self.weights.items()}
        self.base = {name: matrix.float() for name, matrix in self.base.items()}
        for adapter in self.adapters.values():
            adapter.cast(torch.float32)
        self.saved, self.trained_here = [], False

    @precondition(lambda self: self.trains and len(self.adapter.visits) > 1)
    @rule(merge=st.booleans())
    def unload(self, merge: bool) -> None:
        """Out of the model, with or without what was trained, and new slices on what is left."""
        EXECUTED["unload"] += 1
        plain = self.unwrap(merge)
        assert not any(isinstance(module, SliceLayer) for module in plain.modules())
        for name in self.targets:
            expected = self.weights[name]
            if merge:
                expected = expected + self.adapter.trained[name] if self.beside else self.adapter.trained[name]
            here = matrix_of(plain, name)
            assert torch.equal(here, expected), name
            tensor_of(self.plain, name).data.copy_(tensor_of(plain, name).data)
        self.active = "default"
        self.modes = {"default": self.modes.get("default", "row")}
        self.rebase()
        self.model = self.wrap(plain, self.modes["default"])


class AttachMachine(Machine):
    """`slicefine.attach`."""

    def wrap(self, model: nn.Module, mode: str) -> Any:
        self.tuner = attach(
            model,
            target_modules=list(self.targets),
            r=RANK,
            mode=mode,
            interval=INTERVAL,
            history=HISTORY,
            additive=self.beside,
        )
        return model

    def as_new(self, model: Any) -> None:
        super().as_new(model)
        self.tuner = copy.copy(self.tuner)
        self.tuner.model, self.tuner.layers, self.tuner.mover = model, self.layers(), self.mover()
        assert movers_of(model) == [self.tuner.mover]

    def save_to(self, path: Path) -> None:
        self.tuner.save(path)

    def load_new(self, path: Path, mode: str) -> Any:
        model = self.wrap(copy.deepcopy(self.plain), mode)
        self.tuner.load(path)
        return model

    def unwrap(self, merge: bool) -> nn.Module:
        return self.tuner.unload(merge)

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 10**6))
    def load_here(self, which: int) -> None:
        """A file's slices in the place of this model's."""
        EXECUTED["load here"] += 1
        _, path, adapter = self.saved[which % len(self.saved)]
        self.tuner.load(path)
        self.adapters = {"default": copy.deepcopy(adapter)}
        self.as_new(self.model)

    @rule()
    def state_dict(self) -> None:
        """A whole state dict in a new model with slices of its own."""
        EXECUTED["state dict"] += 1
        state = copy.deepcopy(self.model.state_dict())
        self.restore_plain()
        model = self.wrap(copy.deepcopy(self.plain), self.modes["default"])
        model.load_state_dict(state)
        self.as_new(model)
        self.trained_here = False

    @rule()
    def disabled(self) -> None:
        EXECUTED["disable"] += 1
        with self.tuner.disabled():
            self.applied = False
            self.weights_are_as_expected()
        self.applied = True


class PeftMachine(Machine):
    """``get_peft_model`` with one to three adapters."""

    def config(self, mode: str) -> SliceFineConfig:
        return SliceFineConfig(
            r=RANK,
            mode=mode,
            interval=INTERVAL,
            history=HISTORY,
            additive=self.beside or None,
            target_modules=list(self.targets),
        )

    def wrap(self, model: nn.Module, mode: str) -> Any:
        return get_peft_model(model, self.config(mode), adapter_name=self.active)  # type: ignore[arg-type]

    def save_to(self, path: Path) -> None:
        with mock.patch.object(PeftModel, "create_or_update_model_card"):  # slow, and not what this is about
            self.model.save_pretrained(path, selected_adapters=[self.active])

    def load_new(self, path: Path, mode: str) -> Any:
        folder = path if self.active == "default" else path / self.active
        return PeftModel.from_pretrained(
            copy.deepcopy(self.plain),  # type: ignore[arg-type]
            folder,
            adapter_name=self.active,
            is_trainable=True,
        )

    def unwrap(self, merge: bool) -> nn.Module:
        plain: nn.Module = self.model.merge_and_unload() if merge else self.model.unload()
        return plain

    @precondition(lambda self: self.trains and len(self.adapters) < len(NAMES))
    @rule(mode=st.sampled_from(MODES))
    def add(self, mode: str) -> None:
        EXECUTED["add"] += 1
        mode = "row" if self.beside and mode == "random_mask" else mode
        name = next(name for name in NAMES if name not in self.adapters)
        self.modes[name] = mode
        self.model.add_adapter(name, self.config(mode))
        self.adapters[name] = DenseAdapter(mode, self.base)

    @precondition(lambda self: self.trains)
    @rule(name=st.sampled_from(NAMES))
    def switch(self, name: str) -> None:
        EXECUTED["switch"] += 1
        if name in self.adapters:
            self.model.set_adapter(name)
            self.active = name

    @precondition(lambda self: self.trains and len(self.adapters) > 1)
    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        EXECUTED["delete"] += 1
        if name not in self.adapters:
            return
        if name == self.active:
            self.active = next(other for other in self.adapters if other != name)
        self.model.delete_adapter(name)
        self.model.set_adapter(self.active)
        del self.adapters[name], self.modes[name]
        self.optimizers.pop(name, None)
        self.saved = [entry for entry in self.saved if entry[0] != name]

    @precondition(lambda self: not self.merged)
    @rule()
    def toggle(self) -> None:
        EXECUTED["disable or enable"] += 1
        if self.applied:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
        self.applied = not self.applied

    @rule()
    def disabled(self) -> None:
        EXECUTED["disabled"] += 1
        if not self.trains:
            return
        with self.model.disable_adapter():
            self.applied = False
            self.weights_are_as_expected()
        self.applied = True

    @precondition(lambda self: self.applied)
    @rule()
    def merge(self) -> None:
        EXECUTED["merge or unmerge"] += 1
        if self.merged:
            self.model.unmerge_adapter()
        else:
            self.model.merge_adapter()
        self.merged = not self.merged


# -- a campaign -------------------------------------------------------------------------------------------------------


def campaign(machine: type[Machine], sequences: int, steps: int, seed: int | None, shrink: bool = False) -> None:
    """Run a machine; None for the seed derives it from the machine, for the same sequences every time."""
    chosen = settings(
        max_examples=sequences,
        stateful_step_count=steps,
        derandomize=seed is None,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    if seed is not None:
        machine = hypothesis.seed(seed)(machine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(machine, settings=chosen)  # type: ignore[no-untyped-call]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=10_000, help="of both machines together")
    parser.add_argument("--steps", type=int, default=25, help="rules per sequence at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=500, help="sequences per seed")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    done: dict[str, Counter[str]] = {machine.__name__: Counter() for machine in (AttachMachine, PeftMachine)}
    for start in range(0, args.sequences // 2, args.chunk):
        for machine in (AttachMachine, PeftMachine):
            EXECUTED.clear()
            campaign(machine, min(args.chunk, args.sequences // 2 - start), args.steps, args.seed + start)
            done[machine.__name__] += EXECUTED
        minutes = (time.perf_counter() - began) / 60
        record = {
            "sequences": sum(counts["sequences"] for counts in done.values()),
            "rules": sum(counts.total() - counts["sequences"] for counts in done.values()),
            "divergences": 0,  # the first one ends the run
            "executed": {name: dict(sorted(counts.items())) for name, counts in done.items()},
            "seed": args.seed,
            "steps per sequence at most": args.steps,
            "minutes": round(minutes, 1),
            **environment(),
        }
        record["versions"] = {**record["versions"], "hypothesis": hypothesis.__version__}
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")  # so far
        print(f"{record['sequences']} sequences, {record['rules']} rules, {minutes:.0f} min", flush=True)


if __name__ == "__main__":
    main()
