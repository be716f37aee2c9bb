"""The methods that are timed, each as a function from a frozen model to a model that trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError, UnsupportedError
from ..mover import movers_of

__all__ = ["FLOOR", "METHODS", "SUITES", "Method", "find_method", "make_optimizer", "methods_of"]

FLOOR = "floor"
_NORMS = {
    "roberta": ["attention.output.LayerNorm", "output.LayerNorm"],
    "llama": ["input_layernorm", "post_attention_layernorm"],
    "vit": ["layernorm_before", "layernorm_after"],
    "videomae": ["layernorm_before", "layernorm_after"],
}


@dataclass(frozen=True)
class Method:
    """One entry of the table.

    Attributes:
        build: ``(frozen model, family) -> model``; may raise `UnsupportedError` where a model lacks what it trains.
        optimizer: ``"adamw"`` (fused) or ``"lora-fa"``.
        slices: whether it is SliceFine: its gradients are checked against a dense backward, and its moves are timed.
        to_inputs: whether gradients flow to the embeddings; a window stops above them.
    """

    build: Callable[[Any, str], Any]
    optimizer: str = "adamw"
    slices: bool = False
    to_inputs: bool = True


def make_optimizer(method: Method, model: Any, rate: float = 1e-5) -> torch.optim.Optimizer | None:
    """The method's optimizer over what it trains, in its fastest form; None if nothing trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return None
    if method.optimizer == "lora-fa":
        from peft.optimizers import create_lorafa_optimizer

        config = model.peft_config["default"]
        made: torch.optim.Optimizer = create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=rate)
        return made
    return torch.optim.AdamW(trained, lr=rate, fused=True)


def _sliced(mode: str, r: int, moves_made: int = 0, **settings: Any) -> Method:
    def build(model: Any, family: str) -> Any:
        from peft import get_peft_model

        from ..peft import SliceFineConfig

        # timed steps must not move by themselves: a move is timed on its own
        config = SliceFineConfig(r=r, mode=mode, interval=10**9, target_modules="all-linear", **settings)
        wrapped = get_peft_model(model, config)
        for _ in range(moves_made):
            movers_of(wrapped)[0].move()
        return wrapped

    return Method(build, slices=True)


def _beside(mode: str, r: int, moves_made: int) -> Method:
    """Slices beside a weight that is never written, as over a quantised base, some of them visited before."""

    def build(model: Any, family: str) -> Any:
        from ..tuner import attach

        head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
        tuner = attach(model, mode=mode, r=r, interval=10**9, additive=True, exclude_modules=head)
        for _ in range(moves_made):
            tuner.move()
        return model

    return Method(build, slices=True)


def _windowed(share: float, down: float) -> Method:
    """Five columns under a window of a share of the blocks, ``down`` of the way from the top place to the lowest."""
    sliced = _sliced("column", 5, window=share)

    def build(model: Any, family: str) -> Any:
        wrapped = sliced.build(model, family)
        (mover,) = movers_of(wrapped)
        layer = next(iter(mover.layers.values()))
        place = layer.states[mover.name].place
        assert place is not None
        for _ in range(round(down * (len(place.window.windows(place.count)) - 1))):
            mover.move()
        return wrapped

    return Method(build, slices=True, to_inputs=False)


def _listing1(mode: str, r: int) -> Method:
    def build(model: Any, family: str) -> Any:
        from ..reference import Listing1Linear
        from ..targets import match_layers

        head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
        for name in match_layers(model, "all-linear", head):  # PEFT's "all-linear" leaves the head out as well
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Listing1Linear(model.get_submodule(name), mode, r))
        return model

    return Method(build)


def _peft(config: Callable[[str], Any], default_dtype: bool = False, **settings: Any) -> Method:
    """A method of PEFT; ``default_dtype`` keeps its fp32 adapters over a half-precision base."""

    def build(model: Any, family: str) -> Any:
        from peft import get_peft_model

        return get_peft_model(model, config(family), autocast_adapter_dtype=default_dtype)

    return Method(build, **settings)


def _config(name: str, **settings: Any) -> Callable[[str], Any]:
    def make(family: str) -> Any:
        import peft

        return getattr(peft, name)(target_modules="all-linear", **settings)

    return make


def _layer_norms(family: str) -> Any:
    from peft import LNTuningConfig

    return LNTuningConfig(target_modules=_NORMS[family])


def _ia3(family: str) -> Any:
    """(IA)^3 on keys, values and the feed-forward's last layer, as in its paper."""
    from peft import IA3Config

    last = {"roberta": r".*layer\.\d+\.output\.dense", "llama": r".*down_proj"}.get(
        family, r".*mlp\.fc2|.*output\.dense"
    )
    keys = {"roberta": r".*(key|value)", "llama": r".*(k_proj|v_proj)"}.get(family, r".*(key|value|k_proj|v_proj)")
    return IA3Config(target_modules=f"{keys}|{last}", feedforward_modules=last)


def _bitfit(model: Any, family: str) -> Any:
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    if not biases:
        raise UnsupportedError(f"bitfit trains biases, and a {family} model has none.")
    for bias in biases:
        bias.requires_grad_(True)
    return model


def _full(model: Any, family: str) -> Any:
    return model.requires_grad_(True)


def _frozen(model: Any, family: str) -> Any:
    return model.requires_grad_(False)


METHODS: dict[str, Method] = {
    FLOOR: Method(_frozen),
    "floor again": Method(_frozen),
    **{f"{mode} r={r}": _sliced(mode, r) for mode in ("row", "column", "alternate") for r in (1, 5, 12, 32)},
    "additive column r=5": _beside("column", 5, 0),
    "additive column r=5 after 8 moves": _beside("column", 5, 8),
    "additive row r=5 after 8 moves": _beside("row", 5, 8),
    "random mask": _sliced("random_mask", 5),
    # a window costs less the higher it lies; one that moves costs the mean of its places
    "window 1/2": _windowed(1 / 2, 0),
    "window 1/2 low": _windowed(1 / 2, 1),
    "window 1/3": _windowed(1 / 3, 0),
    "window 1/3 middle": _windowed(1 / 3, 1 / 2),
    "window 1/3 low": _windowed(1 / 3, 1),
    "listing 1 row r=5": _listing1("row", 5),
    "listing 1 column r=5": _listing1("column", 5),
    "lora r=8": _peft(_config("LoraConfig", r=8)),
    "lora r=8 (default dtype)": _peft(_config("LoraConfig", r=8), default_dtype=True),
    "lora r=32": _peft(_config("LoraConfig", r=32)),
    "lora-fa r=8": _peft(_config("LoraConfig", r=8), optimizer="lora-fa"),
    "dora r=8": _peft(_config("LoraConfig", r=8, use_dora=True)),
    "adalora": _peft(_config("AdaLoraConfig", init_r=8, target_r=8, total_step=10**6)),
    "vera": _peft(_config("VeraConfig", r=256, vera_dropout=0.0)),
    "ia3": _peft(_ia3),
    "ln tuning": _peft(_layer_norms),
    "shira": _peft(_config("ShiraConfig", r=8)),
    "miss": _peft(_config("MissConfig", r=8, miss_dropout=0.0)),
    "hra": _peft(_config("HRAConfig", r=8)),
    "oft": _peft(_config("OFTConfig", oft_block_size=32, module_dropout=0.0)),
    "bitfit": Method(_bitfit),
    "full": Method(_full),
}

_CORE = ("row r=5", "column r=5", "alternate r=5", "lora r=8", "listing 1 row r=5")
SUITES: dict[str, tuple[str, ...]] = {
    "core": _CORE,
    "ranks": tuple(f"{mode} r={r}" for mode in ("row", "column", "alternate") for r in (1, 5, 12, 32)),
    "windows": ("column r=5", "window 1/2", "window 1/2 low", "window 1/3", "window 1/3 middle", "window 1/3 low"),
    # the paper's Figure 4 (bf16, batch 64): its own method at the two ranks, and the rivals that it names
    "figure4": ("row r=1", "column r=1", "row r=5", "column r=5", "lora r=8", "adalora", "hra", "ln tuning", "full"),
    "peft": (
        *_CORE[:3],
        "random mask",
        *(n for n in METHODS if METHODS[n].build not in (_frozen, _full) and not METHODS[n].slices),
    ),
    "full": tuple(name for name in METHODS if not name.startswith(FLOOR)),
}


_SLICES = re.compile(r"(row|column|alternate) r=([1-9]\d*)(?: after (\d+) moves)?")


def find_method(name: str) -> Method:
    """A method by its name: one of `METHODS`, or slices of any rank, with moves made before the first timed step.

    Raises:
        ConfigError: for an unknown name.

    Example:
        >>> find_method("row r=7 after 100 moves").slices
        True
    """
    if name in METHODS:
        return METHODS[name]
    match = _SLICES.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"bench.methods: {name!r} is unknown; expected slices of any rank ('row r=7', 'alternate r=3', 'column r=5 "
            f"after 100 moves') or some of {', '.join(METHODS)}."
        )
    return _sliced(match[1], int(match[2]), int(match[3] or 0))


def methods_of(suite: str, names: list[str] | None) -> list[str]:
    """The floor twice, then the methods of a suite, or the named ones.

    Raises:
        ConfigError: for an unknown suite or method.
    """
    if suite not in SUITES:
        raise ConfigError(f"bench.suite={suite!r} is unknown; expected one of {', '.join(SUITES)}.")
    chosen = list(SUITES[suite]) if names is None else names
    for name in chosen:
        find_method(name)
    return [FLOOR, "floor again", *(name for name in dict.fromkeys(chosen) if not name.startswith(FLOOR))]
