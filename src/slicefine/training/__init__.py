"""Training runs: settings in, adapter folder and report out. Built on transformers' Trainer, datasets and PEFT."""

from .settings import MethodSettings, SliceSettings, TrainingSettings, TrainSettings

__all__ = ["MethodSettings", "SliceSettings", "TrainSettings", "TrainingSettings"]
