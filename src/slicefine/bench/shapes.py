"""Models by their shape: built from a configuration, never downloaded, with one batch of inputs and a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError

__all__ = ["SHAPES", "Shape", "find_shape", "loss_of", "make_batch", "make_model", "step_loss"]


@dataclass(frozen=True)
class Shape:
    """The size of a model and of its batch.

    Attributes:
        name: what users call it.
        family: roberta, llama, vit or videomae.
        layers, width, intermediate, heads, kv_heads: the transformer's sizes; ``kv_heads`` for llama.
        vocabulary: tokens of a text model.
        batch, length: rows, and tokens per row of a text model.
        lm_head: whether the loss is a cross-entropy over the vocabulary; else it is on the hidden states, because
            logits would hide activations.
    """

    name: str
    family: str
    layers: int = 12
    width: int = 768
    intermediate: int = 3072
    heads: int = 12
    kv_heads: int = 12
    vocabulary: int = 1000
    batch: int = 16
    length: int = 128
    lm_head: bool = False

    @property
    def items(self) -> tuple[int, str]:
        """What one step works on: tokens of texts, images or clips."""
        if self.family in ("roberta", "llama"):
            return self.batch * self.length, "tokens"
        return self.batch, "images" if self.family == "vit" else "clips"


SHAPES = {
    shape.name: shape
    for shape in (
        # the two types and sizes of the project's own targets
        Shape("roberta", "roberta", layers=6),
        Shape("llama", "llama", layers=6, intermediate=2048, batch=4, length=256),
        Shape("roberta-base", "roberta", vocabulary=50265, batch=64),
        Shape("roberta-large", "roberta", 24, 1024, 4096, 16, vocabulary=50265, batch=32),
        Shape("llama-160m", "llama", 12, 768, 3072, 12, 12, 32000, 4, 256),
        Shape("llama-1b", "llama", 16, 2048, 8192, 32, 8, 128256, 4, 512),
        Shape("llama-3b", "llama", 28, 3072, 8192, 24, 8, 128256, 4, 768),
        Shape("vit-b16", "vit", batch=64),
        Shape("videomae-base", "videomae", batch=64),
    )
}


def find_shape(name: str, **changes: Any) -> Shape:
    """A known shape with the sizes that are not None replaced.

    Raises:
        ConfigError: for an unknown name, or a width that its heads of 64 do not divide.

    Example:
        >>> find_shape("llama", width=256, layers=2).intermediate
        640
    """
    if name not in SHAPES:
        raise ConfigError(f"bench.models: {name!r} is unknown; expected one of {', '.join(SHAPES)}.")
    shape = replace(SHAPES[name], **{key: value for key, value in changes.items() if value is not None})
    if shape.width != SHAPES[name].width:
        if shape.width % 64:
            raise ConfigError(f"bench.width={shape.width} must be a multiple of 64, the width of a head.")
        inner = 4 * shape.width if shape.family != "llama" else (8 * shape.width // 3) // 64 * 64
        shape = replace(shape, intermediate=inner, heads=shape.width // 64, kv_heads=shape.width // 64)
    return shape


def make_model(shape: Shape, seed: int = 0) -> nn.Module:
    """A randomly initialised model of a shape, without dropout, frozen."""
    torch.manual_seed(seed)
    model = _FAMILIES[shape.family](shape)
    return model.requires_grad_(False)


def _roberta(shape: Shape) -> nn.Module:
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaModel

    config = RobertaConfig(
        vocab_size=shape.vocabulary,
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.length + 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return RobertaForMaskedLM(config) if shape.lm_head else RobertaModel(config, add_pooling_layer=False)


def _llama(shape: Shape) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.length,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config) if shape.lm_head else LlamaModel(config)


def _vision(shape: Shape, video: bool) -> nn.Module:
    from transformers import VideoMAEConfig, VideoMAEModel, ViTConfig, ViTModel

    sizes: dict[str, Any] = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.width,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
    }
    return VideoMAEModel(VideoMAEConfig(**sizes)) if video else ViTModel(ViTConfig(**sizes), add_pooling_layer=False)


_FAMILIES: dict[str, Callable[[Shape], nn.Module]] = {
    "roberta": _roberta,
    "llama": _llama,
    "vit": lambda shape: _vision(shape, video=False),
    "videomae": lambda shape: _vision(shape, video=True),
}


def make_batch(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 1) -> dict[str, Tensor]:
    """One batch of random inputs: token ids ``(batch, length)``, or pixels."""
    generator = torch.Generator().manual_seed(seed)
    if shape.family in ("roberta", "llama"):
        ids = torch.randint(3, shape.vocabulary, (shape.batch, shape.length), generator=generator).to(device)
        return {"input_ids": ids} | ({"labels": ids} if shape.lm_head else {})
    size = (shape.batch, 3, 224, 224) if shape.family == "vit" else (shape.batch, 16, 3, 224, 224)
    return {"pixel_values": torch.randn(size, generator=generator).to(device, dtype)}


def step_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of one step: the model's own with a head, else the mean square of every other hidden feature.

    Of all features it would be constant after a norm, and its gradients rounding errors.
    """
    return loss_of(model(**batch), batch)


def loss_of(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """See `step_loss`."""
    if "labels" in batch:
        loss: Tensor = output.loss
        return loss
    hidden: Tensor = output.last_hidden_state
    return hidden[..., ::2].float().square().mean()
