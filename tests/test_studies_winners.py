"""`slicefine analyze winners`: noise of gradients, steps on single slices, and what the study says of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn
from torch.testing import assert_close

from cli_helpers import save_bert, save_reviews
from slicefine.analysis.collect import gradients, slice_function, slice_values
from slicefine.analysis.winners import GradientNoise, descend, random_step, wilson
from slicefine.cli.main import main
from slicefine.errors import ConfigError, DataError, NumericalError
from slicefine.geometry import Slice
from slicefine.studies.common import open_model
from slicefine.studies.replay import Replay
from slicefine.studies.winners import Settings, measure
from slicefine.studies.winners_report import shares
from slicefine.tasks.settings import DataSettings, ModelSettings

SEEDS = st.integers(0, 2**16)
QUERY = "bert.encoder.layer.1.attention.self.query"


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny(folder: Path, **changes) -> Settings:
    model, data = save_bert(folder / "model"), save_reviews(folder / "data")
    quick = {"samples": 64, "batch_size": 8, "limit": 3, "positions": 1, "step_rows": 16, "steps": 3, "head_steps": 20}
    return Settings(model=ModelSettings(path=model), data=DataSettings(path=data), device="cpu", **(quick | changes))


# -- formulas ---------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, batches=st.integers(2, 6), rows=st.integers(1, 6), columns=st.integers(1, 6), r=st.integers(1, 3))
@pytest.mark.parametrize("axis", ["row", "column"])
def test_noise_is_the_mean_over_its_standard_error(axis, seed, batches, rows, columns, r):
    each = draw(seed, batches, rows, columns)
    noise = GradientNoise()
    for gradient in each:
        noise.add(gradient)
    r = min(r, rows if axis == "row" else columns)
    mean, error = each.numpy().mean(0), each.numpy().std(0, ddof=1) / math.sqrt(batches)
    lines = (mean, error) if axis == "row" else (mean.T, error.T)
    expected = [
        np.linalg.norm(lines[0][i : i + r]) / np.linalg.norm(lines[1][i : i + r])
        for i in range(len(mean if axis == "row" else mean.T) - r + 1)
    ]
    assert_close(noise.ratios(r, axis).numpy(), np.array(expected), rtol=1e-6, atol=1e-9)
    assert_close(noise.mean().numpy(), mean)


def test_without_a_signal_the_ratio_is_about_one():
    noise = GradientNoise()
    for seed in range(16):
        noise.add(draw(seed, 200, 30))
    assert float(noise.ratios(1, "row").square().mean()) == pytest.approx(1.0, rel=0.1)
    noise = GradientNoise()
    for _ in range(3):
        noise.add(torch.tensor([[2.0], [0.0]]))
    assert noise.ratios(1, "row").tolist() == [math.inf, 0.0]
    single = GradientNoise()
    single.add(torch.ones(2, 2))
    with pytest.raises(DataError, match="1 batches have no spread; add at least 2"):
        single.ratios(1, "row")
    with pytest.raises(ConfigError, match="r=3 must lie between 1 and the 2 rows"):
        noise.ratios(3, "row")


@given(count=st.integers(1, 60), share=st.floats(0, 1), confidence=st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_scipys(count, share, confidence):
    successes = round(share * count)
    oracle = binomtest(successes, count).proportion_ci(confidence, method="wilson")
    assert wilson(successes, count, confidence) == pytest.approx((oracle.low, oracle.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (3, 2), (-1, 2)])
def test_no_share_has_no_interval(successes, count):
    with pytest.raises(DataError, match=f"{successes} of {count} is no share"):
        wilson(successes, count)


def test_descent_on_a_quadratic_is_geometric():
    start = torch.tensor([1.0, -2.0])
    path = descend(lambda v: (v.square() * torch.tensor([0.5, 1.0])).sum(), start, 0.25, 4)
    for step, values in enumerate(path, 1):
        assert_close(values, start * torch.tensor([0.75**step, 0.5**step]))
        assert not values.requires_grad
    assert start.tolist() == [1.0, -2.0]


@given(seed=SEEDS, length=st.floats(1e-4, 10))
def test_random_steps_have_the_length_they_should(seed, length):
    start = draw(0, 3, 40).float()
    after = random_step(start, length, seed)
    assert float((after - start).double().norm()) == pytest.approx(length, rel=2e-2)
    assert torch.equal(after, random_step(start, length, seed))
    assert not torch.equal(after, random_step(start, length, seed + 1))


# -- replay -----------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Linear blocks, called one after the other, ``times`` times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.times = times
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, inputs, labels=None):
        for _ in range(self.times):
            for block in self.blocks:
                inputs = torch.tanh(block(inputs))
        logits = self.head(inputs)
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


def chain_batches() -> list[dict[str, torch.Tensor]]:
    return [{"inputs": draw(n, n, 4).float(), "labels": torch.arange(n) % 2} for n in (5, 3)]


def test_skipping_blocks_changes_nothing():
    model, batches = Chain(1).eval(), chain_batches()
    replay = Replay(model, batches)
    assert replay.skips
    whole = {"inputs": torch.cat([b["inputs"] for b in batches]), "labels": torch.cat([b["labels"] for b in batches])}
    for layer in ("blocks.0", "blocks.2", "head"):
        block = Slice("column", 1, 2)
        values = slice_values(model, layer, block).requires_grad_(True)
        own, full = replay.of_slice(layer, block)(values), slice_function(model, whole, layer, block)(values)
        assert_close(own, full)
        assert_close(torch.autograd.grad(own, values), torch.autograd.grad(full, values))
    assert replay.loss() == pytest.approx(float(model(**whole).loss.detach()))
    assert not any("forward" in vars(block) for block in model.blocks)


def test_lower_blocks_do_not_run():
    model = Chain(1).eval()
    replay = Replay(model, chain_batches())
    block = Slice("row", 0, 1)
    values = slice_values(model, "blocks.1", block)
    before = replay.of_slice("blocks.1", block)(values)
    model.blocks[0].weight.data.fill_(torch.nan)  # nothing of it is read any more
    assert_close(replay.of_slice("blocks.1", block)(values), before)
    with pytest.raises(NumericalError, match="the model's mean loss is nan"):
        replay.loss()


def test_blocks_that_run_twice_are_not_skipped():
    model = Chain(2).eval()
    replay = Replay(model, chain_batches())
    assert not replay.skips
    block = Slice("row", 0, 1)
    full = slice_function(model, chain_batches()[0], "blocks.1", block)(slice_values(model, "blocks.1", block))
    own = Replay(model, chain_batches()[:1]).of_slice("blocks.1", block)(slice_values(model, "blocks.1", block))
    assert_close(own, full)


@pytest.mark.parametrize("head", ["head", "blocks.1"])
def test_fitting_trains_the_new_module_alone(head):
    model, batches = Chain(1).eval(), chain_batches()
    model.blocks[0].weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    replay = Replay(model, batches)
    loss = replay.loss()
    replay.fit([head], 30, 0.05)
    assert replay.loss() < loss
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == {
        f"{head}.weight",
        f"{head}.bias",
    }
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    block = Slice("row", 0, 1)
    own = replay.of_slice("blocks.2", block)(slice_values(model, "blocks.2", block))
    assert float(own.detach()) == pytest.approx(replay.loss(), rel=1e-5)  # kept outputs follow the new weights


# -- the study --------------------------------------------------------------------------------------------------------


def test_gains_are_those_of_weights_changed_in_place(tmp_path: Path):
    settings = tiny(tmp_path, target_modules=[QUERY], positions=2, r=2, modes=["column"])
    opened = open_model(settings)
    maps, gains, losses = measure(opened, settings)
    assert [own.layer for own in maps] == [QUERY]
    assert len(gains) == 2
    assert losses["after the head"] < losses["before the head"]
    whole = gradients(opened.model, opened.batches[:4], [QUERY])[QUERY]
    expected = [float(whole[:, i : i + 2].norm()) for i in range(31)]
    assert_close(maps[0].norms["column"].tolist(), expected, rtol=1e-4, atol=1e-7)
    rows, unseen = opened.batches[:2], opened.batches[4:6]
    weight = opened.model.get_submodule(QUERY).weight

    def mean_loss(batches) -> float:
        with torch.no_grad():
            return sum(float(opened.model(**batch).loss) for batch in batches) / len(batches)

    for gain in gains:
        part = slice(gain.start, gain.start + 2)
        original = weight.detach().clone()
        gradient = gradients(opened.model, rows, [QUERY])[QUERY][:, part]
        assert gain.gradient == pytest.approx(float(gradient.norm()), rel=1e-4)
        starts = mean_loss(rows), mean_loss(unseen)
        with torch.no_grad():
            weight[:, part] -= gradient / gain.smoothness
        assert gain.seen["one"] == pytest.approx(starts[0] - mean_loss(rows), rel=1e-2, abs=2e-6)
        assert gain.unseen["one"] == pytest.approx(starts[1] - mean_loss(unseen), rel=1e-2, abs=2e-6)
        assert gain.bound == pytest.approx(gain.gradient**2 / (2 * gain.smoothness))
        assert gain.seen["few"] >= gain.seen["one"] > 0
        with torch.no_grad():
            weight.copy_(original)
        assert gain.weight == pytest.approx(float(original[:, part].norm()), rel=1e-5)


def test_only_the_head_changes_and_the_draw_is_seeded(tmp_path: Path):
    settings = tiny(tmp_path, limit=2)
    opened = open_model(settings)
    before = {name: value.clone() for name, value in opened.model.state_dict().items()}
    first = measure(opened, settings)[1]
    changed = {name for name, value in opened.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert all(name.split(".")[0] in opened.new_modules for name in changed)
    again = measure(open_model(settings), settings)[1]
    assert first == again
    settings.seed = 1
    other = measure(open_model(settings), settings)[1]
    assert [gain.start for gain in other] != [gain.start for gain in first]
    assert {gain.layer for gain in other} == {gain.layer for gain in first}


def test_half_precision_is_widened(tmp_path: Path):
    settings = tiny(tmp_path, limit=1, modes=["row"])
    settings.model.dtype = "bfloat16"
    opened = open_model(settings)
    assert opened.model.dtype == torch.bfloat16
    (gain,) = measure(opened, settings)[1]
    assert opened.model.dtype == torch.float32
    assert gain.seen["one"] > 0  # in bfloat16 the loss would have three digits


def test_shares_count_and_compare():
    found = SimpleNamespace(
        seen={"one": 0.2, "few": 0.3}, null_seen={"one": 0.3, "few": -1.0}, unseen={"one": -0.1, "few": 0.1},
        null_unseen={"one": -0.2, "few": 0.2},
    )  # fmt: skip
    counts = {name: own["count"] for name, own in shares([found]).items()}
    assert counts == {
        "one: seen": 1, "one: seen, more than the null": 0, "one: unseen": 0, "one: unseen, more than the null": 0,
        "one: null, seen": 1, "one: null, unseen": 0,
        "few: seen": 1, "few: seen, more than the null": 1, "few: unseen": 1, "few: unseen, more than the null": 0,
        "few: null, seen": 0, "few: null, unseen": 1,
    }  # fmt: skip
    assert shares([]) == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_writes_numbers_and_pictures(tmp_path: Path, capsys, dtype):
    model, data = save_bert(tmp_path / "model"), save_reviews(tmp_path / "data")
    arguments = ["--model.path", model, "--data.path", data, "--model.dtype", dtype, "--output", str(tmp_path / "out")]
    sizes = ["--batch_size", "8", "--samples", "32", "--limit", "2", "--positions", "1", "--step_rows", "8"]
    assert main(["analyze", "winners", *arguments, *sizes, "--head_steps", "5", "--steps", "2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "slices of r=1: loss lowered, steps of 1/L on 8 rows" in printed
    assert "rows, all 480 positions: gradient not zero at" in printed
    content = json.loads((tmp_path / "out" / "winners.json").read_text())
    assert len(content["numbers"]["layers"]) == 13
    assert len(content["numbers"]["slices"]) == 4
    for name in ("winners_gradients", "winners_gains"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["alternative"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r=0 must be at least 1"),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"head_steps": -1}, "head_steps=-1 must be at least 0"),
        ({"modes": ["diagonal"]}, r"modes=\['diagonal'\]: expected row, column, or both"),
        ({"modes": []}, r"modes=\[\]: expected row, column, or both"),
        ({"head_rate": 0.0}, "head_rate=0.0 must be above zero"),
        ({"samples": 0}, "samples=0 must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**changes)


def test_broken_weights_and_few_rows(tmp_path: Path):
    settings = tiny(tmp_path, samples=24)
    with pytest.raises(DataError, match="3 batches are too few: half of them is held out"):
        measure(open_model(settings), settings)
    settings.samples = 64
    opened = open_model(settings)
    with torch.no_grad():
        opened.model.get_submodule(QUERY).weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="the model's mean loss is nan; check its weights"):
        measure(opened, settings)
