"""Files and folders that are replaced whole or not at all, also if the machine stops at any moment.

Content is written aside, in the same file system, and brought to the disk; a rename then puts it in place, and the
folder that holds the name is brought to the disk as well. What a crash leaves aside is removed by a later write.

- `replacing` and `write_file`: one file, by one rename.
- `replacing_folder`: a folder, by an exchange of two names (Linux, macOS). Where the file system has none, the old
  folder steps aside first, for a moment under the name that `standing` knows: a reader finds it there, and the next
  write puts it back.
- `replacing_files`: several files of a folder that holds others, too. They are gathered in a folder inside, whose
  rename is the moment that counts; `finish` moves what a crash kept from its place.

Every failure to write is a `ConfigError` of one sentence, and what was there before is still there.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "finish",
    "replacing",
    "replacing_files",
    "replacing_folder",
    "standing",
    "sync_tree",
    "write_file",
]

_COMMIT = ".slicefine-commit"
_MINUTE = 60.0


def write_file(target: Path, content: str | bytes) -> None:
    """Replace a file by this content (text in UTF-8).

    Raises:
        ConfigError: if it cannot be written.
    """
    with replacing(target) as part:
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to; the file there takes the target's place when all went well, or vanishes.

    Raises:
        ConfigError: if it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as out:
        ...     with replacing(Path(out, "metrics.json")) as part:
        ...         _ = part.write_text("{}")
        ...     os.listdir(out)
        ['metrics.json']
    """
    with _failures(target):
        place = Path(os.path.realpath(target))
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if place.exists() and not place.is_file():  # a pipe or a device: nothing to replace
            yield place
            return
        with _aside(place.parent, place.name) as aside:
            part = aside / place.name
            yield part
            _sync(part)
            os.replace(part, place)
            _sync(place.parent)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """An empty folder to write into; it takes the target's place when all went well, or vanishes.

    Raises:
        ConfigError: if it cannot be written, or if the target is no folder.

    Example:
        >>> with replacing_folder(Path("out/adapter")) as folder:  # doctest: +SKIP
        ...     model.save_pretrained(folder)
    """
    with _failures(target):
        place = Path(os.path.realpath(target))
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with _aside(place.parent, place.name) as aside:
            if standing(place) != place:  # a crash in the middle of `_swap`
                os.rename(_stepped_aside(place), place)
            yield aside
            sync_tree(aside)
            if place.exists():
                _swap(aside, place)
            else:
                os.rename(aside, place)
                _sync(place.parent)


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """An empty folder to write into; its files take the place of those of the same name when all went well.

    What else is in ``folder`` stays. Subfolders do the same, one by one.

    Raises:
        ConfigError: if they cannot be written.
    """
    with _failures(folder):
        place = Path(os.path.realpath(folder))
        made = _make(place)
        finish(place)
        with _aside(place, "files") as aside:
            yield aside
            sync_tree(aside)
            _commit(aside, place)
        for new in made:
            _sync(new.parent)


def finish(folder: Path) -> None:
    """Put the files in place that a crash inside `replacing_files` kept from it; nothing to do, as a rule.

    Links are not followed: a folder may come from anywhere.
    """
    commit = folder / _COMMIT
    if not commit.is_dir() or commit.is_symlink():
        return
    for part in sorted(os.scandir(commit), key=lambda entry: entry.name):
        if part.is_file(follow_symlinks=False):
            with suppress(FileNotFoundError):  # another process finishes, too
                os.replace(part.path, folder / part.name)
    _sync(folder)
    shutil.rmtree(commit, ignore_errors=True)


def standing(folder: Path) -> Path:
    """Where a folder is: at its name, or, after a crash between two renames, where it had stepped aside."""
    aside = _stepped_aside(folder)
    return aside if not folder.exists() and aside.is_dir() and not aside.is_symlink() else folder


def sync_tree(folder: Path) -> None:
    """Bring every file and folder below ``folder``, and itself, to the disk."""
    for path, _, files in os.walk(folder):
        for name in files:
            _sync(Path(path, name))
        _sync(Path(path))


# -- parts --------------------------------------------------------------------------------------------------------


@contextmanager
def _failures(target: Path) -> Iterator[None]:
    """What the system, or safetensors, says of a failed write, as one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{target} cannot be written ({error}). What was there before is still there; make room, or choose another "
            "place."
        ) from error


@contextmanager
def _aside(parent: Path, name: str) -> Iterator[Path]:
    """A fresh folder in ``parent``, gone afterwards; what dead writers of that name left is removed first."""
    made = _make(parent)
    prefix = f".{name[:50]}."
    _sweep(parent, prefix)
    aside = parent / f"{prefix}{uuid.uuid4().hex[:8]}.partial"
    aside.mkdir()
    lock = None
    try:
        lock = _lock(aside)
        yield aside
        for new in made:
            _sync(new.parent)
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(aside, ignore_errors=True)


def _make(folder: Path) -> list[Path]:
    """Make a folder with its parents; returns those that were not there."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _sweep(parent: Path, prefix: str) -> None:
    """Remove what was left aside by writers that are no more: their locks are free."""
    for stray in parent.glob(f"{glob.escape(prefix)}????????.partial"):
        with suppress(OSError):
            if stray.is_symlink() or time.time() - stray.stat().st_mtime < _MINUTE:
                continue  # it may have been made, and not been locked yet
            lock = _lock(stray)
            if lock is not None:
                os.close(lock)
                shutil.rmtree(stray, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """Lock a folder for as long as this process lives; None if somebody has it, or where there are no locks."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _commit(part: Path, folder: Path) -> None:
    """Let the files of ``part`` take their places in ``folder``; from the rename on, `finish` gets them there."""
    for inner in sorted(path for path in part.iterdir() if path.is_dir()):
        (folder / inner.name).mkdir(exist_ok=True)
        finish(folder / inner.name)
        _commit(inner, folder / inner.name)
    for attempt in range(10):
        try:
            os.rename(part, folder / _COMMIT)
            break
        except OSError:
            if attempt == 9 or not (folder / _COMMIT).is_dir():
                raise
            finish(folder)  # another process is between its rename and its end
    _sync(folder)
    finish(folder)


def _swap(aside: Path, target: Path) -> None:
    """Give a folder the name of another, which goes."""
    if _exchange(aside, target):
        _sync(target.parent)  # before the old one is removed, in `_aside`
        return
    old = _stepped_aside(target)
    shutil.rmtree(old, ignore_errors=True)
    os.rename(target, old)
    try:
        os.rename(aside, target)
    except BaseException:
        os.rename(old, target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _stepped_aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once; False where the system or the file system cannot."""
    if os.name != "posix":
        return False
    library: Any = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(library, "renameat2"):  # Linux: AT_FDCWD, RENAME_EXCHANGE
        return bool(library.renameat2(-100, names[0], -100, names[1], 2) == 0)
    if hasattr(library, "renamex_np"):  # macOS: RENAME_SWAP
        return bool(library.renamex_np(*names, 2) == 0)
    return False


def _sync(path: Path) -> None:
    """Bring a file's content, or a folder's names, to the disk."""
    folder = path.is_dir()
    if os.name == "nt" and folder:
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no such thing
            raise
    finally:
        os.close(handle)
