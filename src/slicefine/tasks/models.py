"""Load a transformers model and its tokenizer, and say which parts of it are new."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.nn.modules.dropout import _DropoutNd

from ..errors import ConfigError
from ..quantised import prepare
from .base import Loaded
from .minilm import HUB_ID, minilm_folder
from .quantisation import quantisation
from .settings import ModelSettings

__all__ = ["load_model", "load_tokenizer", "resolve_path"]


def resolve_path(path: str) -> str:
    """What ``from_pretrained`` should get: the alias "minilm" is resolved, a local path must exist.

    Raises:
        ConfigError: for a path that looks local and is no folder.
    """
    if path == "minilm":
        return str(minilm_folder())
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local)
    if path.startswith((".", "/", "~")) or local.exists() or path.count("/") > 1:
        raise ConfigError(
            f"model.path={path!r}: no such folder. Give a folder in Hugging Face layout (config.json, "
            'model.safetensors), a hub id such as "FacebookAI/roberta-base", or "minilm".'
        )
    return path


def load_model(auto: Any, settings: ModelSettings, **config: Any) -> Loaded:
    """Load a model without its processor.

    Args:
        auto: the auto class, such as ``AutoModelForSequenceClassification``.
        settings: which model.
        **config: fields of the model's configuration to set (``num_labels``, for example).

    Raises:
        ConfigError: if the model is not found, cannot be loaded, or has no dropout where a rate is asked for.
    """
    if settings.config is not None:
        return _from_config(auto, settings, config)
    assert settings.path is not None
    path = resolve_path(settings.path)
    if settings.attention is not None:
        config["attn_implementation"] = settings.attention
    if settings.quantize is not None:
        config["quantization_config"] = quantisation(auto, settings, path)
    try:
        model, info = auto.from_pretrained(
            path,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            dtype=settings.dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **config,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        here = "" if Path(path).is_dir() else " is no folder here, and"
        raise ConfigError(
            f"model.path={settings.path!r}{here} cannot be loaded as {auto.__name__}: {error} Check the name, the "
            "network, and that the model fits the task."
        ) from error
    if settings.dropout is not None and not _set_dropout(model, settings.dropout) and settings.dropout > 0:
        raise ConfigError(
            f"model.dropout={settings.dropout}: {type(model).__name__} has no dropout to set; leave model.dropout out."
        )
    if settings.path == "minilm":  # the adapter's card should name its base as other machines know it
        model.config._name_or_path = HUB_ID
    if settings.quantize is not None:
        for module in model.modules():
            prepare(module)  # a run evaluates before it trains
    changed = [item[0] if isinstance(item, tuple) else item for item in info["mismatched_keys"]]
    return Loaded(model, None, _new_modules(model, [*info["missing_keys"], *changed]))


def load_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer, with a padding token.

    Raises:
        ConfigError: if there is none.
    """
    from transformers import AutoTokenizer

    name = settings.tokenizer or settings.path
    if name is None:
        raise ConfigError("model.tokenizer is missing: a model built from model.config brings none of its own.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_path(name), revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"no tokenizer can be loaded from {name!r}: {error} Set model.tokenizer.") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers makes an empty one up
        raise ConfigError(
            f"no tokenizer can be loaded from {name!r}: it holds no vocabulary. Copy the tokenizer's files there, or "
            "set model.tokenizer."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def longest(tokenizer: Any, config: Any, wanted: int | None) -> int:
    """Sequence length to cut at: what was asked for, within what model and tokenizer can take.

    Raises:
        ConfigError: if more was asked for than the model's positions allow.
    """
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 10**9
    limit = min(int(positions), int(tokenizer.model_max_length))
    if wanted is not None and wanted > limit:
        raise ConfigError(f"task.max_length={wanted} is more than the {limit} tokens that the model can take.")
    return wanted or min(limit, 512)


def _from_config(auto: Any, settings: ModelSettings, fields: dict[str, Any]) -> Loaded:
    from transformers import AutoConfig

    given = {key: value for key, value in (settings.config or {}).items() if key != "model_type"}
    try:
        config = AutoConfig.for_model((settings.config or {})["model_type"], **given, **fields)
        dtype = {} if settings.dtype == "auto" else {"dtype": settings.dtype}
        model = auto.from_config(config, trust_remote_code=settings.trust_remote_code, **dtype)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.config does not describe a model for {auto.__name__}: {error}") from error
    return Loaded(model, None, _new_modules(model, []))  # trained whole in any case


def _set_dropout(model: Any, rate: float) -> int:
    """Set the rate of all dropout in a model, modules and the rates that modules keep as numbers; how many it found.

    The configuration keeps its own rates: what is saved later is the model as it came.
    """
    found = 0
    for module in model.modules():
        names = [name for name in vars(module) if "dropout" in name or name.endswith("_pdrop")]
        names += ["p"] if isinstance(module, _DropoutNd) else []
        for name in names:
            if type(getattr(module, name)) in (int, float):  # a flag is no rate
                setattr(module, name, rate)
                found += 1
    return found


def _new_modules(model: Any, missing: Iterable[str]) -> list[str]:
    """Modules that a fresh copy of the base would fill with other random numbers: train and save them whole."""
    heads = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    if model.get_output_embeddings() is not None:  # a language model's head is pretrained
        heads = []
    owners = sorted({key.rpartition(".")[0] for key in missing} - {""})
    inside = [name for name in owners if not any(name == head or name.startswith(f"{head}.") for head in heads)]
    return [*heads, *inside]
