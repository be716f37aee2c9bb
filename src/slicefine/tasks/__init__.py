"""Tasks: from raw data to the Trainer's inputs and metrics. One file per task; see `slicefine.tasks.base`."""

from .base import Loaded, Prepared, Task, get_task, register, task_names
from .settings import Columns, DataSettings, ModelSettings, TaskSettings

__all__ = [
    "Columns",
    "DataSettings",
    "Loaded",
    "ModelSettings",
    "Prepared",
    "Task",
    "TaskSettings",
    "get_task",
    "register",
    "task_names",
]
