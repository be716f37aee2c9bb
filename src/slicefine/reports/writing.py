"""Write a page to a file, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from ..durable import write_file
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
        raise ConfigError(f"output={output!r} exists. Choose another name, or --overwrite.")
    return path


def write_page(path: Path, content: str) -> None:
    """Replace a page, whole or not at all.

    Raises:
        ConfigError: if the file cannot be written.
    """
    write_file(path, content)
