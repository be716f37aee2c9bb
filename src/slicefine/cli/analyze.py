"""Measure the theory on a model and its data: spectra, task energy, winners, shift, importance, backbone."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from typing import Any

from .parsing import VerbParser, add_outputs, instantiate

__all__ = ["STUDIES", "add_studies", "parser", "run"]

# verb -> module of `studies`; each has `Settings` (a dataclass with an `output`) and `study(settings) -> Result`
STUDIES: dict[str, str] = {
    "spectra": "spectra",
    "energy": "task_energy",
    "shift": "shift",
    "importance": "importance",
    "winners": "winners",
    "overlap": "overlap",
}


_COMMON = (
    "config",
    "output",
    "json",
    "model",
    "model.path",
    "task.name",
    "data.path",
    "data.columns.text",
    "data.limit_train",
)


def parser() -> VerbParser:
    """Options of `slicefine analyze`; its studies come with `add_studies`."""
    about = "Measure the theory on a model and its data; JSON and pictures beside it."
    usage = f"slicefine analyze {{{','.join(STUDIES)}}} [--SETTING VALUE ...]"
    return VerbParser(
        usage, about, ("slicefine analyze spectra --model LOCAL_OR_HUB", "slicefine analyze winners --help")
    )


def add_studies(result: VerbParser) -> None:
    """Add one subcommand per study, once the parser is a subcommand itself: the upper level must come first."""
    commands = result.add_subcommands(dest="study")
    for name, module in STUDIES.items():
        own = _parser(name)
        add_outputs(own)
        commands.add_subcommand(name, own, help=(_module(module).__doc__ or "").splitlines()[0])


def run(chosen: Any) -> Any:
    """Run one study, print its table, and write its files."""
    name = chosen["study"]
    module = _module(STUDIES[name])
    settings = module.Settings(**instantiate(_parser(name), chosen[name]))
    from ..studies.common import publish
    from ..training.screen import quiet_libraries

    quiet_libraries()
    result = module.study(settings)
    publish(result, settings.output, settings=asdict(settings))
    return {"title": result.title, "numbers": result.numbers, "notes": list(result.notes)}


def _parser(name: str) -> VerbParser:
    module = _module(STUDIES[name])
    about = (module.__doc__ or "").splitlines()[0]
    examples = (f"slicefine analyze {name} --config recipes/studies/mrpc.yaml --output analysis",)
    result = VerbParser(f"slicefine analyze {name} [--SETTING VALUE ...]", about, examples, _COMMON)
    result.add_argument("--config", action="config", help="Settings in YAML; flags after it override it.")
    result.add_class_arguments(module.Settings)
    return result


def _module(name: str) -> Any:
    return importlib.import_module(f"..studies.{name}", __package__)
