"""Where an adapter's base model is: a folder, the hub, or the package that carries the embedded default."""

from __future__ import annotations

from ..errors import ConfigError
from ..files.adapter import Adapter
from ..files.checkpoint import Checkpoint, find_checkpoint
from ..tasks.minilm import HUB_ID, minilm_folder

__all__ = ["open_base"]


def open_base(adapter: Adapter, model: str | None = None) -> Checkpoint:
    """The weights that an adapter was trained on, opened for reading single lines.

    Args:
        adapter: it names its base.
        model: a folder, a name on the hub, or "minilm" instead.

    Raises:
        AdapterFileError: if they cannot be found or read.
        ConfigError: for "minilm" where its package is not installed.
    """
    if model == "minilm":
        return Checkpoint(minilm_folder())
    if model is None and adapter.config.get("base_model_name_or_path") == HUB_ID:
        try:
            return Checkpoint(minilm_folder())
        except ConfigError:  # not installed: the hub may have it
            pass
    return Checkpoint(find_checkpoint(adapter, model))
