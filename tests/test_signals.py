"""SIGINT and SIGTERM: the step is finished, a checkpoint is written, and one sentence says how to go on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from cli_helpers import recipe, save_bert, save_reviews
from peft_helpers import config, llama, same, weights
from slicefine.cli.main import main
from slicefine.peft import StopOnSignal
from slicefine.peft.stopping import SIGNALS, Interrupted, raising_on_sigterm
from slicefine.training import run as run_module
from slicefine.training import session as session_module
from slicefine.training.run import train
from test_resume import Lengths, padded

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # read by PEFT
]


UNDER_TORCHRUN = """
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

import slicefine
from slicefine.peft import StopOnSignal
from test_signals import script

torch.distributed.init_process_group("gloo")


class Slow(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        Path(sys.argv[1], f"step-{args.process_index}").write_text(str(state.global_step))
        time.sleep(0.2 if sys.argv[2] == "first" else 0)


model = script(Path(sys.argv[1], "run"), StopOnSignal(), Slow(), again=sys.argv[2] == "again")
Path(sys.argv[1], "steps").write_text(str(slicefine.movers_of(model)[0].step))
torch.distributed.barrier()  # no process leaves while another one still talks to it
torch.distributed.destroy_process_group()
"""


@pytest.fixture(autouse=True)
def _handlers() -> Any:
    """Every test leaves the handlers of signals as they were, and finds Python's own: a shell in the background
    starts its commands with SIGINT ignored, which `StopOnSignal` leaves so."""
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    after = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, ours)
    assert after == before


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reviews(tmp_path_factory.mktemp("reviews"), rows=32)


class Send(TrainerCallback):
    """Sends this process a signal inside an optimizer step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def script(folder: Path, *callbacks: Any, again: bool = False, **settings: Any) -> Any:
    model = get_peft_model(llama(attention_dropout=0.1), config("alternate", interval=3))
    arguments: dict[str, Any] = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_strategy": "no"}
    arguments |= {"learning_rate": 0.02, "report_to": [], "use_cpu": True, "disable_tqdm": True, **settings}
    made = TrainingArguments(str(folder), **arguments)
    trainer = Trainer(model, made, padded, Lengths(), Lengths(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=again)
    return model


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_script_stops_after_its_step_and_goes_on_as_if_nothing_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, status: int
):
    with pytest.raises(Interrupted, match="stopped after step 5, and its checkpoint is written") as stop:
        script(tmp_path / "parts", StopOnSignal(), Send(number, 5))
    assert stop.value.code == status
    assert "Go on with resume_from_checkpoint" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["checkpoint-5"]
    model = script(tmp_path / "parts", StopOnSignal(), again=True)
    assert same(weights(model), weights(script(tmp_path / "whole", StopOnSignal())))


def test_torchrun_hands_its_signal_on_and_the_run_goes_on(tmp_path: Path):
    (tmp_path / "script.py").write_text(UNDER_TORCHRUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    words = [str(tmp_path / "script.py"), str(tmp_path)]
    setting = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen([*torchrun, *words, "first"], env=setting, stdout=log, stderr=log)
        wait_for(lambda: (tmp_path / "step-1").is_file() and (tmp_path / "step-1").read_text() >= "1", first)
        first.send_signal(signal.SIGTERM)
        assert first.wait(100) != 0
    text = (tmp_path / "log").read_text()
    assert text.count("and its checkpoint is written. Go on with resume_from_checkpoint.") == 1, text
    checkpoints = [path.name for path in (tmp_path / "run").iterdir()]
    assert len(checkpoints) == 1, text
    # it once ended with status 1 on a busy machine, and why was not learnt: torchrun may start workers anew
    words = [*torchrun, "--max-restarts=2", *words, "again"]
    again = subprocess.run(words, env=setting, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, f"{again.stdout[-2000:]}\n{again.stderr[-6000:]}"
    assert (tmp_path / "steps").read_text() == "6"  # of 24 rows, two epochs


def wait_for(ready: Any, process: Any) -> None:
    """Until something is so, or a process has ended."""
    end = time.monotonic() + 200
    while not ready():
        assert process.poll() is None, "the process ended"
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.1)


def test_at_an_epochs_end_the_evaluation_comes_first(tmp_path: Path):
    with pytest.raises(Interrupted, match="stopped after step 6"):
        script(tmp_path, StopOnSignal(lambda text: None), Send(signal.SIGTERM, 6), eval_strategy="epoch")
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [6]


def test_a_second_signal_ends_at_once(capsys: pytest.CaptureFixture[str]):
    stop = StopOnSignal()
    stop.on_train_begin(None, None, None)
    os.kill(os.getpid(), signal.SIGINT)
    assert "SIGINT: finishing this step, then writing a checkpoint. Once more ends at once." in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_comes_after_the_last_step_is_handed_on():
    stop = StopOnSignal(lambda text: None)
    with raising_on_sigterm():
        stop.on_train_begin(None, None, None)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            stop.on_train_end(None, None, None)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup, and in the workers of a sweep
    try:
        stop = StopOnSignal()
        stop.on_train_begin(None, None, None)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received is None
        stop.restore()
    finally:
        signal.signal(signal.SIGINT, before)


def test_processes_stop_after_the_same_step(monkeypatch: pytest.MonkeyPatch):
    """The other process got the signal, not this one; on a GPU they ask where the loss is logged."""
    import torch

    def agree(numbers: torch.Tensor, how: Any) -> None:
        numbers.fill_(signal.SIGTERM)

    monkeypatch.setattr(torch.distributed, "all_reduce", agree)
    asked = []
    for kind in ("cpu", "meta"):
        args = SimpleNamespace(world_size=2, device=SimpleNamespace(type=kind), logging_steps=4)
        args.device = torch.device("cpu") if kind == "cpu" else SimpleNamespace(type="cuda")
        monkeypatch.setattr(torch, "tensor", lambda *given, device=None, make=torch.as_tensor: make(*given))
        for step in range(1, 6):
            control = SimpleNamespace(should_save=False, should_training_stop=False)
            state = SimpleNamespace(global_step=step, max_steps=9, epoch=step / 9)
            StopOnSignal().on_step_end(args, state, control)
            asked.append(control.should_save)
    assert asked == [True] * 5 + [False, False, False, True, False]


def test_the_command_says_exactly_how_to_go_on(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    content = {"model": {"path": bert}, "data": {"path": reviews}, "verify": False, "quiet": True}
    content["training"] = {"epochs": 1, "batch_size": 8, "evaluate": "no", "evaluate_before": False}
    content["slice"] = {"r": 2, "positions": "sweep", "interval": 3}
    (tmp_path / "a recipe.yaml").write_text(yaml.safe_dump(content))
    words = ["train", "--config", str(tmp_path / "a recipe.yaml"), "--output", str(tmp_path / "run")]
    original = session_module.Session.trainer

    def watched(self: Any, *args: Any) -> Any:
        trainer = original(self, *args)
        trainer.add_callback(Send(signal.SIGTERM, 3))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(session_module.Session, "trainer", watched)
        patch.setattr(sys, "argv", ["slicefine", *words])
        assert main(words) == 143
    command = capsys.readouterr().err.strip().partition("interrupted. Go on with: ")[2]
    assert shlex.split(command) == ["slicefine", *words, "--resume"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert main(shlex.split(command)[1:]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 4


def test_an_interruption_after_the_last_step_loses_no_step(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    changes: dict[str, Any] = {"training__max_steps": 2, "training__evaluate": "no", "verify": False}
    changes |= {"training__evaluate_before": False, "slice__minimum_steps": 1}
    monkeypatch.setattr(run_module, "save_trained", interrupted)
    with pytest.raises(KeyboardInterrupt) as stop:
        train(recipe(bert, reviews, tmp_path / "run", **changes))
    assert stop.value.__notes__ == [f"Go on with resume={str(tmp_path / 'run')!r}."]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_an_interruption_before_the_first_step_leaves_nothing(
    bert: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_module, "build", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted) as stop:
        train(recipe(bert, reviews, tmp_path / "run"))
    assert stop.value.code == 143
    assert stop.value.__notes__ == ["It was interrupted before its first step, so nothing is kept: start it again."]
    assert not (tmp_path / "run").exists()


def test_a_sweep_ends_its_workers_and_keeps_what_is_finished(bert: str, reviews: str, tmp_path: Path):
    training = {"epochs": 1, "batch_size": 8, "evaluate": "no", "evaluate_before": False}
    base = {"model": {"path": bert}, "data": {"path": reviews}, "training": training, "slice": {"r": 1}}
    content = {"base": base, "vary": {"slice.r": [1, 2]}, "seeds": [0, 1, 2], "output": str(tmp_path / "sweep")}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-c", "from slicefine.cli import main; raise SystemExit(main())", "sweep"]
    words = ["--config", str(tmp_path / "sweep.yaml")]
    sweep = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while sweep.poll() is None and not list((tmp_path / "sweep" / "runs").glob("*.json")):
        time.sleep(0.05)
    children = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children")
    workers = children.read_text().split() if children.is_file() else []
    sweep.send_signal(signal.SIGTERM)
    _, shown = sweep.communicate(timeout=120)
    assert sweep.returncode == 143
    assert f"Go on with slicefine sweep {' '.join(words)}." in shown
    for file in (tmp_path / "sweep" / "runs").glob("*.json"):
        assert "error" not in json.loads(file.read_text())
    for worker in workers:
        while Path(f"/proc/{worker}").exists():  # the tracker of shared memory ends a little later than its parent
            time.sleep(0.05)
