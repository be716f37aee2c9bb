"""Image classification. Images are decoded and resized when a batch is made; Pillow is enough."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, DataError
from .augment import Augmentation, augmentation
from .base import Loaded, Metric, Prepared, register
from .labels import Labelled, check_labels, class_names, label_numbers
from .metrics import CLASSIFICATION
from .models import load_model, resolve_path
from .settings import DataSettings, ModelSettings, TaskSettings
from .sources import require_columns

__all__ = ["ImageClassification"]


@register
class ImageClassification(Labelled):
    """One class per image."""

    name = "image-classification"
    peft_task_type = None
    metrics: Mapping[str, Metric] = CLASSIFICATION
    minimise: frozenset[str] = frozenset()

    def __init__(self, task: TaskSettings, model: ModelSettings, data: DataSettings) -> None:
        self.model, self.columns = model, data.columns
        self.labels: list[str] = list(task.labels or [])
        self.augment = augmentation(task)

    def read(self, splits: dict[str, Any]) -> None:
        """Check the columns and learn the classes."""
        from datasets import Image

        require_columns(splits, {"image": self.columns.image, "label": self.columns.label})
        for split, dataset in splits.items():
            feature = dataset.features[self.columns.image]
            if not isinstance(feature, Image):
                raise DataError(
                    f"{split} set: column {self.columns.image!r} holds {feature}, not images. Set "
                    "data.columns.image to a column of images as the datasets library stores them."
                )
        self.labels = self.labels or class_names(splits, self.columns.label, None)
        check_labels(splits, self.columns.label, self.labels)

    def load(self) -> Loaded:
        """An image classifier with a new head for these classes."""
        from transformers import AutoModelForImageClassification

        names = dict(enumerate(self.labels))
        back = {name: i for i, name in names.items()}
        loaded = load_model(
            AutoModelForImageClassification, self.model, num_labels=len(names), id2label=names, label2id=back
        )
        loaded.processor = image_processor(self.model, loaded.model.config)
        return loaded

    def prepare(self, splits: dict[str, Any], loaded: Loaded) -> Prepared:
        """Attach the transform; it runs when a row is read. Only the train set is augmented."""
        from datasets import Image

        image = self.columns.image
        prepared = {
            split: dataset.cast_column(image, Image(decode=False)).with_transform(
                self._encoder(loaded.processor, self.augment if split == "train" else None)
            )
            for split, dataset in splits.items()
        }
        return Prepared(prepared, collate, {"remove_unused_columns": False})

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the class names; an evaluation sees the pictures as they are, those of the train set, too."""
        super().restore(state)
        self.augment = None

    def _encoder(self, processor: Any, augment: Augmentation | None) -> Any:
        image, label = self.columns.image, self.columns.label

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            pictures = [decoded(picture) for picture in batch[image]]
            if augment is not None:
                pictures = [augment([picture])[0] for picture in pictures]
            pixels = processor(pictures, return_tensors="pt")["pixel_values"]
            return {"pixel_values": list(pixels), "labels": label_numbers(batch[label], self.labels)}

        return encode


def decoded(stored: Mapping[str, Any]) -> Any:
    """A picture in RGB.

    Args:
        stored: ``{"bytes": ..., "path": ...}``, as the datasets library stores it.

    Raises:
        DataError: if it is no picture.
    """
    from datasets import Image

    found = dict(stored)
    try:
        if found.get("bytes") is None and Path(found["path"]).is_file():  # datasets leaves a broken file open
            found["bytes"] = Path(found["path"]).read_bytes()
        return Image().decode_example(found).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises, by format
        raise DataError(
            f"{stored.get('path') or 'a row without a file name'} cannot be read as a picture: {error}. Replace or "
            "remove it."
        ) from error


def image_processor(settings: ModelSettings, config: Any) -> Any:
    """The model's own image processor, or one that resizes to its image size and scales to [-1, 1].

    Raises:
        ConfigError: if the model's configuration does not tell an image size either.
    """
    from transformers import AutoImageProcessor, ViTImageProcessor

    folder = resolve_path(settings.path) if settings.config is None and settings.path is not None else None
    if folder is not None and (not Path(folder).is_dir() or (Path(folder) / "preprocessor_config.json").is_file()):
        try:
            options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
            return AutoImageProcessor.from_pretrained(folder, **options)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.path={settings.path!r}: its image processor cannot be loaded: {error}") from error
    size = getattr(config, "image_size", None)
    if size is None:
        raise ConfigError(
            f"model.path={settings.path!r} has no preprocessor_config.json, and its configuration no image_size; "
            "add one of them."
        )
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return ViTImageProcessor(size={"height": height, "width": width})


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack pixels and labels."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
