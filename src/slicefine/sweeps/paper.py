"""Recipes of the paper's tables: the published numbers, and a sweep per scale that makes ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .recipes import read_recipe
from .settings import SweepSettings, ViewSettings

__all__ = ["FOLDER", "PaperTable", "find_recipe", "read_table"]

FOLDER = "recipes/paper"
METHODS, TASKS = "methods.yaml", "tasks.yaml"  # what tables share
_FIELDS = {"title", "claim", "source", "columns", "paper", "scales"}


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper and the sweep that makes ours.

    Attributes:
        name: of the recipe.
        source: what the published numbers are.
        columns: labels of the columns, as the sweep has them.
        paper: the published numbers of each row, as printed; a cell may have several, separated by a slash.
        settings: the sweep of the chosen scale.
    """

    name: str
    source: str
    columns: list[str]
    paper: dict[str, list[str]]
    settings: SweepSettings

    def average(self, row: str) -> float | None:
        """Mean over all published numbers of a row, computed here; None where one is missing."""
        try:
            numbers = [float(part) for cell in self.paper[row] for part in cell.split("/")]
        except (KeyError, ValueError):
            return None
        return sum(numbers) / len(numbers)


def find_recipe(name: str) -> Path:
    """The file of a table: a path, or a name below recipes/paper, here or where the package comes from.

    Raises:
        ConfigError: if there is none.
    """
    given = Path(name).expanduser()
    if given.suffix in (".yaml", ".yml") and given.is_file():
        return given
    package = Path(__file__).resolve().parents[1]
    folders = [Path(FOLDER), package / "recipes", package.parents[1] / FOLDER]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted(
        {file.stem for folder in folders for file in folder.glob("*.yaml")} - {Path(METHODS).stem, Path(TASKS).stem}
    )
    raise ConfigError(f"{name!r} is no recipe of a table; there are {', '.join(known) or 'none'}, or give a file.")


def read_table(file: Path, scale: str) -> PaperTable:
    """Read a recipe at a scale. One that ``extends`` another says only what differs from it.

    Raises:
        ConfigError: for a scale, a method or a field that it does not have.
    """
    content = _extended(file)
    try:
        return _table(file, content, scale)
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(f"{file}: a part of it is of another kind than a table's recipe has ({error}).") from error


def _table(file: Path, content: dict[str, Any], scale: str) -> PaperTable:
    unknown = sorted(map(str, content.keys() - _FIELDS))
    if unknown:
        raise ConfigError(f"{file}: unknown fields {', '.join(unknown)}; expected {', '.join(sorted(_FIELDS))}.")
    scales = content.get("scales") or {}
    if scale not in scales:
        raise ConfigError(f"{file}: scale={scale!r} is not there; it has {', '.join(map(str, scales)) or 'none'}.")
    if not isinstance(scales[scale], Mapping):
        raise ConfigError(f"{file}: scales: {scale}: expected settings of a sweep, got {scales[scale]!r}.")
    chosen = dict(scales[scale])
    names = [name for group in chosen.pop("methods", []) for name in (group if isinstance(group, list) else [group])]
    vary = {**_methods(file, names), **_tasks(file, chosen.pop("tasks", None)), **chosen.pop("vary", {})}
    view = ViewSettings(**chosen.pop("view", {}))
    try:
        settings = SweepSettings(title=content["title"], claim=content.get("claim", ""), vary=vary, view=view, **chosen)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{file}: scale {scale}: {error}") from error
    paper = {row: [str(cell) for cell in cells] for row, cells in (content.get("paper") or {}).items()}
    columns = [str(column) for column in content.get("columns", [])]
    for row, cells in paper.items():
        if len(cells) != len(columns):
            raise ConfigError(f"{file}: paper: {row} has {len(cells)} numbers for {len(columns)} columns.")
    return PaperTable(file.stem, content.get("source", ""), columns, paper, settings)


def _methods(file: Path, names: list[str]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The axis of methods, from the list that all tables share."""
    if not names:
        return {}
    known = read_recipe(file.parent / METHODS)
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigError(f"{file}: methods {', '.join(missing)} are not in {METHODS}.")
    return {"method": {name: known[name] for name in names}}


def _tasks(file: Path, group: str | None) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The axis of tasks, from the groups that tables share."""
    if group is None:
        return {}
    known = read_recipe(file.parent / TASKS)
    if group not in known:
        raise ConfigError(f"{file}: tasks={group!r} is not in {TASKS}; it has {', '.join(known)}.")
    return {"task": known[group]}


def _extended(file: Path) -> dict[str, Any]:
    """A recipe on top of the one that it extends; the published numbers are its own alone."""
    content = read_recipe(file)
    parent = content.pop("extends", None)
    if parent is None:
        return content
    if not isinstance(parent, str) or Path(parent).name != parent:
        raise ConfigError(f"{file}: extends: {parent!r} is no name of a recipe in the same folder.")
    if not (file.parent / f"{parent}.yaml").is_file():
        raise ConfigError(f"{file}: extends: there is no {parent}.yaml beside it.")
    base = read_recipe(file.parent / f"{parent}.yaml")
    if "extends" in base:
        raise ConfigError(f"{file}: extends {parent}, which extends another; name the first one.")
    return {**_merged(base, content), "paper": content.get("paper", {})}


def _merged(base: Any, changes: Any) -> Any:
    if not isinstance(base, Mapping) or not isinstance(changes, Mapping):
        return changes
    return {**base, **{name: _merged(base.get(name), value) for name, value in changes.items()}}
