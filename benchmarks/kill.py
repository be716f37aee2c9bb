"""``kill -9`` while checkpoints and adapters are written: a whole one is always found, and runs end as they would have.

A child trains, writes a checkpoint after each step and the adapter after each checkpoint, and is killed at a random
moment of a save. The next child goes on from what it finds, until the run is over; then its weights and its log are
compared with those of a run that nobody killed. After each kill every folder that is called a checkpoint must have all
its files, and the adapter must be, whole, that of a step: never of an earlier one than before, and of none later
than the newest checkpoint.

    python benchmarks/kill.py --kills 100 --out benchmarks/results/kill.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from resume import Case, Rows, collate, content, differences, in_processes, llama, measured
from transformers import TrainingArguments
from transformers.utils import logging

from slicefine import SliceFineConfig
from slicefine.files.writing import atomic_folder
from slicefine.methods import find
from slicefine.training.continuing import Record
from slicefine.training.report import environment
from slicefine.training.trainer import SliceTrainer

FILES = {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"}
FILES |= {"trainer_state.json"}


class Tells(SliceTrainer):
    """Tells the parent when a save begins, and writes the adapter after each checkpoint."""

    pipe = -1

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._tell()
        super()._save_checkpoint(model, trial)
        self._tell()
        folder = Path(str(self.args.output_dir)).parent
        with atomic_folder(folder / "adapter") as aside:
            self.model.save_pretrained(aside)
        if self.pipe < 0:  # the run that nobody kills keeps the adapter of each step
            shutil.copytree(folder / "adapter", folder / f"adapter-{self.state.global_step}")

    def _tell(self) -> None:
        if self.pipe >= 0:
            os.write(self.pipe, b"x")


def run(folder: Path, steps: int, pipe: int) -> None:
    """Train, or go on with the newest checkpoint, whatever state its folder is in."""
    model = get_peft_model(llama(), SliceFineConfig(r=2, mode="alternate", interval=2, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=4,
        save_steps=1,
        logging_steps=2,
        learning_rate=0.01,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    settings: Case = {"head_parameters": [], "head_rate": None, "method": find("slicefine"), "options": {}}
    trainer = Tells(model, arguments, collate, Rows(), record=Record(), save_limit=2, **settings)
    trainer.pipe = pipe
    found = sorted((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    facts = measured({"history": trainer.state.log_history})
    torch.save(facts | {"weights": dict(model.state_dict())}, folder / "facts.pt")


def killed(folder: Path, steps: int, draw: random.Random, duration: float) -> int:
    """Run a child and kill it during a save, from its begin to a little after its end; returns its status."""
    reader, writer = os.pipe()
    count = draw.randrange(1, 7)

    def work() -> None:
        os.close(reader)
        run(folder, steps, writer)

    child = os.fork()
    if child == 0:
        os._exit(in_processes(work, 1, folder / "log"))
    os.close(writer)
    for _ in range(count):
        if not os.read(reader, 1):
            break
    else:
        time.sleep(draw.random() * 1.3 * duration)
        for own in Path(f"/proc/{child}/task/{child}/children").read_text().split():
            os.kill(int(own), signal.SIGKILL)
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def broken(folder: Path, reference: Path, before: int) -> tuple[list[str], int]:
    """What is not whole after a kill, and the step that the adapter is of.

    Args:
        folder: of the run.
        reference: of the run that nobody killed.
        before: the step that the adapter was of before this child.
    """
    found = list((folder / "checkpoints").glob("checkpoint-*"))
    bad = [path.name for path in found if FILES - {file.name for file in path.iterdir()}]
    adapter, last = folder / "adapter", max((int(path.name.rpartition("-")[2]) for path in found), default=0)
    if not adapter.is_dir():
        return (bad if before == 0 else [*bad, f"the adapter of step {before} is gone"]), 0
    same = [step for step in range(max(1, before), last + 1) if same_adapter(reference / f"adapter-{step}", adapter)]
    if not same:
        return [*bad, f"the adapter is of none of the steps {before} to {last}"], before
    return bad, same[-1]


def same_adapter(one: Path, other: Path) -> bool:
    """Whether two folders hold the same adapter, whole."""
    try:
        return all(not differences(content(one / n), content(other / n)) for n in sorted(FILES) if "adapter" in n)
    except (OSError, ValueError):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    draw, began = random.Random(chosen.seed), time.time()
    kills, runs, found = 0, 0, []
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        whole.mkdir()
        start = time.time()
        assert in_processes(lambda: run(whole, chosen.steps, -1), 1, whole / "log") == 0, (whole / "log").read_text()
        duration = (time.time() - start) / chosen.steps / 2  # of a checkpoint, or of an adapter
        expected = torch.load(whole / "facts.pt", weights_only=True)
        while kills < chosen.kills:
            folder, runs = Path(place) / f"run-{runs}", runs + 1
            folder.mkdir()
            step = 0
            while (status := killed(folder, chosen.steps, draw, duration)) != 0:
                kills += 1
                bad, step = broken(folder, whole, step) if status == 137 else ([str(status)], step)
                found += [{"kill": kills, "broken": bad}] if bad else []
                if status != 137:
                    raise SystemExit((folder / "log").read_text())
            bad = differences(expected, torch.load(folder / "facts.pt", weights_only=True))
            found += [{"run": runs, "differs": bad}] if bad else []
            print(f"{kills} kills, {runs} runs, {len(found)} broken", found[-1:], flush=True)
            shutil.rmtree(folder)
    record = {**environment(), "seed": chosen.seed, "seconds": time.time() - began, "steps": chosen.steps}
    record |= {"kills": kills, "runs": runs, "broken": found, "seconds_of_a_save": duration}
    chosen.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
