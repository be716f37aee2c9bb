"""Folders that appear whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError

__all__ = ["atomic_folder", "check_target"]


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling to write into; it takes the target's place when all went well, or vanishes.

    Raises:
        ConfigError: if nothing can be written there.

    Example:
        >>> with atomic_folder(Path("out/adapter")) as folder:  # doctest: +SKIP
        ...     model.save_pretrained(folder)
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error}). Choose a folder that can be.") from error
    try:
        aside.chmod(0o755)
        yield aside
        if target.exists():
            shutil.rmtree(target)
        aside.replace(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_target(output: str | Path, sources: list[Path], overwrite: bool = False) -> Path:
    """The folder to write, once it is clear that nothing is lost by it.

    Args:
        output: where to write.
        sources: folders that are read; the output must hold none of them.
        overwrite: whether what is there may be replaced.

    Raises:
        ConfigError: if the folder is in use, or would replace a source.
    """
    target = Path(output).expanduser()
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(f"output={str(output)!r} is no folder. Choose another name.")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise ConfigError(f"output={str(output)!r} exists and is not empty. Choose another folder, or overwrite=true.")
    for source in sources:
        if source.resolve().is_relative_to(target.resolve()):
            raise ConfigError(f"output={str(output)!r} holds {source}, which would be replaced. Choose another folder.")
    return target
