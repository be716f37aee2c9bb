"""Nested tensors through layers with slices: as their rows one after the other."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from slicefine import SliceFineConfig, attach
from slicefine.errors import UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")

LAYOUTS = {"jagged": torch.jagged, "strided": torch.strided}


def parts(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 6, generator=generator) for rows in (2, 3, 1)]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))


def trained(layout: torch.layout | None, mode: str, additive: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and outputs after five steps and two moves; ``layout`` None: all rows in one plain tensor."""
    network = model()
    tuner = attach(network, r=2, mode=mode, interval=2, additive=additive)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for seed in range(5):
        rows = parts(seed)
        x = torch.cat(rows) if layout is None else torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)
        y = network(x)
        assert y.is_nested == (layout is not None)
        sum(part.square().sum() for part in y.unbind()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tuner.mover.visits == 3
    with torch.no_grad():
        outputs = [network(torch.cat(parts(9)))]
        if layout is not None:
            outputs = [torch.cat(network(torch.nested.nested_tensor(parts(9), layout=layout)).unbind())]
    with tuner.disabled():
        assert_close(network[0].base_layer.weight, model()[0].weight, rtol=0, atol=0)
    return [layer.values("default").clone() for layer in tuner.layers.values()], outputs


@pytest.mark.parametrize(("mode", "additive"), [("alternate", False), ("alternate", True), ("random_mask", False)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_train_as_their_rows_do(layout, mode, additive):
    for mine, its in zip(trained(LAYOUTS[layout], mode, additive), trained(None, mode, additive), strict=True):
        for one, other in zip(mine, its, strict=True):
            assert_close(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_input_s_gradient_arrives(layout):
    found = []
    for nested in (True, False):
        network = model()
        attach(network, r=2, interval=2, additive=True)
        rows = [part.requires_grad_() for part in parts(0)]
        x = torch.nested.as_nested_tensor(rows, layout=LAYOUTS[layout]) if nested else torch.cat(rows)
        sum(part.square().sum() for part in network(x).unbind()).backward()
        found.append([row.grad for row in rows])
    for mine, its in zip(*found, strict=True):
        assert_close(mine, its)


def test_an_embedding_takes_ragged_tokens():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4))
    tuner = attach(network, target_modules=["0", "1"], r=2, mode="row", interval=2)
    tokens = [torch.tensor([1, 0]), torch.tensor([0, 4, 5])]
    gradients = []
    for x in (torch.nested.nested_tensor(tokens, layout=torch.jagged), torch.cat(tokens)):
        y = network(x)
        (y.values() if y.is_nested else y).square().sum().backward()
        gradients.append([p.grad.clone() for p in tuner.parameters()])
        network.zero_grad()
    for mine, its in zip(*gradients, strict=True):
        assert_close(mine, its)
        assert mine.abs().max() > 0


def test_a_disabled_adapter_lets_them_pass():
    wrapped = get_peft_model(model(), SliceFineConfig(r=2, interval=2, target_modules=["0", "2"]))
    x = torch.nested.nested_tensor(parts(0), layout=torch.jagged, requires_grad=True)
    with wrapped.disable_adapter():
        y = wrapped(x)
        y.values().sum().backward()
    assert_close(y.values(), model()(torch.cat(parts(0))))
    assert x.grad is not None


def test_other_raggedness_is_refused():
    network = model()
    attach(network, r=2, interval=2, additive=True)
    jagged = torch.nested.nested_tensor(parts(0), layout=torch.jagged)
    holes = torch.nested.nested_tensor_from_jagged(jagged.values(), jagged.offsets(), torch.tensor([1, 2, 1]))
    for bad in (jagged.unsqueeze(1), holes):
        with pytest.raises(UnsupportedError, match=r"0: the input is a nested tensor whose dimension .* pad it"):
            network(bad)
