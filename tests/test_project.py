"""The project around the code: versions in step, a sorted public API, a README that runs, no machine paths."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import slicefine
from readme_blocks import python_script, shell_script

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_newest_version_in_the_changelog_is_the_package_version():
    versions = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d{2}-\d{2}$", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert versions, "CHANGELOG.md has no heading like '## [0.1.0] - 2026-01-31'"
    assert versions[0] == slicefine.__version__


def test_the_citation_names_the_package_version():
    assert re.findall(r"^version: (.+)$", read("CITATION.cff"), flags=re.MULTILINE) == [slicefine.__version__]


def test_the_public_names_are_sorted_and_importable():
    names = getattr(slicefine, "__all__", [])
    assert list(names) == sorted(set(names), key=str.casefold)
    missing = [name for name in names if not hasattr(slicefine, name)]
    assert not missing


def test_the_package_says_that_it_is_typed():
    assert (Path(slicefine.__file__).parent / "py.typed").is_file()


def test_the_readme_python_blocks_run(tmp_path: Path):
    script = python_script(read("README.md"))
    assert script.strip(), "README.md shows no Python block that runs"
    (tmp_path / "README.py").write_text(script, encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "README.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"a Python block of README.md failed (line numbers are the README's):\n{done.stderr}"


EXAMPLE = """\
<!-- run first
x = 1
-->
```python
y = x + 1
```
<!-- not run: needs a GPU -->
```python
raise SystemExit(3)
```
```bash
make demo
slicefine train --slice.r 5 \\
  --seed 1
```
"""


def test_readme_blocks_keep_their_line_numbers_and_obey_their_marks():
    assert python_script(EXAMPLE).splitlines() == ["", "x = 1", "", "", "y = x + 1"] + [""] * 10


def test_readme_commands_become_a_smoke_version_without_set_up():
    command, *rest = shell_script(EXAMPLE).splitlines()
    assert command.split() == ["slicefine", "train", "--dry_run=true", "--slice.r", "5", "--seed", "1"]
    assert not rest


def test_no_file_of_the_project_holds_machine_paths_or_registry_hosts():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    # put together here, so that this file does not hold them either
    folders = ["/" + name + "/" for name in ("work", "root")]
    indexes = ["/opt" + "/pypi", "/opt" + "/wheels"]
    hosts = ["files.python" + "hosted.org", "pypi.org" + "/simple", "registry." + "npmjs.org", "deb." + "debian.org"]
    pattern = re.compile("|".join(map(re.escape, folders + indexes + hosts)).encode())
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert files
    found = [
        f"{path.relative_to(ROOT)}: {match[0].decode()}"
        for path in files
        if path.is_file() and (match := pattern.search(path.read_bytes()))
    ]
    assert not found


def test_committed_results_are_whole():
    for file in sorted((ROOT / "benchmarks" / "results").rglob("*.json*")):
        text = file.read_text(encoding="utf-8")
        for part in text.splitlines() if file.suffix == ".jsonl" else [text]:
            json.loads(part)
