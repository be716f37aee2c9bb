"""Faults in the middle of writing: at every write, flush and rename of every writer, an error or a sudden end.

    python benchmarks/faults.py --out benchmarks/results/faults.json
    python benchmarks/faults.py --out faults.json --writers tuner --kills 2

For each writer the old content is there, the new one is being written, and the k-th operation fails, for every k until
none is left: once with an error of the system (disk full, read-only, no permission, I/O), once by ending the process on
the spot. Afterwards what is read must be the old content or the new one, whole (an adapter's checksums agree), and the
same save must succeed and leave nothing beside it. Then: a real limit of the file size, and real ``kill -9`` at random
times while a process saves one content after the other.
"""

from __future__ import annotations

import argparse
import errno
import functools
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import peft.peft_model
import safetensors.torch
import torch
from peft import get_peft_model
from torch import nn

from slicefine import SliceFineConfig, attach, durable
from slicefine.charts import Chart, Line, Panel
from slicefine.checksums import checksum
from slicefine.errors import ConfigError
from slicefine.files.adapter import find_adapter, read_adapter, write_adapter
from slicefine.files.checkpoint import Checkpoint
from slicefine.files.export import export_lora, read_lora
from slicefine.files.merge import merge_files
from slicefine.plots import save_chart
from slicefine.reports.writing import write_page
from slicefine.training.report import write_json
from slicefine.tuner import read_file

SYSTEM = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)
DEAD = 77


@dataclass(frozen=True)
class Writer:
    """One thing that is written, in two versions.

    Attributes:
        write: version 0 or 1 into a folder.
        read: what is there, as digests by name; raises if it is not whole.
        apart: its files are replaced one by one, so each may be the old or the new one.
    """

    write: Callable[[Path, int], None]
    read: Callable[[Path], dict[str, str]]
    apart: bool = False


# -- operations -------------------------------------------------------------------------------------------------------


class Faults:
    """Counts operations, and lets one of them fail."""

    def __init__(self, at: int = 0, kill: bool = False) -> None:
        self.at, self.kill, self.count, self.hit = at, kill, 0, ""

    def tick(self, name: str) -> None:
        self.count += 1
        if self.count == self.at:
            self.hit = name
            if self.kill:
                os._exit(DEAD)
            code = SYSTEM[self.at % len(SYSTEM)]
            raise OSError(code, os.strerror(code))

    def before(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.tick(name)
            return function(*args, **kwargs)

        return call

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Every operation by which files of ours come into being, patched."""
        write_bytes, write_text = Path.write_bytes, Path.write_text
        save_file = safetensors.torch.save_file

        def half(function: Callable[..., Any], name: str, place: int) -> Callable[..., Any]:
            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                self.tick(name)
                result = function(*args, **kwargs)
                whole = Path(args[place]).read_bytes()
                write_bytes(Path(args[place]), whole[: len(whole) // 2])
                self.tick(f"half of {name}")
                write_bytes(Path(args[place]), whole)
                return result

            return call

        saved = half(save_file, "save_file", 1)
        patches = [
            *(
                mock.patch.object(os, n, self.before(getattr(os, n), n))
                for n in ("fsync", "replace", "rename", "mkdir")
            ),
            mock.patch.object(shutil, "rmtree", self.before(shutil.rmtree, "rmtree")),
            mock.patch.object(shutil, "copyfile", half(shutil.copyfile, "copyfile", 1)),
            mock.patch.object(durable, "_exchange", self.before(durable._exchange, "exchange")),
            mock.patch.object(Path, "write_bytes", half(write_bytes, "write_bytes", 0)),
            mock.patch.object(Path, "write_text", half(write_text, "write_text", 0)),
            mock.patch.object(safetensors.torch, "save_file", saved),
            mock.patch.object(peft.peft_model, "safe_save_file", saved),
        ]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in reversed(patches):
                patch.stop()


# -- writers ----------------------------------------------------------------------------------------------------------


def _train(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3 + seed):  # other journals, too
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))


@functools.cache
def _model(number: int) -> Any:
    model = get_peft_model(_network(), SliceFineConfig(r=2, interval=2, target_modules=["0", "1"]))
    _train(model, number)
    return model


@functools.cache
def _tuner(number: int) -> Any:
    tuner = attach(_network(), r=2, interval=2)
    _train(tuner.model, number)
    return tuner


@functools.cache
def _scratch() -> Path:
    """Two adapters and their base, to export and to merge."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    for number in (0, 1):
        _model(number).save_pretrained(folder / str(number))
    (folder / "base").mkdir()
    weights = {name: tensor.contiguous() for name, tensor in _network().state_dict().items()}
    safetensors.torch.save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    (folder / "base" / "config.json").write_text("{}")
    return folder


@functools.cache
def _adapter(number: int) -> Any:
    return read_adapter(_scratch() / str(number))


def _base() -> Checkpoint:
    return Checkpoint(_scratch() / "base")


def _export(folder: Path, number: int) -> None:
    with _base() as base:
        export_lora(_adapter(number), base, folder)


def _merge(folder: Path, number: int) -> None:
    with _base() as base:
        merge_files(_adapter(number), base, folder)


def _chart(number: int) -> Chart:
    return Chart("chart", "title", [Panel("panel", [Line("a", [0, 1], [0, number])], "x", "y")], "text")


def _files(folder: Path) -> dict[str, str]:
    """Every file that is no stray, by name."""
    found = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: _digest(path) for path in found}


def _digest(path: Path) -> str:
    if path.suffix != ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with safetensors.safe_open(path, framework="pt") as file:  # the order in its header is anyone's guess
        metadata = {key: json.loads(value) if key == "slicefine" else value for key, value in file.metadata().items()}
        tensors = {key: checksum(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 (not a dict)
    return hashlib.sha256(json.dumps([metadata, tensors], sort_keys=True).encode()).hexdigest()


def _read_adapter(folder: Path) -> dict[str, str]:
    read_adapter(folder)
    return _files(find_adapter(folder))


def _read_saved(folder: Path) -> dict[str, str]:
    found = _read_adapter(folder)
    if "import slicefine" not in (folder / "README.md").read_text():
        raise AssertionError("the model card is cut off")
    return {name: digest for name, digest in found.items() if name != "README.md"}  # PEFT adds to it at each save


def _read_lora(folder: Path) -> dict[str, str]:
    folder = find_adapter(folder)
    read_lora(folder)
    return _files(folder)


def _read_merged(folder: Path) -> dict[str, str]:
    with Checkpoint(durable.standing(folder)) as base:
        base.names()
    return _files(durable.standing(folder))


def _read_tuner(folder: Path) -> dict[str, str]:
    read_file(folder / "t.safetensors")
    return _files(folder)


def _read_json(folder: Path) -> dict[str, str]:
    json.loads((folder / "metrics.json").read_text())
    return _files(folder)


def _peft(folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notes.txt").exists() or os.close(os.open(folder / "notes.txt", os.O_CREAT | os.O_WRONLY))
    _model(number).save_pretrained(folder)


WRITERS = {
    "tuner.save": Writer(lambda folder, n: _tuner(n).save(folder / "t.safetensors"), _read_tuner),
    "PEFT save_pretrained": Writer(_peft, _read_saved),
    "adapter folder (train, compose, undo)": Writer(
        lambda folder, n: write_adapter(_adapter(n), folder), _read_adapter
    ),
    "export": Writer(_export, _read_lora),
    "merge": Writer(_merge, _read_merged),
    "metrics and sweep results": Writer(lambda folder, n: write_json(folder / "metrics.json", {"n": n}), _read_json),
    "HTML page": Writer(lambda folder, n: write_page(folder / "page.html", f"<p>{n}</p>" * 99), _files),
    "chart and its data": Writer(lambda folder, n: void(save_chart(_chart(n), folder)), _files, apart=True),
}
FOLDERS = ("adapter folder (train, compose, undo)", "export", "merge")


def void(_: Any) -> None:
    """Nothing."""


# -- checks -----------------------------------------------------------------------------------------------------------


def check(writer: Writer, folder: Path, versions: list[dict[str, str]], where: str) -> int:
    """Which version is there: 0 or 1 (of files one by one: 1 if any is new); anything else is a failure."""
    found = writer.read(folder)
    if found in versions:
        return versions.index(found)
    old, new = versions
    if writer.apart and found.keys() == new.keys() and all(found[n] in (old[n], new[n]) for n in found):
        return 1
    raise AssertionError(f"{where}: neither the old nor the new content: {sorted(found)}")


def check_again(writer: Writer, folder: Path, versions: list[dict[str, str]], where: str) -> None:
    """The save that failed succeeds now, and strays go once they are a minute old."""
    for stray in folder.parent.rglob(".*.partial"):
        os.utime(stray, (0, 0))
    writer.write(folder, 1)
    assert writer.read(folder) == versions[1], where
    left = [path for path in folder.parent.rglob(".*") if not path.name.startswith("._")]
    assert not left, f"{where}: left behind: {left}"


@contextmanager
def place() -> Iterator[Path]:
    """A folder to write in, inside one of its own."""
    with tempfile.TemporaryDirectory() as outer:
        yield Path(outer, "target")


def both(writer: Writer) -> list[dict[str, str]]:
    """What the two versions look like when nothing fails."""
    found = []
    for number in (0, 1):
        with place() as folder:
            writer.write(folder, number)
            found.append(writer.read(folder))
    with place() as folder:
        writer.write(folder, 0)
        writer.write(folder, 1)
        found[1] = writer.read(folder)
    assert found[0] != found[1]
    return found


def sweep(name: str, writer: Writer, kill: bool) -> dict[str, Any]:
    """Let the k-th operation fail for every k."""
    versions = both(writer)
    outcomes = {"old": 0, "new": 0}
    operations: set[str] = set()
    k = 0
    while True:
        k += 1
        faults = Faults(k, kill)
        where = f"{name}, operation {k}, {'ended' if kill else 'failed'}"
        with place() as folder:
            writer.write(folder, 0)
            reached = in_child(faults, writer, folder) if kill else in_process(faults, writer, folder, where)
            if not reached:
                return {"points": k - 1, "survived": sum(outcomes.values()), **outcomes}
            operations.add(faults.hit)
            outcomes["new" if check(writer, folder, versions, where) else "old"] += 1
            check_again(writer, folder, versions, where)


def in_process(faults: Faults, writer: Writer, folder: Path, where: str) -> bool:
    """Whether the operation was reached; its error is a sentence of ours, or was of no consequence."""
    with faults.everywhere():
        try:
            writer.write(folder, 1)
        except ConfigError as error:
            if "cannot be written" not in str(error):
                raise AssertionError(where) from error
    return bool(faults.hit)


def in_child(faults: Faults, writer: Writer, folder: Path) -> bool:
    """Whether a child process reached the operation, and ended there."""
    child = os.fork()
    if child == 0:
        with faults.everywhere():
            writer.write(folder, 1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, DEAD), status
    return status == DEAD


def file_size_limit(name: str, writer: Writer) -> bool:
    """A limit of 100 bytes per file, which the system itself enforces: one sentence, and the old content."""
    versions = both(writer)
    with place() as folder:
        writer.write(folder, 0)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
            try:
                writer.write(folder, 1)
            except ConfigError:
                os._exit(DEAD)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        small = name == "metrics and sweep results"  # fits
        assert status == (0 if small else DEAD), (name, status)
        check(writer, folder, versions, f"{name}, file size limit")
        check_again(writer, folder, versions, f"{name}, file size limit")
    return True


def kills(name: str, writer: Writer, count: int, draw: random.Random) -> dict[str, int]:
    """``kill -9`` while a process writes one version after the other."""
    versions = both(writer)
    found = {"old": 0, "new": 0}
    with place() as folder:
        writer.write(folder, 0)
        for number in range(count):
            child = os.fork()
            if child == 0:
                while True:
                    writer.write(folder, 1)
                    writer.write(folder, 0)
            time.sleep(draw.uniform(0.001, 0.25))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found["new" if check(writer, folder, versions, f"{name}, kill {number}") else "old"] += 1
        check_again(writer, folder, versions, f"{name}, kills")
    return found


def main() -> None:
    """All writers, and the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--writers", nargs="+", default=[""], help="beginnings of names")
    parser.add_argument("--kills", type=int, default=100)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # fork beside threads that do nothing here
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "command": "python benchmarks/faults.py --out benchmarks/results/faults.json",
        "date": date.today().isoformat(),
        "platform": platform.platform(),
        "versions": {n: version(n) for n in ("slicefine", "torch", "safetensors", "peft")},
        "writers": {},
    }
    for name, writer in WRITERS.items():
        if not any(name.startswith(beginning) for beginning in chosen.writers):
            continue
        own = {"error": sweep(name, writer, kill=False), "end of the process": sweep(name, writer, kill=True)}
        if name in FOLDERS:  # file systems without an exchange of names
            with mock.patch.object(durable, "_exchange", return_value=False):
                own["error, two renames"] = sweep(name, writer, kill=False)
                own["end of the process, two renames"] = sweep(name, writer, kill=True)
        record["writers"][name] = {
            **own,
            "file size limit": file_size_limit(name, writer),
            "kill -9 at random": kills(name, writer, chosen.kills, random.Random(0)),
        }
        print(name, json.dumps(record["writers"][name]), flush=True)
    sums = [own for found in record["writers"].values() for kind, own in found.items() if "points" in str(own)]
    record["points"] = sum(own["points"] for own in sums)
    record["survived"] = sum(own["survived"] for own in sums)
    record["kills"] = sum(sum(found["kill -9 at random"].values()) for found in record["writers"].values())
    chosen.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(_scratch(), ignore_errors=True)


if __name__ == "__main__":
    main()
