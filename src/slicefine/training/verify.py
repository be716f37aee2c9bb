"""Proof after a run: what was saved predicts the same when reloaded, and unloading gives the original weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel

from ..quantised import plain_values
from .session import Session
from .trained import load_trained

__all__ = ["LIMIT", "predictions", "same_predictions", "same_weights"]

LIMIT = 100_000_000  # parameters above which a second copy of the model is not loaded unless asked for
_ROWS = 64


@torch.no_grad()
def predictions(model: Any, session: Session, rows: int = _ROWS) -> torch.Tensor:
    """The model's outputs on the first rows of the validation set (of the train set if there is none), on the CPU.

    Rows whose pictures or clips are drawn at random are drawn from one seed.
    """
    splits = session.prepared.splits
    data = splits.get("validation", splits["train"])
    count = min(rows, len(data))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batch = session.prepared.collator([data[i] for i in range(count)])
    device = next(model.parameters()).device
    model.eval()
    logits: torch.Tensor = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
    return logits.float().cpu()


def same_predictions(session: Session, folder: Path) -> bool:
    """Whether the saved files, loaded into a fresh base, give bit-identical outputs."""
    # the Trainer's autocast would round here what the saved files compute in full
    plain = extract_model_from_parallel(session.model, keep_fp32_wrapper=False)
    expected = predictions(plain, session)
    reloaded = load_trained(folder, trust_remote_code=session.settings.model.trust_remote_code).model.to(
        next(session.model.parameters()).device
    )
    return torch.equal(expected, predictions(reloaded, session))


def same_weights(session: Session) -> bool | None:
    """Whether unloading the adapter gives every original weight back, bit for bit. None for what is no adapter.

    The session's model is unloaded by this, so it comes last. The new head has no original and is left out.
    """
    if session.settings.chosen_method.saves != "adapter" or not hasattr(session.model.base_model, "unload"):
        return None
    fresh = session.task.load()
    unloaded = session.model.unload().state_dict()
    heads = tuple(f"{name}." for name in session.loaded.new_modules)
    return all(
        torch.equal(plain_values(tensor).cpu(), plain_values(unloaded[name]).cpu())
        for name, tensor in fresh.model.state_dict().items()
        if not name.startswith(heads or "\0")
    )
