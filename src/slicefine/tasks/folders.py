"""Folders of classes: ``train/juggling/a.mp4`` or ``train/red/1.png`` as a table of files and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import DataError
from .settings import DataSettings

__all__ = ["IMAGE_ENDINGS", "VIDEO_ENDINGS", "class_folders"]

VIDEO_ENDINGS = frozenset({".avi", ".mkv", ".mov", ".mp4", ".webm"})
IMAGE_ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def class_folders(settings: DataSettings, names: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """Splits of a folder with pictures or clips in folders of classes; empty if it holds none.

    Args:
        settings: the data; its columns name those of pictures or clips (relative to the data's folder) and of labels.
        names: split -> what its folder may be called. Without any such folder the classes are the train set's.

    Raises:
        DataError: if there are pictures and clips, or a file is no picture.
    """
    root = Path(settings.path).expanduser()
    given = {split: (name,) for split in names if (name := getattr(settings, split)) is not None}
    folders = {split: _first(root, {**names, **given}[split]) for split in names}
    found = {split: folder for split, folder in folders.items() if folder is not None} or {"train": root}
    pictures, clips = (_files(found, endings) for endings in (IMAGE_ENDINGS, VIDEO_ENDINGS))
    if pictures and clips:
        raise DataError(
            f"data.path={settings.path!r}: there are pictures ({_example(pictures, root)}) and videos "
            f"({_example(clips, root)}) in folders of classes; a task takes one kind. Move the other elsewhere."
        )
    if pictures:
        return {split: _pictures(files, settings) for split, files in pictures.items()}
    return {split: _clips(files, root, settings) for split, files in clips.items()}


def _first(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _files(folders: dict[str, Path], endings: frozenset[str]) -> dict[str, list[Path]]:
    """For each split the files of a kind, one folder below its own; splits and folders that are hidden are left out."""
    found = {
        split: sorted(
            file
            for file in folder.glob("*/*")
            if file.suffix.lower() in endings and not file.name.startswith(".") and not file.parent.name.startswith(".")
        )
        for split, folder in folders.items()
    }
    return {split: files for split, files in found.items() if files}


def _example(files: dict[str, list[Path]], root: Path) -> str:
    return str(next(iter(files.values()))[0].relative_to(root))


def _clips(files: list[Path], root: Path, settings: DataSettings) -> Any:
    from datasets import Dataset

    names = [str(file.relative_to(root)) for file in files]
    return Dataset.from_dict({settings.columns.video: names, settings.columns.label: [f.parent.name for f in files]})


def _pictures(files: list[Path], settings: DataSettings) -> Any:
    from datasets import Dataset, Image
    from PIL import Image as Picture

    for file in files:  # now, and not in the middle of training; this reads the first bytes only
        try:
            Picture.open(file).close()
        except OSError as error:
            raise DataError(f"{file} cannot be read as a picture: {error}. Replace or remove it.") from error
    names = [str(file.resolve()) for file in files]
    table = Dataset.from_dict({settings.columns.image: names, settings.columns.label: [f.parent.name for f in files]})
    return table.cast_column(settings.columns.image, Image())
