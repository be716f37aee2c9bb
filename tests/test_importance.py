"""Importance as an order of positions, pruned and new backbones, and slices that start from other values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import slicefine
from slicefine.analysis.backbone import prune, reinitialise
from slicefine.analysis.importance import (
    CATEGORIES,
    magnitude_mask,
    ordered_starts,
    position_map,
    slice_scores,
    wanda_scores,
)
from slicefine.errors import ConfigError, NumericalError
from slicefine.geometry import Slice, block_count, block_start
from slicefine.initial import initial_block, initial_matrix, standard_deviation


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- importance -------------------------------------------------------------------------------------------------------


def test_wanda_scores_are_weights_times_input_norms():
    weight, inputs = draw(0, 4, 3), draw(1, 20, 3)
    expected = np.abs(weight.numpy()) * np.linalg.norm(inputs.numpy(), axis=0)
    assert_close(wanda_scores(weight, torch.linalg.vector_norm(inputs, dim=0)).numpy(), expected)
    half = wanda_scores(weight.bfloat16(), torch.ones(3))
    assert half.dtype == torch.float64
    with pytest.raises(ConfigError, match="one norm per column"):
        wanda_scores(weight, torch.ones(4))
    with pytest.raises(NumericalError, match="NaN"):
        wanda_scores(weight.clone().fill_(math.nan), torch.ones(3))


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), r=st.integers(1, 14), seed=st.integers(0, 99))
@pytest.mark.parametrize("axis", ["row", "column"])
def test_slice_scores_are_sums_of_blocks(axis, rows, columns, r, seed):
    scores = draw(seed, rows, columns).abs()
    starts, sums = slice_scores(scores, r, axis)
    size = rows if axis == "row" else columns
    width = min(r, size)
    assert starts == [block_start(b, size, width) for b in range(block_count(size, width))]
    for start, found in zip(starts, sums, strict=True):
        part = scores[start : start + width] if axis == "row" else scores[:, start : start + width]
        assert_close(found, part.sum())


@given(seed=st.integers(0, 99), count=st.integers(1, 9), category=st.sampled_from(CATEGORIES))
def test_every_category_visits_every_position_once(seed, count, category):
    sums = draw(seed, count)
    order = ordered_starts(list(range(count)), sums, category, seed)
    assert sorted(order) == list(range(count))
    values = [float(sums[i]) for i in order]
    if category in ("most", "least"):
        assert values == sorted(values, reverse=category == "most")
    if category == "mixed":
        assert values[0] == max(values)
        assert values[1:2] == [min(values)][: len(values) - 1]


def test_random_order_depends_on_the_seed_alone():
    sums = draw(0, 30)
    assert ordered_starts(list(range(30)), sums, "random", 1) == ordered_starts(list(range(30)), -sums, "random", 1)
    assert ordered_starts(list(range(30)), sums, "random", 1) != ordered_starts(list(range(30)), sums, "random", 2)
    with pytest.raises(ConfigError, match="best.*expected one of most"):
        ordered_starts([0], torch.ones(1), "best")
    with pytest.raises(ConfigError, match="axis='entries'"):
        slice_scores(torch.ones(2, 2), 1, "entries")
    with pytest.raises(ConfigError, match="at least 1"):
        slice_scores(torch.ones(2, 2), 0, "row")


def test_position_maps_are_taken_by_attach():
    model = nn.Sequential(nn.Linear(6, 4))
    scores = {"0": torch.zeros(4, 6)}
    scores["0"][2], scores["0"][:, 4:] = 1.0, 5.0
    positions = position_map(scores.items(), {"0": (1, 2)}, "most")
    assert positions["0"]["row"][0] == 2
    assert positions["0"]["column"][0] == 4
    tuner = slicefine.attach(model, mode="column", r=2, positions=positions, interval=1)
    assert next(iter(tuner.mover.slices().values())) == Slice("column", 4, 2)


def test_mixed_slices_differ_from_layer_to_layer():
    scores = torch.arange(4.0)[:, None].expand(4, 4)
    found = position_map([("a", scores), ("b", scores)], {"a": (1, 1), "b": (1, 1)}, "mixed")
    assert (found["a"]["row"], found["b"]["row"]) == ([3, 0, 2, 1], [0, 3, 1, 2])


def test_iterative_magnitude_pruning_removes_the_smallest_over_all_layers():
    weights = {"a": torch.tensor([[0.1, -5.0], [2.0, 0.2]]), "b": torch.tensor([[0.3, 4.0]])}
    alive = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    first = magnitude_mask(weights, alive, 0.5)
    assert first["a"].tolist() == [[False, True], [True, False]]
    assert first["b"].tolist() == [[False, True]]
    second = magnitude_mask({"a": weights["a"] * 10, "b": weights["b"]}, first, 0.34)
    assert second["b"].tolist() == [[False, False]]
    assert not (second["a"] & ~first["a"]).any()
    assert magnitude_mask(weights, alive, 0.0) == alive
    with pytest.raises(ConfigError, match="share=1"):
        magnitude_mask(weights, alive, 1)
    with pytest.raises(NumericalError, match="NaN"):
        magnitude_mask({"a": weights["a"] * math.nan, "b": weights["b"]}, alive, 0.5)


# -- backbone ---------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.1, 0.5, 0.97, 1.0]), ties=st.booleans())
def test_pruning_zeroes_exactly_the_smallest(seed, share, ties):
    weights = {"a": draw(seed, 5, 4).float(), "b": draw(seed + 1, 3, 2).float()}
    if ties:
        weights = {name: weight.round() for name, weight in weights.items()}
    found = prune(weights, share)
    before = np.concatenate([np.abs(weight.numpy()).ravel() for weight in weights.values()])
    after = np.concatenate([np.abs(weight.numpy()).ravel() for weight in found.values()])
    count = round(share * len(before))
    assert (after == 0).sum() >= count
    assert_close(np.sort(after), np.sort(np.concatenate([np.zeros(count, "float32"), np.sort(before)[count:]])))
    kept = after != 0
    assert_close(after[kept], before[kept])


def test_kept_slices_are_neither_pruned_nor_counted():
    weight = torch.arange(1.0, 17.0).reshape(4, 4)
    found = prune({"fc": weight}, 1.0, {"fc": [Slice("row", 1, 2), Slice("column", 0, 1)]})["fc"]
    assert torch.equal(found[1:3], weight[1:3])
    assert torch.equal(found[:, 0], weight[:, 0])
    assert found[0, 1:].abs().sum() == found[3, 1:].abs().sum() == 0
    half = prune({"fc": weight}, 0.5, {"fc": [Slice("row", 0, 2)]})["fc"]
    assert torch.equal(half[2], torch.zeros(4))
    assert weight.min() == 1  # the argument is left alone
    with pytest.raises(ConfigError, match=r"share=1\.5"):
        prune({"fc": weight}, 1.5)
    with pytest.raises(ConfigError, match="no frozen weight"):
        prune({"fc": weight}, 0.5, {"fc": [Slice("row", 0, 4)]})
    with pytest.raises(ConfigError, match="random mask"):
        prune({"fc": weight}, 0.5, {"fc": [Slice("entries", 0, 4)]})
    with pytest.raises(NumericalError, match="NaN"):
        prune({"fc": weight * math.nan}, 0.5)


@pytest.mark.parametrize("kind", ["xavier", "kaiming", "lecun"])
def test_new_weights_have_the_variance_of_their_kind(kind):
    expected = {"xavier": 2 / (400 + 300), "kaiming": 2 / 300, "lecun": 1 / 300}[kind]
    drawn = initial_matrix(kind, (400, 300), "a", 3)
    assert drawn.var() == pytest.approx(expected, rel=0.03)
    assert drawn.mean() == pytest.approx(0, abs=0.001)
    assert not torch.equal(drawn, initial_matrix(kind, (400, 300), "b", 3))
    assert torch.equal(drawn, initial_matrix(kind, (400, 300), "a", 3))
    half = reinitialise({"a": torch.ones(400, 300, dtype=torch.bfloat16), "c": torch.ones(8, 3, 2, 2)}, kind, 3)
    assert torch.equal(half["a"], drawn.bfloat16())
    assert half["c"].shape == (8, 3, 2, 2)
    assert initial_block(kind, Slice("column", 3, 2), (400, 300)).shape == (2, 400)
    with pytest.raises(ConfigError, match="draws no values"):
        standard_deviation("pretrained", (2, 2))


# -- slices that start from other values ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["row", "column", "alternate"])
def test_new_slices_start_from_drawn_values_and_go_back_bit_for_bit(mode):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    before = [parameter.clone() for parameter in model.parameters()]
    tuner = slicefine.attach(model, r=2, mode=mode, interval=1, start_values="lecun", seed=5)
    layer = model[0]
    expected = before[0].clone()
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.0)
    for _ in range(4):
        block = layer.states["default"].journal.active
        values = initial_block("lecun", block, (6, 8), "0", 5)
        part = slice(block.start, block.start + block.width)
        if block not in layer.states["default"].journal.slices()[:-1]:
            if block.axis == "row":
                expected[part] = values
            else:
                expected[:, part] = values.t()
        x = torch.randn(3, 8)
        assert torch.equal(layer(x), nn.functional.linear(x, expected, before[1]))
        model(x).sum().backward()
        optimizer.step()
    with tuner.disabled():
        assert torch.equal(model[0].weight, before[0])
    tuner.undo(2)
    assert all(torch.equal(a, b) for a, b in zip(tuner.unload().parameters(), before, strict=True))


def test_a_place_that_comes_again_keeps_what_was_trained():
    model = nn.Sequential(nn.Linear(4, 4))
    tuner = slicefine.attach(model, r=2, mode="row", interval=1, start_values="zero")
    optimizer = torch.optim.SGD(tuner.parameters(), lr=1.0)
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tuner.mover.slices()["0"] == Slice("row", 0, 2)
    assert model[0].weight[0].abs().sum() > 0


def test_start_values_are_checked_and_named_in_the_configuration():
    from peft import get_peft_model

    with pytest.raises(ConfigError, match="start_values='ones'.*pretrained, zero"):
        slicefine.SliceFineConfig(start_values="ones")
    with pytest.raises(ConfigError, match="random mask starts pretrained"):
        slicefine.SliceFineConfig(start_values="zero", mode="random_mask")
    model = nn.Sequential(nn.Linear(4, 4))
    original = model[0].weight.detach().clone()
    tuned = get_peft_model(model, slicefine.SliceFineConfig(r=1, mode="row", target_modules=["0"], start_values="zero"))
    assert tuned.base_model.model[0].weight[0].abs().sum() == 0
    assert torch.equal(tuned.base_model.model[0].weight[1:], original[1:])
    assert torch.equal(tuned.unload()[0].weight, original)
