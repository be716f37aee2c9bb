"""`analyze spectra`: reading matrices one by one, nulls, and counts, against NumPy on the model's own weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.testing import assert_close

from cli_helpers import SHARED, save_bert, save_llama
from slicefine.analysis.spectra import null_weight, spectral_balance
from slicefine.cli.main import main
from slicefine.errors import AdapterFileError, ConfigError, NumericalError
from slicefine.files.checkpoint import Checkpoint, kind_of
from slicefine.studies.spectra import STATISTICS, Settings, study

SEEDS = st.integers(0, 2**16)


def save(folder: Path, tensors: dict[str, torch.Tensor], model_type: str | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return str(folder)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(weight: np.ndarray, groups: int, axis: str) -> dict[str, float]:
    """The statistics from singular values of the groups."""
    parts = np.array_split(weight if axis == "row" else weight.T, groups)
    spectra = [np.linalg.svd(part.astype(np.float64), compute_uv=False) ** 2 for part in parts]
    count = min(map(len, spectra))
    values = np.stack([spectrum[:count] for spectrum in spectra])
    means = [spectrum.mean() for spectrum in spectra]
    return {
        "energy_ratio": max(means) / min(means),
        "decay_difference": max(abs(a - b).max() for a, b in (((v - w) / w, 0) for v in values for w in values)),
        "variance": values.var(0).mean(),
        "relative_variance": (values / values.mean()).var(0).mean(),
    }


# -- nulls ------------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, rows=st.integers(2, 9), columns=st.integers(2, 9))
def test_shuffled_lines_keep_every_line(seed, rows, columns):
    weight = draw(seed, rows, columns).double()
    null = null_weight(weight, "shuffled_lines", seed)
    for ours, theirs in ((null, weight), (null.t(), weight.t())):
        assert_close(
            sorted(line.sort().values.tolist() for line in ours), sorted(x.sort().values.tolist() for x in theirs)
        )
    assert_close(torch.linalg.svdvals(null), torch.linalg.svdvals(weight))


def test_shuffled_lines_tell_whether_neighbours_belong_together():
    """Rows in strong and weak neighbourhoods: balanced once they are mixed; shuffled entries lose the lines' scales."""
    weight = draw(0, 64, 32) * torch.tensor([1.0, 4.0]).repeat_interleave(32)[:, None]
    for axis, own in (("row", weight), ("column", weight.t())):
        ratios = [spectral_balance(w, 8, axis).energy_ratio for w in (own, null_weight(own, "shuffled_lines"))]
        assert ratios[0] > 12 > 6 > ratios[1]
    mixed = null_weight(weight, "shuffled_lines", seed=3)
    assert spectral_balance(mixed, 8).energy_ratio > spectral_balance(null_weight(weight, "shuffled"), 8).energy_ratio
    with pytest.raises(ConfigError, match="expected a matrix, got a tensor of shape"):
        null_weight(torch.ones(3), "shuffled_lines")


# -- which tensors ----------------------------------------------------------------------------------------------------


def test_layers_are_matrices_in_order_without_tables(tmp_path: Path):
    tensors = {
        **{f"h.{i}.mlp.up.weight": draw(i, 6, 4) for i in (10, 2)},
        "h.2.mlp.up.bias": draw(1, 6),
        "h.2.norm.weight": draw(1, 4),
        "h.2.conv.weight": draw(1, 4, 4, 2),
        "h.2.packed.weight": torch.ones(4, 4, dtype=torch.int8),
        **{f"{name}.weight": draw(1, 9, 4) for name in ("wte", "wpe", "shared", "lm_head", "embed_tokens")},
        "h.2.attention.relative_attention_bias.weight": draw(1, 8, 2),
        "embeddings.token_type_embeddings.weight": draw(1, 2, 4),
        "pooler.dense.weight": draw(2, 4, 4),
    }
    with Checkpoint(Path(save(tmp_path, tensors))) as base:
        layers, excluded = base.linear_layers()
        assert layers == ["h.2.mlp.up", "h.10.mlp.up", "pooler.dense"]
        assert len(excluded) == 7
        assert torch.equal(base.matrix("h.10.mlp.up"), tensors["h.10.mlp.up.weight"])
        with pytest.raises(AdapterFileError, match=r"there is no tensor 'h.3.mlp.up.weight'; it has"):
            base.matrix("h.3.mlp.up")
    assert [kind_of(name) for name in layers] == ["mlp.up", "mlp.up", "pooler.dense"]


def test_conv1d_weights_are_turned(tmp_path: Path):
    weight = draw(0, 4, 12)
    for model_type, shape in (("gpt2", (12, 4)), ("gpt_bigcode", (4, 12))):
        folder = Path(save(tmp_path / model_type, {"h.0.attn.c_attn.weight": weight}, model_type))
        with Checkpoint(folder) as base:
            assert base.matrix("h.0.attn.c_attn").shape == shape
    (folder / "config.json").write_text("[")
    with Checkpoint(folder) as base, pytest.raises(AdapterFileError, match=r"config.json: not readable as JSON"):
        base.matrix("h.0.attn.c_attn")


def test_an_index_that_names_too_much_is_refused(tmp_path: Path):
    save_file({"a.weight": draw(0, 4, 4)}, tmp_path / "part.safetensors")
    weights = {"weight_map": {"a.weight": "part.safetensors", "b.weight": "part.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(weights))
    with Checkpoint(tmp_path) as base, pytest.raises(AdapterFileError, match=r"tensor 'b.weight' cannot be read"):
        base.linear_layers()


# -- the study --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_layer_is_numpys(tmp_path: Path, dtype):
    weights = {f"layer.{i}.{kind}.weight": draw(i, 16, 12).to(dtype) for i in range(2) for kind in ("key", "up")}
    result = study(Settings(save(tmp_path, weights), groups=3))
    assert [layer["kind"] for layer in result.numbers["layers"]] == ["key", "up"] * 2
    for layer in result.numbers["layers"]:
        for axis in ("row", "column"):
            expected = oracle(weights[f"{layer['name']}.weight"].float().numpy(), 3, axis)
            assert layer["balance"][axis]["trained"] == pytest.approx(expected, rel=1e-6)
            assert layer["balance"][axis].keys() == {"trained", "gaussian", "shuffled", "shuffled_lines"}
    assert len(result.rows) == 4  # two kinds, rows and columns
    trained = [layer["balance"]["row"]["trained"]["energy_ratio"] for layer in result.numbers["layers"][::2]]
    assert result.rows[0][2].splitlines()[0] == f"{np.median(trained):.3g} ({max(trained):.3g})"
    assert result.columns[2:] == [name.replace("_", " ") for name in STATISTICS]


def test_a_layers_null_does_not_depend_on_the_others(tmp_path: Path):
    model = save(tmp_path, {f"layer.{i}.up.weight": draw(0, 16, 12) for i in range(6)})
    whole = {layer["name"]: layer for layer in study(Settings(model, groups=4)).numbers["layers"]}
    some = study(Settings(model, groups=4, limit=2)).numbers["layers"]
    assert [layer["name"] for layer in some] == ["layer.1.up", "layer.4.up"]
    assert all(layer == whole[layer["name"]] for layer in some)
    assert len({layer["balance"]["row"]["gaussian"]["variance"] for layer in whole.values()}) == 6  # one draw each
    (one,) = study(Settings(model, groups=4, target_modules=r"layer\.3\..*")).numbers["layers"]
    assert one == whole["layer.3.up"]
    (other,) = study(Settings(model, groups=4, target_modules=r"layer\.3\..*", seed=1)).numbers["layers"]
    assert other["balance"]["row"]["trained"] == one["balance"]["row"]["trained"]
    assert other["balance"]["row"]["gaussian"] != one["balance"]["row"]["gaussian"]


def test_the_verdict_counts(tmp_path: Path):
    block = draw(0, 4, 32)
    weights = {"a.0.up.weight": torch.cat([block, block]), "a.1.up.weight": torch.cat([block, 2 * block])}
    verdict = study(Settings(save(tmp_path, weights), groups=2, nulls=[])).numbers["verdict"]
    assert verdict.keys() == {"trained"}
    column = [oracle(w.numpy(), 2, "column") for w in weights.values()]
    assert verdict["trained"]["cases"] == 4
    ratios = [1.0, 4.0, *(found["energy_ratio"] for found in column)]
    assert verdict["trained"]["energy_ratio_below_1.1"] == sum(ratio < 1.1 for ratio in ratios)
    assert verdict["trained"]["energy_ratio_median"] == pytest.approx(np.median(ratios), rel=1e-6)
    assert verdict["trained"]["decay_difference_below_0.1"] == 1 + sum(c["decay_difference"] < 0.1 for c in column)


def test_small_and_empty_matrices_are_said(tmp_path: Path):
    weights = {
        "a.0.up.weight": draw(0, 16, 16),
        "a.0.thin.weight": draw(1, 3, 16),
        "score.weight": draw(2, 1, 16),
        "a.0.zero.weight": torch.cat([draw(3, 8, 16), torch.zeros(8, 16)]),
    }
    result = study(Settings(save(tmp_path, weights), groups=8))
    said = " ".join(result.notes)
    assert "a.0.thin has 3 rows: 3 groups" in said
    assert "score has 1 row: left out" in said
    assert "a.0.zero has a group of zero rows (or its null has): left out" in said
    found = {layer["name"]: set(layer["balance"]) for layer in result.numbers["layers"]}
    assert found["score"] == {"column"}
    assert found["a.0.zero"] == {"column"}


def test_drawn_spectra_are_the_groups_and_a_null(tmp_path: Path):
    weight = draw(0, 16, 12)
    result = study(Settings(save(tmp_path, {"a.0.up.weight": weight, "a.1.up.weight": draw(1, 16, 12)}), groups=2))
    (spectra, balance) = result.charts
    assert [panel.title for panel in spectra.panels] == ["a.1.up: rows", "a.1.up: columns"]
    (chosen, _) = study(Settings(str(tmp_path), groups=2, layers=["a.0.up"])).charts
    null, *groups = chosen.panels[0].lines
    assert null.label == "gaussian, mean of groups"
    assert_close([list(line.y) for line in groups], spectral_balance(weight, 2).eigenvalues.tolist())
    assert len(balance.panels) == 4
    assert [line.label for line in balance.panels[0].lines] == ["trained", "gaussian", "shuffled", "shuffled_lines"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value):
    weight = draw(0, 8, 8)
    weight[1, 2] = value
    with pytest.raises(NumericalError, match=r"tensor 'a.1.up.weight' has 1 NaN or infinite values"):
        study(Settings(save(tmp_path, {"a.0.up.weight": draw(0, 8, 8), "a.1.up.weight": weight})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 1}, "groups=1 must be at least 2"),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"nulls": ["odd"]}, "nulls: 'odd' is unknown; expected some of gaussian, shuffled, shuffled_lines"),
        ({"target_modules": ["query"]}, "target_modules=['query'] matches none of the linear layers"),
        ({"layers": ["query"]}, "layers=['query'] names none of the layers looked at: a.0.up"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, changes, message):
    model = save(tmp_path, {"a.0.up.weight": draw(0, 8, 8)})
    with pytest.raises(ConfigError, match=re.escape(message)):
        study(Settings(model, **changes))
    with pytest.raises(ConfigError, match="none of the chosen layers has two groups with values"):
        study(Settings(save(tmp_path / "zero", {"a.weight": torch.zeros(8, 8)})))


def test_threads_come_back(tmp_path: Path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        study(Settings(save(tmp_path, {"a.0.up.weight": draw(0, 8, 8)}), groups=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("make", "kinds"), [(save_bert, 7), (save_llama, 7)])
def test_the_command_reads_a_models_folder(tmp_path: Path, capsys, make, kinds):
    model = make(tmp_path / "model")
    words = ["analyze", "spectra", "--model", model, "--groups", "4", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "spectral balance of" in printed
    assert "gaussian: energy ratio below 1.1" in printed
    numbers = json.loads((tmp_path / "out" / "spectra.json").read_text())["numbers"]
    assert len({layer["kind"] for layer in numbers["layers"]}) == kinds
    assert all("embed" in name or name == "lm_head" for name in numbers["excluded"])
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"spectra_groups.png", "spectra_balance.png"}
    assert main(["analyze", "spectra", "--model", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(not (SHARED / "models" / "stories260k").is_dir(), reason="real weights are not here")
def test_trained_weights_are_less_balanced_than_random_ones():
    verdict = study(Settings(str(SHARED / "models" / "stories260k"))).numbers["verdict"]
    assert verdict["trained"]["energy_ratio_median"] > verdict["gaussian"]["energy_ratio_median"]
