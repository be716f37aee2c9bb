"""`slicefine analyze overlap`: closed forms against autograd's Jacobians, and what the study says of a tiny model."""

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
from torch import nn
from torch.testing import assert_close

from cli_helpers import save_bert, save_llama, save_reviews
from slicefine.analysis.collect import gradients, output_gradients, slice_jacobian
from slicefine.analysis.kernels import ntk
from slicefine.analysis.spans import (
    certificate,
    directions,
    joint_rank,
    logit_gradient,
    lora_jacobian,
    lora_overlap,
    span,
)
from slicefine.analysis.winners import Overlap, layer_overlap, overlap
from slicefine.cli.main import main
from slicefine.errors import ConfigError, DataError, NumericalError
from slicefine.geometry import Slice
from slicefine.studies.common import open_model
from slicefine.studies.overlap import Settings, measure
from slicefine.studies.overlap_cases import examples_of, logit_cases, reaches, single_rows
from slicefine.studies.overlap_pruning import falls, measure_pruning
from slicefine.tasks.settings import DataSettings, ModelSettings

SEEDS = st.integers(0, 2**16)
VALUE = "bert.encoder.layer.1.attention.self.value"


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis_of(seed: int, d: int, k: int) -> torch.Tensor:
    return torch.linalg.qr(draw(seed, d, d))[0][:, :k]


def with_block(weight: torch.Tensor, block: Slice, values: torch.Tensor) -> torch.Tensor:
    start, stop = block.start, block.start + block.width
    if block.axis == "row":
        return torch.cat([weight[:start], values, weight[stop:]])
    return torch.cat([weight[:, :start], values, weight[:, stop:]], dim=1)


def block_jacobian(inputs: torch.Tensor, weight: torch.Tensor, block: Slice) -> torch.Tensor:
    """Of all outputs at all positions, position by position, by autograd."""
    lines = slice(block.start, block.start + block.width)
    own = weight[lines] if block.axis == "row" else weight[:, lines]
    found = torch.func.jacrev(lambda values: (inputs @ with_block(weight, block, values).t()).flatten())(own)
    return found.flatten(1)


def tiny(folder: Path, **changes) -> Settings:
    model, data = save_bert(folder / "model"), save_reviews(folder / "data")
    quick = {"samples": 32, "batch_size": 8, "limit": 2, "examples": 3, "positions": 1, "head_steps": 10}
    return Settings(model=ModelSettings(path=model), data=DataSettings(path=data), device="cpu", **(quick | changes))


# -- closed forms -----------------------------------------------------------------------------------------------------


@given(seed=SEEDS, t=st.integers(1, 4), out=st.integers(1, 5), width=st.integers(1, 5), k=st.integers(1, 5))
@pytest.mark.parametrize("axis", ["row", "column"])
def test_overlap_at_all_positions_is_that_of_the_jacobian(axis, seed, t, out, width, k):
    k, r = min(k, out), 1 + seed % min(out, width)
    inputs, weight, basis = draw(seed, t, width), draw(seed + 1, out, width), basis_of(seed + 2, out, k)
    block = Slice(axis, seed % ((out if axis == "row" else width) - r + 1), r)
    oracle = overlap(block_jacobian(inputs, weight, block), torch.from_numpy(np.kron(np.eye(t), basis)))
    found = layer_overlap(inputs, block, basis)
    assert found.gamma == pytest.approx(oracle.gamma, abs=1e-8)
    assert found.beta == pytest.approx(oracle.beta, abs=1e-8)
    assert found.rank == oracle.rank
    assert axis == "row" or t <= r or found.gamma == 0


@given(seed=SEEDS, t=st.integers(1, 3), out=st.integers(1, 5), width=st.integers(1, 5), rank=st.integers(1, 3))
def test_a_lora_at_its_start_is_a_column_slice_of_reduced_inputs(seed, t, out, width, rank):
    inputs, weight, factor = draw(seed, t, width), draw(seed + 1, out, width), draw(seed + 2, rank, width)
    basis = basis_of(seed + 3, out, 1 + seed % out)
    start = torch.zeros(out, rank, dtype=torch.float64)

    def outputs(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return (inputs @ (weight + b @ a).t()).flatten()

    of_b, of_a = torch.func.jacrev(outputs, argnums=(0, 1))(start, factor)
    assert not of_a.any()
    oracle = overlap(of_b.flatten(1), torch.from_numpy(np.kron(np.eye(t), basis)))
    found = lora_overlap(inputs, factor, basis)
    assert found.gamma == pytest.approx(oracle.gamma, abs=1e-8)
    assert found.beta == pytest.approx(oracle.beta, abs=1e-8)
    whole = torch.func.jacrev(lambda w: (inputs @ w.t()).flatten())(weight)
    assert_close(lora_jacobian(whole, factor), of_b.flatten(1))


def test_rounding_is_no_direction():
    exact = draw(0, 5, 1) @ draw(1, 1, 40)
    rounded = overlap(exact.float(), torch.eye(5))
    assert (rounded.rank, rounded.gamma) == (1, 0.0)
    small = exact + 1e-9 * draw(2, 5, 40)  # a direction in fp64, none in fp32
    assert (overlap(small, torch.eye(5)).rank, overlap(small.float(), torch.eye(5)).rank) == (5, 1)
    block = Slice("column", 0, 3)
    inputs = torch.cat([draw(3, 1, 4), draw(3, 1, 4)]) + 1e-9 * draw(4, 2, 4)  # two equal positions, nearly
    assert (
        layer_overlap(inputs, block, torch.eye(2)).rank,
        layer_overlap(inputs.float(), block, torch.eye(2)).rank,
    ) == (4, 2)
    assert joint_rank(inputs.float(), Slice("row", 0, 1), block, 2) == (1, 2, 2)


@given(seed=SEEDS, d=st.integers(1, 6), entries=st.integers(1, 9), k=st.integers(1, 6))
def test_the_certificate_is_always_kept(seed, d, entries, k):
    jacobian, basis, gradient = draw(seed, d, entries), basis_of(seed + 1, d, min(k, d)), draw(seed + 2, d)
    met = overlap(jacobian, basis)
    found = certificate(met, gradient, basis, float((jacobian.t() @ gradient).norm()))
    assert found.holds
    projector = basis @ basis.t()
    task, rest = float((projector @ gradient).norm()), float((gradient - projector @ gradient).norm())
    assert found.rho == pytest.approx(rest / task, abs=1e-9)
    if met.gamma > 0:  # as the Lemma writes it
        c = met.beta / met.gamma
        assert found.bound == pytest.approx((1 - c * found.rho) * met.gamma * task, rel=1e-6, abs=1e-9)


def test_certificates_say_what_they_are():
    basis = torch.eye(2, dtype=torch.float64)[:, :1]
    met = Overlap(1.0, 1.0, 1)
    assert certificate(met, torch.tensor([1.0, 2.0]), basis, 1.0).vacuous
    assert not certificate(met, torch.tensor([2.0, 1.0]), basis, 0.5).holds
    assert certificate(met, torch.tensor([0.0, 1.0]), basis, 1.0).rho == math.inf
    with pytest.raises(DataError, match=r"a gradient \(3,\) and a subspace \(2, 1\) differ"):
        certificate(met, torch.ones(3), basis, 1.0)


@given(seed=SEEDS, n=st.integers(1, 7), d=st.integers(1, 7))
def test_directions_are_numpys_left_singular_vectors(seed, n, d):
    features, k = draw(seed, n, d), 1 + seed % min(n, d)
    left = np.linalg.svd(features.numpy().T, full_matrices=False)[0][:, :k]
    found = directions(features, k).numpy()
    assert_close(found @ found.T, left @ left.T, rtol=1e-7, atol=1e-9)


def test_directions_refuse_what_has_none():
    with pytest.raises(ConfigError, match=r"k=3 must lie between 1 and 2 for features \(2, 5\)"):
        directions(draw(0, 2, 5), 3)
    with pytest.raises(NumericalError, match="NaN or infinite features"):
        directions(torch.full((2, 2), torch.nan), 1)


@given(seed=SEEDS, classes=st.integers(1, 6))
def test_logit_gradients_are_autograds(seed, classes):
    logits = (3 * draw(seed, classes)).requires_grad_(True)
    label = torch.tensor(seed % classes) if classes > 1 else draw(seed + 1, 1)[0]
    loss = nn.functional.cross_entropy(logits, label) if classes > 1 else nn.functional.mse_loss(logits[0], label)
    (oracle,) = torch.autograd.grad(loss, logits)
    assert_close(logit_gradient(logits, label), oracle)


@given(seed=SEEDS, n=st.integers(1, 4), c=st.integers(1, 3), slices=st.integers(1, 3), entries=st.integers(1, 3))
def test_spans_are_ranks_of_stacked_jacobians(seed, n, c, slices, entries):
    each = [draw(seed + m, n, c, entries) for m in range(slices)]
    stacked = np.concatenate([jacobian.flatten(0, 1).numpy() for jacobian in each], axis=1)
    found = span(sum(ntk(list(jacobian)) for jacobian in each))
    assert found.rank == np.linalg.matrix_rank(stacked)
    values = np.linalg.svd(stacked, compute_uv=False)
    shares = values[values > 1e-5 * values[0]] / values.sum()
    assert found.effective == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert found.outputs == n * c


def test_spans_of_nothing():
    assert (span(torch.zeros(3, 3)).rank, span(torch.zeros(3, 3)).effective) == (0, 0.0)
    with pytest.raises(NumericalError, match="NaN or infinite values in the kernel"):
        span(torch.full((2, 2), torch.nan))


@given(seed=SEEDS, t=st.integers(1, 5), out=st.integers(1, 5), width=st.integers(1, 5))
def test_joint_ranks_are_those_of_both_jacobians(seed, t, out, width):
    inputs, weight = draw(seed, t, width), draw(seed + 1, out, width)
    row = Slice("row", 0, 1 + seed % out)
    column = Slice("column", 0, 1 + seed % width)
    first, second = (block_jacobian(inputs, weight, block) for block in (row, column))
    ranks = [int(torch.linalg.matrix_rank(j)) for j in (first, second, torch.cat([first, second], dim=1))]
    assert list(joint_rank(inputs, row, column, out)) == ranks


# -- what is read from models -----------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(2, 2)

    def forward(self, inputs, labels=None):
        logits = self.second(torch.tanh(self.first(inputs))).mean(1)
        return SimpleNamespace(
            logits=logits, loss=None if labels is None else nn.functional.cross_entropy(logits, labels)
        )


def test_output_gradients_make_the_weights_gradient():
    model = Two()
    model.first.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    batch = {"inputs": draw(0, 6, 3, 4).float(), "labels": torch.arange(6) % 3}
    found = output_gradients(model, [batch, batch], ["first", "second"])
    whole = gradients(model, [batch], ["first", "second"])
    for name in ("first", "second"):
        assert len(found[name]) == 2
        inputs, gradient = found[name][0]
        assert gradient.shape == (6, 3, 5 if name == "first" else 3)
        assert_close(torch.einsum("nto,nti->oi", gradient, inputs), whole[name])
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.training
    assert not model.first._forward_hooks


def test_output_gradients_refuse_what_they_cannot_see():
    model, batch = Two(), {"inputs": torch.ones(1, 2, 4), "labels": torch.zeros(1, dtype=torch.long)}
    with pytest.raises(DataError, match="no batch reached module 'unused'"):
        output_gradients(model, [batch], ["unused"])
    with pytest.raises(ConfigError, match="module 'third': there is none of that name"):
        output_gradients(model, [batch], ["third"])
    with pytest.raises(DataError, match="the model gives no loss"):
        output_gradients(model, [{"inputs": batch["inputs"]}], ["first"])
    with pytest.raises(DataError, match="module '' does not get and give one tensor"):
        output_gradients(model, [batch], [""])


def test_single_rows_have_no_padding_and_the_same_loss(tmp_path: Path):
    opened = open_model(tiny(tmp_path))
    rows = single_rows(opened.batches, 10)
    assert len(rows) == 10
    assert all(bool(row["attention_mask"].all()) for row in rows)
    assert len({row["input_ids"].shape[1] for row in rows}) > 1
    with torch.no_grad():
        single = sum(float(opened.model(**row).loss) for row in rows[:8]) / 8
        assert single == pytest.approx(float(opened.model(**opened.batches[0]).loss), rel=1e-5)
    assert len(single_rows(opened.batches, 1000)) == 32


def test_reaches_take_parts_of_the_whole_jacobian(tmp_path: Path):
    opened = open_model(tiny(tmp_path))
    (row,) = single_rows(opened.batches, 1)
    own = reaches(VALUE, (32, 32), 2, 2, 3, seed=1)
    assert [reach.what for reach in own] == ["row", "row", "column", "column", "wide row", "wide column", "LoRA"]
    assert [reach.entries for reach in own] == [64, 64, 64, 64, 192, 192, 192]
    whole = slice_jacobian(opened.model, row, VALUE, Slice("row", 0, 32)).reshape(2, 32, 32)
    for reach in own[:6]:
        direct = slice_jacobian(opened.model, row, VALUE, reach.block)
        mine = reach.part(whole)
        if reach.block.axis == "column":  # lines are columns there
            direct = direct.reshape(2, -1, 32).transpose(1, 2).flatten(1)
        assert_close(mine, direct)
    assert own[-1].part(whole).shape == (2, 96)  # B's entries
    factor = own[-1].factor
    assert float(factor.abs().max()) <= 32**-0.5 < 1.2 * float(factor.abs().max())
    assert [reach.block for reach in reaches(VALUE, (32, 32), 2, 2, 3, seed=1)] == [reach.block for reach in own]
    assert reaches(VALUE, (3, 50), 9, 1, 1, seed=0)[0].block == Slice("row", 0, 3)  # no wider than the layer


# -- the study --------------------------------------------------------------------------------------------------------


def test_at_the_logits_the_gradient_follows_from_the_jacobian(tmp_path: Path):
    opened = open_model(tiny(tmp_path))
    rows = single_rows(opened.batches, 3)
    own = reaches(VALUE, (32, 32), 1, 1, 1, seed=0)
    basis = torch.tensor([[1.0], [-1.0]]).double() / math.sqrt(2)
    cases, parts, whole = logit_cases(opened, own, examples_of(opened, rows, VALUE), basis)
    assert len(cases) == 3 * len(own)
    assert [len(part) for part in parts] == [3] * len(own)
    for case in cases:
        jacobian = parts[[reach.what for reach in own].index(case.what)][case.example].double()
        logits = opened.model(**rows[case.example]).logits[0]
        gradient = logit_gradient(logits, rows[case.example]["labels"][0])
        assert case.measured == pytest.approx(float((jacobian.t() @ gradient).norm()), rel=1e-3)
        assert case.gamma == pytest.approx(float((basis.t() @ jacobian).norm()))
        assert case.bound == pytest.approx(case.measured, rel=1e-3)  # one direction, and all of the gradient in it
        assert case.holds
        assert case.rho == pytest.approx(0.0, abs=1e-6)
    assert all(own.shape == (2, 32 * 32) for own in whole)


def test_premises_fail_at_the_layer_as_the_closed_forms_say(tmp_path: Path):
    found = measure(open_model(tiny(tmp_path)), tiny(tmp_path))
    assert (found.k, found.classes) == (2, 2)
    for case in found.cases:
        if case.place == "layer, mean" and case.what == "row":
            assert (case.gamma, case.rank, case.premise, case.vacuous) == (0.0, 1, False, True)
        if case.place == "layer, mean" and case.what in ("column", "wide column", "LoRA"):
            assert case.gamma == pytest.approx(case.beta)
            assert case.rank == 2
        if case.place == "layer, positions":
            assert case.holds
    assert set(found.spans) == {"row", "column", "wide row", "wide column", "LoRA", "whole layers"}
    for what, spans in found.spans.items():
        assert len(spans) == 2
        assert spans[0].rank <= spans[1].rank <= spans[1].outputs == 6
        assert what == "whole layers" or spans[1].rank <= found.spans["whole layers"][1].rank
    assert all(own.change == 2 and own.both == min(own.outputs, own.both) for own in found.joints)


def test_pruning_is_undone_and_measured(tmp_path: Path):
    opened = open_model(tiny(tmp_path))
    before = {name: value.clone() for name, value in opened.model.state_dict().items()}
    found = measure_pruning(opened, opened.batches, [0.0, 0.5, 1.0], 2, 0.9)
    assert all(torch.equal(value, before[name]) for name, value in opened.model.state_dict().items())
    assert [(own.block[-1], own.share) for own in found] == [(b, p) for p in (0.0, 0.5, 1.0) for b in "01"]
    assert all(0 < own.energy <= 1 for own in found)
    assert found[0].layer == "bert.encoder.layer.0.output.dense"
    assert found[0].gamma_column > 0
    assert found[-1].gamma_row == pytest.approx(0.0, abs=1e-9)  # all outputs are the bias, its inputs gelu(bias)
    again = measure_pruning(opened, opened.batches, [0.5], 2, 0.9)
    assert again == found[2:4]
    with pytest.raises(ConfigError, match="share=1.5"):
        measure_pruning(opened, opened.batches, [1.5], 2, 0.9)


@pytest.mark.parametrize(("values", "count"), [([1, 1, 2], 0), ([3, 2, None, 1], 2), ([None, 4], 0), ([], 0)])
def test_falls_are_counted(values, count):
    assert falls(values) == count


def test_the_command_writes_numbers_and_pictures(tmp_path: Path, capsys):
    model, data = save_bert(tmp_path / "model"), save_reviews(tmp_path / "data")
    arguments = ["--model.path", model, "--data.path", data, "--output", str(tmp_path / "out"), "--shares", "[0, 0.5]"]
    sizes = ["--batch_size", "8", "--samples", "32", "--limit", "2", "--examples", "2", "--positions", "1"]
    assert main(["analyze", "overlap", *arguments, *sizes, "--head_steps", "5"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "logits: LoRA" in printed
    assert "p = 0, 0.5: r*(p, 0.9) is nondecreasing in" in printed
    assert "a change in 1 rows and 1 columns has rank 2" in printed
    numbers = json.loads((tmp_path / "out" / "overlap.json").read_text())["numbers"]
    assert numbers["summary"]["layer, mean: row"]["premise"] == 0
    assert len(numbers["cases"]) == 2 * 2 * 5 * 3
    for name in ("overlap_premise", "overlap_span", "overlap_pruning"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["alternative"]


def test_a_language_model_has_no_logits_here(tmp_path: Path, capsys):
    model, data = save_llama(tmp_path / "model"), save_reviews(tmp_path / "data")
    arguments = ["--model.path", model, "--data.path", data, "--task.name", "causal-lm", "--shares", "[0.5]"]
    sizes = ["--batch_size", "8", "--samples", "32", "--limit", "2", "--examples", "2", "--positions", "1"]
    assert main(["analyze", "overlap", *arguments, *sizes]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Logits: left out, for a language model" in printed
    assert "logits: row" not in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r=0 must be at least 1"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"examples": 0}, "examples=0 must be at least 1"),
        ({"tau": 1.5}, r"tau=1.5 must lie in \(0, 1\]"),
        ({"shares": [0.5, 2.0]}, r"shares: 2.0 must lie in \[0, 1\]"),
        ({"head_rate": 0.0}, "head_rate=0.0: expected >= 0 and > 0"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**changes)


def test_half_precision_is_widened(tmp_path: Path):
    settings = tiny(tmp_path, shares=[], limit=1)
    settings.model.dtype = "bfloat16"
    opened = open_model(settings)
    assert opened.model.dtype == torch.bfloat16
    assert measure(opened, settings).cases
    assert opened.model.dtype == torch.float32


def test_bad_data_and_weights(tmp_path: Path):
    settings = tiny(tmp_path, logit_k=2)
    with pytest.raises(ConfigError, match="logit_k=2 must lie between 1 and 1: 2 logits of 32 rows"):
        measure(open_model(settings), settings)
    settings.logit_k = None
    opened = open_model(settings)
    opened.labels.zero_()
    with pytest.raises(DataError, match="all rows have the same label"):
        measure(opened, settings)
    opened = open_model(settings)
    with torch.no_grad():
        opened.model.get_submodule(VALUE).weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN or infinite"):
        measure(opened, settings)
