"""PROPETL: one prototype that all layers share, of which each layer uses the entries that its own mask keeps.

A mask keeps the entries with the largest scores; scores are trained straight through the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from ..errors import ConfigError, UnsupportedError
from ..weights import matrix_of
from .base import Base, Method, MethodLayer, Options, block_outputs, freeze, numbers, wrap_layers
from .bottleneck import Adapter, AfterLayer, activation, seeded, size, width_of
from .prefix import Prompt, Site, add_prefixes, linear, prefix_count, sites

__all__ = ["METHODS", "Mask"]


class _Largest(Function):
    """One where a score is among the largest, zero elsewhere; gradients pass as if it were the identity."""

    @staticmethod
    def forward(ctx: FunctionCtx, scores: Tensor, keep: float) -> Tensor:
        kept = scores.numel() - int((1 - keep) * scores.numel())
        mask = torch.zeros_like(scores)
        mask.view(-1)[scores.flatten().topk(kept).indices] = 1
        return mask

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Mask(nn.Module):
    """Chooses entries of a shared tensor.

    Args:
        shape: of the tensor.
        fan: scores are drawn uniformly from minus to plus one over its root.
        keep: share of entries that stay.
        generator: what draws them.
    """

    def __init__(self, shape: Sequence[int], fan: int, keep: float, generator: torch.Generator) -> None:
        super().__init__()
        self.keep = keep
        # 32 bits whatever the model has: a small step must not be lost, or the choice never changes
        self.scores = nn.Parameter(torch.empty(*shape, dtype=torch.float32))
        nn.init.uniform_(self.scores, -(fan**-0.5), fan**-0.5, generator=generator)

    def forward(self, shared: Tensor) -> Tensor:
        """The shared tensor with all other entries zero."""
        mask: Tensor = _Largest.apply(self.scores.abs(), self.keep)  # type: ignore[no-untyped-call]
        return shared * mask.to(shared.dtype)


class MaskedAdapter(nn.Module):
    """A shared adapter under one layer's masks; biases are not masked."""

    def __init__(self, shared: Adapter, keep: float, generator: torch.Generator) -> None:
        super().__init__()
        self.shared = shared
        down, up = shared.down.weight.shape, shared.up.weight.shape
        self.down, self.up = Mask(down, down[0], keep, generator), Mask(up, up[0], keep, generator)

    def forward(self, x: Tensor) -> Tensor:
        """States ``(..., width)`` to what is added to them, of the same shape."""
        down, up = self.shared.down, self.shared.up
        inner = self.shared.shape(F.linear(x, self.down(down.weight), down.bias))
        return F.linear(inner, self.up(up.weight), up.bias)


class BeforeNorm(MethodLayer):
    """A normalisation of a sum, with an adapter that reads its output and adds to its input: N(s + A(N(s)))."""

    def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x: Tensor) -> Tensor:
        """The sum of a part and its residual to the normalised state."""
        y: Tensor = self.base(x + self.adapter(self.base(x)))
        return y


class Factors(nn.Module):
    """The two matrices of a low-rank change; the second one starts at zero."""

    def __init__(self, like: Tensor, r: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = like.shape
        self.A = nn.Parameter(torch.empty(r, columns, dtype=like.dtype))
        self.B = nn.Parameter(torch.zeros(rows, r, dtype=like.dtype))
        nn.init.uniform_(self.A, -(columns**-0.5), columns**-0.5, generator=generator)


class MaskedFactors(MethodLayer):
    """A dense layer with shared low-rank factors under its own masks."""

    def __init__(self, base: nn.Module, shared: Factors, scale: float, keep: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.shared, self.scale = base, shared, scale
        A, B = shared.A.shape, shared.B.shape
        self.mask_A, self.mask_B = Mask(A, A[1], keep, generator), Mask(B, B[1], keep, generator)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + F.linear(F.linear(x, self.mask_A(self.shared.A)), self.mask_B(self.shared.B)) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base's layer with the change added to its weight."""
        change = self.mask_B(self.shared.B) @ self.mask_A(self.shared.A)
        matrix_of(self.base).add_(change * self.scale)
        return self.base


class MaskedPrefix(nn.Module):
    """One layer's keys and values: those that all layers share, under its mask."""

    def __init__(self, prompt: Prompt, up: nn.Linear, mask: Mask) -> None:
        super().__init__()
        self.prompt, self.up, self.mask = prompt, up, mask

    def forward(self) -> Tensor:
        """``(length, 2 * heads * size)``, keys first."""
        found: Tensor = self.mask(self.up(self.prompt()))
        return found


def _keep(options: Options) -> float:
    """The share of entries that a mask keeps.

    Raises:
        ConfigError: if it is no share.
    """
    if not 0 < options["keep"] <= 1:
        raise ConfigError(f"method.options.keep={options['keep']!r}: expected more than 0 and at most 1.")
    return float(options["keep"])


def _rate(name: str, options: Options) -> float:
    return float(options["mask_rate"]) if name.endswith(".scores") else 1.0


def _one(values: list[int], what: str) -> int:
    """What all layers have in common, since they share one prototype.

    Raises:
        UnsupportedError: if they differ.
    """
    if len(set(values)) != 1:
        raise UnsupportedError(f"propetl shares one prototype, and {what} differ: {sorted(set(values))}.")
    return values[0]


def _places(base: Base) -> tuple[list[str], int]:
    """The layers that get an adapter, and their width: what normalises a part's sum, else the part's last layer."""
    _, last = block_outputs(base)
    parents = [name.rpartition(".")[0] for name in last]
    norms = [f"{parent}.LayerNorm" for parent in parents if hasattr(base.model.get_submodule(parent), "LayerNorm")]
    return (norms if len(norms) == len(last) else last), _one([width_of(base, name) for name in last], "widths")


def _bottleneck(options: Options, width: int) -> int:
    return max(width // int(options["reduction"]), 1)


def _adapter(base: Base, options: Options) -> nn.Module:
    (names, width), keep, generator = _places(base), _keep(options), seeded(base)
    draw = partial(nn.init.normal_, std=0.02, generator=generator)
    like = next(base.model.get_submodule(names[0]).parameters())
    shared = Adapter(like, width, _bottleneck(options, width), activation(options)).start(draw, draw)

    def make(name: str, layer: nn.Module) -> nn.Module:
        adapter = MaskedAdapter(shared, keep, generator)
        return BeforeNorm(layer, adapter) if name.endswith(".LayerNorm") else AfterLayer(layer, adapter)

    return wrap_layers(base, names, make)


def _adapter_count(base: Base, options: Options) -> int:
    names, width = _places(base)
    bottleneck = _bottleneck(options, width)
    return size(width, bottleneck) + len(names) * 2 * width * bottleneck


def _shared_places(base: Base) -> dict[str, tuple[str, int, int]]:
    """Each target layer's place within its block, which layers of all blocks share, with its outputs and inputs."""
    return {
        name: (".".join(part for part in name.split(".") if not part.isdigit()), rows, columns)
        for name, rows, columns in numbers(base)
    }


def _lora(base: Base, options: Options) -> nn.Module:
    r, keep, generator = int(options["r"]), _keep(options), seeded(base)
    places, shared = _shared_places(base), dict[tuple[str, int, int], Factors]()

    def make(name: str, layer: nn.Module) -> nn.Module:
        if places[name] not in shared:
            shared[places[name]] = Factors(matrix_of(layer), r, generator)
        return MaskedFactors(layer, shared[places[name]], options["alpha"] / r, keep, generator)

    return wrap_layers(base, list(places), make)


def _lora_count(base: Base, options: Options) -> int:
    places, r = _shared_places(base), int(options["r"])
    tensors = [*places.values(), *set(places.values())]  # a mask per layer, and the prototypes
    return sum(r * (rows + columns) for _, rows, columns in tensors)


def _prefix(base: Base, options: Options) -> nn.Module:
    found, keep, generator = sites(base), _keep(options), seeded(base)
    length, bottleneck = int(options["length"]), int(options["bottleneck"])
    entries = _one([site.entries for site in found], "entries of keys and values")
    like = next(base.model.parameters())
    prompt = Prompt(like, length, found[0].width, bottleneck, generator)
    up = linear(like, bottleneck, entries, generator)

    def values(site: Site) -> nn.Module:
        return MaskedPrefix(prompt, up, Mask((length, entries), length * entries, keep, generator))

    freeze(base)
    return add_prefixes(base, found, values)


def _prefix_count(base: Base, options: Options) -> int:
    found, length, bottleneck = sites(base), int(options["length"]), int(options["bottleneck"])
    # one layer's prefix is what all share
    return prefix_count(found[:1], length, bottleneck) + sum(length * site.entries for site in found)


_SOURCE = "Zeng et al. 2023 (arXiv 2305.17682); compared with the authors' layers (ChaosCodes/ProPETL)"
_DIFFERS = "the file holds scores in 32 bits where the original's holds masks in one"

METHODS = (
    Method(
        name="propetl_adapter",
        title="PROPETL (adapter)",
        source=_SOURCE,
        formula="2db + b + d and a mask of 2db per block, for blocks of width d and b = d / reduction",
        build=_adapter,
        count=_adapter_count,
        differs=(
            f"{_DIFFERS}; where a block normalises before its parts, adapters follow the last layer of the "
            "feed-forward part, as in the authors' T5"
        ),
        options={"reduction": 12, "non_linearity": "relu", "keep": 0.5, "mask_rate": 30.0},
        learning_rate=1e-4,
        starts_at_base=False,
        merges=False,
        groups=_rate,
    ),
    Method(
        name="propetl_prefix",
        title="PROPETL (prefix)",
        source=_SOURCE,
        formula="ld + db + b + (b + 1)2k and a mask of 2lk per layer, with the letters of prefix",
        build=_prefix,
        count=_prefix_count,
        differs=_DIFFERS,
        options={"length": 64, "bottleneck": 512, "keep": 0.1, "mask_rate": 1.0},
        learning_rate=1e-4,
        starts_at_base=False,
        merges=False,
        groups=_rate,
    ),
    Method(
        name="propetl_lora",
        title="PROPETL (LoRA)",
        source=_SOURCE,
        formula="r(outputs + inputs) per weight for its mask, and as much for what all blocks share",
        build=_lora,
        count=_lora_count,
        differs=f"{_DIFFERS}; weights are those of slice.target_modules, of queries and values in the original",
        options={"r": 32, "alpha": 48, "keep": 0.1, "mask_rate": 300.0},
        learning_rate=1e-4,
        groups=_rate,
    ),
)
