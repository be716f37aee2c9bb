"""SFT (SpIEL-AG) and diff pruning: against the authors' code, and what they keep, drop and save."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from bottleneck_helpers import IDS, MASK, bert, build, llama, logits, recorded
from slicefine.errors import ConfigError
from slicefine.methods import Base, find, options_of
from slicefine.methods.base import merge_layers
from slicefine.methods.diff_pruning import GatedChange, keep_largest
from slicefine.methods.files import load_tensors, save_tensors
from slicefine.methods.sparse import SparseChange, SpielAdamW

METHODS = ("sft", "diff_pruning")
QUICK: dict[str, dict[str, Any]] = {
    "sft": {"density": 0.05, "every": 5, "watched": 2},
    "diff_pruning": {"target": 0.1, "penalty": 1e-4},
}


def gpt2() -> Base:
    """A model whose layers keep their weights transposed."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=1, n_head=4)
    return Base(GPT2LMHeadModel(config).eval())


MODELS = {"bert": bert, "llama": llama, "gpt2": gpt2}


def train(name: str, model: nn.Module, base: Base, options: dict[str, Any], count: int, steps: int) -> list[float]:
    """Losses of a loop that does what a method asks for."""
    method = find(name)
    own = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if method.optimizer is not None:
        optimizer: Any = method.optimizer(model, options, 1e-2, 0.0)
    else:
        groups = [{"params": [p], "lr": 2e-3 * (10 if "gate" in n else 1)} for n, p in own]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    model.train()
    labels = torch.arange(len(IDS)) % 3 if base.head else IDS
    losses = []
    for step in range(1, count + 1):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, attention_mask=MASK, labels=labels).loss
        penalty = method.penalty(model, step / steps) if method.penalty else 0.0
        (loss + penalty).backward()
        optimizer.step()
        method.after_step(model, step, steps)
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def of_kind(model: nn.Module, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


# -- SFT ----------------------------------------------------------------------------------------------------------


def authors_run() -> tuple[nn.Module, dict[str, Tensor], SpielAdamW]:
    """Our layers with the weights and entries from which the authors' run started, and its optimizer."""
    given = recorded("methods_sparse", "sft")
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    with torch.no_grad():
        for name in ("0", "2"):
            model.get_submodule(name).weight.copy_(given[f"{name}.weight"])
            model.get_submodule(name).bias.copy_(given[f"{name}.bias"])
    options = options_of(find("sft"), {"density": 0.25, "every": 6, "watched": 2, "rate": 0.5})
    find("sft").build(Base(model), options)
    for name in ("0", "2"):
        model.get_submodule(name).indices.copy_(given[f"{name}.first"])
    return model, given, find("sft").optimizer(model, options, 0.02, 0.5)


def test_sft_goes_the_authors_way():
    model, given, optimizer = authors_run()
    steps, losses = len(given["x"]), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = (model(given["x"][step]) - given["target"][step]).square().mean()
        loss.backward()
        optimizer.step()
        find("sft").after_step(model, step + 1, steps)
        losses.append(loss.detach())
    assert_close(torch.stack(losses), given["losses"], rtol=1e-5, atol=1e-6)
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        assert torch.equal(layer.indices, given[f"{name}.indices"])
        assert_close(layer.values, given[f"{name}.values"], rtol=1e-5, atol=1e-6)
        assert not torch.equal(layer.indices, given[f"{name}.first"])


def test_gradients_of_sparse_changes_are_those_of_the_whole_weight():
    torch.manual_seed(0)
    layer = SparseChange(nn.Linear(5, 4).double().requires_grad_(False), torch.tensor([0, 7, 13, 19]), 20, 5, 0.2)
    with torch.no_grad():
        layer.values.copy_(torch.randn(4))
    x = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)
    seen: list[Tensor] = []
    layer._watch = seen.append  # type: ignore[method-assign]
    dy = torch.randn(2, 3, 4, dtype=torch.double)
    layer(x).backward(dy)
    whole = (layer.weight + layer.change()).detach().requires_grad_()
    other = x.detach().clone().requires_grad_()
    y = F.linear(other, whole, layer.bias)
    y.backward(dy)
    assert_close(layer(x.detach()), y)
    assert_close(x.grad, other.grad)
    assert_close(layer.values.grad, whole.grad.flatten()[layer.indices])
    assert_close(seen[0], whole.grad.flatten())


def test_entries_move_and_stay_as_many():
    base = bert()
    options = options_of(find("sft"), QUICK["sft"])
    model = build("sft", base, **QUICK["sft"])
    layers = of_kind(model, SparseChange)
    before = [layer.indices.clone() for layer in layers]
    assert not torch.equal(before[0], before[1])  # layers of one shape have draws of their own
    train("sft", model, base, options, 1, 40)
    assert all(layer.watching and layer.candidates is not None for layer in layers)
    assert all(torch.equal(layer.indices, old) for layer, old in zip(layers, before, strict=True))
    train("sft", model, base, options, 12, 12)
    for layer, old in zip(layers, before, strict=True):
        assert len(layer.indices) == len(old) == len(layer.indices.unique())
        assert int(layer.indices.max()) < layer.weight.numel()
        assert not torch.equal(layer.indices.sort().values, old.sort().values)
        assert not layer.watching


def test_moments_begin_anew_where_an_entry_does():
    layer = SparseChange(nn.Linear(4, 3), torch.arange(4), 20, 2, 0.2)
    optimizer = SpielAdamW([layer.values], lr=0.1, betas=(0.5, 0.9))
    layer.optimizer = optimizer
    gradient = torch.zeros(12)
    gradient[[1, 6, 8, 9]] = torch.tensor([3.0, 4.0, -5.0, 0.5])
    for step in (1, 2):
        layer.values.grad = torch.tensor([1.0, 1.0, 1.0, 1.0])
        layer._watch(gradient * step)
        optimizer.step()
        with torch.no_grad():
            layer.values.copy_(torch.tensor([0.1, 0.9, 0.2, 0.8]))
        layer.age += 1
    layer.choose(0.5)  # entries 0 and 2 go; 8 and 6 come, as 1 is there already
    assert layer.indices.tolist() == [8, 1, 6, 3]
    assert_close(layer.values.detach(), torch.tensor([0.0, 0.9, 0.0, 0.8]))
    state = optimizer.state[layer.values]
    assert state["age"].tolist() == [2.0, 3.0, 2.0, 3.0]
    assert_close(state["exp_avg"], torch.tensor([-7.5 * 0.75, 0.75, 6.0 * 0.75, 0.75]))
    assert_close(state["exp_avg_sq"], torch.tensor([62.5 * 0.19, 0.19, 40.0 * 0.19, 0.19]))


def test_spiel_adamw_is_adamw_without_moves():
    torch.manual_seed(0)
    one = nn.Parameter(torch.randn(5))
    other = nn.Parameter(one.detach().clone())
    ours, theirs = SpielAdamW([one], lr=0.1, eps=0), torch.optim.AdamW([other], lr=0.1, eps=0, weight_decay=0.0)
    for _ in range(4):
        gradient = torch.randn(5)
        one.grad, other.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    assert_close(one, other)


# -- diff pruning -------------------------------------------------------------------------------------------------


def test_gates_are_the_authors():
    given = recorded("methods_sparse", "gates")
    dense = nn.Linear(9, 7, bias=False).requires_grad_(False)
    dense.weight.copy_(given["weight"])
    settings = {"lower": -1.5, "upper": 1.5, "start": 5.0, "penalty": 1.0, "target": 0.1, "fixed": 0.5}
    layer = GatedChange(dense, structured=True, **settings)
    own = {name: getattr(layer, name) for name in ("diff", "gates", "group_gate")}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name])
    torch.manual_seed(5)  # the group's gate is drawn first
    y = layer(given["x"])
    y.backward(given["dy"])
    assert_close(y, given["y"])
    for name, parameter in own.items():
        assert_close(parameter.grad, given[f"grad.{name}"], rtol=1e-5, atol=1e-5)
    shut = given["gates"].sigmoid().sum() + given["group_gate"].sigmoid().sum()  # log(1.5 / 1.5) is 0
    assert_close(layer.expected_open().detach(), shut)


def test_the_penalty_is_the_chance_of_an_open_gate():
    base = bert()
    model = build("diff_pruning", base, lower=-0.5, upper=1.2, start=-0.7, penalty=2.0, structured=False)
    layer = of_kind(model, GatedChange)[0]
    torch.manual_seed(0)
    draws = torch.stack([layer.train()._open(layer.gates) > 0 for _ in range(200)])
    chance = float(draws.float().mean())
    assert abs(float(layer.expected_open().detach()) / layer.gates.numel() - chance) < 5e-3
    penalty = find("diff_pruning").penalty(model, 0.5)
    total = sum(layer.expected_open() for layer in of_kind(model, GatedChange))
    assert_close(penalty, 2.0 * total)
    penalty.backward()
    assert all(bool((layer.gates.grad > 0).all()) for layer in of_kind(model, GatedChange))


@pytest.mark.parametrize("structured", [True, False])
def test_pruning_keeps_the_largest_entries_of_all_layers(structured: bool):
    base = bert()
    options = options_of(find("diff_pruning"), {**QUICK["diff_pruning"], "structured": structured, "fixed": 0.25})
    model = find("diff_pruning").build(base, options)
    train("diff_pruning", model, base, options, 5, 8)
    layers = of_kind(model, GatedChange)
    assert not any(layer.pruned for layer in layers)
    with torch.no_grad():  # some gates open, some half open, some closed
        for layer in layers:
            layer.gates.copy_(torch.randn_like(layer.gates))
            if structured:
                layer.group_gate.fill_(0.5)
    whole = torch.cat([layer.change().flatten() for layer in layers]).detach()
    expected = round(0.1 * len(whole))
    kept = whole.abs().sort(descending=True).values[expected - 1]
    model.train()
    keep_largest(model)
    assert all(layer.training for layer in layers)
    pruned = torch.cat([layer.change().flatten() for layer in layers]).detach()
    assert int((pruned != 0).sum()) == expected
    assert_close(pruned, torch.where(whole.abs() >= kept, whole, 0.0))
    mask = torch.cat([layer.mask.flatten() for layer in layers])
    train("diff_pruning", model, base, options, 3, 8)
    later = torch.cat([layer.change().flatten() for layer in layers]).detach()
    assert not bool(later[~mask].any())
    assert bool((later[mask] != pruned[mask]).all())
    assert float(find("diff_pruning").penalty(model, 1.0)) == 0.0


@pytest.mark.parametrize(("fixed", "pruned_after"), [(0.0, 10), (0.5, 5), (0.25, 8)])
def test_pruning_comes_when_it_is_due(fixed: float, pruned_after: int):
    base = llama()
    options = options_of(find("diff_pruning"), {"fixed": fixed})
    model = find("diff_pruning").build(base, options)
    layer = of_kind(model, GatedChange)[0]
    for step in range(1, 11):
        find("diff_pruning").after_step(model, step, 10)
        assert bool(layer.pruned) == (step >= pruned_after)


def test_gates_have_a_rate_of_their_own():
    method = find("diff_pruning")
    factor = [method.groups(f"bert.pooler.dense.{name}", method.options) for name in ("diff", "gates", "group_gate")]
    assert factor == [1.0, 400.0, 400.0]
    assert factor[1] * method.learning_rate == pytest.approx(0.1)  # the authors' rate of gates


# -- both ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_trains_saves_loads_and_merges(name: str, family: str, tmp_path):
    base = MODELS[family]()
    fresh, options = copy.deepcopy(base), options_of(find(name), QUICK[name])
    before, expected = logits(base.model), find(name).count(base, options)
    model = find(name).build(base, options)
    assert_close(logits(model), before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    own = {n: p for n, p in model.named_parameters() if n in trained and not n.startswith("classifier")}
    assert sum(p.numel() for p in own.values()) == expected
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in trained}
    losses = train(name, model, base, options, 20, 40)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    for more in range(2):  # then past the pruning
        save_tensors(model, find(name), options, tmp_path)
        after = logits(model)
        assert torch.equal(logits(load_tensors(copy.deepcopy(fresh), find(name), tmp_path)), after)
        if not more:
            train(name, model, base, options, 25, 25)
    merged = merge_layers(model)
    assert_close(logits(merged), after, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-3


def test_counts_are_those_of_the_shapes():
    # four (32, 32) and two (48, 32) per block, and the pooler
    weights = 2 * (4 * 32 * 32 + 2 * 48 * 32) + 32 * 32
    assert find("diff_pruning").count(bert(), find("diff_pruning").options) == 2 * weights + 13
    assert find("diff_pruning").count(bert(), {**find("diff_pruning").options, "structured": False}) == 2 * weights
    entries = 2 * (4 * 51 + 2 * 76) + 51  # 5% of each, rounded down
    assert find("sft").count(bert(), options_of(find("sft"), QUICK["sft"])) == entries


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sft", {"density": 0.0}, "method.options.density=0.0: sft expects 1e-09 to 1"),
        ("sft", {"watched": 19}, "method.options.watched=19: sft expects 1 to 18"),
        ("sft", {"rate": 1.5}, "method.options.rate=1.5: sft expects 0 to 1"),
        ("diff_pruning", {"target": 0.0}, "method.options.target=0.0"),
        ("diff_pruning", {"fixed": 1.0}, "method.options.fixed=1.0: diff_pruning expects 0 to 0.99"),
        ("diff_pruning", {"lower": 0.0}, "method.options.lower=0.0"),
        ("diff_pruning", {"upper": 1.0}, "method.options.upper=1.0"),
        ("diff_pruning", {"structured": "yes"}, "method.options.structured='yes': diff_pruning expects one of"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str):
    for work in (lambda: build(name, bert(), **options), lambda: count(name, options)):
        with pytest.raises(ConfigError, match=message):
            work()


def count(name: str, options: dict[str, Any]) -> int:
    return find(name).count(bert(), options_of(find(name), options))
