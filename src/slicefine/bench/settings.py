"""What `slicefine bench` is asked to measure."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..errors import ConfigError
from .methods import methods_of
from .shapes import Shape, find_shape

__all__ = ["BenchSettings"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class BenchSettings:
    """Everything that `slicefine bench` needs; the defaults take a few minutes on two cores.

    Args:
        models: shapes: roberta, llama (6 layers of width 768), roberta-base, roberta-large, llama-160m, llama-1b,
            llama-3b, vit-b16, videomae-base.
        suite: core, ranks, windows, peft, or full (everything).
        methods: names of single methods, instead of a suite; a list, or one text with commas, as for models.
        rounds: timed rounds; every method makes one step per round.
        warmup: rounds before them that are not timed.
        layers: number of layers; null is the shape's.
        width: hidden size; null is the shape's.
        batch: rows per step; null is the shape's.
        length: tokens per row; null is the shape's.
        lm_head: add the language-model head and its loss; logits hide the activations of the layers.
        device: cpu or cuda.
        dtype: float32, bfloat16 or float16.
        checkpointing: recompute activations in the backward pass.
        compiled: run every model through torch.compile.
        loop: bare, or trainer: through transformers' Trainer, whose own work per step then counts as well.
        threads: CPU threads; null leaves them.
        together: methods that are held in memory and interleaved at a time, beside the floor.
        memory: measure peak memory as well, on a CPU each method in a process of its own.
        output: folder for bench.json and bench.png; null writes none.
        seed: of weights and inputs.
    """

    models: list[str] | str = field(default_factory=lambda: ["roberta", "llama"])
    suite: str = "core"
    methods: list[str] | str | None = None
    rounds: int = 10
    warmup: int = 1
    layers: int | None = None
    width: int | None = None
    batch: int | None = None
    length: int | None = None
    lm_head: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    checkpointing: bool = False
    compiled: bool = False
    loop: str = "bare"
    threads: int | None = None
    together: int = 8
    memory: bool = False
    output: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("rounds", 2), ("warmup", 0), ("together", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"bench.{name}={getattr(self, name)} must be at least {low}.")
        for name in ("layers", "width", "batch", "length", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"bench.{name}={value} must be at least 1.")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"bench.dtype={self.dtype!r} is unknown; expected one of {', '.join(_DTYPES)}.")
        if self.loop not in ("bare", "trainer"):
            raise ConfigError(f"bench.loop={self.loop!r} is unknown; expected bare or trainer.")
        if self.loop == "trainer" and self.compiled:
            raise ConfigError("bench.loop=trainer does not go with bench.compiled; leave one of them out.")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"bench.device={self.device!r} is unknown; expected cpu or cuda.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("bench.device=cuda, but PyTorch sees no GPU; use --device cpu.")
        self.method_names()
        self.shapes()

    def shapes(self) -> list[Shape]:
        """The shapes with the sizes that were asked for."""
        sizes = {name: getattr(self, name) for name in ("layers", "width", "batch", "length")}
        return [find_shape(name, **sizes, lm_head=self.lm_head) for name in _names(self.models)]

    def method_names(self) -> list[str]:
        """The floor twice, then the methods in order."""
        return methods_of(self.suite, None if self.methods is None else _names(self.methods))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision of the models."""
        return _DTYPES[self.dtype]


def _names(given: list[str] | str) -> list[str]:
    return [name.strip() for name in given.split(",")] if isinstance(given, str) else given
