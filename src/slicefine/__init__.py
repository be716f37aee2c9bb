"""SliceFine: fine-tune a pretrained model by training a small moving slice of each weight, in place."""

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
from .mover import Mover, MoveSettings, movers_of
from .schedule import Schedule
from .tuner import SliceTuner, attach

try:
    from .peft import SliceFineCallback, SliceFineConfig, SliceFineModel
except ModuleNotFoundError as error:  # the core needs torch and safetensors only
    if error.name not in ("peft", "transformers", "accelerate"):
        raise

__version__ = "0.1.0"
