"""Kernels, label energy, `analyze energy` and `plan --rank auto` against closed forms and whole-function Jacobians."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from torch import nn
from torch.func import functional_call, jacrev
from torch.testing import assert_close

from cli_helpers import SHARED, recipe, save_bert, save_llama, save_reviews, write_rows
from slicefine.analysis.collect import slice_jacobian
from slicefine.analysis.features import (
    components_for,
    explained_variance,
    kernel_check,
    kernel_pair,
    label_energy,
    label_share,
    separating_dimension,
    task_rank,
)
from slicefine.analysis.kernels import (
    centred_kernel,
    kernel_alignment,
    kernel_distance,
    ntk,
    readout_ntk,
    unbiased_cka,
)
from slicefine.analysis.shift import linear_cka
from slicefine.cli.main import main
from slicefine.errors import ConfigError, DataError, NumericalError
from slicefine.geometry import Slice
from slicefine.mover import movers_of
from slicefine.studies.task_energy import Settings, compare_curves, study
from slicefine.training.rank import plan_ranks
from slicefine.training.session import build

SEEDS = st.integers(0, 2**16)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by PEFT
]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- kernels ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers and a readout, with a model's keywords and output."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.readout = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x: torch.Tensor) -> object:
        return type("Out", (), {"logits": self.readout(torch.tanh(self.up(x)))})()


def net() -> tuple[Net, torch.Tensor]:
    torch.manual_seed(0)
    return Net().double(), draw(1, 5, 4)


def whole_ntk(model: Net, x: torch.Tensor, name: str, keep: torch.Tensor) -> torch.Tensor:
    """Every pair of outputs' gradients, entry by entry: the Jacobian of all outputs of all examples at once."""
    weights = dict(model.named_parameters())

    def outputs(weight: torch.Tensor) -> torch.Tensor:
        return functional_call(model, weights | {name: weight}, (x,)).logits

    jacobian = jacrev(outputs)(weights[name].detach())  # (n, c, rows, columns)
    flat = jacobian[..., keep]
    return torch.einsum("iap,jbp->iajb", flat, flat).reshape(15, 15)


@pytest.mark.parametrize("block", [Slice("row", 1, 2), Slice("column", 2, 1)])
def test_the_kernel_of_a_slice_is_that_of_the_whole_functions_jacobian(block):
    model, x = net()
    jacobians = [slice_jacobian(model, {"x": row[None]}, "up", block) for row in x]
    keep = torch.zeros(6, 4, dtype=torch.bool)
    keep[(slice(1, 3),) if block.axis == "row" else (slice(None), slice(2, 3))] = True
    oracle = whole_ntk(model, x, "up.weight", keep)
    assert_close(ntk(jacobians), oracle)
    assert_close(ntk(torch.stack(jacobians), trace=True), oracle.reshape(5, 3, 5, 3).diagonal(0, 1, 3).sum(-1))
    hidden = torch.tanh(model.up(x)).detach()
    assert unbiased_cka(ntk(jacobians, trace=True), readout_ntk(hidden)) < 0.99  # it does not reduce to the features'


def test_the_kernel_of_the_readout_is_that_of_its_features():
    model, x = net()
    hidden = torch.tanh(model.up(x)).detach()
    jacobians = [slice_jacobian(model, {"x": row[None]}, "readout", Slice("row", 0, 3)) for row in x]
    oracle = whole_ntk(model, x, "readout.weight", torch.ones(3, 6, dtype=torch.bool))
    assert_close(ntk(jacobians), oracle)
    assert_close(readout_ntk(hidden, 3), oracle)
    assert_close(readout_ntk(hidden, 3), torch.kron(hidden @ hidden.t(), torch.eye(3).double()))
    assert_close(ntk(jacobians, trace=True), 3 * hidden @ hidden.t())
    ones = torch.cat([hidden, torch.ones(5, 1)], dim=1)
    assert_close(readout_ntk(hidden, 2, bias=True), readout_ntk(ones, 2))


@given(seed=SEEDS, n=st.integers(4, 12), d=st.integers(1, 15), other=st.integers(1, 15))
def test_centring_and_alignment_are_those_of_features(seed, n, d, other):
    first, second = draw(seed, n, d) + 3, draw(seed + 1, n, other)
    centre = np.eye(n) - 1 / n
    kernel, beside = readout_ntk(first), readout_ntk(second)
    assert_close(centred_kernel(kernel).numpy(), centre @ kernel.numpy() @ centre, rtol=1e-7, atol=1e-9)
    assert_close(centred_kernel(kernel), kernel_pair(first)[0], rtol=1e-7, atol=1e-9)
    assert kernel_alignment(kernel, beside, centred=True) == pytest.approx(linear_cka(first, second), abs=1e-9)
    a, b = kernel.numpy().ravel(), beside.numpy().ravel()
    assert kernel_alignment(kernel, beside) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert kernel_distance(kernel, beside) == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a))


def unbiased_hsic(kernel: np.ndarray, other: np.ndarray) -> float:
    """Song et al. (2012), equation 5."""
    n = len(kernel)
    k, m = (each - np.diag(np.diag(each)) for each in (kernel, other))
    one = np.ones(n)
    total = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


@given(seed=SEEDS, n=st.integers(5, 12), d=st.integers(2, 30))
def test_unbiased_cka_is_that_of_songs_estimator(seed, n, d):
    kernel, other = readout_ntk(draw(seed, n, d)), readout_ntk(draw(seed + 1, n, d) + 1)
    parts = [
        unbiased_hsic(*pair) for pair in ((a.numpy(), b.numpy()) for a in (kernel, other) for b in (kernel, other))
    ]
    assert unbiased_cka(kernel, other) == pytest.approx(parts[1] / np.sqrt(parts[0] * parts[3]), rel=1e-6, abs=1e-9)


def test_cka_is_high_for_unrelated_wide_features_and_unbiased_cka_is_not():
    pairs = [(readout_ntk(draw(seed, 16, 400)), readout_ntk(draw(seed + 50, 16, 400))) for seed in range(20)]
    assert min(kernel_alignment(*pair, centred=True) for pair in pairs) > 0.9
    assert abs(np.mean([unbiased_cka(*pair) for pair in pairs])) < 0.1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ntk([]), DataError, "Jacobians of one shape .* got none"),
        (lambda: ntk([torch.ones(2, 3), torch.ones(2, 4)]), DataError, r"got \(2, 3\), \(2, 4\)"),
        (lambda: ntk([torch.full((1, 2), torch.nan)]), NumericalError, "NaN or infinite values in the Jacobians"),
        (lambda: readout_ntk(torch.ones(3)), DataError, r"features \(3,\) and outputs=1"),
        (lambda: readout_ntk(torch.full((2, 2), torch.inf)), NumericalError, "NaN or infinite features"),
        (lambda: centred_kernel(torch.ones(2, 3)), DataError, r"a square kernel, got \(2, 3\)"),
        (lambda: kernel_distance(torch.eye(2), torch.eye(3)), DataError, r"\(2, 2\) and \(3, 3\) differ"),
        (lambda: kernel_distance(torch.zeros(2, 2), torch.eye(2)), NumericalError, "reference kernel is zero"),
        (lambda: kernel_distance(torch.eye(2), torch.full((2, 2), torch.nan)), NumericalError, "NaN"),
        (lambda: kernel_alignment(torch.eye(3), 7 * torch.ones(3, 3), True), NumericalError, "is zero, so it has no"),
        (lambda: unbiased_cka(torch.eye(3), torch.eye(3)), DataError, "3 examples; expected at least 4"),
        (lambda: unbiased_cka(torch.eye(5), torch.ones(5, 5)), NumericalError, "constant off its diagonal"),
    ],
)
def test_bad_kernels_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# -- labels -----------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, n=st.integers(6, 20), d=st.integers(2, 10), classes=st.integers(2, 4))
def test_label_share_and_energy_are_those_of_a_regression_on_the_labels(seed, n, d, classes):
    features, labels = draw(seed, n, d) + 2, torch.arange(n) % classes
    for targets, given_labels in ((np.eye(classes)[labels], labels), (draw(seed, n, 1).numpy(), draw(seed, n))):
        fitted = LinearRegression().fit(targets, features.numpy()).predict(targets)
        centred = features.numpy() - features.numpy().mean(0)
        explained = fitted - fitted.mean(0)
        assert label_share(features, given_labels) == pytest.approx((explained**2).sum() / (centred**2).sum())
        count = min(n - 1, d)
        scores = explained @ PCA(n_components=count).fit(features.numpy()).components_.T
        oracle = (scores**2).sum(0).cumsum() / (explained**2).sum()
        assert_close(label_energy(features, given_labels).numpy(), oracle, rtol=1e-6, atol=1e-8)


def test_meaningless_labels_explain_their_number_and_no_more():
    features = draw(0, 200, 20)
    shares = []
    for seed in range(30):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        shares.append(label_share(features, (torch.arange(200) % 5)[order]))
    assert np.mean(shares) == pytest.approx(4 / 199, rel=0.1)


def test_the_task_can_lie_where_the_variance_does_not():
    """One large direction of noise and a small one of the labels: k_task(0.9) is 1 and misses the task."""
    labels = torch.arange(60) % 2
    features = torch.stack([20 * draw(0, 60), 2.0 * labels + 0.1 * draw(1, 60)], dim=1)
    assert components_for(features, 0.9) == 1
    assert label_energy(features, labels)[0] < label_share(features, labels) + 0.5
    assert separating_dimension(features, labels) == 2


def test_targets_of_a_regression_have_rank_one():
    features, targets = draw(0, 12, 5), draw(1, 12)
    assert task_rank(features, targets) == 1
    assert task_rank(features, (targets > 0).long()) == 2
    assert label_share(features, torch.full((12,), 0.1)) == 0.0
    assert label_share(features, torch.zeros(12, dtype=torch.long)) == 0.0
    with pytest.raises(DataError, match="labels explain nothing of the features; are they all the same"):
        label_energy(features, torch.zeros(12, dtype=torch.long))
    with pytest.raises(DataError, match=r"12 examples and labels of shape \(3,\)"):
        label_share(features, torch.zeros(3))
    with pytest.raises(NumericalError, match="NaN or infinite labels"):
        label_share(features, torch.full((12,), torch.nan))


def test_both_kernels_of_the_lemma():
    features = draw(3, 6, 4)
    centred = features - features.mean(0)
    kernel, rebuilt = kernel_pair(features)
    assert_close(kernel, centred @ centred.t())
    assert_close(rebuilt, kernel)


# -- the study --------------------------------------------------------------------------------------------------------


def settings_for(model: str, data: str, **changes: object) -> Settings:
    settings = Settings(samples=24, kernel_samples=5, separating_samples=16, batch_size=8, device="cpu")
    settings.model.path, settings.data.path = model, data
    return replace(settings, **changes)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("energy")
    return save_bert(folder / "model"), save_reviews(folder / "data")


def test_every_number_is_the_analysis_of_the_features(bert):
    from slicefine.analysis.collect import features
    from slicefine.studies.common import open_model

    settings = settings_for(*bert)
    result = study(settings)
    opened = open_model(settings)
    names = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    hidden = features(opened.model, opened.batches, names)
    assert [own["name"] for own in result.numbers["blocks"]] == names
    for own in result.numbers["blocks"]:
        rows = hidden[own["name"]]
        assert_close(torch.tensor(own["curve"], dtype=torch.float64), explained_variance(rows))
        assert own["k_task"] == {str(tau): components_for(rows, tau) for tau in (0.5, 0.8, 0.9, 0.95)}
        assert own["null_k_task"]["0.9"] > own["k_task"]["0.9"]
        assert own["task_rank"] == own["permuted_task_rank"] == 2
        assert own["label_share"] > 3 * own["permuted_label_share"]
        assert own["separating_dimension"] == separating_dimension(rows[:16], opened.labels[:16])
        assert max(own["kernel_check"].values()) < 1e-9
        assert own["kernel_check"]["kernel_difference"] == kernel_check(rows).kernel_difference
    kernels = result.numbers["kernels"]
    assert kernels["readout"] == "classifier"
    assert kernels["readout_difference"] < 1e-6
    assert kernels["centred_difference"] > 0.1
    found = {(item["name"], item["features"]): item for item in kernels["alignments"]}
    assert found["readout", "classifier"]["unbiased"] == pytest.approx(1.0)
    slices = [item for (name, module), item in found.items() if name != "readout" and module == "classifier"]
    assert len(slices) == 4
    assert all(item["unbiased"] < 0.9999 for item in slices)
    beside = found["readout", names[1]]
    said = (
        f"readout: unbiased CKA {beside['unbiased']:.3f} with features of {names[1]}; random ones {beside['null']:.3f}."
    )
    assert said in result.notes
    assert study(settings).numbers == result.numbers  # the seed decides


def test_the_command_writes_numbers_and_pictures_and_compares_them(bert, tmp_path: Path, capsys):
    model, data = bert
    words = ["analyze", "energy", "--model.path", model, "--data.path", data, "--samples", "12", "--tau", "[0.5, 0.9]"]
    words += ["--kernel_samples", "0", "--separating_samples", "0", "--device", "cpu"]
    for name in ("one", "two"):
        assert main([*words, "--output", str(tmp_path / name)]) == 0
    printed = capsys.readouterr().out
    assert "task energy of" in printed
    assert "at most n - 1 = 11" in printed
    numbers = json.loads((tmp_path / "one" / "energy.json").read_text())["numbers"]
    assert numbers["kernels"] is None
    assert "separating_dimension" not in numbers["blocks"][0]
    assert {path.name for path in (tmp_path / "one").glob("*.png")} == {"energy_curves.png", "energy_kernels.png"}
    files = [str(tmp_path / name / "energy.json") for name in ("one", "two")]
    assert main(["analyze", "energy", "--compare", json.dumps(files), "--output", str(tmp_path / "both")]) == 0
    assert "k_task(0.9)" in capsys.readouterr().out
    assert (tmp_path / "both" / "energy_compared.png").is_file()
    compared = compare_curves(files)
    assert len(compared.numbers) == 2
    assert compared.charts[0].panels[0].lines[1].y == numbers["blocks"][-1]["curve"]


def test_language_models_have_no_label_per_example(tmp_path: Path):
    model = save_llama(tmp_path / "model")
    write_rows(
        tmp_path / "data" / "train.jsonl", [{"text": "the film was very good one " * (i + 3)} for i in range(24)]
    )
    settings = settings_for(model, str(tmp_path / "data"))
    settings.task.name = "causal-lm"
    result = study(settings)
    assert all("task_rank" not in own and own["k_task"] for own in result.numbers["blocks"])
    assert result.numbers["kernels"] is None
    assert any("Labels are tokens here" in note for note in result.notes)
    assert result.rows[0][3:] == ["-"] * 5


@pytest.mark.parametrize(
    ("label", "task", "note"),
    [
        (lambda i: float(i % 7), "text-regression", "A regression has one target: rank"),
        (lambda i: 0 if i < 40 else 1, "text-classification", "All labels are the same"),
    ],
)
def test_regressions_and_constant_labels(tmp_path: Path, label, task, note):
    data = tmp_path / "data"
    rows = [{"text": f"film {'very ' * (i % 4)} good {'one ' * (i % 3)}", "label": label(i)} for i in range(41)]
    write_rows(data / "train.jsonl", rows)
    write_rows(data / "validation.jsonl", rows[:20])
    settings = settings_for(save_bert(tmp_path / "model"), str(data), kernel_samples=0, split="validation")
    settings.task.name = task
    result = study(settings)
    assert any(note in said for said in result.notes)
    own = result.numbers["blocks"][0]
    assert "separating_dimension" not in own
    assert own.get("task_rank") == (1 if task == "text-regression" else None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau": []}, "tau=[]: expected at least one number"),
        ({"tau": [1.5]}, "each in (0, 1]"),
        ({"pool": "tokens"}, "pool='tokens': expected one of mean, first, last"),
        ({"kernel_samples": 3}, "kernel_samples=3 must be at least 4; 0 leaves it out"),
        ({"r": 0}, "r=0 must be at least 1"),
        ({"split": "test"}, "expected train or validation"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Settings(**changes)


def test_unknown_blocks_and_other_files_are_refused(bert, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"blocks=\[2\]: the model has blocks 0 to 1"):
        study(settings_for(*bert, blocks=[2]))
    (tmp_path / "other.json").write_text('{"numbers": {"blocks": []}}')
    with pytest.raises(DataError, match=r"is no result of `slicefine analyze energy` \(IndexError"):
        compare_curves([str(tmp_path / "other.json")])


@pytest.mark.skipif(not (SHARED / "data" / "glue" / "mrpc").is_dir(), reason="real data is not here")
def test_real_features_hold_their_variance_in_fewer_components_than_random_ones():
    settings = Settings(samples=64, kernel_samples=4, separating_samples=24, blocks=[5], device="cpu")
    settings.data.path = str(SHARED / "data" / "glue" / "mrpc")
    settings.data.columns.text, settings.data.columns.text_pair = "sentence1", "sentence2"
    result = study(settings)
    (own,) = result.numbers["blocks"]
    assert own["k_task"]["0.9"] < own["null_k_task"]["0.9"] < 64
    assert own["task_rank"] == 2
    assert result.numbers["kernels"]["readout_difference"] < 1e-6


# -- ranks ------------------------------------------------------------------------------------------------------------


def session_for(bert, **changes):
    return build(recipe(*bert, None, method__name="full", **changes))


def reach(session, layers, side, axis):
    """Inputs or outputs of layers, mean over positions that are no padding, by hooks of our own."""
    from slicefine.training.methods import train_batches

    found = {name: [] for name in layers}
    masks = []

    def watch(name):
        def hook(_module, args, result):
            value = args[0] if side == "input" else result
            if value.dim() == 3:
                value = torch.stack([row[keep.bool()].mean(0) for row, keep in zip(value, masks[-1], strict=True)])
            found[name].append(value)

        return hook

    model = session.loaded.model.eval()
    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in layers]
    with torch.no_grad():
        for batch in train_batches(session.loaded, session.settings, session.prepared, 4):
            masks.append(batch["attention_mask"])
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize(("mode", "side"), [("row", "output"), ("column", "input")])
def test_ranks_are_those_of_the_side_that_a_slice_works_on(bert, mode, side):
    session = session_for(bert, slice__mode=mode)
    before = {name: value.clone() for name, value in session.loaded.model.state_dict().items()}
    found = plan_ranks(session, 0.9, per_layer=True, examples=32)
    layers = [layer.name for layer in found.layers]
    assert len(layers) == 13  # six per block and the pooler; the new head is not sliced
    assert "classifier" not in layers
    hidden = reach(session, layers, side, mode)
    assert [layer.k_task for layer in found.layers] == [components_for(hidden[name], 0.9) for name in layers]
    shapes = [session.loaded.model.get_submodule(name).weight.shape for name in layers]
    assert [layer.lines for layer in found.layers] == [shape[mode == "column"] for shape in shapes]
    assert found.ranks == {mode: int(np.ceil(np.median([layer.r for layer in found.layers])))}
    assert found.rank_pattern == {layer.name: layer.r for layer in found.layers}
    assert all(layer.task_rank == 2 and layer.k_task <= 31 for layer in found.layers)
    after = session.loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert movers_of(session.loaded.model) == []


def test_alternating_slices_have_two_ranks_and_layers_the_larger(bert):
    found = plan_ranks(session_for(bert), 0.95, per_layer=True, examples=40)
    rows, columns = ({i.name: i for i in found.layers if i.axis == axis} for axis in ("row", "column"))
    assert found.settings.keys() == {"r_row", "r_column", "rank_pattern"}
    for name, r in found.rank_pattern.items():
        assert r == min(max(rows[name].k_task, columns[name].k_task), rows[name].lines, columns[name].lines)
    assert found.examples == 40
    assert found.ranks["row"] == int(np.ceil(np.median([layer.r for layer in rows.values()])))


def test_a_rank_for_rows_and_columns_fits_the_shorter_side(tmp_path: Path):
    words = ["good", "fine", "great", "nice", "bad", "poor", "awful", "weak"]
    texts = [" ".join(words[(i * j + i // 8) % 8] for j in range(1, 7)) for i in range(64)]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "validation.jsonl", rows[:8])
    bert = save_bert(tmp_path / "model"), str(tmp_path / "data")
    found = plan_ranks(session_for(bert), 1.0, per_layer=True, examples=64)
    wide = [i for i in found.layers if i.name.endswith("output.dense") and i.axis == "column" and i.lines == 64]
    assert len(wide) == 2
    assert all(layer.k_task > 32 for layer in wide)  # 64 columns, 32 rows
    assert all(found.rank_pattern[layer.name] == 32 for layer in wide)


def test_the_command_suggests_ranks_that_a_recipe_takes(bert, tmp_path: Path, capsys):
    model, data = bert
    words = ["plan", "--rank", "auto", "--model.path", model, "--data.path", data, "--calibration", "24"]
    file = tmp_path / "sub" / "ranks.json"
    assert main([*words, "--tau", "0.8", "--slice.mode", "column", "--rank_file", str(file)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert f"suggests --slice.r {content['slice']['r']}" in printed
    assert "k_task(tau) knows nothing of the labels; see docs/findings.md" in " ".join(printed.split())
    assert "at most n - 1 = 23" in printed
    assert main([*words, "--slice.mode", "row", "--per_layer", "true", "--rank_file", str(file)]) == 0
    assert "--slice.rank_pattern '{" in capsys.readouterr().out
    pattern = json.loads(file.read_text())["slice"]["rank_pattern"]
    assert list(map(len, pattern)) == sorted(map(len, pattern), reverse=True)
    settings = recipe(model, data, None, slice__mode="row", slice__rank_pattern=pattern, slice__r=1)
    (mover,) = movers_of(build(settings).model)
    ranks = {name: layer.slicefine_active[mover.name].shape[0] for name, layer in mover.layers.items()}
    assert ranks == pattern


def test_language_models_get_ranks_without_label_numbers(tmp_path: Path):
    model = save_llama(tmp_path / "model")
    write_rows(
        tmp_path / "data" / "train.jsonl", [{"text": "the film was very good one " * (i + 3)} for i in range(24)]
    )
    session = build(recipe(model, str(tmp_path / "data"), None, task__name="causal-lm", method__name="full"))
    found = plan_ranks(session, examples=6)
    assert all(layer.task_rank is None and layer.label_components is None for layer in found.layers)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "5"], "rank='5': expected auto; name ranks of your own with --ranks"),
        (["--rank", "auto", "--tau", "0"], "tau=0.0 must lie in (0, 1]"),
        (["--rank", "auto", "--calibration", "1"], "calibration=1 must be at least 2 rows"),
        (["--rank", "auto", "--slice.mode", "random_mask"], "has no rows or columns whose features could be looked at"),
    ],
)
def test_bad_rank_settings_are_refused(words, message, capsys):
    assert main(["plan", *words]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
