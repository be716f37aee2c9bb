"""Files that are replaced whole or not at all; every fault at every operation is in benchmarks/faults.py."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import pytest

from slicefine import durable
from slicefine.durable import finish, replacing, replacing_files, replacing_folder, standing, write_file
from slicefine.errors import ConfigError

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "faults.py"


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def fill(folder: Path, word: str) -> None:
    (folder / "inner").mkdir(exist_ok=True)
    for name in ("a", "b", "inner/c"):
        (folder / name).write_text(f"{word} {name}")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12: beside threads that do nothing here
@pytest.mark.parametrize("writer", ["tuner", "PEFT"])
def test_a_fault_at_any_operation_leaves_the_old_or_the_new(writer: str, tmp_path: Path, monkeypatch):
    words = ["--out", str(tmp_path / "f.json"), "--writers", writer, "--kills", "2"]
    monkeypatch.setattr(sys, "argv", ["faults.py", *words])
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    record = json.loads((tmp_path / "f.json").read_text())
    assert record["points"] == record["survived"] >= 16
    (found,) = record["writers"].values()
    assert all(own["old"] and own["new"] for kind, own in found.items() if kind.startswith(("error", "end")))


def test_a_file_is_replaced_and_an_error_keeps_the_old_one(tmp_path: Path):
    target = tmp_path / "new" / "m.json"
    write_file(target, "one")
    with (
        pytest.raises(ConfigError, match=r"m.json cannot be written \(no room\)\. What was there before"),
        replacing(target) as part,
    ):
        part.write_text("half")
        raise OSError("no room")
    assert content(tmp_path) == {"new/m.json": "one"}
    write_file(target, b"two")
    assert content(tmp_path) == {"new/m.json": "two"}


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path: Path):
    write_file(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "two"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", "three")
    assert os.read(reader, 9) == b"three"
    os.close(reader)
    with pytest.raises(ConfigError, match="directory"):
        write_file(tmp_path, "four")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_with_all_that_was_in_it(tmp_path: Path, monkeypatch, exchange: bool):
    if not exchange:
        monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    target = tmp_path / "adapter"
    for word in ("one", "two"):
        with replacing_folder(target) as aside:
            fill(aside, word)
            if word == "one":
                (aside / "only here").write_text("")
    assert content(tmp_path) == {f"adapter/{name}": f"two {name}" for name in ("a", "b", "inner/c")}
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="directory"), replacing_folder(tmp_path / "file"):
        pass


def test_a_folder_that_stepped_aside_is_found_and_comes_back(tmp_path: Path):
    target, old = tmp_path / "adapter", tmp_path / ".adapter.old"
    fill_new(old, "one")
    assert standing(target) == old  # a crash between two renames
    with pytest.raises(ConfigError), replacing_folder(target) as aside:
        raise OSError
    assert not aside.exists()
    assert standing(target) == target
    assert content(tmp_path)["adapter/a"] == "one a"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".other.old").symlink_to("elsewhere")
    assert standing(tmp_path / "other") == tmp_path / "other"


def fill_new(folder: Path, word: str) -> None:
    folder.mkdir()
    fill(folder, word)


def test_files_are_replaced_together_and_others_stay(tmp_path: Path):
    fill(tmp_path, "one")
    (tmp_path / "mine").write_text("mine")
    with replacing_files(tmp_path) as aside:
        (aside / "a").write_text("two a")
        (aside / "inner").mkdir()
        (aside / "inner" / "c").write_text("two c")
    assert content(tmp_path) == {"a": "two a", "b": "one b", "inner/c": "two c", "mine": "mine"}


def test_what_a_crash_kept_from_its_place_is_finished_without_following_links(tmp_path: Path):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    fill_new(folder, "one")
    outside.write_text("secret")
    commit = folder / ".slicefine-commit"
    commit.mkdir()
    (commit / "a").write_text("two a")
    (commit / "b").symlink_to(outside)
    finish(folder)
    assert content(folder) == {"a": "two a", "b": "one b", "inner/c": "one inner/c"}
    other = tmp_path / "other"
    fill_new(other, "three")
    commit.symlink_to(other)
    finish(folder)
    assert content(other) == {"a": "three a", "b": "three b", "inner/c": "three inner/c"}


def test_strays_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path: Path):
    dead = tmp_path / ".m.json.01234567.partial"
    fill_new(dead, "half")
    write_file(tmp_path / "m.json", "one")
    assert dead.exists()  # made a moment ago: its writer may be about to lock it
    os.utime(dead, (0, 0))
    with replacing(tmp_path / "m.json") as part:
        assert not dead.exists()
        part.write_text("three")
        os.utime(part.parent, (0, 0))  # last, since writing renews it: only the lock says that this writer lives
        write_file(tmp_path / "m.json", "two")
        assert part.parent.exists()
    assert content(tmp_path) == {"m.json": "three"}


def test_the_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        done.append("flush " + os.readlink(f"/proc/self/fd/{handle}").rpartition("/")[2])
        fsync(handle)

    def noted_replace(source: str, target: str) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    write_file(tmp_path / "m.json", "one")
    assert done == ["flush m.json", "rename", f"flush {tmp_path.name}"]
