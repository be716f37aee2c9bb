"""How transformers is told to load a model quantised, and what is left as it is."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ..errors import ConfigError
from .settings import ModelSettings

__all__ = ["quantisation"]

_PACKAGES = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "int8": "torchao"}


def quantisation(auto: Any, settings: ModelSettings, path: str) -> Any:
    """The configuration that ``from_pretrained`` takes for ``model.quantize``.

    Args:
        auto: the auto class.
        settings: with ``quantize``.
        path: of the model.

    Raises:
        ConfigError: if the package that does it is not installed.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    kind = settings.quantize or ""
    package = _PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f'model.quantize={kind} needs {package}, which is not installed; run: pip install "slicefine[quant]"'
        )
    kept = _heads(auto, settings, path)
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)
    made: Any = BitsAndBytesConfig
    if kind == "8bit":
        return made(load_in_8bit=True, llm_int8_skip_modules=kept)
    compute = torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
    return made(load_in_4bit=True, llm_int8_skip_modules=kept, **nf4)


def _heads(auto: Any, settings: ModelSettings, path: str) -> list[str]:
    """Modules beside the base model: a head is new and trained whole, or a language model's output layer."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=settings.trust_remote_code)
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]
