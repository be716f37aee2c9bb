"""SliceFine as a Hugging Face PEFT method: `SliceFineConfig` in place of ``LoraConfig``.

Importing this package registers the method with PEFT; ``import slicefine`` does it when PEFT is installed.
"""

from .callback import SliceFineCallback
from .config import SliceFineConfig
from .layer import SliceFineLinear
from .model import SliceFineModel
from .registration import register
from .stopping import StopOnSignal

register(SliceFineConfig, SliceFineModel)

__all__ = ["SliceFineCallback", "SliceFineConfig", "SliceFineLinear", "SliceFineModel", "StopOnSignal"]
