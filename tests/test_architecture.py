"""Imports go one way, the core needs only torch and safetensors, and every doctest runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import slicefine

SOURCE = Path(slicefine.__file__).parent

# a module may import those before it
LADDER = [
    "errors",
    "durable",
    "reading",
    "checksums",
    "fingerprint",
    "geometry",
    "initial",
    "quantised",
    "zero",
    "weights",
    "window",
    "schedule",
    "functional",
    "packed",
    "journal",
    "delta",
    "sharded",
    "biases",
    "state",
    "transfer",
    "held",
    "adapters",
    "nested",
    "layer",
    "guards",
    "since",
    "coupling",
    "optimizers",
    "pace",
    "mover",
    "targets",
    "tuner",
    "energy",
]
ALLOWED = {name: set(LADDER[:i]) for i, name in enumerate(LADDER)}
for name in ("durable", "reading", "checksums", "geometry"):
    ALLOWED[name] = {"errors"}
ALLOWED["fingerprint"] = set()
ALLOWED["initial"] = {"errors", "geometry"}
ALLOWED["schedule"] = {"errors", "geometry", "initial"}
ALLOWED["window"] = {"errors", "geometry"}
ALLOWED["nested"] = {"errors"}
ALLOWED["packed"] = {"errors", "functional", "geometry"}
ALLOWED["quantised"] = {"errors"}
ALLOWED["weights"] = {"errors", "geometry", "quantised", "zero"}  # stage 3 shows no shapes
ALLOWED["functional"] = {"errors", "geometry", "weights"}  # tensors only: no schedule
ALLOWED["journal"] = {"errors", "geometry", "functional"}
ALLOWED["delta"] = {"errors", "geometry", "functional", "journal"}
ALLOWED["coupling"] = {"errors", "geometry", "schedule", "weights", "window"}
ALLOWED["optimizers"] = {"errors", "sharded", "zero"}
ALLOWED["targets"] = {"errors", "layer", "quantised", "weights"}
ALLOWED["pace"] = {"errors", "schedule", "state", "window"}
ALLOWED["sharded"] = {"errors", "geometry", "zero"}
ALLOWED["zero"] = {"errors"}
ALLOWED["biases"] = {"errors", "sharded"}
ALLOWED["state"] = {"errors", "biases", "geometry", "window", "schedule", "functional", "journal", "zero"}
ALLOWED["transfer"] -= {"window"}
ALLOWED["reference"] = {"errors", "geometry", "schedule"}  # the twin shares nothing with the fast path
CORE = list(ALLOWED)
EXTERNAL = {name: {"torch", "safetensors"} for name in CORE}
EXTERNAL["quantised"] = {"torch", "bitsandbytes", "torchao"}  # these where a layer of theirs is there


def imports(name: str) -> tuple[set[str], set[str]]:
    """Sibling modules and external packages that a core module imports, wherever in the file."""
    siblings, external = set(), set()
    for node in ast.walk(ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            siblings.update([node.module.split(".")[0]] if node.module else [alias.name for alias in node.names])
        elif isinstance(node, ast.ImportFrom):
            external.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            external.update(alias.name.split(".")[0] for alias in node.names)
    return siblings, external - set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", CORE)
def test_imports_go_one_way(name):
    siblings, external = imports(name)
    assert siblings <= ALLOWED[name]
    assert external <= EXTERNAL[name]


def test_the_import_check_can_see():
    assert imports("journal")[0] == {"errors", "functional", "geometry"}
    assert imports("tuner")[1] == {"torch", "safetensors"}


def test_the_core_needs_only_torch_and_safetensors():
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {
            "peft", "transformers", "accelerate", "datasets", "sklearn", "matplotlib", "yaml", "bitsandbytes", "torchao"
        }:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
import slicefine.tuner, slicefine.reference
from torch import nn
tuner = slicefine.tuner.attach(nn.Sequential(nn.Linear(3, 3)), r=1, interval=1)
tuner.move()
print(len(tuner.parameters()), "peft" in sys.modules, "transformers" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["1", "False", "False"], result.stderr


@pytest.mark.parametrize("name", CORE)
def test_doctests(name):
    module = importlib.import_module(f"slicefine.{name}")
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0 or ">>>" not in (SOURCE / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CORE)
def test_public_names_exist_and_are_listed(name):
    module = importlib.import_module(f"slicefine.{name}")
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)
    assert module.__doc__


def test_every_error_is_a_slicefine_error_and_a_builtin_one():
    from slicefine import errors

    kinds = {name: getattr(errors, name) for name in errors.__all__ if name != "nearest"}
    for name, kind in kinds.items():
        assert issubclass(kind, errors.SliceFineError)
        assert name == "SliceFineError" or len(kind.__bases__) == 2
        assert name in errors.__doc__
