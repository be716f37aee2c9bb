"""Adapters on the Hugging Face hub: publish a folder with a model card, and fetch one by name."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..errors import AdapterFileError, ConfigError
from ..reading import read_json
from .adapter import CONFIG, HUB_NAME, WEIGHTS, Adapter, files_beside, first_line, read_adapter, read_config

__all__ = ["model_card", "push"]

_RUN_FILE = "slicefine_run.json"
_BASE_NAME = re.compile(r"([\w.-]+/)?[\w.-]+")  # old models have no user before their name
_PATH = re.compile(r"(?<![\w.])[~/](?:[^\s/]*/)+([^\s/]+)")  # a folder of this machine, but for its last part


def push(
    folder: str | Path,
    repository: str,
    *,
    base: str | None = None,
    license: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
) -> str:
    """Publish an adapter folder, with a model card made from what it holds; the folder itself stays as it is.

    Args:
        folder: a SliceFine adapter, or a run's output folder with one in it.
        repository: ``user/name`` on the hub; it is created if it is not there.
        base: the base model's name on the hub, where training knew it by a folder of this machine.
        license: identifier for the card, such as ``apache-2.0``.
        private: create the repository as a private one.
        endpoint: of another hub.

    Returns:
        The address of the commit.

    Raises:
        AdapterFileError: if the folder is no SliceFine adapter.
        ConfigError: if the repository's name is wrong, the base has no name on the hub, or the hub refuses.

    Example:
        >>> push("runs/mrpc/adapter", "me/mrpc-slices", license="apache-2.0")  # doctest: +SKIP
        'https://huggingface.co/me/mrpc-slices/commit/...'
    """
    from huggingface_hub import HfApi

    if not HUB_NAME.fullmatch(repository):
        raise ConfigError(f"repository={repository!r}: expected user/name.")
    adapter = read_adapter(folder)
    name = base or adapter.config.get("base_model_name_or_path")
    if not name or not _BASE_NAME.fullmatch(str(name)) or (base is None and Path(str(name)).exists()):
        raise ConfigError(
            f"{adapter.folder}: its base model is {name!r}, which nobody else can find. Say its name on the hub "
            "(--base user/name)."
        )
    api = HfApi(endpoint=endpoint)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "adapter"
        copy.mkdir()
        own = (adapter.folder / CONFIG, adapter.folder / WEIGHTS)
        for file in (*own, *files_beside(adapter.folder)):  # not everything: a folder may hold a state, or secrets
            shutil.copyfile(file, copy / file.name)
        _rename_base(copy, str(name))
        card = model_card(adapter, str(name), repository, license)
        (copy / "README.md").write_text(card, encoding="utf-8")
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=copy, commit_message="Upload a SliceFine adapter"
            )
        except Exception as error:  # its releases differ in the HTTP client, and so in what is raised
            raise ConfigError(f"repository={repository!r}: the hub does not take it ({first_line(error)}).") from error
    return str(commit.commit_url)


def model_card(adapter: Adapter, base: str, repository: str, license: str | None = None) -> str:
    """The text of an adapter's model card: what was trained, its metrics and command, and how to load it.

    Metrics and command are those in the ``metrics.json`` of `slicefine train`, beside the adapter's folder.
    """
    from huggingface_hub import EvalResult, ModelCardData

    report = _report(adapter.folder)
    metrics = _metrics(report)
    settings = report.get("settings", {}).get("data")
    data = str(settings.get("path", "unknown")) if isinstance(settings, dict) else "unknown"
    results = [
        EvalResult(
            task_type="text-classification" if adapter.config.get("task_type") == "SEQ_CLS" else "text-generation",
            dataset_type=Path(data).name,
            dataset_name=Path(data).name,
            dataset_split=split,
            metric_type=metric,
            metric_value=value,
        )
        for split, values in metrics.items()
        for metric, value in values.items()
    ]
    title = repository.rpartition("/")[2]
    meta = ModelCardData(
        base_model=base,
        library_name="peft",
        license=license,
        tags=["slicefine", "peft", "base_model:adapter:" + base],
        model_name=title if results else None,
        eval_results=results or None,
    )
    config = adapter.config
    values = sum(t.numel() for layer in adapter.layers.values() for t in layer.values.values())
    positions = max((len(layer.visits) for layer in adapter.layers.values()), default=0)
    size = (adapter.folder / WEIGHTS).stat().st_size / 2**20
    lines = [
        f"---\n{meta.to_yaml()}\n---",
        f"# {title}",
        f"Slices of [{base}](https://huggingface.co/{base}), trained in place with SliceFine "
        "([arXiv 2510.08513](https://arxiv.org/abs/2510.08513)): no parameters are added.",
        "| | |\n|---|---|\n"
        f"| mode, rank | {config.get('mode')}, {config.get('r')} |\n"
        f"| layers | {len(adapter.layers)} |\n"
        f"| positions | {positions} |\n"
        f"| values in slices (crossings counted in both) | {values:,} |\n"
        f"| file | {size:.2f} MiB |",
    ]
    if metrics:
        names = list(dict.fromkeys(name for values_ in metrics.values() for name in values_))
        table = [f"| split | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for split, found in metrics.items():
            cells = [f"{found[name]:.4f}" if name in found else "" for name in names]
            table.append(f"| {split} | {' | '.join(cells)} |")
        lines += ["## Metrics", "\n".join(table)]
    if "command" in report:
        versions = ", ".join(f"{k} {v}" for k, v in report.get("versions", {}).items())
        command = _PATH.sub(r"\1", str(report["command"]))
        lines += ["## Training", f"```\n{command}\n```", f"{report.get('device', '')}; {versions}"]
    lines += [
        "## Use",
        "```python\n"
        "import slicefine  # registers the method with PEFT\n"
        "from peft import PeftModel\n\n"
        f'model = PeftModel.from_pretrained(base_model, "{repository}")\n'
        "```",
        "`slicefine export` makes an ordinary LoRA adapter of it, with the same outputs.",
    ]
    return "\n\n".join(lines) + "\n"


def _report(folder: Path) -> dict[str, Any]:
    """What `slicefine train` wrote beside the adapter's folder; empty where there is nothing."""
    file = folder.parent / "metrics.json"
    try:
        found = read_json(file)
    except AdapterFileError:
        return {}
    mine = isinstance(found, dict) and isinstance(found.get("settings"), dict) and isinstance(found.get("after"), dict)
    return found if mine else {}


def _metrics(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        split: {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
        for split, values in report.get("after", {}).items()
        if isinstance(values, dict)
    }


def _rename_base(folder: Path, base: str) -> None:
    """Name the base as others know it, in the files that name it."""
    config = read_config(folder)
    config["base_model_name_or_path"] = base
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    file = folder / _RUN_FILE
    if file.is_file():
        run = read_json(file)
        model, data = (run.get(part) if isinstance(run.get(part), dict) else {} for part in ("model", "data"))
        model["path"] = base
        if Path(str(data.get("path", ""))).is_absolute():  # a folder of this machine
            data["path"] = Path(data["path"]).name
        file.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
