"""PEFT's MetaMathQA benchmark: its runner reads our folders, and its kind of loop moves the slices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from peft_helpers import llama
from slicefine import SliceFineConfig, movers_of

EXPERIMENTS = Path(__file__).resolve().parents[1] / "recipes" / "peft_metamathqa" / "experiments"
FOLDERS = sorted(file.parent for file in EXPERIMENTS.glob("*/*/adapter_config.json"))


def test_there_are_experiments():
    assert FOLDERS
    assert all(folder.parent.name == "slicefine" for folder in FOLDERS)  # experiments/METHOD/NAME, as the runner asks


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by PEFT
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_runner_reads_the_folder_and_its_loop_moves_the_slices(folder: Path):
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, SliceFineConfig)
    assert config.total_steps == 5000  # the runner's max_steps: it is a loop of its own, and tells nobody
    training = json.loads((folder / "training_params.json").read_text())
    assert training.keys() == {"optimizer_kwargs"}

    config.total_steps, config.minimum_steps, config.moves = 12, 1, 3  # a short run of the same kind
    base = llama(torch.bfloat16, hidden_size=64, intermediate_size=96)  # wide enough for three moves
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, config, autocast_adapter_dtype=True)
    with model.disable_adapter():
        model(input_ids=torch.ones(1, 4, dtype=torch.long))  # the runner's loss on Wikipedia text
    optimizer = torch.optim.AdamW(model.parameters(), **training["optimizer_kwargs"])  # frozen ones included
    torch.manual_seed(0)
    for _ in range(12):
        batch = torch.randint(3, 30, (2, 8))
        optimizer.zero_grad()
        model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    mover = movers_of(model)[0]
    assert mover.visits == 4
    touched = {name for name, tensor in before.items() if not torch.equal(tensor, base.state_dict()[_inner(name)])}
    assert len(touched) == 14  # seven projections of two blocks
    assert all("proj" in name for name in touched)


def _inner(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    return f"{stem}.base_layer.{kind}" if "proj" in stem else name
