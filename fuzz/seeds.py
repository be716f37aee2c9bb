"""Write the seeds of the corpus: tiny adapters of every kind, configurations, and recipes.

python fuzz/seeds.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn

from slicefine import SliceFineConfig, attach

HERE = Path(__file__).parent
ROOT = HERE.parent
KINDS = {
    "alternate": {"mode": "alternate"},
    "row": {"mode": "row", "target_modules": ["0"], "modules_to_save": ["2"]},
    "column": {"mode": "column", "positions": {"0": {"column": [4, 0]}}, "save_values": "base"},
    "mask": {"mode": "random_mask", "mask_fraction": 0.1},
    "beside": {"mode": "alternate", "additive": True},
    "shared": {"mode": "row", "share": [0, 2], "moves": 2, "total_steps": 30, "minimum_steps": 2},
    "reserved": {"mode": "alternate", "reserve": {"0": [["row", 0, 2]]}, "window": 1, "window_dwell": [2]},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 2))


def train(model: nn.Module, steps: int = 5) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Write adapters with and without checksums; mutations get past the first check where there are none."""
    for kind, given in KINDS.items():
        settings = {"r": 2, "interval": 2, "target_modules": ["0", "1"], **given}
        if kind == "shared":
            settings.pop("interval")
        if "window" not in settings:
            model = get_peft_model(network(), SliceFineConfig(**settings))
            train(model)
            with tempfile.TemporaryDirectory() as scratch:
                model.save_pretrained(scratch)
                config = json.loads(Path(scratch, "adapter_config.json").read_text())
                weights = Path(scratch, "adapter_model.safetensors").read_bytes()
            if kind == "row":
                _write("adapter", kind + "-sealed", json.dumps(config).encode() + b"\0" + weights)
            config["checksums"] = None
            _write("adapter", kind, json.dumps(config).encode() + b"\0" + weights)
        made = SliceFineConfig(**settings).to_dict()
        made = {name: sorted(value) if isinstance(value, set) else value for name, value in made.items()}
        _write("config", kind, json.dumps(made).encode())
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    tuner = attach(model, r=2, interval=1)
    train(model)
    with tempfile.TemporaryDirectory() as scratch:
        tuner.save(Path(scratch, "t.safetensors"))
        _write("adapter", "tuner", b"{}\0" + Path(scratch, "t.safetensors").read_bytes())
    for letter, name in (("T", "mrpc"), ("T", "gsm8k"), ("S", "sweeps/rank"), ("S", "sweeps/subset")):
        _write("recipe", name.replace("/", "-"), letter.encode() + (ROOT / "recipes" / f"{name}.yaml").read_bytes())
    plan = {"vary": {"slice.r": [1, 2]}, "tune": {"training.learning_rate": [0.1]}, "view": {"rows": "slice.r"}}
    table = {
        "title": "t",
        "source": "s",
        "columns": ["a"],
        "paper": {"x": ["1/2"]},
        "scales": {"here": plan},
    }
    _write("recipe", "table", b"P" + json.dumps(table, indent=1).encode())


def _write(target: str, name: str, content: bytes) -> None:
    (HERE / "corpus" / target).mkdir(parents=True, exist_ok=True)
    (HERE / "corpus" / target / name).write_bytes(content)


if __name__ == "__main__":
    main()
