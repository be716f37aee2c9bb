"""Runs from settings to files: every task, every method, resuming, errors, and what is left behind."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from cli_helpers import (
    BAD,
    GOOD,
    recipe,
    review,
    save_bert,
    save_images,
    save_llama,
    save_reviews,
    save_vit,
    write_rows,
)
from slicefine.energy import gradient_energy, input_energy
from slicefine.errors import AdapterFileError, ConfigError, DataError, NumericalError
from slicefine.files.writing import atomic_folder
from slicefine.geometry import Slice, block_start
from slicefine.training import run as run_module
from slicefine.training import session as session_module
from slicefine.training.contents import read_contents
from slicefine.training.counts import touched_entries
from slicefine.training.evaluate import evaluate, merge
from slicefine.training.plan import make_plan
from slicefine.training.run import train
from slicefine.training.session import build
from slicefine.training.settings import MethodSettings, SliceSettings, TrainingSettings, TrainSettings
from slicefine.training.trained import load_trained, read_run

# third-party notes that have nothing to do with what is tested
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by PEFT
]

SHORT = {"training__max_steps": 2, "slice__minimum_steps": 1}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reviews(tmp_path_factory.mktemp("reviews"))


@pytest.fixture(scope="module")
def done(bert: str, reviews: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One finished run with slices, for the tests that only look at results."""
    output = tmp_path_factory.mktemp("done") / "run"
    settings = recipe(bert, reviews, output, training__learning_rate=1e-2, training__epochs=4)
    return output, train(settings)


# -- a run and what it leaves ---------------------------------------------------------------------------------------


def test_a_run_learns_reports_and_proves_itself(done: tuple[Path, dict[str, Any]]):
    output, report = done
    assert report["after"]["validation"]["accuracy"] > 0.8 > report["before"]["validation"]["accuracy"]
    assert report["reload_identical"] is True
    assert report["unload_identical"] is True
    assert report["counts"]["added"] == 0
    assert report["moves"] == [8, 16, 24]
    assert report["steps"] == 32
    assert report["file_bytes"] == (output / "adapter" / "adapter_model.safetensors").stat().st_size
    assert report["seconds_per_step"] > 0
    assert report["peak_memory_bytes"] > 0


def test_the_output_folder_holds_exactly_the_results(done: tuple[Path, dict[str, Any]]):
    output, report = done
    assert sorted(p.name for p in output.iterdir()) == ["adapter", "checkpoints", "curves.png", "metrics.json"]
    assert (output / "curves.png").read_bytes()[:4] == b"\x89PNG"
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["after"] == report["after"]
    assert metrics["settings"]["slice"]["r"] == 2
    assert {"torch", "peft", "slicefine"} <= set(metrics["versions"])
    assert metrics["device"]
    assert metrics["command"]


@pytest.mark.parametrize(
    ("mode", "row_order", "measured"),
    [
        ("column", "gradient", {"column"}),
        ("alternate", "gradient", {"column", "row"}),
        ("alternate", "sweep", {"column"}),
        ("row", "gradient", {"row"}),
        ("row", "sweep", None),
    ],
)
def test_positions_follow_the_energy_of_the_training_data(
    bert: str, tmp_path: Path, mode: str, row_order: str, measured: set[str] | None
):
    words = [f"{(GOOD, BAD)[i % 2][i // 2 % 4]} film" for i in range(64)]  # of one length: no padding
    write_rows(tmp_path / "data/train.jsonl", [{"text": text, "label": i % 2} for i, text in enumerate(words)])
    settings = recipe(bert, str(tmp_path / "data"), tmp_path / "run", slice__mode=mode, data__validation_fraction=0.0)
    settings.slice.rank_pattern, settings.slice.row_order = {"query": 3}, row_order
    session = build(settings)
    positions = session.model.peft_config["default"].positions
    if measured is None:
        assert positions == "sweep"
        return
    rows = session.prepared.splits["train"]  # 64 rows: the eight batches are all of them, in any order
    torch.manual_seed(settings.training.seed)
    base = session.task.load().model
    base.load_state_dict(
        {name.replace("modules_to_save.default.", ""): t for name, t in session.model.unload().state_dict().items()}
    )  # the head that the run drew
    whole = session.prepared.collator([rows[i] for i in range(64)])
    energies = {"column": input_energy(base, [whole]), "row": gradient_energy(base, [whole])}
    for name, r in (("bert.encoder.layer.0.attention.self.query", 3), ("bert.encoder.layer.1.output.dense", 2)):
        assert positions[name].keys() == measured
        for axis in measured:
            starts, energy = positions[name][axis], energies[axis][name]
            assert len(starts) == settings.slice.moves + 1
            size = len(energy)
            blocks = [block_start(block, size, r) for block in range(-(-size // r))]
            assert starts == sorted(blocks, key=lambda at: -float(energy[at : at + r].sum()))[: len(starts)]


def test_positions_by_energy_can_be_switched_off(bert: str, tmp_path: Path):
    settings = recipe(bert, save_reviews(tmp_path / "data"), tmp_path / "run", slice__positions="sweep")
    assert build(settings).model.peft_config["default"].positions == "sweep"


def test_counts_are_active_entries_and_touched_entries(done: tuple[Path, dict[str, Any]], bert: str):
    _, report = done
    counts = report["counts"]
    # alternate at its fourth position: two columns of every layer; two blocks of 4 square layers, 64x32, 32x64, pooler
    layers = [(32, 32)] * 8 + [(64, 32), (32, 64)] * 2 + [(32, 32)]
    head = 2 * 32 + 2
    best = report["best_step"] // 8  # positions that the best checkpoint had trained
    slices = [Slice("row", 0, 2), Slice("column", 0, 2), Slice("row", 2, 2), Slice("column", 2, 2)][:best]
    assert counts["head"] == head
    assert counts["changed"] == sum(touched_entries(slices, shape) for shape in layers) + head
    assert counts["total"] == sum(
        p.numel() for p in AutoModelForSequenceClassification.from_pretrained(bert).parameters()
    )


def test_touched_entries_count_crossings_once():
    assert touched_entries([Slice("row", 0, 2), Slice("column", 0, 1), Slice("row", 1, 2)], (4, 10)) == 3 * 10 + 4 - 3
    draws = [Slice("entries", 1, 30), Slice("entries", 2, 30)]
    assert 30 <= touched_entries(draws, (10, 10)) <= 60


def test_the_adapter_is_plain_peft(done: tuple[Path, dict[str, Any]], bert: str):
    output, _ = done
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    model = PeftModel.from_pretrained(base, output / "adapter").eval()
    ours = load_trained(output / "adapter").model
    ids = torch.arange(5, 15).unsqueeze(0)
    assert torch.equal(model(input_ids=ids).logits, ours(input_ids=ids).logits)


def test_contents_are_read_without_the_base(done: tuple[Path, dict[str, Any]]):
    output, report = done
    contents = read_contents(output)  # the output folder will do, too
    assert len(contents.layers) == 13
    first = contents.layers[0]
    assert first.visits[0].slice._replace(start=0) == Slice("row", 0, 2)
    assert first.visits[-1].last_step == report["best_step"]
    assert first.rows == 2 * sum(1 for v in first.visits if v.slice.axis == "row")
    assert sum(contents.others.values()) == report["counts"]["head"]


def test_evaluate_gives_the_figure_of_the_report(done: tuple[Path, dict[str, Any]], tmp_path: Path):
    output, report = done
    file = tmp_path / "metrics.json"
    found = evaluate(str(output / "adapter"), output=str(file))
    assert found["accuracy"] == report["after"]["validation"]["accuracy"]
    assert json.loads(file.read_text())["metrics"] == found
    rows = [review(i) for i in range(10)]
    write_rows(tmp_path / "other.jsonl", rows)
    other = evaluate(str(output / "adapter"), split="test", path=str(tmp_path / "other.jsonl"))
    trained = load_trained(output / "adapter")
    inputs = trained.loaded.processor([row["text"] for row in rows], padding=True, return_tensors="pt")
    predicted = trained.model.eval()(**inputs).logits.argmax(-1).tolist()
    assert other["accuracy"] == sum(p == row["label"] for p, row in zip(predicted, rows, strict=True)) / len(rows)


def test_merging_gives_a_plain_checkpoint_with_the_same_predictions(done: tuple[Path, dict[str, Any]], tmp_path: Path):
    output, _ = done
    merge(str(output / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ours = load_trained(output / "adapter").model
    ids = torch.arange(5, 15).unsqueeze(0)
    assert torch.equal(merged(input_ids=ids).logits, ours(input_ids=ids).logits)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        merge(str(output / "adapter"), str(tmp_path / "merged"))


# -- methods and tasks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "file"), [("lora", "adapter_model"), ("full", "model"), ("head", "model")])
def test_the_baselines_run_through_the_same_code(bert: str, reviews: str, tmp_path: Path, method: str, file: str):
    settings = recipe(bert, reviews, tmp_path / "run", method__name=method, training__epochs=1)
    report = train(settings)
    assert (tmp_path / "run" / "adapter" / f"{file}.safetensors").is_file()
    assert report["reload_identical"] is True
    assert report["unload_identical"] is (True if method == "lora" else None)
    assert (report["counts"]["added"] > 0) == (method == "lora")
    expected = {"head": report["counts"]["head"], "full": report["counts"]["total"]}.get(method)
    assert expected is None or report["counts"]["trainable"] == expected


@pytest.mark.parametrize("mode", ["row", "column", "random_mask"])
def test_every_mode_runs(bert: str, reviews: str, tmp_path: Path, mode: str):
    settings = recipe(bert, reviews, tmp_path / "run", slice__mode=mode, training__evaluate="no")
    report = train(settings)
    assert report["reload_identical"] is True
    assert report["unload_identical"] is True
    assert len(report["moves"]) == 3


def test_regression_on_pairs(bert: str, tmp_path: Path):
    rows = [{"a": f"the film was {w}", "b": "good", "score": float(s)} for w, s in [("good", 5), ("bad", 0)] * 16]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    settings = recipe(bert, str(tmp_path / "data"), tmp_path / "run", task__name="text-regression", task__metric="rmse")
    settings.data.columns.text, settings.data.columns.text_pair, settings.data.columns.label = "a", "b", "score"
    settings.training.learning_rate, settings.training.epochs = 2e-2, 4
    report = train(settings)
    assert report["after"]["validation"]["rmse"] < report["before"]["validation"]["rmse"]
    best = min(entry["eval_rmse"] for entry in report["history"] if "eval_rmse" in entry)
    assert report["after"]["validation"]["rmse"] == pytest.approx(best)  # less is better


@pytest.mark.parametrize("answers", [False, True])
def test_causal_language_model(tmp_path: Path, answers: bool):
    model = save_llama(tmp_path / "llama")
    rows = [{"text": "one plus two is three", "prompt": "one plus two is", "answer": "three"}] * 96
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    changes = {"data__columns__answer": "answer"} if answers else {"task__max_length": 8}
    settings = recipe(model, str(tmp_path / "data"), tmp_path / "run", task__name="causal-lm", **changes)
    settings.training.learning_rate, settings.training.epochs = 2e-2, 3
    report = train(settings)
    assert report["after"]["validation"]["perplexity"] < report["before"]["validation"]["perplexity"] / 1.5
    assert report["reload_identical"] is True
    assert report["unload_identical"] is True
    assert report["counts"]["head"] == 0


def test_image_classification(tmp_path: Path):
    settings = recipe(save_vit(tmp_path / "vit"), save_images(tmp_path / "data"), tmp_path / "run")
    settings.task.name, settings.training.learning_rate, settings.training.epochs = "image-classification", 1e-2, 4
    report = train(settings)
    assert report["after"]["test"]["accuracy"] == 1.0
    assert report["reload_identical"] is True
    assert evaluate(str(tmp_path / "run"), split="test")["accuracy"] == 1.0


def test_a_model_from_a_configuration_is_trained_whole(tmp_path: Path):
    data = save_images(tmp_path / "data")
    settings = recipe("", data, tmp_path / "run", method__name="full", **SHORT)
    settings.task.name, settings.model.path = "image-classification", None
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    settings.model.config = {"model_type": "vit", "image_size": 16, "patch_size": 8, **tiny}
    train(settings)
    second = recipe(str(tmp_path / "run" / "adapter"), data, tmp_path / "second", **SHORT)
    second.task.name = "image-classification"
    assert train(second)["reload_identical"] is True


def test_a_model_from_a_configuration_has_the_precision_that_was_asked_for(tmp_path: Path):
    settings = recipe("", save_images(tmp_path / "data"), None, method__name="full", model__dtype="bfloat16")
    settings.task.name, settings.model.path = "image-classification", None
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    settings.model.config = {"model_type": "vit", "image_size": 16, "patch_size": 8, **tiny}
    assert {parameter.dtype for parameter in build(settings).model.parameters()} == {torch.bfloat16}


def test_precision_accumulation_and_checkpointing_run_together(bert: str, reviews: str, tmp_path: Path):
    settings = recipe(bert, reviews, tmp_path / "run", model__dtype="bfloat16", slice__interval=2)
    settings.training = replace(settings.training, bf16=True, gradient_accumulation=2, gradient_checkpointing=True)
    report = train(settings)
    assert report["steps"] == 8
    assert report["moves"] == [2, 4, 6, 8]
    assert report["reload_identical"] is True
    assert report["unload_identical"] is True


def test_mixed_precision_over_full_weights_reloads_the_same(bert: str, reviews: str, tmp_path: Path):
    report = train(recipe(bert, reviews, tmp_path / "run", training__bf16=True, **SHORT))
    assert report["reload_identical"] is True
    assert report["unload_identical"] is True


def test_the_head_has_its_own_rate_and_slices_are_in_the_optimizer(bert: str, reviews: str, tmp_path: Path):
    settings = recipe(bert, reviews, tmp_path, training__learning_rate=1e-3, training__head_learning_rate=5e-3)
    session = build(settings)
    optimizer = session.trainer(str(tmp_path)).create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in session.model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (5e-3 if "modules_to_save" in name else 1e-3), name
    assert sum("slicefine_active" in name for name, p in session.model.named_parameters() if id(p) in rates) == 13


def test_early_stopping_ends_a_run_that_gets_no_better(bert: str, reviews: str, tmp_path: Path):
    settings = recipe(bert, reviews, tmp_path / "run", training__learning_rate=1e-12, training__epochs=6)
    settings.training.early_stopping = 1
    assert train(settings)["steps"] == 16


def test_report_to_tensorboard(bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(
        recipe(
            bert,
            reviews,
            tmp_path / "run",
            training__report_to=["tensorboard"],
            training__max_steps=2,
            slice__minimum_steps=1,
        )
    )
    assert list((tmp_path / "board").rglob("events.*"))


# -- the plan -------------------------------------------------------------------------------------------------------


def test_a_dry_run_plans_what_the_run_then_does(
    done: tuple[Path, dict[str, Any]], bert: str, reviews: str, tmp_path: Path
):
    _, report = done
    settings = recipe(bert, reviews, tmp_path / "run", training__epochs=4, dry_run=True)
    plan = train(settings)
    assert (plan["moves"], plan["steps"]) == (report["moves"], report["steps"])
    assert not (tmp_path / "run").exists()
    settings.slice.row_order = "sweep"  # else each layer begins elsewhere
    layers = make_plan(build(settings)).layers
    assert sum(layer.count for layer in layers) == 13
    assert {layer.first for layer in layers} == {"rows 0 to 1"}
    assert plan["counts"]["trainable"] == sum(layer.count * layer.entries for layer in layers) + plan["counts"]["head"]


# -- resuming -------------------------------------------------------------------------------------------------------


class _Pulled(TrainerCallback):  # type: ignore[misc]
    """Somebody pulls the plug after the second epoch's checkpoint."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 19:
            raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["alternate", "column"])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
):
    changes: dict[str, Any] = {"training__epochs": 4, "slice__mode": mode, "training__load_best": False}
    whole = train(recipe(bert, reviews, tmp_path / "whole", **changes))
    original = session_module.Session.trainer

    def interrupted(self: Any, *args: Any) -> Any:
        trainer = original(self, *args)
        trainer.add_callback(_Pulled())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(session_module.Session, "trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(bert, reviews, tmp_path / "parts", **changes))
    assert not (tmp_path / "parts" / "adapter").exists()
    parts = train(recipe(bert, reviews, tmp_path / "parts", resume=True, **changes))
    assert parts["moves"] == whole["moves"] == [8, 16, 24]
    assert parts["steps"] == 32
    files = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "parts")]
    assert files[0].keys() == files[1].keys()
    for key, tensor in files[0].items():
        assert torch.equal(tensor, files[1][key]), key


def test_resuming_a_finished_run_takes_no_further_step(bert: str, reviews: str, tmp_path: Path):
    changes: dict[str, Any] = {"training__max_steps": 5, "training__schedule": "constant", "training__load_best": False}
    changes |= {
        "training__evaluate": "steps",
        "training__evaluate_steps": 5,
        "slice__moves": 0,
    }  # 5 steps end within an epoch of 8
    train(recipe(bert, reviews, tmp_path / "run", **changes))
    file = tmp_path / "run/adapter/adapter_model.safetensors"
    first = load_file(file)
    report = train(recipe(bert, reviews, tmp_path / "run", resume=True, **changes))
    assert report["steps"] == 5
    for key, tensor in load_file(file).items():
        assert torch.equal(tensor, first[key]), key


def test_weights_that_the_last_step_broke_are_not_saved(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Broken(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(math.nan)

    original = session_module.Session.trainer

    def broken(self: Any, *args: Any) -> Any:
        trainer = original(self, *args)
        trainer.add_callback(Broken())
        return trainer

    monkeypatch.setattr(session_module.Session, "trainer", broken)
    write_rows(tmp_path / "data/train.jsonl", [review(i) for i in range(16)])
    changes: dict[str, Any] = {"training__max_steps": 1, "training__evaluate": "no", "training__load_best": False}
    changes |= {"data__validation_fraction": 0.0, "slice__moves": 0}
    with pytest.raises(NumericalError, match=r"steps 1 to 1: the active slice of .* is NaN or infinite"):
        train(recipe(bert, str(tmp_path / "data"), tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "adapter").exists()


def test_resuming_from_a_folder_that_is_none_is_refused(bert: str, reviews: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"resume: .*nowhere' is no folder. Give the output folder of a run"):
        train(recipe(bert, reviews, None, resume=str(tmp_path / "nowhere")))
    (tmp_path / "checkpoints" / "checkpoint-8").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-8" / "trainer_state.json").write_text('{"global')
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):
        train(recipe(bert, reviews, tmp_path, resume=True))
    with pytest.raises(ConfigError, match="--resume needs --output"):
        TrainSettings(resume=True)


# -- errors, and what they leave behind -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "message"), [(1, r"step 3: the loss is nan.* Lower"), (4, r"steps 3 to 3: .* is NaN or infinite.* Lower")]
)
def test_a_loss_that_is_nan_stops_at_its_step_and_leaves_nothing(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, message: str
):
    original = session_module.Session.trainer

    def poisoned(self: Any, *args: Any) -> Any:
        trainer = original(self, *args)
        plain = trainer.compute_loss
        assert trainer.check_every == 1  # on a CPU
        trainer.check_every = every  # as on a GPU

        def compute_loss(*given: Any, return_outputs: bool = False, **more: Any) -> Any:
            loss = plain(*given, return_outputs=return_outputs, **more)
            return loss if return_outputs or trainer.state.global_step != 2 else loss * math.nan

        trainer.compute_loss = compute_loss
        return trainer

    monkeypatch.setattr(session_module.Session, "trainer", poisoned)
    with pytest.raises(NumericalError, match=message):
        train(recipe(bert, reviews, tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("evaluate", ["epoch", "no"])
def test_a_last_step_that_spoils_the_weights_is_noticed(bert: str, reviews: str, tmp_path: Path, evaluate: str):
    changes = {**SHORT, "training__learning_rate": 1e30, "training__evaluate": evaluate}
    with pytest.raises(
        NumericalError, match=r"evaluation after step 2: the loss is nan.* Lower training.learning_rate"
    ):
        train(recipe(bert, reviews, tmp_path / "run", **changes))
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_are_whole_survive_an_error(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(run_module, "save_trained", fail)
    with pytest.raises(ConfigError, match=r"adapter cannot be written \(disk full\)"):
        train(recipe(bert, reviews, tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_a_folder_that_cannot_be_written_is_refused_before_work_begins(bert: str, reviews: str, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output='.*file/run' cannot be written .* Choose a folder that can be"):
        train(recipe(bert, reviews, tmp_path / "file" / "run"))


def test_earlier_results_are_not_overwritten_unasked(bert: str, reviews: str, tmp_path: Path):
    settings = recipe(bert, reviews, tmp_path / "run", **SHORT)
    train(settings)
    with pytest.raises(ConfigError, match="holds the results of an earlier run"):
        train(settings)
    assert train(replace(settings, overwrite=True))["steps"] == 2


def test_checkpoints_of_an_earlier_run_are_not_mixed_with_new_ones(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_trained", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(recipe(bert, reviews, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"holds the checkpoints of an earlier run.* go on with --resume"):
        train(recipe(bert, reviews, tmp_path / "run"))
    assert train(recipe(bert, reviews, tmp_path / "run", resume=True))["steps"] == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__report_to": ["nonsense"]}, r"training.report_to=\['nonsense'\]: nonsense is not supported"),
        ({"training__report_to": "nonsense"}, r"training.report_to=\['nonsense'\]: nonsense is not supported"),
    ],
)
def test_unknown_integrations_are_refused(bert: str, reviews: str, tmp_path: Path, changes: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        train(recipe(bert, reviews, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_an_optimizer_whose_package_is_missing_is_refused(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def missing(*args: Any) -> None:
        raise ImportError("You need to install `bitsandbytes`")

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", missing)
    with pytest.raises(ConfigError, match=r"training.optimizer='adamw_torch': You need to install `bitsandbytes`"):
        train(recipe(bert, reviews, tmp_path / "run", **SHORT))
    assert not (tmp_path / "run").exists()


def test_early_stopping_without_a_validation_set_is_refused(bert: str, reviews: str, tmp_path: Path):
    settings = recipe(bert, str(Path(reviews) / "train.jsonl"), tmp_path / "run", data__validation_fraction=0.0)
    settings.training.early_stopping = 1
    with pytest.raises(ConfigError, match="early_stopping needs a validation set"):
        train(settings)


def test_an_unknown_module_names_some_that_exist(bert: str, reviews: str, tmp_path: Path):
    message = r"target_modules=\['nonsense'\].* are called classifier, dense, key, query, value\."
    for mode in ("row", "column"):  # the second one looks for the layers' inputs first
        with pytest.raises(ConfigError, match=message):
            train(recipe(bert, reviews, tmp_path / "run", slice__target_modules=["nonsense"], slice__mode=mode))
    assert not (tmp_path / "run").exists()


def test_data_errors_leave_nothing(bert: str, reviews: str, tmp_path: Path):
    with pytest.raises(DataError, match=r"column 'review' \(data.columns.text\) is missing"):
        train(recipe(bert, reviews, tmp_path / "run", data__columns__text="review"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SliceSettings(mode="diagonal"), r"slice: mode='diagonal' is unknown; expected one of row, column"),
        (lambda: SliceSettings(r=0), r"slice: row rank r=0 must be an integer of at least 1"),
        (lambda: SliceSettings(moves=None), r"slice: give either moves= .* or interval="),
        (lambda: SliceSettings(state_policy="x"), r"slice: state_policy='x' is unknown"),
        (lambda: SliceSettings(bias="lora_only"), r"slice.bias='lora_only' is unknown; expected one of none, all, sli"),
        (lambda: MethodSettings("qlora"), r"method.name='qlora' is unknown; expected one of full, head, .*lora"),
        (lambda: MethodSettings("lora", {"rank": 4}), r"lora has no rank; its options are: r, alpha, dropout"),
        (lambda: MethodSettings("lora", {"r": 0}), r"method.options.r=0: expected a number like 8 for lora"),
        (lambda: MethodSettings(options={"r": 4}), r"slicefine's settings are below slice, as slice.r"),
        (lambda: TrainingSettings(rate_factor=0.0), r"training.rate_factor=0.0 must be positive"),
        (lambda: TrainingSettings(batch_size=0), r"training.batch_size=0 must be at least 1"),
        (lambda: TrainingSettings(learning_rate=-1.0), r"training.learning_rate=-1.0 must be positive"),
        (lambda: TrainingSettings(workers=-1), r"training.workers=-1 must not be negative"),
        (lambda: TrainingSettings(warmup_ratio=5), r"training.warmup_ratio=5 must lie in \[0, 1\]"),
        (lambda: TrainingSettings(evaluate="always"), r"training.evaluate='always' is unknown"),
        (lambda: TrainingSettings(evaluate="steps"), r"needs training.evaluate_steps"),
        (lambda: TrainingSettings(early_stopping=2, load_best=False), r"early_stopping needs evaluations"),
    ],
)
def test_settings_are_checked_where_they_enter(make: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


def test_an_adapter_on_random_weights_is_refused(tmp_path: Path):
    settings = TrainSettings()
    settings.model.config = {"model_type": "vit"}
    with pytest.raises(ConfigError, match="model.config starts from random weights"):
        replace(settings)


@pytest.mark.parametrize("damage", ["missing", "cut", "garbled", "foreign"])
def test_damaged_adapters_are_refused(done: tuple[Path, dict[str, Any]], tmp_path: Path, damage: str):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (done[0] / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "adapter_model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "garbled":
        weights.write_bytes(b"not safetensors at all")
    else:
        config = json.loads((folder / "slicefine_run.json").read_text())
        config["model"]["path"] = save_narrow_bert(tmp_path / "other")
        (folder / "slicefine_run.json").write_text(json.dumps(config))
    message = {"missing": "is missing; copy the whole adapter folder", "foreign": "another base|not the one|other base"}
    with pytest.raises(AdapterFileError, match=message.get(damage, "corrupt")):
        evaluate(str(folder))
    if damage not in ("foreign",):
        with pytest.raises(AdapterFileError, match=message.get(damage, "corrupt")):
            read_contents(folder)


def test_a_run_file_without_its_parts_is_refused(tmp_path: Path):
    (tmp_path / "slicefine_run.json").write_text('{"version": 1, "adapter": true}')
    with pytest.raises(AdapterFileError, match=r"slicefine_run.json: data, model, state, task is missing"):
        evaluate(str(tmp_path))


def test_evaluate_and_merge_check_where_they_write(done: tuple[Path, dict[str, Any]], tmp_path: Path):
    adapter = str(done[0] / "adapter")
    with pytest.raises(ConfigError, match=r"output=.* is no file in an existing folder"):
        evaluate(adapter, output=str(tmp_path / "nowhere" / "metrics.json"))
    with pytest.raises(ConfigError, match=r"batch_size=0 must be at least 1"):
        evaluate(adapter, batch_size=0)
    base = Path(read_run(done[0] / "adapter")["model"]["path"])
    assert base.is_dir()
    for target in (done[0], done[0] / "adapter", base):
        with pytest.raises(ConfigError, match="holds .*, which would be replaced"):
            merge(adapter, str(target), overwrite=True)


def save_narrow_bert(folder: Path) -> str:
    from transformers import BertConfig, BertModel

    from cli_helpers import WORDS, save_tokenizer

    config = BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder, pair=True)
    return str(folder)


def test_folders_without_an_adapter_are_refused(tmp_path: Path):
    with pytest.raises(AdapterFileError, match=r"no slicefine_run.json here"):
        evaluate(str(tmp_path))
    with pytest.raises(AdapterFileError, match=r"adapter_config.json is missing"):
        read_contents(tmp_path)
    (tmp_path / "slicefine_run.json").write_text("{")
    with pytest.raises(AdapterFileError, match=r"not readable as JSON"):
        evaluate(str(tmp_path))


def test_an_atomic_folder_appears_whole_or_not_at_all(tmp_path: Path):
    with pytest.raises(RuntimeError, match="midway"), atomic_folder(tmp_path / "target") as aside:
        (aside / "half").write_text("x")
        raise RuntimeError("midway")
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "target") as aside:
        (aside / "whole").write_text("x")
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["whole"]
