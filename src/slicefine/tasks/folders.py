"""Folders of classes: ``train/juggling/a.mp4`` as a table of files and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .settings import DataSettings

__all__ = ["VIDEO_ENDINGS", "class_folders"]

VIDEO_ENDINGS = frozenset({".avi", ".mkv", ".mov", ".mp4", ".webm"})


def class_folders(settings: DataSettings, names: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """Splits of a folder with clips in folders of classes; empty if it holds none.

    Args:
        settings: the data; its columns name those of files (relative to the data's folder) and of labels.
        names: split -> what its folder may be called. Without any such folder the classes are the train set's.
    """
    root = Path(settings.path).expanduser()
    given = {split: (name,) for split in names if (name := getattr(settings, split)) is not None}
    folders = {split: _first(root, {**names, **given}[split]) for split in names}
    found = {split: folder for split, folder in folders.items() if folder is not None} or {"train": root}
    tables = {split: _table(root, folder, settings) for split, folder in found.items()}
    return {split: table for split, table in tables.items() if table is not None}


def _first(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _table(root: Path, folder: Path, settings: DataSettings) -> Any:
    from datasets import Dataset

    files = sorted(file for file in folder.glob("*/*") if file.suffix.lower() in VIDEO_ENDINGS)
    if not files:
        return None
    names = [str(file.relative_to(root)) for file in files]
    return Dataset.from_dict({settings.columns.video: names, settings.columns.label: [f.parent.name for f in files]})
