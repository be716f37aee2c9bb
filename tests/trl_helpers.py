"""Trainers of TRL that check every step against plain PyTorch, and the tiny data that they train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli_helpers import SHARED
from core_helpers import lines_of
from peft_helpers import layers
from slicefine import Slice, SliceFineConfig, movers_of

BASE = SHARED / "models" / "stories260k"
CHAT = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
A: {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{%- else -%}
U: {{ message.content }} {% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}A: {% endif -%}"""
SENTENCES = ("Once upon a time there was a cat.", "The dog ran.", "Lily and Tom went to the park to play.", "She ate.")


def needs_the_small_llama() -> None:
    if not BASE.is_dir():
        pytest.skip(f"{BASE} is not here")


def base_model(kind: Any = AutoModelForCausalLM, **settings: Any) -> Any:
    """The small Llama in evaluation mode; it has no dropout, so this changes nothing but the flag."""
    return kind.from_pretrained(BASE, **settings).eval()


def plain(model: nn.Module) -> dict[str, Tensor]:
    """What the model computes with now, under the names of a base model; a fully trained head included."""
    found = {}
    for name, parameter in model.named_parameters():
        if "slicefine_" not in name and "original_module" not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[name.replace(".modules_to_save.default", "")] = parameter.detach().clone()
    return found


def tokenizer() -> Any:
    made = AutoTokenizer.from_pretrained(BASE)
    made.chat_template = CHAT
    return made


def slices(mode: str = "alternate", **settings: Any) -> SliceFineConfig:
    """Rank 4, and a move after every second step unless told otherwise."""
    return SliceFineConfig(**{"r": 4, "mode": mode, "interval": 2, "task_type": "CAUSAL_LM", **settings})


def arguments(kind: Any, folder: Path, **settings: Any) -> Any:
    """Five steps on a CPU, without a word."""
    common = {
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return kind(str(folder), **{**common, **settings})


Formula = Callable[[Any, Any, dict[str, Tensor]], Tensor]


def checked(kind: Any, formula: Formula, like: Any) -> Any:
    """A trainer that compares each step's loss and gradients with ``formula`` on plain models.

    Args:
        kind: a trainer of TRL.
        formula: ``(policy, reference, batch) -> loss``, written out in plain PyTorch.
        like: makes the base model: the policy gets the trainer's weights of that step, the reference keeps its own.
    """

    class Checked(kind):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.compared = 0
            self.slices: list[Slice] = []
            self.changed: list[set[str]] = []
            self.before = plain(self.model)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
            self.batch = dict(inputs)
            return super().compute_loss(model, inputs, *args, **settings)

        def training_step(self, model: Any, inputs: Any, *args: Any, **settings: Any) -> Tensor:
            self.note_changes()
            loss: Tensor = super().training_step(model, inputs, *args, **settings)
            policy, reference = like(), like().requires_grad_(False)
            policy.load_state_dict(self.before, strict=False)
            expected = formula(policy, reference, self.batch)
            expected.backward()
            torch.testing.assert_close(loss.detach(), expected.detach())
            self.compare_gradients(policy)
            return loss

        def compare_gradients(self, policy: nn.Module) -> None:
            for name, layer in layers(self.model):
                active = layer.states["default"].journal.active
                dense = policy.get_submodule(name.removeprefix("base_model.model.")).weight.grad
                found = layer.slicefine_active["default"].grad
                wanted = lines_of(dense, active)
                torch.testing.assert_close(found[: wanted.shape[0], : wanted.shape[1]], wanted)
                self.compared += 1

        def note_changes(self) -> None:
            """Which rows and columns changed since the last step: those of one slice, and no others."""
            now, active = plain(self.model), next(iter(movers_of(self.model)[0].slices().values()))
            if self.slices:
                self.changed.append(only_slices_changed(self.model, self.before, now))
            self.slices.append(active)
            self.before = now

    return Checked


def only_slices_changed(model: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of changed weights, all of them slices' and changed inside the slice that the last step trained."""
    trained = {}
    for name, layer in layers(model):
        stepped = [v for v in layer.states["default"].journal.visits if v.last_step >= v.first_step]
        trained[name.removeprefix("base_model.model.") + ".weight"] = stepped[-1].slice
    changed = {name for name in before if "score" not in name and not torch.equal(before[name], after[name])}
    assert changed <= trained.keys()
    for name in changed:
        outside = (before[name] != after[name]).clone()
        lines_of(outside, trained[name]).zero_()
        assert not outside.any(), name
    return changed


def log_probs(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each next token, ``(batch, tokens - 1)``."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    found: Tensor = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return found
