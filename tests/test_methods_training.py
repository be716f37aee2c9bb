"""Methods of the registry through `slicefine train`: rates, penalties, steps, files, evaluation and merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from cli_helpers import recipe, save_bert, save_reviews
from slicefine.errors import AdapterFileError, ConfigError, UnsupportedError
from slicefine.methods.files import TENSORS_FILE
from slicefine.training.evaluate import evaluate, merge
from slicefine.training.run import train
from slicefine.training.session import build
from slicefine.training.settings import TrainSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:.*:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reviews(tmp_path_factory.mktemp("reviews"))


def settings(bert: str, reviews: str, output: Path | None, name: str, **options: Any) -> TrainSettings:
    made = recipe(bert, reviews, output, method__name=name, method__options=options)
    made.training.epochs, made.verify = 1, True
    return made


@pytest.mark.parametrize(
    "name",
    ["bitfit", "houlsby", "rocoft", "lora_xs", "diff_pruning", "sft", "prefix", "propetl_lora", "propetl_adapter"],
)
def test_what_is_saved_beside_peft_reloads_and_is_small(bert: str, reviews: str, tmp_path: Path, name: str):
    options = {"r": 2} if name in ("rocoft", "lora_xs") else {}
    report = train(settings(bert, reviews, tmp_path / "run", name, **options))
    assert report["reload_identical"] is True
    assert "unload_identical" not in report or report["unload_identical"] is None
    adapter = tmp_path / "run" / "adapter"
    assert (adapter / TENSORS_FILE).is_file()
    assert not (adapter / "model.safetensors").exists()
    measured = evaluate(str(adapter), split="validation", path=reviews)
    assert measured["accuracy"] == pytest.approx(report["after"]["validation"]["accuracy"])


@pytest.mark.parametrize("name", ["lora_fa", "lora_plus", "adalora", "miss"])
def test_methods_of_peft_reload(bert: str, reviews: str, tmp_path: Path, name: str):
    options = {"r": 4, "target_r": 2} if name == "adalora" else {"r": 2}
    report = train(settings(bert, reviews, tmp_path / "run", name, **options))
    assert report["reload_identical"] is True or name == "adalora"  # whose file leaves pruned ranks out
    assert report["counts"]["added"] > 0


def test_merging_gives_the_base_own_layers(bert: str, reviews: str, tmp_path: Path):
    report = train(settings(bert, reviews, tmp_path / "run", "rocoft", r=2))
    merge(str(tmp_path / "run" / "adapter"), str(tmp_path / "merged"))
    with (
        safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file,
        safe_open(Path(bert) / "model.safetensors", "pt") as base,
    ):
        assert all(any(key.endswith(name) for key in file.keys()) for name in base.keys())  # noqa: SIM118
    assert report["counts"]["added"] == 0
    train(settings(bert, reviews, tmp_path / "prefix", "prefix"))
    with pytest.raises(UnsupportedError, match="keep it apart"):
        merge(str(tmp_path / "prefix" / "adapter"), str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()


def test_parts_have_their_own_rates(bert: str, reviews: str, tmp_path: Path):
    chosen = settings(bert, reviews, tmp_path / "run", "lora_plus", r=2, ratio=4.0)
    chosen.training.learning_rate, chosen.training.head_learning_rate = 1e-3, 5e-4
    session = build(chosen)
    optimizer = session.trainer(str(tmp_path)).create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in session.model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in named.items() if "lora_B" in name} == {4e-3}
    assert {rate for name, rate in named.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in named.items() if "classifier" in name} == {5e-4}


def test_a_penalty_is_part_of_the_loss_while_training_only(bert: str, reviews: str, tmp_path: Path):
    session = build(settings(bert, reviews, tmp_path / "run", "diff_pruning"))
    trainer = session.trainer(str(tmp_path))
    batch = session.prepared.collator([session.prepared.splits["train"][i] for i in range(4)])
    method = session.settings.chosen_method
    assert method.penalty is not None
    session.model.train()
    torch.manual_seed(0)
    with_penalty = trainer.compute_loss(session.model, dict(batch))
    torch.manual_seed(0)
    plain = session.model(**batch).loss
    torch.testing.assert_close(with_penalty - plain, method.penalty(session.model, 0.0))
    session.model.eval()
    torch.testing.assert_close(trainer.compute_loss(session.model, dict(batch)), session.model(**batch).loss)


def test_a_damaged_file_is_refused(bert: str, reviews: str, tmp_path: Path):
    train(settings(bert, reviews, tmp_path / "run", "bitfit"))
    adapter = tmp_path / "run" / "adapter"
    content = json.loads((adapter / "method.json").read_text())
    (adapter / "method.json").write_text(json.dumps({**content, "method": "lora"}))
    with pytest.raises(AdapterFileError, match="expected version 1 of bitfit"):
        evaluate(str(adapter), split="validation", path=reviews)
    (adapter / TENSORS_FILE).unlink()
    (adapter / "method.json").write_text(json.dumps(content))
    with pytest.raises(AdapterFileError, match="trained.safetensors is missing; copy the whole folder"):
        evaluate(str(adapter), split="validation", path=reviews)


def test_a_rate_factor_multiplies_the_methods_own_rate():
    made = TrainSettings()
    assert made.learning_rate == 3e-3
    made.training.rate_factor = 0.5
    assert made.learning_rate == 1.5e-3
    made.training.learning_rate = 1e-2
    assert made.learning_rate == 5e-3
    made.method.name = "bitfit"
    made.training.learning_rate, made.training.rate_factor = None, 1.0
    assert made.learning_rate == 1e-3


def test_a_set_can_be_left_out_although_there_is_a_file(bert: str, reviews: str):
    made = recipe(bert, reviews, None, data__validation="none", data__test="validation.jsonl")
    splits = build(made).prepared.splits
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 58, "validation": 6, "test": 16}


def test_adalora_cannot_grow(bert: str, reviews: str):
    with pytest.raises(ConfigError, match="adalora begins with r=2 and cannot end with target_r=8"):
        build(settings(bert, reviews, None, "adalora", r=2))


def test_questions_belong_to_reasoning():
    from slicefine.tasks import TaskSettings

    with pytest.raises(ConfigError, match="task.tests is for task.name=reasoning, and this one is text-classification"):
        TaskSettings(tests={"a": "b"})
    with pytest.raises(ConfigError, match="task.tests_limit=0 must be at least 1"):
        TaskSettings("reasoning", tests_limit=0)
