"""Read the raw splits: a hub data set, a local folder or file, or the built-in docstrings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DataError
from .folders import class_folders
from .settings import DataSettings

__all__ = ["BUILT_IN", "LOADERS", "load_splits", "require_columns"]

BUILT_IN = "docstrings"
# file ending -> loader of the datasets library
LOADERS = {"parquet": "parquet", "csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json"}
NONE = "none"  # a split that is left out, although there may be a file of its name
_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def load_splits(settings: DataSettings, check: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """``{"train": dataset, "validation": ..., "test": ...}``, limited; validation and test may be missing.

    Args:
        settings: the data.
        check: is given the splits before rows are held out and drawn, so that row numbers are those of the files.

    Raises:
        DataError: if the data is not found, cannot be read, or holds no rows.
    """
    if settings.path == BUILT_IN:
        from .docstrings import docstring_splits

        splits = docstring_splits(settings.seed)
    elif _is_local(settings.path):
        splits = _local(settings, Path(settings.path).expanduser())
    else:
        splits = _hub(settings)
    splits = {name: dataset for name, dataset in splits.items() if getattr(settings, f"limit_{name}") != 0}
    for name, dataset in splits.items():
        if len(dataset) == 0:
            raise DataError(
                f"data.path={settings.path!r}: the data set is empty (0 rows in {name}); give a file with rows in it."
            )
    if check is not None:
        check(splits)
    return _limit(_hold_out(splits, settings), settings)


def require_columns(splits: dict[str, Any], wanted: dict[str, str]) -> None:
    """Check that every split has the columns that the recipe names.

    Args:
        splits: the raw splits.
        wanted: setting -> column name.

    Raises:
        DataError: naming the split, the column, the setting, and what columns there are.
    """
    for split, dataset in splits.items():
        missing = {setting: column for setting, column in wanted.items() if column not in dataset.column_names}
        if missing:
            named = ", ".join(f"column {column!r} (data.columns.{setting})" for setting, column in missing.items())
            one = "{" + ", ".join(f"{setting}: COLUMN" for setting in missing) + "}"
            raise DataError(
                f"{split} set: {named} {'is' if len(missing) == 1 else 'are'} missing; the columns are "
                f"{', '.join(dataset.column_names)}. Name those to take: --data.columns '{one}'."
            )


def _is_local(path: str) -> bool:
    local = Path(path).expanduser()
    return local.exists() or path.startswith((".", "/", "~")) or _loader(local) is not None


def _loader(path: Path) -> str | None:
    endings = [ending.lstrip(".") for ending in path.suffixes if ending not in (".gz", ".bz2", ".xz", ".zst")]
    return LOADERS.get(endings[-1]) if endings else None


def _local(settings: DataSettings, path: Path) -> dict[str, Any]:
    if not path.exists():
        raise DataError(
            f"data.path={settings.path!r}: no such file or folder (looked in {Path.cwd()}). Give data.path the folder "
            "or file where the data is now."
        )
    if path.is_file():
        files = {"train": path, **{k: Path(v) for k, v in _given(settings).items() if k != "train"}}
    else:
        given = _given(settings)
        candidates = {
            split: path / given[split] if split in given else _find(path, split)
            for split in _NAMES
            if getattr(settings, split) != NONE
        }
        files = {split: file for split, file in candidates.items() if file is not None}
        if all(file.is_dir() for file in files.values()) and (classes := class_folders(settings, _NAMES)):
            return classes
    if not files:
        raise DataError(
            f"data.path={settings.path!r}: no train, validation or test file with the ending "
            f"{', '.join(LOADERS)} (or .gz of it) in the folder, and no pictures or videos in folders of classes. "
            "Name the files with data.train, data.validation, data.test."
        )
    return {split: _read(file) for split, file in files.items()}


def _given(settings: DataSettings) -> dict[str, str]:
    return {split: name for split in _NAMES if (name := getattr(settings, split)) not in (None, NONE)}


def _find(folder: Path, split: str) -> Path | None:
    for name in _NAMES[split]:
        found = sorted(file for file in folder.glob(f"{name}.*") if _loader(file) is not None)
        if found:
            return found[0]
    return None


def _read(file: Path) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    loader = _loader(file)
    if not file.is_file() or loader is None:
        raise DataError(f"{file}: no such file, or not one of {', '.join(LOADERS)} (or .gz of it).")
    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty (0 bytes); give a file with rows in it.")
    options = {"sep": "\t"} if ".tsv" in file.suffixes else {}
    try:
        return load_dataset(loader, data_files=str(file), split="train", **options)
    except (DatasetGenerationError, ValueError, OSError, KeyError) as error:
        if "no data" in str(error):  # the datasets library makes no split of a file with a header only
            raise DataError(f"{file}: the data set is empty (0 rows); give a file with rows in it.") from error
        cause = str(error.__cause__ or error).strip().rstrip(".")
        raise DataError(f"{file}: cannot be read as {loader}: {cause}. Correct the file, or write it anew.") from error


def _hub(settings: DataSettings) -> dict[str, Any]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(settings.path, settings.name, revision=settings.revision)
    except Exception as error:  # the hub client raises a dozen kinds, none of them with a common base
        raise DataError(
            f"data.path={settings.path!r} is no folder or file here, and cannot be loaded from the hub: {error} Check "
            "the name, data.name and the network, or give a local folder or file."
        ) from error
    splits = {}
    for split, names in _NAMES.items():
        wanted = getattr(settings, split)
        if wanted == NONE:
            continue
        if wanted is not None and wanted not in loaded:
            raise DataError(f"data.{split}={wanted!r}: {settings.path} has the splits {', '.join(loaded)} only.")
        found = wanted or next((name for name in names if name in loaded), None)
        if found is not None:
            splits[split] = loaded[found]
    return splits


def _hold_out(splits: dict[str, Any], settings: DataSettings) -> dict[str, Any]:
    unwanted = settings.validation_fraction == 0 or settings.limit_validation == 0
    if "validation" in splits or "train" not in splits or unwanted:
        return splits
    rows = len(splits["train"])
    held = max(1, round(rows * settings.validation_fraction))
    if held >= rows:
        raise DataError(
            f"data.path={settings.path!r}: {rows} train rows are too few to hold out {held} for validation; give a "
            "validation set, or data.validation_fraction=0."
        )
    mixed = splits["train"].shuffle(seed=settings.seed)
    parts = {"train": mixed.select(range(held, rows)), "validation": mixed.select(range(held))}
    return {**parts, **{k: v for k, v in splits.items() if k == "test"}}


def _limit(splits: dict[str, Any], settings: DataSettings) -> dict[str, Any]:
    limited = {}
    for split, dataset in splits.items():
        limit = getattr(settings, f"limit_{split}")
        if limit is not None and limit < len(dataset):
            dataset = dataset.shuffle(seed=settings.seed).select(range(limit))
        limited[split] = dataset
    return limited
