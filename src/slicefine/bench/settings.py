"""What `slicefine bench` is asked to measure."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .methods import methods_of
from .shapes import Shape, find_shape

__all__ = ["BenchSettings"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FIGURE4 = ["roberta-base", "vit-b16", "videomae-base"]


@dataclass
class BenchSettings:
    """Everything that `slicefine bench` needs; the defaults take a few minutes on two cores.

    Args:
        models: shapes: roberta, llama (6 layers of width 768), roberta-base, roberta-large, llama-160m, llama-1b,
            llama-3b, vit-b16, videomae-base. null takes roberta and llama; for figure4 roberta-base, vit-b16 and
            videomae-base, and on a GPU these three and llama-3b.
        suite: core, ranks, windows, peft, figure4 (the paper's Figure 4: with a table of total time, throughput,
            memory and model size; it is sized for a GPU, so give a smaller batch elsewhere), or full (everything).
        methods: names of single methods, instead of a suite; a list, or one text with commas, as for models.
        rounds: timed rounds; every method makes one step per round.
        warmup: rounds before them that are not timed, beside the forward and backward that check every method.
        layers: number of layers; null is the shape's.
        width: hidden size; null is the shape's.
        batch: rows per step; null is the shape's.
        length: tokens per row; null is the shape's.
        lm_head: add the language-model head and its loss; logits hide the activations of the layers.
        device: cpu or cuda.
        dtype: float32, bfloat16 or float16; null takes bfloat16 on a GPU and for figure4, else float32.
        checkpointing: recompute activations in the backward pass.
        reentrant: with checkpointing, the older, re-entrant kind.
        compiled: run every model through torch.compile.
        loop: bare, or trainer: through transformers' Trainer, whose own work per step then counts as well.
        threads: CPU threads; null leaves them.
        together: methods that are held in memory and interleaved at a time, beside the floor; null takes eight, or as
            many as there is memory for.
        memory: measure peak memory as well, on a CPU each method in a process of its own; null does so for figure4.
        keep_memory: let the C library keep freed memory for the next step, as a GPU's allocator does, instead of
            handing it back (CPU, Linux with glibc); what a method allocates then costs it no page faults.
        output: folder for bench.json and bench.png; null writes none.
        seed: of weights and inputs.
    """

    models: list[str] | str | None = None
    suite: str = "core"
    methods: list[str] | str | None = None
    rounds: int = 10
    warmup: int = 0
    layers: int | None = None
    width: int | None = None
    batch: int | None = None
    length: int | None = None
    lm_head: bool = False
    device: str = "cpu"
    dtype: str | None = None
    checkpointing: bool = False
    reentrant: bool = False
    compiled: bool = False
    loop: str = "bare"
    threads: int | None = None
    together: int | None = None
    memory: bool | None = None
    keep_memory: bool = False
    output: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        gpu = self.device == "cuda"
        if self.models is None:
            own = _FIGURE4 if self.suite == "figure4" else ["roberta", "llama"]
            self.models = [*_FIGURE4, "llama-3b"] if gpu and self.suite != "figure4" else own
        if self.memory is None:
            self.memory = self.suite == "figure4"
        if self.dtype is None:
            self.dtype = "bfloat16" if gpu or self.suite == "figure4" else "float32"
        if not any(_names(self.models)):
            raise ConfigError("bench.models is empty; name a shape, or leave it out for the default ones.")
        for name, low in (("rounds", 2), ("warmup", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"bench.{name}={getattr(self, name)} must be at least {low}.")
        for name in ("layers", "width", "batch", "length", "threads", "together"):
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
        if self.reentrant and not self.checkpointing:
            raise ConfigError("bench.reentrant=true is a kind of checkpointing; set bench.checkpointing=true, too.")
        if self.keep_memory and (gpu or sys.platform != "linux"):
            raise ConfigError("bench.keep_memory=true is for a CPU on Linux; leave it out here.")
        self.method_names()
        self.shapes()

    def shapes(self) -> list[Shape]:
        """The shapes with the sizes that were asked for."""
        assert self.models is not None
        sizes = {name: getattr(self, name) for name in ("layers", "width", "batch", "length")}
        return [find_shape(name, **sizes, lm_head=self.lm_head) for name in _names(self.models)]

    def method_names(self) -> list[str]:
        """The floor twice, then the methods in order."""
        return methods_of(self.suite, None if self.methods is None else _names(self.methods))

    @property
    def recompute(self) -> bool | None:
        """Whether the recomputation of activations is re-entrant; None if there is none."""
        return self.reentrant if self.checkpointing else None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision of the models."""
        return _DTYPES[str(self.dtype)]


def _names(given: list[str] | str) -> list[str]:
    return [name.strip() for name in given.split(",")] if isinstance(given, str) else given
