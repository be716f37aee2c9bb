"""Where PEFT's tests come from: the source distribution of the installed version, in a cache folder."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import peft
import pytest

__all__ = ["load"]

PACKAGE = "peft_released_tests"
_CACHE = Path(os.environ.get("SLICEFINE_CACHE", Path(__file__).parents[2] / ".cache"))


def load(module: str) -> types.ModuleType:
    """Import one of PEFT's test modules; skips the caller's module when the tests cannot be had."""
    parent = str(_folder().parent)
    if parent not in sys.path:
        sys.path.append(parent)
        pytest.register_assert_rewrite(PACKAGE)
    missing = _stand_in("diffusers")  # imported for Stable Diffusion tests only, which are not run here
    try:
        return importlib.import_module(f"{PACKAGE}.{module}")
    finally:
        for name in missing:
            del sys.modules[name]


@functools.cache
def _folder() -> Path:
    """The unpacked tests, downloaded on first use, with the ``__init__.py`` that the distribution lacks."""
    target = _CACHE / f"peft-{peft.__version__}" / PACKAGE
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE) as work:
            tests = _unpack(_download(Path(work)), Path(work))
            (tests / "__init__.py").touch()
            try:
                tests.rename(target)
            except OSError:  # another process was faster
                if not target.exists():
                    raise
    return target


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "20", "--dest", str(work)]
    if importlib.util.find_spec("setuptools") is not None:  # else pip fetches it for its own use
        command.append("--no-build-isolation")
    done = subprocess.run([*command, f"peft=={peft.__version__}"], capture_output=True, text=True, check=False)
    archives = list(work.glob("peft-*.tar.gz"))
    if done.returncode or not archives:
        last = (done.stderr.strip().splitlines() or ["no archive"])[-1]
        pytest.skip(f"PEFT's source distribution cannot be downloaded ({last})", allow_module_level=True)
    return archives[0]


def _unpack(archive: Path, work: Path) -> Path:
    with tarfile.open(archive) as file:
        file.extractall(work, filter="data")
    tests = work / f"peft-{peft.__version__}" / "tests"
    if not tests.is_dir():
        pytest.skip(f"{archive.name} ships no tests", allow_module_level=True)
    return Path(shutil.move(tests, work / PACKAGE))


def _stand_in(package: str) -> list[str]:
    """Make ``from package import anything`` work while PEFT's modules are imported; returns what to remove."""
    if package in sys.modules or importlib.util.find_spec(package) is not None:
        return []
    module = types.ModuleType(package)
    module.__spec__ = importlib.machinery.ModuleSpec(package, None)
    module.__getattr__ = lambda name: type(name, (), {})  # type: ignore[method-assign]
    sys.modules[package] = module
    return [package]
