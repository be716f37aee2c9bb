"""The output folder: checked before work begins, and resumed from."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .checkpoints import damaged
from .continuing import check_settings
from .settings import TrainSettings

__all__ = ["CHECKPOINTS", "RunFolder", "open_folder"]

CHECKPOINTS = "checkpoints"
RESULTS = "adapter"


class RunFolder:
    """Where a run writes, and where it goes on from.

    Attributes:
        path: the output folder.
        checkpoint: the checkpoint to resume from, or None.
        settings: groups of settings, those that decide what a run comes to, as plain data.
    """

    def __init__(self, path: Path, checkpoint: Path | None, created: list[Path], settings: dict[str, Any]) -> None:
        self.path, self.checkpoint, self._created, self.settings = path, checkpoint, created, settings

    @property
    def checkpoints(self) -> Path:
        """Where the Trainer keeps its checkpoints."""
        return self.path / CHECKPOINTS

    @contextmanager
    def clean_up(self) -> Iterator[None]:
        """On an error remove checkpoints that are not whole, and the folder if nothing else is in it."""
        try:
            yield
        except BaseException:
            for folder in self.checkpoints.glob("checkpoint-*"):
                if not _is_checkpoint(folder):
                    shutil.rmtree(folder, ignore_errors=True)
            if self._created and not any(self.checkpoints.glob("checkpoint-*")):
                shutil.rmtree(self.path, ignore_errors=True)
                for parent in self._created:
                    with suppress(OSError):  # gone already, or somebody else put something in
                        parent.rmdir()
            raise


def open_folder(settings: TrainSettings) -> RunFolder:
    """Find or make the output folder, and the checkpoint if the run is resumed.

    Raises:
        ConfigError: if the folder cannot be written, holds results already, or has no checkpoint to resume from; or if
            that was written with other settings.
    """
    groups = {name: values for name, values in settings.as_dict().items() if isinstance(values, dict)}
    checkpoint = _find_checkpoint(settings)
    if checkpoint is not None:
        check_settings(checkpoint, groups)
    path = _output(settings, checkpoint)
    earlier = "results" if (path / RESULTS).exists() else "checkpoints" if _checkpoints(path) else None
    if checkpoint is None and not settings.overwrite and earlier is not None:
        raise ConfigError(
            f"output={str(path)!r} holds the {earlier} of an earlier run. Choose another folder, go on with "
            "--resume, or replace them with --overwrite."
        )
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"output={str(path)!r} cannot be written ({error}). Choose a folder that can be.") from error
    if checkpoint is None and settings.overwrite:
        shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)
    return RunFolder(path, checkpoint, created, groups)


def _output(settings: TrainSettings, checkpoint: Path | None) -> Path:
    if settings.output is not None:
        return Path(settings.output).expanduser()
    if checkpoint is not None:
        return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else checkpoint.parent
    stem = f"{settings.method.name}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = Path("runs") / stem, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{stem}-{number}"
    return path


def _find_checkpoint(settings: TrainSettings) -> Path | None:
    if settings.resume is False:
        return None
    folder = Path(settings.output or "") if settings.resume is True else Path(settings.resume)
    folder = folder.expanduser()
    if _is_checkpoint(folder):
        damage = damaged(folder)
        if damage is not None:
            raise ConfigError(f"resume: {damage} Give an earlier checkpoint, or the run's output folder.")
        return folder
    found = sorted(_checkpoints(folder), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    reason = ""
    for checkpoint in found:
        damage = damaged(checkpoint)
        if damage is None:
            if reason:
                warnings.warn(f"SliceFine: the run goes on from {checkpoint.name}: {reason}", UserWarning, stacklevel=2)
            return checkpoint
        reason = reason or damage
    state = "is no folder" if not folder.is_dir() else "holds no whole checkpoint"
    raise ConfigError(
        f"resume: {str(folder)!r} {state}{f' ({reason})' if reason else ''}. Give the output folder of a run that was "
        f"interrupted, or one of its {CHECKPOINTS}/checkpoint-N folders; or leave resume out to start anew."
    )


def _checkpoints(output: Path) -> list[Path]:
    return [path for path in (output / CHECKPOINTS).glob("checkpoint-*") if _is_checkpoint(path)]


def _is_checkpoint(folder: Path) -> bool:
    """The Trainer writes its state last, so a folder with a readable state is whole."""
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return (folder / "optimizer.pt").is_file()
