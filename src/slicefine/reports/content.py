"""What lies in a run's folder: metrics, adapter, distances from its base, and what `slicefine analyze` found."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ..charts import Chart, Line, Panel
from ..errors import AdapterFileError, ConfigError, DataError
from ..files.adapter import CONFIG, Adapter, find_adapter, read_adapter
from ..files.checkpoint import Checkpoint
from ..files.distance import Distance, distances
from ..geometry import Slice
from ..reading import read_json
from ..training.contents import Contents, read_contents
from ..training.trained import RUN_FILE
from .elements import clean

__all__ = ["METRICS", "Run", "Study", "read_chart", "read_run", "read_runs", "read_study"]

METRICS = "metrics.json"
_NEEDED: dict[str, type] = {"after": dict, "metric": str, "counts": dict, "history": list, "settings": dict}


@dataclass(frozen=True)
class Study:
    """What `slicefine analyze` left in a folder.

    Attributes:
        charts: in the order of their files' names.
        notes: the sentences below the studies' tables.
    """

    charts: list[Chart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One run, as far as its folder tells.

    Attributes:
        name: of its section; no two runs of a page have the same.
        folder: where it is.
        date: when its newest file was written, as the file system says.
        metrics: its ``metrics.json``; None for an adapter alone.
        contents: its adapter; None where the whole model was saved.
        adapter: the slices; None for other methods.
        distances: how far each slice went from the base; None if that could not be measured.
        missing: why not.
        study: analyses that lie with the run.
    """

    name: str
    folder: Path
    date: str
    metrics: dict[str, Any] | None = None
    contents: Contents | None = None
    adapter: Adapter | None = None
    distances: dict[str, dict[Slice, Distance]] | None = None
    missing: str = ""
    study: Study = field(default_factory=Study)

    def setting(self, name: str) -> Any:
        """A setting by its dotted name, from the run's recipe or from its adapter; None where neither knows it."""
        found: Any = (self.metrics or {}).get("settings")
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is None and self.metrics is None and self.contents is not None:
            found = self.contents.config.get(name.rpartition(".")[2])
        return found

    @property
    def moves(self) -> list[int]:
        """Steps after which the slices moved, as the run noted them."""
        return [int(step) for step in (self.metrics or {}).get("moves") or ()]

    @property
    def before(self) -> float | None:
        """The main metric on the validation set before training; None if it was not measured."""
        found: Any = self.metrics
        for key in ("before", "validation", (self.metrics or {}).get("metric")):
            found = found.get(key) if isinstance(found, dict) else None
        return float(found) if _is_number(found) else None

    @property
    def method(self) -> str:
        """How it was fine-tuned: slicefine, lora, full, head; or "analysis" for a folder without a run."""
        if self.metrics is None and self.contents is None:
            return "analysis"
        kind = None if self.contents is None else self.contents.config.get("peft_type")
        return str(self.setting("method.name") or kind or "unknown").lower()


def read_runs(folders: Sequence[str], model: str | None = None) -> list[Run]:
    """Read several runs, and tell those of the same name apart by the folders above.

    Args:
        folders: what `slicefine train` or `slicefine analyze` wrote.
        model: the base, if it is elsewhere than in training.

    Raises:
        ConfigError: if a folder is given twice.
        DataError, AdapterFileError: see `read_run`.
    """
    runs = [read_run(folder, model) for folder in folders]
    paths = [run.folder.resolve() for run in runs]
    for path, count in Counter(paths).items():
        if count > 1:
            raise ConfigError(f"{path}: given {count} times. Give each run once.")
    depth = 1
    while len(set(_names(paths, depth))) < len(paths):
        depth += 1
    return [replace(run, name=clean(name)) for run, name in zip(runs, _names(paths, depth), strict=True)]


def read_run(folder: str | Path, model: str | None = None) -> Run:
    """Read a run: the output folder of `slicefine train`, its ``adapter`` folder, or one of `slicefine analyze`.

    The base is looked for on this machine only.

    Raises:
        DataError: if there is no such folder, nothing of a run in it, or a file is corrupt.
        AdapterFileError: if the adapter is corrupt.

    Example:
        >>> read_run("runs/mrpc").metrics["after"]["test"]  # doctest: +SKIP
        {'accuracy': 0.86, 'f1': 0.9}
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise DataError(f"{path}: no such folder. Give the folder that `slicefine train` or `slicefine analyze` wrote.")
    metrics = _read_metrics(path / METRICS) if (path / METRICS).is_file() else None
    contents = read_contents(path) if (find_adapter(path) / CONFIG).is_file() else None
    beside = path / "analysis"
    study = read_study(beside) if beside.is_dir() else Study()
    if metrics is None and contents is None:
        study = study if study.charts else read_study(path)
        if not study.charts:
            raise DataError(_nothing(path))
    sliced = contents is not None and bool(contents.layers)
    adapter = read_adapter(path) if sliced else None
    found, missing = (None, "") if adapter is None else _distances(adapter, model)
    return Run(path.name, path, _date(path), metrics, contents, adapter, found, missing, study)


def read_study(folder: str | Path) -> Study:
    """The charts and notes that `slicefine analyze` wrote as JSON into a folder; other JSON files are passed over.

    Raises:
        DataError: if there is no such folder, or a file is not readable as JSON.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise DataError(f"analysis={str(folder)!r}: no such folder. Give one that `slicefine analyze` wrote.")
    found = Study()
    for file in sorted(path.glob("*.json")):
        content = _read_json(file)
        if isinstance(content, dict) and "panels" in content:
            found.charts.append(read_chart(content, str(file)))
        elif isinstance(content, dict) and isinstance(content.get("notes"), list):
            found.notes.extend(clean(note) for note in content["notes"])
    return found


def read_chart(content: dict[str, Any], where: str) -> Chart:
    """A chart from what `Chart.as_dict` gave, in which null stands for a value that is not finite.

    Raises:
        DataError: if it is no chart.

    Example:
        >>> chart = Chart("one", "One point", [Panel(lines=[Line("a", [1], [2.0])])], "A point.")
        >>> read_chart(chart.as_dict(), "one.json").panels[0].lines[0].y
        [2.0]
    """
    try:
        panels = [_panel(panel) for panel in content["panels"]]
        words = {name: clean(content[name]) for name in ("name", "title", "alternative")}
        across = content.get("across")
        return Chart(panels=panels, across=None if across is None else max(1, int(across)), **words)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{where}: not a chart of `slicefine analyze` ({type(error).__name__}: {error}). Run the analysis again."
        ) from error


def _panel(panel: dict[str, Any]) -> Panel:
    plain = {name: clean(panel.get(name, "")) for name in ("title", "x_label", "y_label", "scale")}
    return Panel(
        lines=[_line(line) for line in panel.get("lines", ())],
        log_x=bool(panel.get("log_x")),
        log_y=bool(panel.get("log_y")),
        marks=_numbers(panel.get("marks", ())),
        levels={clean(name): _number(level) for name, level in panel.get("levels", {}).items()},
        matrix=None if panel.get("matrix") is None else [_numbers(row) for row in panel["matrix"]],
        row_names=[clean(name) for name in panel.get("row_names", ())],
        column_names=[clean(name) for name in panel.get("column_names", ())],
        **plain,
    )


def _line(line: dict[str, Any]) -> Line:
    named = any(isinstance(x, str) for x in line["x"])
    x: Any = [clean(x) for x in line["x"]] if named else _numbers(line["x"])
    error = None if line.get("error") is None else _numbers(line["error"])
    return Line(clean(line.get("label", "")), x, _numbers(line["y"]), error, line.get("style", "line"))


def _numbers(values: Any) -> list[float]:
    return [_number(value) for value in values]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _read_json(file: Path) -> Any:
    return read_json(file, "the file is corrupt. Write it anew.", DataError)


def _cleaned(value: Any) -> Any:
    """JSON in which every text, and every name, can be drawn."""
    if isinstance(value, dict):
        return {clean(name): _cleaned(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return clean(value) if isinstance(value, str) else value


def _read_metrics(file: Path) -> dict[str, Any]:
    content = _cleaned(_read_json(file))
    kind = type(content).__name__
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected a JSON object, got {kind}; `slicefine train` did not write it.")
    for name, wanted in _NEEDED.items():
        if not isinstance(content.get(name), wanted):
            raise DataError(
                f"{file}: {name!r} is {type(content.get(name)).__name__}, expected {wanted.__name__}; `slicefine "
                "train` did not write it. Give the folder of a run."
            )
    for entry in content["history"]:
        if not isinstance(entry, dict) or not all(map(_is_number, _plotted(entry, content["metric"]))):
            raise DataError(
                f"{file}: the history has an entry whose step, loss or metric is no number; the file is corrupt."
            )
    counted = [*(content.get("moves") or ()), content.get("steps", 0)]
    if not all(_is_number(step) and math.isfinite(step) for step in counted):
        raise DataError(f"{file}: moves and steps must be numbers, got {counted!r:.200}; the file is corrupt.")
    return content


def _plotted(entry: dict[str, Any], metric: str) -> list[Any]:
    """What a chart takes of an entry of the log."""
    shown = [entry[name] for name in ("loss", f"eval_{metric}") if name in entry]
    return [entry.get("step"), *shown] if shown or "step" in entry else []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _distances(adapter: Adapter, model: str | None) -> tuple[dict[str, dict[Slice, Distance]] | None, str]:
    """How far each slice went, or why that cannot be said."""
    try:
        with _local_base(adapter, model) as base:
            return distances(adapter, base), ""
    except AdapterFileError as error:
        return None, clean(error)


def _local_base(adapter: Adapter, model: str | None) -> Checkpoint:
    """As `training.bases.open_base`, but without downloads: a page must not fetch gigabytes on its own."""
    from ..tasks.minilm import HUB_ID, minilm_folder

    name = str(model or adapter.config.get("base_model_name_or_path") or "")
    if name in ("minilm", HUB_ID):
        try:
            return Checkpoint(minilm_folder())
        except ConfigError:  # not installed: the hub's cache may have it
            name = HUB_ID
    if name and Path(name).expanduser().is_dir():
        return Checkpoint(Path(name).expanduser())
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    revision = adapter.config.get("revision") if model is None else None
    try:
        return Checkpoint(Path(snapshot_download(name, revision=revision, local_files_only=True)))
    except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterFileError(f"base model {name!r} is not on this machine; name its folder with --model") from error


def _names(paths: Sequence[Path], depth: int) -> list[str]:
    return ["/".join(path.parts[-depth:]) for path in paths]


def _date(folder: Path) -> str:
    known = [folder / METRICS, folder / CONFIG, folder / "adapter" / CONFIG]
    files = [file for file in known if file.is_file()] or [*folder.glob("*.json")] or [folder]
    return datetime.fromtimestamp(max(file.stat().st_mtime for file in files)).strftime("%Y-%m-%d %H:%M")


def _nothing(path: Path) -> str:
    if (path / RUN_FILE).is_file():
        return f"{path}: a whole model, without {METRICS}. Give the folder above it, which `slicefine train` wrote."
    return (
        f"{path}: no {METRICS}, no {CONFIG} and no charts of `slicefine analyze` here. Give the output folder of a run "
        "that has ended, or its adapter."
    )
