"""Write a page to a file, whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import ConfigError

__all__ = ["check_file", "write_page"]


def check_file(output: str, overwrite: bool = False) -> Path:
    """The file to write, once it is clear that nothing is lost by it.

    Raises:
        ConfigError: if it is a folder, or exists and may not be replaced.
    """
    path = Path(output).expanduser()
    if path.is_dir():
        raise ConfigError(f"output={output!r} is a folder. Give the name of a file, such as report.html.")
    if path.exists() and not overwrite:
        raise ConfigError(f"output={output!r} exists. Choose another name, or overwrite=true.")
    return path


def write_page(path: Path, content: str) -> None:
    """Write through a temporary sibling, so that a reader never sees half a page.

    Raises:
        ConfigError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise ConfigError(f"output={str(path)!r} cannot be written ({error}). Choose a file that can be.") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(content)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except OSError as error:
        raise ConfigError(f"output={str(path)!r} cannot be written ({error}). Choose a file that can be.") from error
    finally:
        Path(aside).unlink(missing_ok=True)
