"""`slicefine analyze importance`: rankings against SciPy and NumPy, scores against sums over entries."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from cli_helpers import save_bert, save_llama, save_reviews, write_rows
from slicefine.analysis.rankings import gini, most_to_least, rank_correlation, top_overlap
from slicefine.cli.main import main
from slicefine.errors import ConfigError, DataError, NumericalError
from slicefine.studies.common import open_model
from slicefine.studies.importance import Settings, block_scores, layer_importance, study

SEEDS = st.integers(0, 2**16)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- rankings ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=20))
def test_rank_correlation_is_spearmans_with_ties(pairs):
    first, second = (torch.tensor(column).double() for column in zip(*pairs, strict=True))
    found = rank_correlation(first, second)
    if len(set(first.tolist())) == 1 or len(set(second.tolist())) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(spearmanr(first.numpy(), second.numpy()).statistic, abs=1e-12)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(lambda values: max(values) > 1e-3))
def test_gini_is_half_the_relative_mean_difference(values):
    x = np.array(values)
    expected = np.abs(x[:, None] - x).mean() / (2 * x.mean())
    assert gini(torch.tensor(values)) == pytest.approx(expected, abs=1e-6)
    assert gini(torch.tensor(values) * 1000) == pytest.approx(expected, abs=1e-6)


@given(seed=SEEDS, n=st.integers(2, 30), share=st.sampled_from([0.1, 0.25, 0.5, 1.0]))
def test_overlap_counts_what_both_have_at_the_top(seed, n, share):
    first, second = draw(seed, n), draw(seed + 1, n)
    count = math.ceil(round(share * n, 9))
    best = [set(np.argsort(-each.numpy())[:count]) for each in (first, second)]
    assert top_overlap(first, second, share) == pytest.approx((len(best[0] & best[1]) / count, count / n))
    assert top_overlap(first, 3 * first + 1, share)[0] == 1


def test_chance_is_what_random_choices_share():
    found = [top_overlap(draw(seed, 40), draw(seed + 1000, 40), 0.25) for seed in range(200)]
    assert np.mean([overlap for overlap, _ in found]) == pytest.approx(found[0][1], abs=0.03)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rank_correlation(torch.ones(3), torch.ones(4)), DataError, r"got \(3,\) and \(4,\)"),
        (lambda: rank_correlation(torch.ones(0), torch.ones(0)), DataError, r"got \(0,\) and \(0,\)"),
        (lambda: rank_correlation(torch.full((2,), torch.nan), torch.ones(2)), NumericalError, "NaN or infinite"),
        (lambda: top_overlap(torch.ones(3), torch.ones(3), 0.0), ConfigError, r"share=0.0 must lie in \(0, 1\]"),
        (lambda: gini(torch.tensor([1.0, -1.0])), DataError, "one score of at least 0 per position"),
        (lambda: gini(torch.zeros(3)), NumericalError, "every score is zero"),
        (lambda: most_to_least(torch.ones(2, 2)), DataError, r"got \(2, 2\)"),
    ],
)
def test_bad_scores_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert most_to_least(torch.tensor([0.0, 2.0])) == math.inf


# -- scores -----------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, rows=st.integers(2, 9), columns=st.integers(2, 9), r=st.integers(1, 4))
@pytest.mark.parametrize("axis", ["row", "column"])
def test_scores_are_sums_over_the_entries_of_a_slice(axis, seed, rows, columns, r):
    weight, gradient, inputs = draw(seed, rows, columns), draw(seed + 1, rows, columns), draw(seed + 2, 20, columns)
    energy = inputs.square().mean(0)
    starts, scores = block_scores(weight, energy, gradient, r, axis)
    w, g, norms = weight.numpy(), gradient.numpy(), np.sqrt((inputs.numpy() ** 2).mean(0))
    width = min(r, rows if axis == "row" else columns)
    for number, start in enumerate(starts):
        part = np.s_[start : start + width, :] if axis == "row" else np.s_[:, start : start + width]
        assert scores["wanda"][number] == pytest.approx((np.abs(w) * norms)[part].sum())
        assert scores["magnitude"][number] == pytest.approx(np.linalg.norm(w[part]))
        assert scores["gradient"][number] == pytest.approx(np.linalg.norm(g[part]))
        if axis == "column":
            assert scores["energy"][number] == pytest.approx((norms[start : start + width] ** 2).sum())
    assert ("energy" in scores) == (axis == "column")
    assert starts[-1] + width == (rows if axis == "row" else columns)


def test_a_planted_contrast_shows_and_chance_does_not():
    weight, flat = draw(0, 60, 60), torch.ones(60)
    settings = Settings(r=6)
    plain = layer_importance("flat", weight, flat, weight, "row", settings)
    assert plain.ratio["wanda"] < 1.2
    assert plain.shuffled < 1.2
    assert plain.gini["wanda"] < 0.05
    assert plain.correlation["magnitude"] > 0.5  # both look at the same entries
    weight[:6] *= 10
    strong = layer_importance("strong", weight, flat, weight, "row", settings)
    assert strong.ratio["wanda"] > 8
    assert strong.shuffled < 3  # the strong entries lie all over
    assert strong.scores["wanda"].index(max(strong.scores["wanda"])) == 0
    dead = layer_importance("dead", weight, flat, 0 * weight, "column", settings)
    assert "gradient" not in dead.ratio
    assert math.isnan(dead.correlation["gradient"])
    assert dead.chance == pytest.approx(3 / 10)


def test_broken_weights_name_their_layer():
    weight = draw(0, 6, 6)
    for bad in (weight * torch.nan, weight.clone().fill_(torch.inf)):
        with pytest.raises(NumericalError, match="layer 'up': .*NaN or infinite"):
            layer_importance("up", bad, torch.ones(6), weight, "row", Settings())
        with pytest.raises(NumericalError, match="layer 'up': .*NaN or infinite"):
            layer_importance("up", weight, torch.ones(6), bad, "row", Settings())
    with pytest.raises(ConfigError, match=r"\(6, 6\) and a gradient \(5, 6\) differ"):
        block_scores(weight, torch.ones(6), weight[:5], 2, "row")
    half, wide = (block_scores(w, torch.ones(6), weight, 2, "row")[1] for w in (weight.half(), weight.half().double()))
    assert half["wanda"].tolist() == wide["wanda"].tolist()


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("files")
    return save_bert(folder / "bert"), save_reviews(folder / "reviews")


def settings(files: tuple[str, str], **changes) -> Settings:
    result = Settings(**{"samples": 32, "r": 4, "head_steps": 0} | changes)
    result.model.path, result.data.path = files
    return result


def test_a_study_measures_every_layer_along_both_axes(files: tuple[str, str]):
    chosen = settings(files)
    result = study(chosen)
    opened = open_model(chosen)
    found = result.numbers["layers"]
    assert [(each["layer"], each["axis"]) for each in found] == [
        (name, axis) for name in opened.layers for axis in ("row", "column")
    ]
    name = opened.layers[0]  # its gradient, by plain autograd over all rows
    weight = opened.model.get_submodule(name).weight
    rows = sum(len(batch["labels"]) for batch in opened.batches)
    losses = [opened.model(**batch).loss * len(batch["labels"]) for batch in opened.batches]
    (gradient,) = torch.autograd.grad(sum(losses) / rows, weight)
    expected = [float(gradient[start : start + 4].norm()) for start in found[0]["starts"]]
    assert found[0]["scores"]["gradient"] == pytest.approx(expected, rel=1e-4)
    assert [row[2] for row in result.rows][:2] == ["2", "2"]
    assert [chart.name for chart in result.charts] == ["importance_rows", "importance_columns"]
    for line in result.charts[1].panels[0].lines:
        assert sum(line.y) / len(line.y) == pytest.approx(1.0)
        assert list(line.y) == sorted(line.y, reverse=True)
    assert study(chosen).numbers == result.numbers


def test_the_heads_steps_lower_the_loss_and_train_nothing_else(files: tuple[str, str]):
    from slicefine.studies.importance import _fit_head

    opened = open_model(settings(files))
    before = {name: value.clone() for name, value in opened.model.state_dict().items()}
    first = sum(float(opened.model(**batch).loss.detach()) for batch in opened.batches)
    assert _fit_head(opened, 30) == 30
    assert sum(float(opened.model(**batch).loss.detach()) for batch in opened.batches) < first
    changed = {name for name, value in opened.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in opened.model.parameters())
    assert not opened.model.training


def test_the_command_prints_and_writes(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--model.path", files[0], "--data.path", files[1], "--samples", "24", "--r", "4", "--head_steps", "5"]
    assert main(["analyze", "importance", *options, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "rows: in" in shown
    assert "after 5 steps that trained the head alone" in shown
    names = {f"importance_{axis}.{end}" for axis in ("rows", "columns") for end in ("png", "json")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"importance.json"} | names
    found = json.loads((tmp_path / "out/importance.json").read_text())
    assert found["numbers"]["head_steps"] == 5
    assert found["settings"]["r"] == 4


def test_a_language_model_keeps_its_head(tmp_path: Path):
    llama = save_llama(tmp_path / "llama")
    write_rows(tmp_path / "data/train.jsonl", [{"text": "the film was very good " * 4} for _ in range(12)])
    chosen = settings((llama, str(tmp_path / "data")), samples=4, head_steps=5)
    chosen.task.name, chosen.data.validation_fraction = "causal-lm", 0.0
    result = study(chosen)
    assert result.numbers["head_steps"] == 0
    assert any("as it was loaded" in note for note in result.notes)


def test_layers_that_are_never_reached_are_said(files: tuple[str, str], monkeypatch: pytest.MonkeyPatch):
    from slicefine.studies import importance

    real = importance.input_energy
    monkeypatch.setattr(importance, "input_energy", lambda *given: dict(list(real(*given).items())[1:]))
    result = study(settings(files))
    assert any(note.startswith("Left out, since no batch reaches them: bert.encoder.layer.0") for note in result.notes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"r": 0}, ConfigError, "r=0 must be at least 1"),
        ({"share": 1.0}, ConfigError, "share=1.0 must lie between 0 and 1"),
        ({"head_steps": -1}, ConfigError, "head_steps=-1 must be at least 0"),
        ({"layers": ["bert.nothing"]}, ConfigError, "layers: 'bert.nothing' was not measured; choose among bert"),
        ({"target_modules": "nothing"}, ConfigError, "matches no layer that can be trained"),
    ],
)
def test_bad_settings_are_refused(files: tuple[str, str], changes, error, message):
    with pytest.raises(error, match=message):
        study(settings(files, **changes))


def test_a_broken_checkpoint_is_refused(tmp_path: Path):
    bert = Path(save_bert(tmp_path / "bert"))
    tensors = load_file(bert / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"] *= torch.nan
    save_file(tensors, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((NumericalError, DataError), match="not finite|NaN or infinite"):
        study(settings((str(bert), save_reviews(tmp_path / "data"))))
