"""The lock, the distributions and the workflows: pinned, hashed, and in step with pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TORCH = (ROOT / "requirements" / "torch.txt").read_text(encoding="utf-8")


def locked(name: str) -> dict[str, set[str]]:
    """Versions of each package in a lock (several where they depend on the Python version); each line has hashes."""
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8").replace("\\\n", " ")
    found: dict[str, set[str]] = {}
    for line in filter(lambda line: line and not line.startswith("#"), text.splitlines()):
        requirement = Requirement(line.split(" --hash=")[0])
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}\b", line), f"{name}: {requirement.name} has no hash"
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        found.setdefault(canonicalize_name(requirement.name), set()).add(pin.version)
    return found


def required(extra: str | None) -> list[Requirement]:
    """What the package, or one of its extras, asks for, other extras of its own included."""
    listed = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    found: list[Requirement] = []
    for requirement in map(Requirement, listed):
        own = requirement.name == PROJECT["name"]
        found += [r for name in requirement.extras for r in required(name)] if own else [requirement]
    return found


@pytest.mark.parametrize("extra", ["demo", "dev"])
def test_the_lock_fits_what_the_package_asks_for(extra: str):
    versions = locked(f"{extra}.txt") | {"torch": set(re.findall(r"^torch==(\S+)$", TORCH, flags=re.MULTILINE))}
    for requirement in required(None) + required(extra):
        pins = versions.get(canonicalize_name(requirement.name))
        assert pins, f"{requirement} is not in the lock; run: make lock"
        assert all(pin in requirement.specifier for pin in pins), f"{requirement}, but {pins}; run: make lock"


def test_the_demo_has_the_versions_of_the_tests():
    dev = locked("dev.txt")
    assert {name: versions for name, versions in locked("demo.txt").items() if dev.get(name) != versions} == {}


def test_the_core_needs_little_and_bounds_nothing_from_above():
    assert {r.name for r in required(None)} == {"torch", "safetensors"}
    every = [r for extra in PROJECT["optional-dependencies"] for r in required(extra)] + required(None)
    assert [str(r) for r in every if any(s.operator in ("<", "<=", "~=") for s in r.specifier)] == []


def test_actions_are_pinned_by_commit_but_for_the_one_that_publishes():
    loose = []
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"].values()
        used = [step["uses"] for job in jobs for step in job["steps"] if "uses" in step]
        loose += [name for name in used if not re.search(r"@[0-9a-f]{40}$", name)]
    assert loose == ["pypa/gh-action-pypi-publish@release/v1"]
