"""What a language model forgets: its loss on general text before and after it was fine-tuned on something else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cli_helpers import recipe, save_llama, write_rows
from peft_helpers import llama
from slicefine.errors import ConfigError, DataError
from slicefine.tasks.general import general_loss, general_texts, own_texts
from slicefine.tasks.settings import TaskSettings
from slicefine.training.run import train

TOKENS = SimpleNamespace(bos_token_id=1, eos_token_id=2)


def test_the_loss_is_that_of_each_text_alone():
    model = llama().train()
    texts = [[1, 5, 9, 7], [1, 3], [4, 4, 8, 2, 6, 11]]
    found = general_loss(model, texts)
    total, count = 0.0, 0
    for ids in texts:
        row = torch.tensor([ids])
        with torch.no_grad():
            total += float(model(input_ids=row, labels=row).loss) * (len(ids) - 1)
        count += len(ids) - 1
    assert found == pytest.approx(total / count, rel=1e-5)
    assert model.training  # as it was


def test_own_texts_are_repeatable_end_once_and_leave_the_random_state_alone():
    model = llama()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    texts = own_texts(model, TOKENS, 20)
    assert torch.equal(state, torch.get_rng_state())
    assert texts == own_texts(model, TOKENS, 20)
    assert texts != own_texts(model, TOKENS, 20, seed=1)
    assert len(texts) == 20
    assert all(ids[0] == 1 and 2 not in ids[1:-1] and len(ids) <= 32 for ids in texts)
    own = general_loss(model, texts)
    other = general_loss(llama(seed=1), texts)
    assert own < other  # a model foretells its own texts better than another one does


@pytest.mark.parametrize("general", ["samples", "file"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by PEFT
def test_a_run_reports_what_was_forgotten(tmp_path: Path, general: str, capsys: pytest.CaptureFixture[str]):
    model = save_llama(tmp_path / "model")
    write_rows(tmp_path / "data" / "train.jsonl", [{"text": "the film was very good " * 3} for _ in range(16)])
    if general == "file":
        general = str(tmp_path / "general.jsonl")
        write_rows(Path(general), [{"text": "one plus two is three"}, {"text": "awful weak poor"}])
    settings = recipe(
        model,
        str(tmp_path / "data"),
        tmp_path / "run",
        quiet=False,
        task__name="causal-lm",
        task__general=general,
        task__general_limit=6,
        task__max_length=16,
        training__max_steps=8,
        training__learning_rate=0.03,
        method__name="full",
    )
    report = train(settings)
    found = report["general"]
    assert found["after"] > found["before"] + 0.1
    assert found["forgotten"] == found["after"] - found["before"]
    assert report["after"].keys() == {"validation"}  # general text is no set of the data
    assert f"{found['forgotten']:+.4f} nats per token" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by PEFT
def test_what_the_base_foretells_is_measured_on_the_base(tmp_path: Path, method: str):
    model = save_llama(tmp_path / "model")
    write_rows(tmp_path / "data" / "train.jsonl", [{"text": "the film was very good " * 3} for _ in range(16)])
    changes = {"task__name": "causal-lm", "task__general": "samples", "task__general_limit": 4, "task__max_length": 16}
    found = []
    for name in ("lora", method):  # a random prefix changes the outputs before anything is trained
        settings = recipe(model, str(tmp_path / "data"), tmp_path / name, method__name=name, **changes)
        settings.training.max_steps = 2
        found.append(train(settings)["general"])
    assert found[0]["before"] == found[1]["before"]
    assert abs(found[1]["forgotten"]) < 2


def test_texts_are_drawn_whatever_the_models_own_settings_are():
    model = llama()
    texts = own_texts(model, TOKENS, 8)
    model.generation_config.temperature, model.generation_config.top_p = 0.3, 0.5
    model.generation_config.repetition_penalty, model.generation_config.eos_token_id = 2.0, [2, 7]
    assert own_texts(model, TOKENS, 8) == texts


def test_general_text_that_cannot_be_used_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="task.general is for language models .*; this task is text-classification"):
        TaskSettings(general="samples")
    with pytest.raises(ConfigError, match="task.general_limit=0 must be at least 1"):
        TaskSettings(name="causal-lm", general_limit=0)
    with pytest.raises(DataError, match=r"task.general='nowhere.jsonl' is no file; give one with a text per row"):
        general_texts(llama(), TOKENS, TaskSettings(name="causal-lm", general="nowhere.jsonl"))
    write_rows(tmp_path / "empty.jsonl", [{"text": "x"}])
    single = TaskSettings(name="causal-lm", general=str(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="no text has two tokens"):
        general_texts(llama(), lambda text: {"input_ids": [5]}, single)
