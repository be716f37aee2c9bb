"""What a recipe says about the model, the data and the task: plain dataclasses, checked where they enter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError

__all__ = ["Columns", "DataSettings", "ModelSettings", "TaskSettings"]

DTYPES = ("float32", "bfloat16", "float16", "auto")
QUANTISED = ("4bit", "8bit", "int8")
AUGMENTATIONS = ("none", "randaugment")


@dataclass
class ModelSettings:
    """The pretrained model.

    Args:
        path: hub id, local folder in Hugging Face layout, or "minilm" for the packaged MiniLM (extra `demo`).
        revision: branch, tag or commit on the hub.
        trust_remote_code: run model code that comes with the checkpoint.
        dtype: float32, bfloat16, float16 or auto (as stored).
        quantize: load the linear layers, all but heads, quantised: 4bit (bitsandbytes nf4, double quantisation), 8bit
            (bitsandbytes) or int8 (torchao, weights only); slices then lie beside them (extra `quant`).
        dropout: rate of all dropout in the pretrained model while it trains; null leaves the model's own. 0 by
            default: in short runs on cola slices and LoRA learned more without (docs/results/accuracy.md).
        attention: eager, sdpa, or another implementation that transformers knows; null is the model's own.
        config: train from scratch: a configuration with its model_type instead of pretrained weights.
        tokenizer: hub id or folder of the tokenizer, if it is not the model's own.
    """

    path: str | None = "minilm"
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "float32"
    quantize: str | None = None
    dropout: float | None = 0.0
    attention: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"model.dtype={self.dtype!r} is unknown; expected one of {', '.join(DTYPES)}.")
        if self.quantize is not None and self.quantize not in QUANTISED:
            raise ConfigError(f"model.quantize={self.quantize!r} is unknown; expected one of {', '.join(QUANTISED)}.")
        if self.quantize is not None and self.config is not None:
            raise ConfigError("model.quantize: model.config starts from random weights; there is nothing to quantise.")
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout={self.dropout!r} must lie in [0, 1); null leaves the model's own.")
        if self.config is not None and self.dropout:
            raise ConfigError(f"model.dropout={self.dropout} is for pretrained models; say the rates in model.config.")
        if self.config is not None and "model_type" not in self.config:
            raise ConfigError("model.config has no model_type; add one, for example model_type: vit.")
        if self.config is None and self.path is None:
            raise ConfigError(
                "model.path is missing; give a hub id, a local folder, or model.config to start from scratch."
            )


@dataclass
class Columns:
    """Names of the data set's columns.

    Args:
        text: the text, or the first text of a pair.
        text_pair: the second text of a pair.
        label: the label (integer or string), or the target of a regression.
        image: the image.
        video: the file of a video, relative to the data's folder.
        prompt: what a causal model reads before it answers.
        answer: what it learns to answer; with it, the loss is on the answer only.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    image: str = "image"
    video: str = "video"
    prompt: str = "prompt"
    answer: str | None = None


@dataclass
class DataSettings:
    """The data set.

    Args:
        path: hub id, local folder, local parquet, csv, json or jsonl file (also .gz), or "docstrings" (built in).
        name: configuration name on the hub.
        revision: branch, tag or commit on the hub.
        train: split name on the hub, or file name inside the folder; None looks for train.*.
        validation: likewise; None looks for validation.*, valid.*, val.* or dev.*, and "none" holds rows of train out.
        test: likewise; None looks for test.*.
        columns: names of the columns.
        validation_fraction: part of the train set that is held out if there is no validation set.
        limit_train: use at most this many rows, drawn with the seed.
        limit_validation: likewise; 0 leaves the set out.
        limit_test: likewise; 0 leaves it out, as for hub sets whose test labels are hidden.
        seed: seed of the limits and of the held-out part.
    """

    path: str = "docstrings"
    name: str | None = None
    revision: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    columns: Columns = field(default_factory=Columns)
    validation_fraction: float = 0.1
    limit_train: int | None = None
    limit_validation: int | None = None
    limit_test: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ConfigError(f"data.validation_fraction={self.validation_fraction!r} must lie in [0, 1).")
        for name in ("limit_train", "limit_validation", "limit_test"):
            value = getattr(self, name)
            least = 1 if name == "limit_train" else 0
            if value is not None and value < least:
                raise ConfigError(f"data.{name}={value!r} must be at least {least}; leave it out for no limit.")


@dataclass
class TaskSettings:
    """The task.

    Args:
        name: text-classification, text-regression, multiple-choice, causal-lm, reasoning, image-classification or
            video-classification.
        metric: the metric that decides which checkpoint is best; None takes the task's own.
        max_length: longest sequence in tokens; None takes the model's limit, at most 512.
        labels: class names, in the order of their numbers; None takes them from the train set.
        center: text-regression: start a new head at the mean of the train set's targets instead of zero.
        packing: causal-lm, plain text: join the texts and cut them into full sequences.
        template: causal-lm with answers: the prompt, with column names in braces; None is "{prompt}",
            and for reasoning the template of LLM-Adapters.
        prompt_loss: causal-lm and reasoning with answers: the loss counts the prompt's tokens, too, as in LLM-Adapters.
        tests: reasoning: {name: file} of questions that the trained model answers at the end, by generation.
        tests_limit: at most this many questions of each.
        general: language models: a file with general texts (column text), or "samples", which the model writes itself
            before training; their loss before and after says what was forgotten.
        general_limit: at most this many general texts.
        augment: images and videos: randaugment changes the train set at random, none leaves it.
        frames: frames of a video; None takes the model's own number.
        stride: of how many frames of a video one is taken.
    """

    name: str = "text-classification"
    metric: str | None = None
    max_length: int | None = None
    labels: list[str] | None = None
    center: bool = True
    packing: bool = True
    template: str | None = None
    prompt_loss: bool = False
    tests: dict[str, str] = field(default_factory=dict)
    tests_limit: int | None = None
    general: str | None = None
    general_limit: int = 100
    augment: str = "none"
    frames: int | None = None
    stride: int = 4

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTATIONS:
            raise ConfigError(f"task.augment={self.augment!r} is unknown; expected one of {', '.join(AUGMENTATIONS)}.")
        if self.stride < 1 or (self.frames is not None and self.frames < 1):
            raise ConfigError(f"task.frames={self.frames!r} and task.stride={self.stride!r} must be at least 1.")
        if self.tests_limit is not None and self.tests_limit < 1:
            raise ConfigError(f"task.tests_limit={self.tests_limit!r} must be at least 1; leave it out for no limit.")
        if self.tests and self.name != "reasoning":
            raise ConfigError(f"task.tests is for task.name=reasoning, and this one is {self.name}.")
        if self.general is not None and self.name not in ("causal-lm", "reasoning"):
            raise ConfigError(f"task.general is for language models (causal-lm, reasoning); this task is {self.name}.")
        if self.general_limit < 1:
            raise ConfigError(f"task.general_limit={self.general_limit!r} must be at least 1.")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"task.max_length={self.max_length!r} must be at least 2 tokens.")
