"""Prefixes: trained keys and values that every query of an attention layer sees beside those of the tokens.

They enter through transformers' attention interface, after positions were put into the tokens' keys, so that a
prefix has no position and the tokens keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UnsupportedError
from .base import Base, Method, MethodLayer, Options, freeze
from .bottleneck import seeded, switch, undrawn

__all__ = [
    "METHODS",
    "Prefix",
    "Prompt",
    "Site",
    "add_prefixes",
    "linear",
    "prefix_count",
    "prefix_values",
    "sites",
    "sizes",
]

_NAME = "slicefine_prefix"  # of the attention function, and of the submodule that an attention layer gets


class Site(NamedTuple):
    """An attention layer, and the shape of its keys.

    Attributes:
        name: path in the model.
        heads: heads of keys and values.
        size: entries of a head.
        width: entries of a state.
    """

    name: str
    heads: int
    size: int
    width: int

    @property
    def entries(self) -> int:
        """Entries of one key and one value over all heads."""
        return 2 * self.heads * self.size


class Prompt(nn.Module):
    """Trained states, brought to a bottleneck: what all layers' prefixes are computed from.

    Args:
        like: parameter whose dtype is taken.
        length: number of states.
        width: entries of a state.
        bottleneck: entries that come out.
    """

    def __init__(self, like: Tensor, length: int, width: int, bottleneck: int, generator: torch.Generator) -> None:
        super().__init__()
        self.states = nn.Parameter(torch.empty(length, width, dtype=like.dtype).normal_(generator=generator))
        self.down = linear(like, width, bottleneck, generator)

    def forward(self) -> Tensor:
        """``(length, bottleneck)``."""
        return torch.tanh(self.down(self.states))


class Projected(nn.Module):
    """One layer's keys and values from the prompt that all share."""

    def __init__(self, prompt: Prompt, up: nn.Linear) -> None:
        super().__init__()
        self.prompt, self.up = prompt, up

    def forward(self) -> Tensor:
        """``(length, 2 * heads * size)``, keys first."""
        found: Tensor = self.up(self.prompt())
        return found


class Flat(nn.Module):
    """One layer's keys and values as they are."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self) -> Tensor:
        """``(length, 2 * heads * size)``, keys first."""
        return self.values


class Prefix(MethodLayer):
    """A submodule of an attention layer that holds its prefix; it has no layer of the base inside.

    Args:
        site: the attention layer.
        values: returns keys and values side by side, ``(length, 2 * heads * size)``.
    """

    def __init__(self, site: Site, values: nn.Module) -> None:
        super().__init__()
        self.site, self.values = site, values

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values, both ``(batch, heads, length, size)``."""
        pair = self.values().unflatten(-1, (2, self.site.heads, self.site.size))
        keys, values = pair.permute(1, 2, 0, 3).unsqueeze(1).expand(-1, batch, -1, -1, -1)
        return keys, values


def linear(like: Tensor, inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A dense layer, drawn as PyTorch draws one, but from a generator."""
    layer = undrawn(like, inputs, outputs)
    bound = inputs**-0.5
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return layer


def sites(base: Base) -> list[Site]:
    """All self-attention layers of a model.

    Raises:
        UnsupportedError: if the model's attention cannot be given more keys and values.
    """
    model, name = base.model, type(base.model).__name__
    config = getattr(model, "config", None)
    able = getattr(model, "_can_set_attn_implementation", lambda: False)() and getattr(model, "_supports_sdpa", False)
    if config is None or not able or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"prefixes enter through transformers' attention interface, in an encoder or a decoder with sdpa; {name} "
            "is none. Use prompt, lora or houlsby."
        )
    found = [path for path, m in model.named_modules() if isinstance(getattr(m, "is_causal", None), bool)]
    found = [path for path in found if hasattr(model.get_submodule(path), "config")]
    crossed = [path for path in found if "cross" in type(model.get_submodule(path)).__name__.lower()]
    if not found or crossed:
        raise UnsupportedError(f"prefixes: {name} has {len(found)} attention layers, {len(crossed)} of them crossed.")
    return [_site(model, path) for path in found]


def _site(model: nn.Module, path: str) -> Site:
    layer = model.get_submodule(path)
    config: Any = layer.config
    heads = config.num_attention_heads
    size = getattr(layer, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    return Site(path, getattr(config, "num_key_value_heads", None) or heads, int(size), config.hidden_size)


def add_prefixes(base: Base, found: list[Site], values: Callable[[Site], nn.Module]) -> nn.Module:
    """Give each attention layer the prefix ``values(site)``; nothing is frozen or unfrozen."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    for site in found:
        layer = base.model.get_submodule(site.name)
        prefix = Prefix(site, values(site)).to(next(layer.parameters()).device)
        layer.register_module(_NAME, prefix)
    base.model.set_attn_implementation(_NAME)  # type: ignore[operator]
    return base.model


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers: the prefix of ``module``, if it has one, before its keys and values."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    prefix = getattr(module, _NAME, None)
    if prefix is not None:
        _check(module, prefix.site, key, value, more)
        causal = more.get("is_causal")
        causal = module.is_causal if causal is None else causal
        keys, values = (part.to(key.dtype) for part in prefix(key.shape[0]))
        attention_mask = _opened(attention_mask, query, key, keys.shape[2], bool(causal))
        key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        more["is_causal"] = False  # the mask says it all
    attended: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    return attended


def _opened(mask: Tensor | None, query: Tensor, key: Tensor, length: int, causal: bool) -> Tensor | None:
    """A mask ``(..., queries, keys)`` with the prefix before it, which all queries see; None where they see all."""
    if mask is None and causal and query.shape[2] > 1:
        # as sdpa takes a causal mask that it is not given: the first query stands at the first key
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None:
        return None
    return F.pad(mask, (length, 0), value=1.0 if mask.dtype == torch.bool else 0.0)


def _check(module: nn.Module, site: Site, key: Tensor, value: Tensor, more: dict[str, Any]) -> None:
    unknown = [name for name in ("position_bias", "cache", "s_aux", "softcap") if more.get(name) is not None]
    if unknown:
        raise UnsupportedError(
            f"prefixes: {type(module).__name__} attends with {', '.join(unknown)}; use lora instead."
        )
    if not key.shape[1::2] == value.shape[1::2] == (site.heads, site.size):
        raise UnsupportedError(
            f"prefixes: {type(module).__name__} has keys {tuple(key.shape)} and values {tuple(value.shape)}, and its "
            f"configuration tells of {site.heads} heads of {site.size}; use lora instead."
        )


def prefix_values(base: Base, found: list[Site], length: int, bottleneck: int | None) -> Callable[[Site], nn.Module]:
    """What makes each layer's keys and values; without a bottleneck they are trained as they are."""
    generator = seeded(base)
    like = next(base.model.parameters())
    if bottleneck is None:
        return lambda site: Flat(torch.empty(length, site.entries, dtype=like.dtype).normal_(generator=generator))
    prompt = Prompt(like, length, found[0].width, bottleneck, generator)
    return lambda site: Projected(prompt, linear(like, bottleneck, site.entries, generator))


def prefix_count(found: list[Site], length: int, bottleneck: int | None) -> int:
    """Entries that `prefix_values` trains."""
    if bottleneck is None:
        return length * sum(site.entries for site in found)
    prompt = length * found[0].width + found[0].width * bottleneck + bottleneck
    return prompt + sum((bottleneck + 1) * site.entries for site in found)


def sizes(options: Options, bottleneck: str = "bottleneck") -> tuple[int, int | None]:
    """Length of prefixes, and the bottleneck that they come through, if they do."""
    return int(options["length"]), None if switch(options, "flat") else int(options[bottleneck])


def _build(base: Base, options: Options) -> nn.Module:
    found = sites(base)
    values = prefix_values(base, found, *sizes(options))
    freeze(base)
    return add_prefixes(base, found, values)


METHODS = (
    Method(
        name="prefix",
        title="Prefix-tuning",
        source="Li & Liang 2021 (arXiv 2101.00190); compared with adapters 1.3.0 (prefix_tuning)",
        formula=(
            "ld + db + b + L(b + 1)2k for l states, width d, bottleneck b and L layers with keys of k entries in all; "
            "2Llk where flat"
        ),
        build=_build,
        count=lambda base, options: prefix_count(sites(base), *sizes(options)),
        differs="keys of a prefix are not rotated by rotary positions, and tokens keep their positions",
        options={"length": 30, "bottleneck": 512, "flat": False},
        learning_rate=5e-4,
        starts_at_base=False,
        merges=False,
    ),
)
