"""What is fuzzed, without any fuzzer: each target takes bytes and lets nothing but a `SliceFineError` out.

An input of `adapter` is ``adapter_config.json``, a zero byte, and ``adapter_model.safetensors``. One of `config` is
``adapter_config.json``. One of `recipe` is a letter (T: a training recipe, S: a sweep, P: a table of the paper) and
YAML.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slicefine import SliceFineConfig, attach
from slicefine.errors import SliceFineError
from slicefine.schedule import check_positions, slice_at

MEMORY = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
SHAPES = [(8, 6), (6, 8), (1, 1)]


@contextlib.contextmanager
def folder(**files: bytes) -> Iterator[Path]:
    """A folder with these files; nothing else may be in it, or beside it, afterwards."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as outer:
        inner = Path(outer, "adapter")
        inner.mkdir()
        for name, content in files.items():
            (inner / name.replace("__", ".")).write_bytes(content)
        yield inner
        found = sorted(str(path.relative_to(outer)) for path in Path(outer).rglob("*"))
        wanted = sorted(["adapter", *(f"adapter/{name.replace('__', '.')}" for name in files)])
        assert found == wanted, f"files appeared or went: {found}, not {wanted}"


def adapter(data: bytes) -> str:
    """Read an adapter folder as files do, as `slicefine info` does, and undo its last visit; and as a tuner's file."""
    from slicefine.files.adapter import owned_slices, read_adapter
    from slicefine.files.compose import overlaps
    from slicefine.files.undo import undo
    from slicefine.training.contents import read_contents

    config, _, weights = data.partition(b"\0")
    outcome = "refused"
    with folder(adapter_config__json=config, adapter_model__safetensors=weights) as path:
        for read in (read_contents, owned_slices):
            with contextlib.suppress(SliceFineError):
                read(str(path))
        with contextlib.suppress(SliceFineError):
            found = read_adapter(path)
            outcome = "read"
            overlaps([found, found])
            undo(found)
        with contextlib.suppress(SliceFineError):
            _tuner().load(path / "adapter_model.safetensors")
    return outcome


def config(data: bytes) -> str:
    """Read a configuration as PEFT does, and ask it for slices and moves."""
    with folder(adapter_config__json=data) as path, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says which keys it does not know
        try:
            found: Any = SliceFineConfig.from_pretrained(str(path))
            if not isinstance(found, SliceFineConfig):
                return "another method's"
            schedule, moves = found.schedule(), found.move_settings()
            found.to_dict()
            moves.plan(1000)
            for shape, visit in itertools.product(SHAPES, range(3)):
                check_positions(schedule, shape, "layer")
                slice_at(schedule, visit, shape, "layer").check(shape, "layer")
        except SliceFineError:
            return "refused"
    return "read"


def recipe(data: bytes) -> str:
    """Parse a recipe as the command line does: a usage message (exit status 2) counts as refused."""
    from slicefine.cli import sweep, train
    from slicefine.cli.parsing import instantiate, parse
    from slicefine.sweeps.paper import read_table
    from slicefine.sweeps.settings import SweepSettings, cells, runs_of, train_settings
    from slicefine.training.settings import TrainSettings

    with folder(recipe__yaml=data[1:]) as path, contextlib.redirect_stderr(io.StringIO()):
        try:
            if data[:1] == b"P":
                plan = read_table(path / "recipe.yaml", "here").settings
            else:
                verb = train if data[:1] == b"T" else sweep
                parser = verb.parser()
                made = instantiate(parser, parse(parser, ["--config", str(path / "recipe.yaml")]))
                if verb is train:
                    TrainSettings(**made).as_dict()
                    return "read"
                plan = SweepSettings(**made)
            grid = cells(plan)
            for run in runs_of(plan, grid[0], plan.seeds[0])[:2]:
                assert run.key
                train_settings(run.recipe)
        except SliceFineError:
            return "refused"
        except SystemExit as end:
            if end.code != 2:
                raise
            return "usage"
    return "read"


TARGETS = {"adapter": adapter, "config": config, "recipe": recipe}


def _tuner() -> Any:
    from torch import nn

    return attach(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)), r=2, interval=1)
