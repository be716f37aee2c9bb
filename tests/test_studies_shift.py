"""`slicefine analyze shift`: measures against independent implementations, runs against direct comparisons."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import entropy
from sklearn.metrics.pairwise import linear_kernel
from sklearn.preprocessing import KernelCenterer
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification

from cli_helpers import recipe, save_bert, save_llama, save_reviews, write_rows
from slicefine.analysis.collect import features
from slicefine.analysis.shift import debiased_cka, linear_cka, relative_change
from slicefine.cli.main import main
from slicefine.errors import AdapterFileError, ConfigError, DataError, NumericalError
from slicefine.studies.pairs import open_pair, pair_names, run_folders
from slicefine.studies.shift import Settings, _debiased, measure_shift, study
from slicefine.training.run import train
from slicefine.training.trained import load_trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by PEFT
]

SEEDS = st.integers(0, 2**16)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- measures ---------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, n=st.integers(4, 12), d=st.integers(1, 6), other=st.integers(1, 20))
def test_cka_is_that_of_scikit_learns_centred_kernels(seed, n, d, other):
    ours, theirs = draw(seed, n, d), draw(seed + 1, n, other)
    k, m = (KernelCenterer().fit_transform(linear_kernel(each.numpy())) for each in (ours, theirs))
    assert linear_cka(ours, theirs) == pytest.approx((k * m).sum() / np.linalg.norm(k) / np.linalg.norm(m), rel=1e-8)


@given(seed=SEEDS, n=st.integers(5, 12), d=st.integers(2, 6), other=st.integers(2, 20))
def test_debiased_cka_is_that_of_pytorch_cka(seed, n, d, other):
    from cka import hsic

    ours, theirs = draw(seed, n, d), draw(seed + 1, n, other)
    cross, own, others = (float(each.squeeze()) for each in hsic((ours @ ours.T)[None], (theirs @ theirs.T)[None]))
    if own > 1e-6 and others > 1e-6:
        assert debiased_cka(ours, theirs) == pytest.approx(cross / math.sqrt(own * others), rel=1e-7, abs=1e-9)
    rotation = torch.linalg.qr(draw(seed + 2, d, d))[0]
    if own > 1e-6:
        assert debiased_cka(ours, 3 * ours @ rotation + 1) == pytest.approx(1.0)


def test_unrelated_wide_features_are_alike_for_cka_and_not_for_the_debiased_one():
    ours, theirs = draw(0, 20, 400), draw(1, 20, 400)
    assert linear_cka(ours, theirs) > 0.9
    assert abs(debiased_cka(ours, theirs)) < 0.1


def test_relative_change_is_numpys_and_has_an_answer_for_zeros():
    before, after = draw(0, 5, 4), draw(1, 5, 4)
    expected = np.linalg.norm(after.numpy() - before.numpy()) / np.linalg.norm(before.numpy())
    assert relative_change(after, before) == pytest.approx(expected)
    assert relative_change(after.bfloat16(), after.bfloat16()) == 0
    assert (relative_change(after, 0 * after), relative_change(0 * after, 0 * after)) == (math.inf, 0.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: debiased_cka(draw(0, 3, 2), draw(1, 3, 2)), DataError, "got 3 examples; .* needs at least 4"),
        (lambda: debiased_cka(draw(0, 5, 2), draw(1, 6, 2)), DataError, "features of the same examples"),
        (lambda: debiased_cka(torch.ones(5, 2), draw(1, 5, 2)), NumericalError, "the same features"),
        (lambda: debiased_cka(torch.full((5, 2), torch.inf), draw(1, 5, 2)), NumericalError, "NaN or infinite"),
        (lambda: debiased_cka(torch.eye(6), torch.eye(6)), NumericalError, "constant off its diagonal"),
        (lambda: relative_change(draw(0, 5, 4), draw(0, 4, 5)), DataError, r"\(5, 4\) and a base \(4, 5\)"),
        (lambda: relative_change(torch.full((1, 2), torch.nan), torch.ones(1, 2)), NumericalError, "NaN or infinite"),
    ],
)
def test_bad_measurements_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A warm-started model, and runs from it and from the plain one."""
    folder = tmp_path_factory.mktemp("runs")
    bert, data = save_bert(folder / "bert"), save_reviews(folder / "reviews")
    wanted = {
        "warm": (bert, {"method__name": "full"}),
        "slices": (bert, {}),
        "lora": (bert, {"method__name": "lora"}),
    }
    found = {"bert": bert, "data": data}
    for name, (model, changes) in wanted.items():
        train(recipe(model, data, folder / name, training__learning_rate=1e-2, training__epochs=1, **changes))
        found[name] = str(folder / name)
    again = recipe(found["warm"] + "/adapter", data, folder / "again", training__learning_rate=1e-2)
    train(again)
    return found | {"again": str(folder / "again")}


def settings(runs: dict[str, str], name: str, **changes) -> Settings:
    return replace(Settings(runs[name], samples=16, ntk_rows=4), **changes)


@pytest.mark.parametrize("name", ["slices", "lora", "again"])
def test_the_base_is_the_adapter_switched_off(runs: dict[str, str], name: str):
    """The two plain models give bit for bit what PEFT's own switch gives in one wrapped model."""
    pair = open_pair(name, runs[name], settings(runs, name))
    model = load_trained(Path(runs[name])).model
    own = {block: f"base_model.model.{block}" for block in pair.blocks}
    with model.disable_adapter():
        off = features(model, pair.batches, list(own.values()))
    base, tuned = (features(each, pair.batches, pair.blocks) for each in (pair.base, pair.tuned))
    on = features(model, pair.batches, list(own.values()))
    for block, wrapped in own.items():
        assert torch.equal(base[block], off[wrapped])
        if name != "lora":  # a merged LoRA adds in another order
            assert torch.equal(tuned[block], on[wrapped])
        assert_close(tuned[block], on[wrapped])
        assert not torch.equal(base[block], tuned[block])


@torch.no_grad()
def test_predictions_and_scores_are_those_of_the_models(runs: dict[str, str]):
    chosen = settings(runs, "again")
    pair = open_pair("again", runs["again"], chosen)
    found = measure_shift(pair, chosen)
    model = load_trained(Path(runs["again"])).model
    p = np.concatenate([torch.softmax(model(**batch).logits, 1).numpy() for batch in pair.batches])
    with model.disable_adapter():  # the warm-started head is in the wrapped model, too
        q = np.concatenate([torch.softmax(model(**batch).logits, 1).numpy() for batch in pair.batches])
    labels = torch.cat(pair.labels).numpy()
    assert found.own_head
    assert found.divergence == pytest.approx(entropy(p, q, axis=1).mean(), rel=1e-4)
    assert found.divergence > 0
    assert (found.metric, found.score) == ("accuracy", pytest.approx((p.argmax(1) == labels).mean()))
    assert found.base_score == pytest.approx((q.argmax(1) == labels).mean())
    tuned, base = (features(each, pair.batches, pair.blocks) for each in (pair.tuned, pair.base))
    assert found.cka == [linear_cka(tuned[block], base[block]) for block in pair.blocks]
    assert found.debiased == [debiased_cka(tuned[block], base[block]) for block in pair.blocks]
    assert all(low < high for low, high in zip(found.shuffled, found.cka, strict=True))


def test_weights_are_compared_as_the_files_have_them(runs: dict[str, str]):
    chosen = settings(runs, "slices", ntk_rows=0)
    found = measure_shift(open_pair("slices", runs["slices"], chosen), chosen)
    merged = load_trained(Path(runs["slices"])).model.merge_and_unload().state_dict()
    base = load_file(f"{runs['bert']}/model.safetensors")
    assert len(found.layers) == 13  # six in each of two blocks, and the pooler
    for name, change in found.layers.items():
        after, before = (
            each.numpy().astype(np.float64)
            for each in (merged[f"{name}.weight"], base[f"{name.removeprefix('bert.')}.weight"])
        )
        assert change == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-6)
        assert change > 0
    assert {name: len(changes) for name, changes in found.slices.items()} == dict.fromkeys(found.layers, 2)
    assert found.ntk_distance is None


def test_a_new_head_is_said_and_another_base_can_be_named(runs: dict[str, str]):
    chosen = settings(runs, "slices")
    found = measure_shift(open_pair("slices", runs["slices"], chosen), chosen)
    assert not found.own_head
    assert found.base_score is None
    again = measure_shift(open_pair("slices", runs["slices"], chosen), chosen)
    assert found == again  # no random head takes part
    warm = replace(chosen, base=runs["warm"])
    named = measure_shift(open_pair("slices", runs["slices"], warm), warm)
    assert named.own_head
    assert named.base_score is not None
    assert named.divergence != found.divergence
    assert named.slices == found.slices  # of the base that they were trained on
    itself = replace(chosen, base=runs["slices"])
    same = measure_shift(open_pair("slices", runs["slices"], itself), itself)
    assert same.divergence == 0
    assert same.cka == pytest.approx([1.0, 1.0])
    assert set(same.layers.values()) == {0.0}
    assert same.ntk_distance == 0
    assert same.ntk_alignment == pytest.approx(1.0)
    folder = replace(chosen, base=f"{runs['warm']}/adapter")
    assert measure_shift(open_pair("slices", runs["slices"], folder), folder) == named


@pytest.mark.parametrize("classes", [2, 3])
def test_a_checkpoint_with_a_head_for_as_many_classes_is_a_base_for_kl(
    runs: dict[str, str], tmp_path: Path, classes: int
):
    source = Path(runs["warm"]) / "adapter"
    shutil.copytree(source, tmp_path / "base", ignore=shutil.ignore_patterns("slicefine_run.json"))  # a plain folder
    config = BertConfig.from_pretrained(source)
    config.num_labels = classes
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    chosen = settings(runs, "slices", base=str(tmp_path / "base"), ntk_rows=0)
    pair = open_pair("slices", runs["slices"], chosen)
    assert pair.own_head == (classes == 2)
    head = model.state_dict()["classifier.weight"] if classes == 2 else pair.tuned.state_dict()["classifier.weight"]
    assert torch.equal(pair.base.state_dict()["classifier.weight"], head)


def test_a_run_with_other_classes_lends_its_blocks_alone(runs: dict[str, str], tmp_path: Path):
    write_rows(
        tmp_path / "data/train.jsonl", [{"text": f"{'good ' * (1 + i % 3)}film", "label": i % 3} for i in range(9)]
    )
    changes = {"method__name": "head", "training__epochs": 1, "data__validation_fraction": 0.0}
    train(recipe(runs["bert"], str(tmp_path / "data"), tmp_path / "three", **changes))
    pair = open_pair("slices", runs["slices"], settings(runs, "slices", base=str(tmp_path / "three")))
    assert not pair.own_head
    assert torch.equal(pair.base.classifier.weight, pair.tuned.classifier.weight)


def test_the_kernel_is_the_sum_over_classes_and_weights(runs: dict[str, str]):
    chosen = settings(runs, "again", ntk_rows=3)
    pair = open_pair("again", runs["again"], chosen)
    found = measure_shift(pair, chosen)
    middle = pair.blocks[1]
    assert found.ntk_layers[0] == "classifier"
    assert found.ntk_layers[1:] == [name for name in pair.layers if name.startswith(f"{middle}.")]
    kernels = []
    for model in (pair.base, pair.tuned):
        weights = [model.get_submodule(name).weight.requires_grad_(True) for name in found.ntk_layers]
        rows = [{name: value[i : i + 1] for name, value in pair.batches[0].items()} for i in range(3)]
        vectors = []
        for row in rows:
            logits = model(**row).logits[0]
            parts = [torch.autograd.grad(logit, weights, retain_graph=True) for logit in logits]
            vectors.append(torch.cat([part.flatten() for own in parts for part in own]).double())
        kernels.append(torch.stack(vectors) @ torch.stack(vectors).t())
    before, after = (kernel.numpy() for kernel in kernels)
    assert found.ntk_distance == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-4)
    expected = (before * after).sum() / np.linalg.norm(before) / np.linalg.norm(after)
    assert found.ntk_alignment == pytest.approx(expected, rel=1e-5)


def test_the_command_prints_and_writes(runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    adapters = f"{runs['slices']},{runs['lora']}"
    options = ["--samples", "12", "--ntk_rows", "2", "--output", str(tmp_path / "out")]
    assert main(["analyze", "shift", "--adapters", adapters, *options]) == 0
    shown = capsys.readouterr().out
    assert "a new one is random" in shown
    assert "rows shuffled" in shown
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"shift.json"} | {
        f"shift_{n}.{e}" for n in ("cka", "predictions", "weights") for e in ("png", "json")
    }
    found = json.loads((tmp_path / "out/shift.json").read_text())["numbers"]["adapters"]
    assert [each["name"] for each in found] == ["slices", "lora"]
    assert found[1]["slices"] == {}
    assert all(0 < value <= 1 + 1e-9 for each in found for value in each["cka"])
    picture = json.loads((tmp_path / "out/shift_cka.json").read_text())
    assert picture["panels"][2]["matrix"] == [[each["cka"][block] for each in found] for block in range(2)]


def test_a_language_model_is_compared_token_by_token(tmp_path: Path):
    llama = save_llama(tmp_path / "llama")
    write_rows(tmp_path / "data/train.jsonl", [{"text": "the film was very good " * (1 + i % 3)} for i in range(24)])
    changes = {
        "task__name": "causal-lm",
        "task__packing": False,
        "training__learning_rate": 1e-2,
        "slice__minimum_steps": 1,
    }
    train(recipe(llama, str(tmp_path / "data"), tmp_path / "run", data__validation_fraction=0.25, **changes))
    chosen = Settings(str(tmp_path / "run"), samples=6, batch_size=4)
    pair = open_pair("run", chosen.adapters, chosen)
    found = measure_shift(pair, chosen)
    assert (found.score, found.own_head, found.ntk_distance) == (None, True, None)
    values = []
    for batch in pair.batches:
        p, q = (torch.softmax(model(**batch).logits.detach(), -1).numpy() for model in (pair.tuned, pair.base))
        mask = batch["attention_mask"].numpy()
        values += [entropy(p[i, t], q[i, t]) for i in range(len(p)) for t in range(mask[i].sum() - 1)]
    assert found.divergence == pytest.approx(np.mean(values), rel=1e-4)
    assert any("no neural tangent kernel" in note for note in found.notes)


def test_a_regression_has_no_divergence(tmp_path: Path):
    bert = save_bert(tmp_path / "bert")
    write_rows(
        tmp_path / "data/train.jsonl", [{"text": "good film " * (1 + i % 3), "label": i / 24} for i in range(24)]
    )
    data = str(tmp_path / "data")
    changes = {"task__name": "text-regression", "data__validation_fraction": 0.25, "slice__minimum_steps": 1}
    train(recipe(bert, data, tmp_path / "run", **changes))
    result = study(Settings(str(tmp_path / "run"), samples=6, ntk_rows=2))
    assert result.rows[0][4] == "-"
    assert {chart.name for chart in result.charts} == {"shift_cka", "shift_weights"}


def test_few_rows_have_no_debiased_cka(runs: dict[str, str]):
    chosen = settings(runs, "slices", samples=4, ntk_rows=0)
    assert math.isnan(_debiased(torch.eye(6), torch.eye(6)))
    single = replace(chosen, batch_size=1)
    pair = open_pair("slices", runs["slices"], single)
    pair.batches, pair.labels = pair.batches[:3], pair.labels[:3]
    with pytest.raises(DataError, match="slices: 3 rows are too few"):
        measure_shift(pair, single)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_other_bases_and_broken_ones_are_refused(runs: dict[str, str], tmp_path: Path):
    other = Path(save_bert(tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    changed = {key: value * 1.5 if "query.weight" in key else value for key, value in tensors.items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterFileError, match="not the one|base"):
        study(settings(runs, "slices", model=str(other)))
    broken = {
        key: value * torch.nan if "layer.1.output.dense.weight" in key else value for key, value in tensors.items()
    }
    save_file(broken, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="NaN or infinite"):
        study(settings(runs, "slices", base=str(other)))
    llama = save_llama(tmp_path / "llama")
    with pytest.raises(ConfigError, match="layer .* is missing in the base"):
        study(settings(runs, "slices", base=str(llama)))


def test_a_base_that_reads_other_numbers_or_never_was_is_refused(runs: dict[str, str], tmp_path: Path):
    shutil.copytree(Path(runs["warm"]) / "adapter", tmp_path / "warm")
    tokenizer = tmp_path / "warm/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"film"', '"movie"'))
    with pytest.raises(ConfigError, match="its tokenizer is another one"):
        study(settings(runs, "slices", base=str(tmp_path / "warm")))
    file = tmp_path / "warm/slicefine_run.json"
    content = json.loads(file.read_text())
    file.rename(tmp_path / "aside")  # now it is a plain checkpoint
    with pytest.raises(ConfigError, match="its tokenizer is another one"):
        study(settings(runs, "slices", base=str(tmp_path / "warm")))
    content["model"] |= {"config": {"model_type": "bert"}, "tokenizer": runs["bert"]}
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="trained from random weights, so it has no base"):
        study(settings(runs, "warm", adapters=str(tmp_path / "warm")))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"samples": 3}, ConfigError, "samples=3 must be at least 4"),
        ({"ntk_rows": -1}, ConfigError, "ntk_rows=-1 must be at least 0"),
        ({"split": "all"}, ConfigError, "split='all' is unknown"),
        ({"pool": "max"}, ConfigError, "pool='max' is unknown"),
        ({"split": "test"}, ConfigError, "split='test': data.path=.* has train, validation"),
        ({"adapters": " , "}, ConfigError, "adapters=' , ' names no folder"),
        ({"adapters": "/nowhere"}, AdapterFileError, "no slicefine_run.json here"),
        ({"ntk_layers": ["bert.nothing"]}, ConfigError, "there is none of that name"),
        ({"ntk_layers": ["bert.embeddings.LayerNorm"]}, ConfigError, "expected nn.Linear or Conv1D"),
    ],
)
def test_bad_settings_are_refused(runs: dict[str, str], changes, error, message):
    with pytest.raises(error, match=message):
        study(settings(runs, "slices", **changes))


def test_names():
    assert run_folders(["a,b", " c "]) == ["a,b", "c"]
    assert pair_names(["runs/a/adapter", "runs/a"]) == ["runs/a/adapter", "runs/a"]
