"""Slices beside quantised weights: training equals that of the dense model with the same values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from quantised_helpers import cases, dense_values, dequantised, quantise
from slicefine import attach
from slicefine.geometry import Slice
from slicefine.quantised import format_of

MODES = {"row": {"r": 3}, "column": {"r": 4}, "alternate": {"r_row": 3, "r_column": 4}}


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 32))


def made(name: str) -> nn.Module:
    return quantise(mlp(), name)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 32, generator=generator), torch.randn(6, 32, generator=generator)


def train(model: nn.Module, parameters, steps: int = 20) -> nn.Module:
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for seed in range(steps):
        x, y = batch(seed)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", cases())
def test_training_equals_that_of_the_dense_model(name, mode):
    model = made(name)
    twin, before = dequantised(model), [dense_values(layer) for layer in model if format_of(layer)]
    ours, theirs = (attach(m, mode=mode, interval=4, **MODES[mode]) for m in (model, twin))
    assert ours.additive
    assert not theirs.additive
    assert_close(model(batch(99)[0]), twin(batch(99)[0]))
    for m, tuner in ((model, ours), (twin, theirs)):
        train(m, tuner.parameters())
    assert ours.mover.visits == theirs.mover.visits == 5 + 1
    assert_close(model(batch(99)[0]), twin(batch(99)[0]), rtol=1e-4, atol=1e-5)
    for (_, layer), values, (_, dense) in zip(ours.layers.items(), before, theirs.layers.items(), strict=True):
        assert torch.equal(dense_values(layer.base_layer), values)  # never written
        change = layer.packed.read(Slice("row", 0, layer.shape[0]))
        assert change.count_nonzero() > 0
        assert_close(values + change, dense.base_layer.weight, rtol=1e-4, atol=1e-5)
