"""Where a command may write."""

from __future__ import annotations

from pathlib import Path

from ..durable import replacing_folder as atomic_folder
from ..errors import ConfigError

__all__ = ["atomic_folder", "check_target"]


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
        raise ConfigError(f"output={str(output)!r} exists and is not empty. Choose another folder, or --overwrite.")
    for source in sources:
        if source.resolve().is_relative_to(target.resolve()):
            raise ConfigError(f"output={str(output)!r} holds {source}, which would be replaced. Choose another folder.")
    return target
