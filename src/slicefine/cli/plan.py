"""Say what each mode and rank would cost in a run, and which fits into a given memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..schedule import MODES
from ..training.settings import TrainSettings
from .parsing import VerbParser, instantiate

__all__ = ["PlanSettings", "parser", "run"]

_EXAMPLES = (
    "slicefine plan --config recipes/mrpc.yaml --modes '[column,row]' --ranks '[5,12]' --memory 8",
    "slicefine plan --config recipes/mrpc.yaml --rank auto",
    "slicefine plan --model.path LOCAL_OR_HUB --gpus 8",
)
_MODES, _RANKS = ("row", "column", "alternate"), (5, 12)
_COMMON = (
    "config",
    "json",
    "modes",
    "ranks",
    "memory",
    "rounds",
    "rank",
    "tau",
    "per_layer",
    "gpus",
    "model.path",
    "data.path",
    "training.batch_size",
    "task.max_length",
)


@dataclass
class PlanSettings(TrainSettings):
    """What `slicefine train` needs, and what to compare.

    Args:
        modes: the modes to measure; null takes row, column, alternate and slice.mode.
        ranks: the ranks to measure; null takes 5, 12 and slice.r.
        memory: GiB that weights, activations, optimizer state and gradients may take together; null: no limit.
        batches: training batches to time, spread evenly from the shortest to the longest; kept activations are those
            of the largest batch of all.
        rounds: timed steps per batch.
        rank: auto suggests slice ranks from the features of the train rows instead of measuring costs.
        tau: with rank=auto, the share of the features' variance that so many directions hold.
        per_layer: with rank=auto, a rank for each layer; else one for all, the median.
        calibration: with rank=auto, train rows to look at; n rows give ranks of at most n - 1.
        rank_file: with rank=auto, a JSON file for the result.
        gpus: say what each of so many GPUs would hold and send under DDP and FSDP2, instead of measuring; it takes
            model.path's configuration alone, no weights and no data.
        lora_rank: with gpus, the rank of the LoRA adapters beside the slices.
    """

    modes: list[str] | None = None
    ranks: list[int] | None = None
    memory: float | None = None
    batches: int = 4
    rounds: int = 3
    rank: str | None = None
    tau: float = 0.9
    per_layer: bool = False
    calibration: int = 256
    rank_file: str | None = None
    gpus: int | None = None
    lora_rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modes is None:
            self.modes = list(dict.fromkeys((*_MODES, self.slice.mode)))
        if self.ranks is None:
            self.ranks = sorted({*_RANKS, self.slice.r})
        for mode in self.modes:
            if mode not in MODES:
                raise ConfigError(f"modes: {mode!r} is unknown; expected some of {', '.join(MODES)}.")
        for name, values in (("ranks", self.ranks), ("batches", [self.batches]), ("rounds", [self.rounds])):
            if not values or min(values) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be at least 1.")
        if not self.modes:
            raise ConfigError("modes=[]: name at least one mode.")
        if self.memory is not None and not self.memory > 0:
            raise ConfigError(f"memory={self.memory!r} must be positive: GiB.")
        if self.rank not in (None, "auto"):
            raise ConfigError(f"rank={self.rank!r}: expected auto; name ranks of your own with --ranks.")
        if not 0 < self.tau <= 1:
            raise ConfigError(f"tau={self.tau!r} must lie in (0, 1].")
        if self.calibration < 2:
            raise ConfigError(f"calibration={self.calibration!r} must be at least 2 rows.")


def parser() -> VerbParser:
    """Options of `slicefine plan`."""
    usage = "slicefine plan [--config RECIPE.yaml] [--modes [row,column]] [--ranks [5,12]] [--memory GIB] [--rank auto]"
    usage += " [--gpus N]"
    result = VerbParser(usage, "Measure what each mode and rank would cost, before a run.", _EXAMPLES, _COMMON)
    result.add_argument("--config", action="config", help="Recipe in YAML, as for train; flags after it override it.")
    result.add_class_arguments(PlanSettings)
    return result


def run(chosen: Any) -> Any:
    """Measure and print the table."""
    settings = PlanSettings(**instantiate(parser(), chosen))
    from ..training.compare import compare
    from ..training.screen import quiet_libraries

    quiet_libraries()
    if settings.gpus is not None:
        from ..training.gpus import plan_gpus

        return plan_gpus(settings, settings.gpus, settings.lora_rank)
    if settings.rank is not None:
        from ..training.rank import rank_plan

        return rank_plan(settings, settings.tau, settings.per_layer, settings.calibration, settings.rank_file)
    modes, ranks = settings.modes or (), settings.ranks or ()
    return compare(settings, modes, ranks, settings.memory, settings.batches, settings.rounds)
