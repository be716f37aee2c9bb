"""SliceFine: fine-tune a pretrained model by training a small moving slice of each weight, in place."""

from typing import Any

from .energy import energy_positions
from .errors import (
    AdapterFileError,
    ConfigError,
    ContentError,
    DataError,
    NumericalError,
    OptimizerError,
    SliceFineError,
    UnsupportedError,
)
from .geometry import Slice
from .guards import accept_weights
from .mover import Mover, movers_of
from .pace import MoveSettings
from .schedule import Schedule
from .since import apply_slices, delta_since
from .tuner import SliceTuner, attach, merge_errors

try:  # the core needs torch and safetensors only; with PEFT at hand, importing slicefine registers the method there
    from .peft import SliceFineCallback, SliceFineConfig, SliceFineModel
except ModuleNotFoundError as error:
    if error.name not in ("peft", "transformers", "accelerate"):
        raise

__version__ = "0.1.0"

__all__ = [
    "accept_weights",
    "AdapterFileError",
    "apply_slices",
    "attach",
    "ConfigError",
    "ContentError",
    "DataError",
    "delta_since",
    "energy_positions",
    "merge_errors",
    "Mover",
    "movers_of",
    "MoveSettings",
    "NumericalError",
    "OptimizerError",
    "Schedule",
    "Slice",
    "SliceFineCallback",
    "SliceFineConfig",
    "SliceFineError",
    "SliceFineModel",
    "SliceTuner",
    "UnsupportedError",
]


def __getattr__(name: str) -> Any:
    if name in ("SliceFineCallback", "SliceFineConfig", "SliceFineModel"):
        raise ImportError(f'slicefine.{name} needs Hugging Face PEFT: pip install "slicefine[peft]".')
    raise AttributeError(f"module 'slicefine' has no attribute {name!r}")
