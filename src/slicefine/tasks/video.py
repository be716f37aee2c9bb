"""Video classification for models such as VideoMAE. Clips are decoded when a batch is made, by PyAV (extra `video`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, DataError
from .augment import Augmentation, augmentation
from .base import Loaded, Metric, Prepared, register
from .image import collate, image_processor
from .labels import Labelled, check_labels, class_names, label_numbers
from .metrics import CLASSIFICATION
from .models import load_model
from .settings import DataSettings, ModelSettings, TaskSettings
from .sources import require_columns
from .text import check_texts

__all__ = ["VideoClassification", "frame_indices", "read_frames"]

FRAMES = 16  # for models that take any number


@register
class VideoClassification(Labelled):
    """One class per clip.

    The data is a folder of classes with clips in them (``train/juggling/a.mp4``), or a table with the columns
    ``data.columns.video`` (a file, relative to the data's folder) and ``data.columns.label``.
    """

    name = "video-classification"
    peft_task_type = None
    metrics: Mapping[str, Metric] = CLASSIFICATION
    minimise: frozenset[str] = frozenset()

    def __init__(self, task: TaskSettings, model: ModelSettings, data: DataSettings) -> None:
        self.task, self.model, self.columns = task, model, data.columns
        self.labels: list[str] = list(task.labels or [])
        self.augment = augmentation(task)
        self.drawn = True  # where a train clip's frames begin
        path = Path(data.path).expanduser()
        self.folder = path.parent if path.is_file() else path

    def read(self, splits: dict[str, Any]) -> None:
        """Check columns and files, and learn the classes."""
        require_columns(splits, {"video": self.columns.video, "label": self.columns.label})
        check_texts(splits, [self.columns.video])
        for split, dataset in splits.items():
            for row, name in enumerate(dataset[self.columns.video]):
                if not (self.folder / name).is_file():
                    raise DataError(
                        f"{split} set, row {row}: no such file: {self.folder / name}. Correct column "
                        f"{self.columns.video!r}; its paths are relative to {self.folder}."
                    )
        self.labels = self.labels or class_names(splits, self.columns.label, None)
        check_labels(splits, self.columns.label, self.labels)

    def load(self) -> Loaded:
        """A video classifier with a new head for these classes."""
        from transformers import AutoModelForVideoClassification

        names = dict(enumerate(self.labels))
        back = {name: i for i, name in names.items()}
        loaded = load_model(
            AutoModelForVideoClassification, self.model, num_labels=len(names), id2label=names, label2id=back
        )
        loaded.processor = image_processor(self.model, loaded.model.config)
        return loaded

    def prepare(self, splits: dict[str, Any], loaded: Loaded) -> Prepared:
        """Attach the transform; it runs when a row is read. Of a train clip any part is taken, else the middle."""
        count = self._frames(loaded.model.config)
        prepared = {
            split: dataset.with_transform(self._encoder(loaded.processor, count, split == "train"))
            for split, dataset in splits.items()
        }
        return Prepared(prepared, collate, {"remove_unused_columns": False})

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the class names; an evaluation neither draws nor changes anything, in the train set, too."""
        super().restore(state)
        self.augment, self.drawn = None, False

    def _frames(self, config: Any) -> int:
        own, wanted = getattr(config, "num_frames", None), self.task.frames
        if own is not None and wanted not in (None, own):
            raise ConfigError(
                f"task.frames={wanted}: the model's positions are for {own} frames; leave task.frames out."
            )
        return int(wanted or own or FRAMES)

    def _encoder(self, processor: Any, count: int, train: bool) -> Any:
        augment: Augmentation | None = self.augment if train else None
        drawn, stride = train and self.drawn, self.task.stride

        def clip(name: str) -> torch.Tensor:
            pictures = read_frames(self.folder / name, count, stride, drawn)
            if augment is not None:
                pictures = augment(pictures)
            pixels = torch.as_tensor(processor(pictures, return_tensors="pt")["pixel_values"])
            return pixels.reshape(
                count, *pixels.shape[-3:]
            )  # processors of videos add a dimension, those of images none

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            labels = label_numbers(batch[self.columns.label], self.labels)
            return {"pixel_values": [clip(name) for name in batch[self.columns.video]], "labels": labels}

        return encode


def frame_indices(length: int, count: int, stride: int, drawn: bool) -> list[int]:
    """Which frames to take: every ``stride``-th one, from a random start or around the middle.

    A clip that is too short stands still at its end.

    Args:
        length: frames of the clip.
        count: frames to take.
        stride: distance between them.
        drawn: draw the start (with torch's random numbers), as in training.

    Example:
        >>> frame_indices(100, 4, 10, drawn=False)
        [34, 44, 54, 64]
        >>> frame_indices(15, 4, 10, drawn=False)
        [0, 10, 14, 14]
    """
    free = max(0, length - ((count - 1) * stride + 1))
    start = int(torch.randint(free + 1, ())) if drawn else free // 2
    return [min(start + i * stride, length - 1) for i in range(count)]


def read_frames(path: Path, count: int, stride: int, drawn: bool) -> list[Any]:
    """Frames of a clip as RGB pictures, chosen by `frame_indices`.

    Raises:
        ConfigError: if PyAV is missing.
        DataError: if the file holds no video that can be decoded.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            'videos are decoded by PyAV, which is not installed; run: pip install "slicefine[video]"'
        ) from error
    try:
        with av.open(str(path)) as container:  # counting packets decodes nothing, and headers may be wrong
            length = sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))
        wanted = frame_indices(max(length, 1), count, stride, drawn)
        with av.open(str(path)) as container:
            found = _pick(container.decode(container.streams.video[0]), set(wanted))
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"{path}: cannot be decoded as a video ({error}). Drop the clip, or convert it.") from error
    if not found:
        raise DataError(f"{path}: no frame can be decoded. Drop the clip, or convert it.")
    last = max(found)
    return [found[min(index, last)] for index in wanted]


def _pick(frames: Iterable[Any], wanted: set[int]) -> dict[int, Any]:
    found = {}
    for index, frame in enumerate(frames):
        if index in wanted:
            found[index] = frame.to_image()
        if index >= max(wanted):
            break
    return found
