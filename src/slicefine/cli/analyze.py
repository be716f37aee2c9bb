"""Measure the theory on a model and its data: spectra, task energy, winners, shift, importance, backbone."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from typing import Any

from jsonargparse import ArgumentParser

from .parsing import instantiate

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


def parser() -> ArgumentParser:
    """Options of `slicefine analyze`; its studies come with `add_studies`."""
    return ArgumentParser(description="Measure the theory on a model and its data; JSON and pictures beside it.")


def add_studies(result: ArgumentParser) -> None:
    """Add one subcommand per study, once the parser is a subcommand itself: the upper level must come first."""
    commands = result.add_subcommands(dest="study")
    for name, module in STUDIES.items():
        commands.add_subcommand(name, _parser(name), help=(_module(module).__doc__ or "").splitlines()[0])


def run(chosen: Any) -> int:
    """Run one study, print its table, and write its files."""
    name = chosen["study"]
    module = _module(STUDIES[name])
    settings = module.Settings(**instantiate(_parser(name), chosen[name]))
    from ..studies.common import publish
    from ..training.screen import quiet_libraries

    quiet_libraries()
    publish(module.study(settings), settings.output, settings=asdict(settings))
    return 0


def _parser(name: str) -> ArgumentParser:
    module = _module(STUDIES[name])
    about = (module.__doc__ or "").splitlines()[0]
    result = ArgumentParser(usage=f"slicefine analyze {name} [--SETTING VALUE ...]", description=about)
    result.add_argument("--config", action="config", help="Settings in YAML; flags after it override it.")
    result.add_class_arguments(module.Settings)
    return result


def _module(name: str) -> Any:
    return importlib.import_module(f"..studies.{name}", __package__)
